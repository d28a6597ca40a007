"""The repository that a publication goes to: who asks, what is there, and whether it may be written to.

| a repository that | is |
|---|---|
| holds `publication.json` | ours: files of the earlier publication that are not in the next one go with its commit |
| is empty, or has a README of metadata alone | taken, as the Hub makes it |
| holds anything else, pickles, code | refused, and named: nobody's work is overwritten |
| is a data set's or a Space's | refused, unless a model's stands beside it |

Nothing here changes anything but `make` and `make_branch`.
"""

import hashlib
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_backdoor_defense.hub.evidence import PUBLICATION
from hf_backdoor_defense.hub.faults import LOGIN, explained, said
from hf_backdoor_defense.hub.files import CARD, refused_names
from hf_backdoor_defense.reporting.sealed import CHECKSUMS, read_checksums

NOTHING = "nothing was published"
_HUB_FILES = {".gitattributes"}


@dataclass(frozen=True)
class Place:
    """A repository where a commit goes: the head that it is made on, the files there, who sees it, whether the branch exists;
    and what this call made of it."""

    repo_id: str
    head: str
    names: frozenset[str]
    private: bool
    branch: bool
    made: bool = False
    made_branch: str | None = None

    @property
    def state(self) -> str:
        """What the user has while nothing is committed."""
        empty, same = f"the new repository `{self.repo_id}` is there and empty", f"`{self.repo_id}` is as it was"
        beside = f", with a new branch `{self.made_branch}`" if self.made_branch else ""
        return f"{NOTHING}; {empty if self.made else same}{beside}"


def check_token(api: HfApi, token: str | None, repo_id: str) -> str:
    """The token, given or of `api` or of the login, when the Hub knows it and it may write.

    Raises:
        ValueError: none, one that the Hub does not know, one that may only read. ConnectionError.
    """
    token = token or (api.token if isinstance(api.token, str) else None) or get_token()
    if not token:
        raise ValueError(f"A token that may write must be there, and none was found: {NOTHING}. {LOGIN}.")
    with explained(repo_id, NOTHING):
        user = api.whoami(token=token)
    role = (user.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"The token must be allowed to write, got one that may only read: {NOTHING}. {LOGIN} with another."
        )
    return token


def look(api: HfApi, repo_id: str, revision: str | None, token: str) -> Place | None:
    """The repository as it is, or None where there is none of that name.

    Raises:
        ValueError: it is a data set's or a Space's, or has another name by now. ConnectionError.
    """
    kind = None
    branch = True
    with explained(repo_id, NOTHING):
        try:
            info = api.model_info(repo_id, token=token)
            if revision is not None:
                try:
                    info = api.model_info(repo_id, revision=revision, token=token)
                except RevisionNotFoundError:
                    branch = False
        except RepositoryNotFoundError:
            kind = next((k for k in ("dataset", "space") if api.repo_exists(repo_id, repo_type=k, token=token)), "")
    if kind == "":
        return None
    if kind is not None:
        raise ValueError(
            f"`{repo_id}` must be a model's repository, and is a {kind}: {NOTHING}. Choose another name, or make a model's "
            f"repository of that name first: hf repo create {repo_id}"
        )
    if info.id != repo_id:
        raise ValueError(
            f"`{repo_id}` is called {info.id!r} by now: {NOTHING}. The card names it in full; use that name."
        )
    return Place(
        repo_id=repo_id,
        head=str(info.sha),
        names=frozenset(file.rfilename for file in info.siblings or []),
        private=bool(info.private),
        branch=branch,
    )


def make(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, token: str) -> Place:
    """Make the repository, which must be new: one that is there may be public, or somebody else's.

    Raises:
        ValueError: it is there, or may not be made. ConnectionError.
    """
    with explained(repo_id, NOTHING):
        api.create_repo(repo_id, private=private, exist_ok=False, token=token)
    place = look(api, repo_id, revision, token)
    if place is None:
        raise ConnectionError(f"`{repo_id}` was made, but is not there yet. Run the same command again.")
    return replace(place, made=True)


