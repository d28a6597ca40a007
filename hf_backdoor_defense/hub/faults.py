"""What the Hub or the way to it refused, said so that one knows what to do and what was published: nothing.

| the Hub says | the error | what to do |
|---|---|---|
| 401 | `ValueError` | log in again |
| 403 | `ValueError` | a token that may write there |
| 404, 409, 412, 413, 400 | `ValueError` | by case |
| 429, 5xx, no answer, a connection that breaks | `ConnectionError` | the same command again |
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

# What the client raises: its HTTP library's errors and its own, the system's, those around an upload, and of its own checks.
_RAISED: tuple[type[BaseException], ...] = (
    HfHubHTTPError.__bases__[0],
    ConnectionError,
    TimeoutError,
    RuntimeError,
    ValueError,
)
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(repo_id: str, state: str) -> Iterator[None]:
    """Turn the client's errors into ours.

    Args:
        state: what the user has now, for example "nothing was published"; every error ends with it.

    Raises:
        ValueError: the Hub refused. ConnectionError: it could not be asked, or failed.
    """
    try:
        yield
    except _RAISED as error:
        raise _explain(error, repo_id, state) from error


def _explain(error: BaseException, repo_id: str, state: str) -> Exception:
    answer = _answer(error)
    if answer is None:
        if isinstance(error, ValueError):  # the client's own checks, and what the Hub says of a card
            return ValueError(f"{_line(error)}: {state}.")
        return ConnectionError(
            f"The connection to the Hub broke ({_line(_root(error))}): {state}. Check the network and run the same "
            "command again."
        )
    nothing = state.partition(";")[
        0
    ]  # the rest says what the repository holds, which is not known after a commit of others
    status, words = answer.response.status_code, said(answer)
    if status == 401:
        return ValueError(
            f"The token must be valid, but the Hub does not know it (401): {state}. {LOGIN} to a token that may write."
        )
    if status == 403:
        return ValueError(
            f"The token must be allowed to write to `{repo_id}`, but the Hub says no (403{words}): {state}. Use one with write "
            f"access and an account or organization that you belong to."
        )
    if isinstance(answer, RevisionNotFoundError):
        return ValueError(f"`{repo_id}` has no branch of that name: {state}. --revision (revision=) takes a branch.")
    if status == 404:
        return ValueError(
            f"`{repo_id}` is not there, or the token may not see it (404{words}): {state}. Check the name."
        )
    if status == 409:
        return ValueError(
            f"`{repo_id}` was made in between, or is one that the token may not see (409{words}): {state}. Check who owns it."
        )
    if status == 412:
        return ValueError(
            f"Somebody else committed to `{repo_id}` in between (412): {nothing}, and theirs was not overwritten. Look at "
            "it, then run the same command again."
        )
    if status == 429 or status >= 500:
        why = "wants fewer requests" if status == 429 else "failed"
        return ConnectionError(f"The Hub {why} ({status}{words}): {state}. Run the same command again later.")
    return ValueError(f"The Hub refused what was sent to `{repo_id}` ({status}{words}): {state}.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _answer(error: BaseException) -> HfHubHTTPError | None:
    return next((found for found in _chain(error) if isinstance(found, HfHubHTTPError)), None)


def said(answer: HfHubHTTPError) -> str:
    """The server's own words, escaped: they may hold commands for the terminal."""
    words = " ".join((answer.server_message or "").split())[:300]
    return f": {words!r}" if words else ""


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:500].rstrip(".")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in words) or type(error).__name__
