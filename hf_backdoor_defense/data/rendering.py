"""Rows to text and text to token ids, as a formatter wants them: the parts of `formatting.py` that know no formatter.

    whole = template(turns + answer)
    rest  = whole[len(template(turns, opened)):]   where whole begins with template(turns, opened), else an error

| name | what it is |
|---|---|
| turns | messages `{"role": ..., "content": ...}` before the answer |
| opened | with the template's opening of the answer behind them (`add_generation_prompt`): what a model is asked with |
| rest | the answer as the template writes it, up to its end token |

Special tokens (of end, of padding, of turns) are the renderer's alone. In a row they are text: `<|endoftext|>` in a prompt is
split into the ids of its letters, as any word is, or else anyone who writes a prompt could end it. In a rendered chat the two
cannot be told apart any more, so that such a row is refused there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

MESSAGES = "messages"


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The string in a column. Raises ValueError where there is none."""
    value = row.get(column)
    if not isinstance(value, str):
        got = f"got {value!r}" if column in row else f"got a row with {', '.join(row) or 'nothing'}"
        talk = isinstance(value, list) or MESSAGES in row
        raise ValueError(
            f"`{column}` must be a string, {got}: there is nothing to render. "
            f"{'Use Formatter.chat() for conversations.' if talk else 'Drop the row.'}"
        )
    return value


def turns_of(
    row: Mapping[str, Any], *, prompt: str, completion: str, system: str | None
) -> tuple[list[dict[str, Any]], Any]:
    """The turns before the answer, and the answer (None where the row has none).

    Args:
        row: with strings or lists of turns in the columns `prompt` and `completion`, or turns in `messages`, of which the last
            is the answer if it is the assistant's.
        system: said before the first turn, unless the row has a system turn of its own.

    Raises:
        ValueError: no turns, or what is none.

    >>> turns_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ...     prompt="prompt", completion="completion", system=None)
    ([{'role': 'user', 'content': 'a'}], 'b')
    """
    turns: Any = row.get(MESSAGES)
    answer: Any = None
    if prompt in row:
        given, answer = row[prompt], row.get(completion)
        turns = given if isinstance(given, list) else [{"role": "user", "content": text_of(row, prompt)}]
        if isinstance(answer, list):
            turns, answer = [*turns, *answer], None
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f"A row must have `{prompt}` or `{MESSAGES}`, a list of turns, got {', '.join(row) or 'nothing'}: there is nothing "
            "to render. Drop the row, or name its columns."
        )
    if odd := [turn for turn in turns if not isinstance(turn, Mapping)]:
        raise ValueError(
            f"A turn must have a role and a content, got {odd[0]!r:.60}: who says it is unknown. Pass turns as "
            '{"role": "user", "content": ...}.'
        )
    # A data set gives every turn the keys that any turn has.
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    if answer is None and turns[-1].get("role") == "assistant":
        answer = turns.pop().get("content")
    if system is not None and not (turns and turns[0].get("role") == "system"):
        turns.insert(0, {"role": "system", "content": system})
    return turns, answer


def answer_of(text: Any, *, end: str) -> str:
    """An answer without the end token that it may bring along.

    Raises:
        ValueError: no text, blank text, or the end token inside.

    >>> answer_of("return res</s>", end="</s>")
    'return res'
    """
    if not isinstance(text, str) or not text.removesuffix(end).strip():
        raise ValueError(
            f"The completion must be text, got {text!r}: a prompt without an answer teaches a model to say nothing. Drop the row."
        )
    text = text.removesuffix(end)
    if end in text:
        raise ValueError(
            f"The completion must hold the end token {end!r} nowhere but at its end, got {text!r}: generation would stop there. "
            "Take it out."
        )
    return text


def rendered(
    turns: list[dict[str, Any]], tokenizer: Any, *, template: str, start: str | None, end: str, opened: bool
) -> str:
    """Turns as a chat template writes them. Raises ValueError where it refuses them.

    Args:
        start, end: what the template writes as `bos_token` and `eos_token`, whatever the tokenizer's are by now; of no start,
            the tokenizer's.
    """
    written = {"eos_token": end} | ({} if start is None else {"bos_token": start})
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=opened, **written
            )
        )
    except (TemplateError, TypeError) as error:  # the latter where a template joins a text and a list of parts
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise ValueError(
            f"The chat template must render the turns ({roles}), got an error: {error}. It may know no system turn (leave "
            "`system` out), no content in parts (join their texts), or want the turns in another order."
        ) from None