def make_branch(api: HfApi, place: Place, branch: str, token: str) -> Place:
    """Make the branch, at the head that was seen.

    Raises:
        ValueError: the Hub takes no such branch. ConnectionError.
    """
    unknown = (
        f"{place.state}; whether the branch `{branch}` was made is not known, and the next push takes it either way"
    )
    with explained(place.repo_id, unknown):
        try:
            api.create_branch(place.repo_id, branch=branch, revision=place.head, exist_ok=True, token=token)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 429) or status >= 500:
                raise
            refused = (
                f"The Hub made no branch `{branch}` ({status}{said(error)}): {place.state}. Choose another name for it."
            )
        else:
            refused = ""
    if refused:
        raise ValueError(refused)
    return replace(place, branch=True, made_branch=branch)


def holds(
    api: HfApi, place: Place, files: Mapping[str, Path | bytes], checksums: Mapping[str, dict[str, Any]], token: str
) -> bool:
    """Whether the head that was seen has just these bytes in all of `files`; nothing is downloaded.

    Args:
        checksums: of files, with `sha256`. What the Hub keeps in Git has the hash of a blob: of `blob <size>\\0` and the bytes.

    Raises:
        ValueError, ConnectionError: the Hub refused, or was not reached.
    """
    if not place.names >= set(files):
        return False
    with explained(place.repo_id, place.state):
        there = api.get_paths_info(place.repo_id, sorted(files), revision=place.head, token=token)
    large = {file.path: file.lfs.sha256 for file in there if isinstance(file, RepoFile) and file.lfs is not None}
    small = {file.path: file.blob_id for file in there if isinstance(file, RepoFile) and file.lfs is None}
    for name, content in files.items():
        if name in large and name in checksums:
            same = large[name] == checksums[name]["sha256"]
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
            same = small.get(name) == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if not same:
            return False
    return True


def check_visibility(place: Place, *, private: bool | None, attacked: bool) -> None:
    """That who sees the repository is what was asked for, and what attacked weights need. Raises ValueError."""
    if attacked and not place.private:
        raise ValueError(
            f"Attacked weights must be published into a private repository, and `{place.repo_id}` is public: {NOTHING}. "
            "Choose another name, or make it private in its settings first."
        )
    if private is not None and private != place.private:
        is_, want = ("private", "public") if place.private else ("public", "private")
        raise ValueError(
            f"`{place.repo_id}` must be {want} for private={private}, and is {is_}: {NOTHING}. A push does not change who may "
            "see a repository. Change it in its settings first, or leave the option out."
        )


def outdated_files(api: HfApi, place: Place, names: Collection[str], token: str) -> list[str]:
    """Files of our earlier publication there that are not among `names`.

    Raises:
        ValueError: the repository holds what must not be there, or somebody else's work. ConnectionError.
    """
    there = place.names - _HUB_FILES
    refused = refused_names(sorted(there))
    if refused:
        named = ", ".join(f"{name!r} ({why})" for name, why in refused.items())
        raise ValueError(
            f"`{place.repo_id}` must hold only safetensors and known text files, and holds {named}: {NOTHING}. Delete them "
            "there, or choose another name."
        )
    with explained(place.repo_id, NOTHING):
        if PUBLICATION in there:
            earlier = {*_earlier(api, place, token), CHECKSUMS}
            foreign = there - earlier - set(names)
        elif there == {CARD} and not _text(fetch(api, place.repo_id, CARD, place.head, token)):
            return []
        else:
            earlier, foreign = set(), there
    if foreign:
        raise ValueError(
            f"`{place.repo_id}` must be empty or hold what was published from here, and holds "
            f"{', '.join(map(repr, sorted(foreign)))}: {NOTHING}, so as not to overwrite or mix up somebody's work. Delete them "
            "there, or choose another name."
        )
    return sorted((there & earlier) - set(names))


def fetch(api: HfApi, repo_id: str, name: str, head: str, token: str) -> bytes:
    """A small file of the repository; what the client raises is not explained."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, name, revision=head, cache_dir=folder, token=token)).read_bytes()


def _earlier(api: HfApi, place: Place, token: str) -> list[str]:
    if CHECKSUMS not in place.names:
        return []
    data = fetch(api, place.repo_id, CHECKSUMS, place.head, token)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CHECKSUMS).write_bytes(data)
        try:
            return list(read_checksums(folder))
        except ValueError:  # edited there: what it named is then nobody's, and is shown to the user
            return []


def _text(readme: bytes) -> str:
    """What a README says below its metadata: the Hub makes one of metadata alone for a new repository with a license."""
    return re.sub(r"\A---\n.*?\n---\s*", "", readme.decode(errors="replace"), count=1, flags=re.S).strip()
