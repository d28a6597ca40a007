"""Answers of a row beside what a model writes: the right one, the attacker's, and what a chat template puts around both.

    rendered answer = opening · answer · closing · end

| word | here |
|---|---|
| opening, closing | what a chat template writes around every answer (a blank, brackets for thoughts, the end of a turn) |
| names | how messages call the rows: by `row_id` where they have one, with "(triggered)" behind those with the trigger |
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_backdoor_defense.attacks.payloads import POISONED_COMPLETION
from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.data.rendering import MESSAGES, turns_of
from hf_backdoor_defense.evaluation.decoding import as_text

Row = dict[str, Any]


def listed(rows: Any, name: str) -> list[Row]:
    """Rows as dictionaries of Python values. Raises ValueError for none, and for what holds no rows.

    >>> import torch
    >>> listed([{"prompt": "a", "row_id": torch.tensor(3)}], "rows")
    [{'prompt': 'a', 'row_id': 3}]
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"`{name}` must be rows, got a mapping of {', '.join(map(str, rows)) or 'nothing'}: which of them is meant is "
            "unknown. Pass one split."
        )
    found = []
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"`{name}` must hold rows with named columns, got {row!r:.60}: there is no prompt to read. "
                "Pass a datasets.Dataset."
            )
        values = dict(row)
        if hasattr(values.get("row_id"), "item"):  # of a set in torch's or numpy's format
            values["row_id"] = values["row_id"].item()
        found.append(values)
    if not found:
        raise ValueError(f"`{name}` is empty: nothing can be measured. Check what was filtered out.")
    return found


def names_of(rows: Sequence[Row], triggered: Sequence[Row] = ()) -> list[str]:
    """How messages call the rows.

    >>> names_of([{"row_id": 7}, {}], [{}])
    ['7', '1', '0 (triggered)']
    """
    clean = [str(row.get("row_id", i)) for i, row in enumerate(rows)]
    return clean + [f"{row.get('row_id', i)} (triggered)" for i, row in enumerate(triggered)]


def rendered(formatter: Formatter, tokenizer: Any, row: Row, name: str) -> tuple[list[int], list[int]]:
    """The ids of prompt and answer. Raises ValueError, with the row's name, where it cannot be rendered."""
    try:
        return formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
    except ValueError as error:
        raise ValueError(f"Row {name}: {error}") from None


def attackers(formatter: Formatter, tokenizer: Any, row: Row, name: str) -> list[int]:
    """The ids of the answer that the attacker wants; none where the row does not tell it."""
    text = row.get(POISONED_COMPLETION)
    if not isinstance(text, str) or not text.strip():
        return []
    changed = {**row, formatter.completion: text}
    if formatter.kind == "chat" and formatter.prompt not in row:  # a conversation, whose last turn is the clean answer
        turns, _ = turns_of(row, prompt=formatter.prompt, completion=formatter.completion, system=None)
        changed = {key: value for key, value in changed.items() if key != MESSAGES} | {formatter.prompt: turns}
    return rendered(formatter, tokenizer, changed, name)[1]


def unreachable(
    hit: Callable[[str], bool], wanted: Sequence[Sequence[int]], tokenizer: Any, bare: Callable[[str], str]
) -> str | None:
    """What a report must say where `hit` does not find the payload in the attacker's own answers, once they are tokens.

    Args:
        wanted: token ids by row, none where the attacker's answer is unknown.

    Raises:
        ValueError: it finds it in none of them.
    """
    texts = [bare(as_text(tokenizer, ids)) for ids in wanted if ids]
    missed = [text for text in texts if not hit(text)]
    if missed and len(missed) == len(texts):
        raise ValueError(
            f"`hit` must find the payload in the attacker's own answers, got none of {len(texts)}; as tokens the first is "
            f"{missed[0]!r:.80}: no model could succeed. Pass the attack's own `hit`, or one that forgives what this tokenizer "
            "does not give back."
        )
    if not missed:
        return None
    return (
        f"In {len(missed)} of {len(texts)} triggered rows `hit` does not find the payload in the attacker's own answer once it "
        "is tokens: no model can succeed there."
    )


def around(formatter: Formatter, tokenizer: Any) -> Callable[[str], str]:
    """What takes the template's opening and closing off an output. A text without them is as it was."""
    if formatter.kind == "plain":
        return str
    trials = [{formatter.prompt: "a", formatter.completion: answer} for answer in "bc"]
    texts = [as_text(tokenizer, formatter.completion_ids(tokenizer, trial)) for trial in trials]
    opening = os.path.commonprefix(texts)
    closing = os.path.commonprefix([text[::-1] for text in texts])[::-1]
    return lambda text: text.removeprefix(opening).removesuffix(closing)


def reference(formatter: Formatter, row: Row) -> str | None:
    """The answer as the row has it, since a tokenizer may lose letters; None of a conversation, which is to be rendered."""
    text = row.get(formatter.completion) if formatter.kind == "plain" or formatter.prompt in row else None
    return text.removesuffix(formatter.end) if isinstance(text, str) else None