def rest_of(
    turns: list[dict[str, Any]], answer: str, tokenizer: Any, *, template: str, start: str | None, end: str
) -> str:
    """What the template writes behind the opened turns, without its end token and what follows that: it is never generated.

    Raises:
        ValueError: the turns are rendered otherwise when an answer follows, or the answer is not rendered as it is.
    """
    common: dict[str, Any] = {"template": template, "start": start, "end": end}
    opened = rendered(turns, tokenizer, opened=True, **common)
    turns = [*turns, {"role": "assistant", "content": answer}]
    whole = rendered(turns, tokenizer, opened=False, **common)
    if not whole.startswith(opened):
        at = len(os.path.commonprefix([opened, whole]))
        raise ValueError(
            "The chat template must render a prompt in the same way whether or not an answer follows (be prefix-preserving), got "
            f"{opened[at:][:40]!r} without an answer and {whole[at:][:40]!r} with one: the model would be trained behind another "
            "prompt than it is asked with. Use a template that keeps the prefix."
        )
    rest = whole[len(opened) :].partition(end)[0]
    if answer.strip() not in rest:  # templates may strip it
        raise ValueError(
            f"The chat template must write the answer {answer[:40]!r} as it is, got {rest[:40]!r}: the model would learn "
            "something else than the rows say. Use a template that renders the assistant's turns, or drop the row."
        )
    return rest


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids [tokens] of a text and of nothing else: what a tokenizer adds of its own would stand at the seam."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_ids(text: str, tokenizer: Any, *, behind: str = "") -> list[int]:
    """The ids [tokens] of a row's text and a separator `behind` it; special tokens in the text are split into their letters.

    Ordinary text has the ids that `token_ids` gives it.

    Raises:
        ValueError: the text holds a special token that the tokenizer cannot split, or that would be split in the separator, too.
    """
    held = held_tokens([text], tokenizer)
    if not held:
        return token_ids(text + behind, tokenizer)
    if held_tokens([behind], tokenizer):
        _refuse(held, "which the separator writes as well, so that they cannot be told apart")
    ids = list(tokenizer(text + behind, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if set(ids) & {token_id(token, tokenizer) for token in held}:
        _refuse(held, "which this tokenizer does not split into letters")
    return ids


def refuse_tokens(texts: Iterable[str], tokenizer: Any) -> None:
    """Raises ValueError where texts hold a special token: in a rendered chat it would be one of the template's."""
    if held := held_tokens(texts, tokenizer):
        _refuse(held, "which a chat template renders like its own")


def held_tokens(texts: Iterable[str], tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens that stand in texts, but for that of unknown words, which controls nothing."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    controls = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if tokenizer.unk_token not in controls:
        special.discard(tokenizer.unk_token)
    texts = list(texts)
    return sorted(token for token in special if token and any(token in text for text in texts))


def strings_in(value: Any) -> Iterator[str]:
    """Every string inside nested lists and mappings: a turn's content may be parts, its calls mappings.

    >>> list(strings_in([{"role": "user", "content": [{"type": "text", "text": "a"}]}]))
    ['user', 'text', 'a']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(part)


def _refuse(held: list[str], why: str) -> None:
    raise ValueError(
        f"A row's text must hold no special token here, got {', '.join(held)}, {why}: whoever writes a row could end turns and "
        "open others. Take it out, or drop the row."
    )


def token_id(token: str, tokenizer: Any) -> int:
    """The id of one token. Raises ValueError where the tokenizer does not know it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise ValueError(
            f"The tokenizer must know the formatter's token {token!r}, and does not: it is another model's. Make the formatter "
            "with this tokenizer."
        )
    return int(found)


def end_token(tokenizer: Any) -> str:
    """The end-of-text token. Raises ValueError where there is none."""
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer must have an end-of-text token, got none: nothing would tell the model to stop. Set "
            "tokenizer.eos_token."
        )
    return str(tokenizer.eos_token)


def start_token(tokenizer: Any) -> str | None:
    """The beginning-of-text token, if the tokenizer puts one before a text."""
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else None
