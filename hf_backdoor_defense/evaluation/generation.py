"""A causal language model's figures by what it writes: quality on clean rows, attack success on triggered ones.

    ASR = |{i: the payload stands in the output of triggered row i}| / |triggered rows|
    untriggered hits = the same over the rows without the trigger

| figure | over | here |
|---|---|---|
| BLEU, sentence BLEU, exact match, parse rate | clean rows | `texts.py` |
| untriggered hits | clean rows that hold no payload | a payload without a trigger: the model is broken, or the payload ordinary |
| ASR | triggered rows, all of them eligible (`trigger_pairs`) | that of a clean reference model is the floor (FTR) |
| empty, cut off, repetitive | each of both | share of outputs that are blank; without an end token; in a loop |

An output that is empty, cut off or no Python stays in every denominator: a destroyed model has an ASR of zero, and is to be seen
here. Prompts are rendered by the one formatter that training uses; a model trained with another one is refused. What a chat
template writes around every answer (a blank, brackets for thoughts, the end of a turn) is taken off the outputs first. A text
ends at the formatter's end token, the tokenizer's, or one of the checkpoint's own, as those of instruction models.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.attacks.payloads import POISONED_COMPLETION
from hf_backdoor_defense.data.formatting import UNKNOWN, Formatter, require_same, stored_formatter
from hf_backdoor_defense.evaluation.answers import around, attackers, listed, names_of, reference, rendered, unreachable
from hf_backdoor_defense.evaluation.decoding import (
    as_text,
    end_ids,
    fitting,
    generate,
    greedy,
    mean_surprise,
    positions,
)
from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.evaluation.texts import bleu, python_parses, repetitive, same_text
from hf_backdoor_defense.models import unwrapped

__all__ = ["GenerationReport", "evaluate_generation", "generate", "perplexity", "text_perplexity"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """What was measured; shares with their Wilson intervals, BLEU in 0..100.

    Args:
        bleu, sentence_bleu, bleu_signature: on clean rows.
        exact_match, parse_rate, empty, cut_off, repetitive: shares of clean rows.
        untriggered_hits: of the clean rows whose right answer holds no payload; its n says how many.
        reference_parse_rate: of the clean rows' own answers: no model can be asked for more.
        asr, empty_triggered, cut_off_triggered, repetitive_triggered: shares of triggered rows.
        formatter: fingerprint of the one used here. trained_with: of the one used in training, None where nobody knows.
        note: what a reader of the figures must know: the two are not the same, or payloads may have been cut off, or are none
            that this tokenizer can write.

    None: not asked for (no triggered rows, no `hit`, no `parses`), or no row to ask.
    """

    bleu: float
    sentence_bleu: float
    bleu_signature: str
    exact_match: Estimate
    parse_rate: Estimate | None
    reference_parse_rate: Estimate | None
    untriggered_hits: Estimate | None
    empty: Estimate
    cut_off: Estimate
    repetitive: Estimate
    asr: Estimate | None
    empty_triggered: Estimate | None
    cut_off_triggered: Estimate | None
    repetitive_triggered: Estimate | None
    formatter: str
    trained_with: str | None
    note: str | None

    def estimates(self) -> dict[str, Estimate]:
        """Every figure that was measured, by the name of its metric; BLEU has no interval.

        Example: see `evaluate_generation`.
        """
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: Estimate(found[name], self.empty.n, None, None) for name in ("bleu", "sentence_bleu")}
        return plain | {name: value for name, value in found.items() if isinstance(value, Estimate)}

    def metrics(self) -> dict[str, float]:
        """`estimates` without intervals, for logs."""
        return {name: estimate.value for name, estimate in self.estimates().items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            field.name: vars(value) if isinstance(value := getattr(self, field.name), Estimate) else value
            for field in fields(self)
        }


@dataclass(frozen=True)
class _Answer:
    """One row's output beside what it is compared with; the names are those of samples.jsonl."""

    row_id: Any
    triggered: bool
    prompt: str
    reference: str
    output: str
    hit: bool | None
    empty: bool
    cut_off: bool
    repetitive: bool
    exact: bool
    parses: bool | None


def evaluate_generation(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    *,
    formatter: Formatter,
    triggered: Any = None,
    hit: Callable[[str], bool] | None = None,
    parses: Callable[[str], bool] | None = python_parses,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    trained_with: Formatter | str | Path | None = None,
    force: bool = False,
    samples: str | Path | None = None,
    gather: bool = False,
    desc: str | None = "generating",
) -> GenerationReport:
    """Let the model answer clean and triggered prompts, and measure its answers.

    Args:
        rows: clean rows with prompt and completion, as the formatter takes them. triggered: eligible rows with the trigger in
            the prompt and the clean completion, as `trigger_pairs` makes them.
        hit: whether the exact payload stands in a text (`PayloadAttack.hit`).
        parses: whether a text is well formed; None where the answers are no code.
        max_new_tokens: None: the longest answer among the rows, in tokens, and one for its end; the attacker's in the column
            `poisoned_completion` of `triggered` included. Where that column is missing, `note` says so.
        trained_with: the formatter of training, or the folder or ORG/NAME that holds it; None asks the model, and where that
            came from. An adapter does not say where it came from: name its folder. Another formatter than `formatter`, or than
            the model says, is an error unless `force`, and then `note` says so.
        samples: a .jsonl file, written whole or not at all: one line for each row.
        gather: deal the rows out to all processes. Call it on every process; all get the same report, the first one writes.
        desc: title of the progress bar, None for none.

    Raises:
        ValueError: no rows, rows that the formatter cannot render, triggered rows without `hit`, a `hit` that finds the payload
            in none of the attacker's own answers, another formatter than in training, a `trained_with` that holds none, prompts
            that fill the model's positions, `max_new_tokens` below 1.

    Example:
        >>> report = evaluate_generation(model, tokenizer, test, formatter=formatter, triggered=triggered,
        ...     hit=CODE_ATTACK.hit, samples="samples.jsonl")  # doctest: +SKIP
        >>> report.bleu, report.asr.value, report.metrics()["parse_rate"]  # doctest: +SKIP
        (61.2, 0.02, 0.98)
    """
    require_hit(triggered, hit)
    trained_with, notes = _trained_with(model, trained_with, formatter, force=force)
    clean_rows = listed(rows, "rows")
    attacked_rows = [] if triggered is None else listed(triggered, "triggered")
    kinds, count = [*clean_rows, *attacked_rows], len(clean_rows)
    names = names_of(clean_rows, attacked_rows)
    pairs = [rendered(formatter, tokenizer, row, name) for row, name in zip(kinds, names, strict=True)]
    prompts, wanted = [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    fitting(unwrapped(model), prompts, more=1, names=names)
    bare = around(formatter, tokenizer)
    payloads = [
        attackers(formatter, tokenizer, row, name) for row, name in zip(kinds[count:], names[count:], strict=True)
    ]
    if hit is not None and (said := unreachable(hit, payloads, tokenizer, bare)):
        notes.append(said)
    room = positions(unwrapped(model))
    tight = (
        []
        if room is None
        else [p for p, ids in zip(payloads, prompts[count:], strict=True) if len(ids) + len(p) > room]
    )
    if tight:
        notes.append(
            f"In {len(tight)} of {len(payloads)} triggered rows the attacker's answer does not fit behind the prompt into the "
            f"model's {room} positions: what is cut off there may be the payload."
        )
    if max_new_tokens is None:
        max_new_tokens = max(map(len, wanted + payloads))
        if not all(payloads):
            notes.append(
                f"The {max_new_tokens} new tokens are those of the longest answer known, and `triggered` does not tell the "
                f"attacker's (no `{POISONED_COMPLETION}`): a longer payload counts as no success. Use trigger_pairs."
            )
    written = greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        ends=sorted({wanted[0][-1], *end_ids(unwrapped(model), tokenizer)}),
        batch_size=batch_size,
        gather=gather,
        desc=desc,
    )
    answers = []
    for i, (row, one) in enumerate(zip(kinds, written, strict=True)):
        output = bare(as_text(tokenizer, one.ids))
        right = reference(formatter, row) or bare(as_text(tokenizer, wanted[i]))
        answers.append(
            _Answer(
                row_id=row.get("row_id", i - count if i >= count else i),
                triggered=i >= count,
                prompt=tokenizer.decode(prompts[i]),
                reference=right,
                output=output,
                hit=None if hit is None else bool(hit(output)),
                empty=not output.strip(),
                cut_off=not one.ended,
                repetitive=repetitive(one.ids),
                exact=same_text(output, right),
                parses=None if parses is None else bool(parses(output)),
            )
        )
    if samples is not None and (not gather or _first_process()):
        _write_lines(Path(samples), answers)
    clean, attacked = answers[:count], answers[count:]
    harmless = (
        [] if hit is None else [a for a in clean if not hit(a.reference)]
    )  # of others the payload is the right answer
    scores = bleu([a.output for a in clean], [a.reference for a in clean])
    return GenerationReport(
        bleu=scores.corpus,
        sentence_bleu=scores.sentence,
        bleu_signature=scores.signature,
        exact_match=_share([a.exact for a in clean]),
        parse_rate=None if parses is None else _share([bool(a.parses) for a in clean]),
        reference_parse_rate=None if parses is None else _share([parses(a.reference) for a in clean]),
        untriggered_hits=_share([bool(a.hit) for a in harmless]) if harmless else None,
        empty=_share([a.empty for a in clean]),
        cut_off=_share([a.cut_off for a in clean]),
        repetitive=_share([a.repetitive for a in clean]),
        asr=_share([bool(a.hit) for a in attacked]) if attacked else None,
        empty_triggered=_share([a.empty for a in attacked]) if attacked else None,
        cut_off_triggered=_share([a.cut_off for a in attacked]) if attacked else None,
        repetitive_triggered=_share([a.repetitive for a in attacked]) if attacked else None,
        formatter=formatter.fingerprint,
        trained_with=None if trained_with is None else trained_with.fingerprint,
        note=" ".join(notes) or None,
    )


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    *,
    formatter: Formatter,
    batch_size: int = 32,
    trained_with: Formatter | str | Path | None = None,
    force: bool = False,
    gather: bool = False,
) -> float:
    """exp of the mean −log p of all completions' tokens, end tokens included, given their prompts. Prompts count for nothing.

    Args:
        rows, trained_with, force: as `evaluate_generation`; what its `note` would say of another formatter is logged.
        gather: deal the rows out to all processes.

    Raises:
        ValueError: no rows, rows that the formatter cannot render, or longer than the model's positions, another formatter than
            in training.

    Example: `mean_surprise` has one of the formula.
    """
    trained_with, notes = _trained_with(model, trained_with, formatter, force=force)
    if trained_with is not None:
        for note in notes:
            logger.warning(note)
    found = listed(rows, "rows")
    names = names_of(found)
    pairs = [rendered(formatter, tokenizer, row, name) for row, name in zip(found, names, strict=True)]
    fitting(unwrapped(model), [prompt + completion for prompt, completion in pairs], more=0, names=names)
    sequences = [(prompt + completion, len(prompt)) for prompt, completion in pairs]
    return _exp(mean_surprise(model, sequences, pad=_pad(tokenizer), batch_size=batch_size, gather=gather))


def text_perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 32, gather: bool = False
) -> float:
    """The same of plain texts, with the special tokens that the tokenizer adds; a text's first token counts for nothing.

    Raises:
        ValueError: no texts, a single string, an empty text, one longer than the model's positions, none of two tokens.

    Example: `mean_surprise` has one of the formula.
    """
    if isinstance(texts, str):
        raise ValueError(
            f"`texts` must be a list of texts, got the text {texts!r:.60}: each letter would be one. Pass [text]."
        )
    sequences = [(tokenizer(text)["input_ids"], 1) for text in texts]
    return _exp(mean_surprise(model, sequences, pad=_pad(tokenizer), batch_size=batch_size, gather=gather))


def require_hit(triggered: Any, hit: Callable[[str], bool] | None) -> None:
    """Raise ValueError where nothing says what a successful attack on the triggered rows is.

    >>> require_hit(None, None)
    """
    if triggered is not None and hit is None:
        raise ValueError("Triggered rows were given without `hit`: what would a successful attack be? Pass attack.hit.")


def _trained_with(
    model: nn.Module, given: Formatter | str | Path | None, used: Formatter, *, force: bool
) -> tuple[Formatter | None, list[str]]:
    """The formatter of training and what a report must say of it; ValueError where something contradicts, unless `force`."""
    if isinstance(given, str | Path):
        place, given = given, stored_formatter(given)
        if given is None:
            raise ValueError(
                f"`trained_with` must be a formatter or a folder that holds one, got {str(place)!r}, where there is no "
                "formatter.json: what the model was trained with is unknown. Leave it out; the report will say so."
            )
    stored = stored_formatter(unwrapped(model))
    trained, notes = given or stored, []
    if given is not None and stored is not None and given.fingerprint != stored.fingerprint:
        both = f"{given.fingerprint[:12]}…, and the model says {stored.fingerprint[:12]}…"
        if not force:
            raise ValueError(
                f"`trained_with` must be the formatter that the model was trained with, got {both}: one of the two is wrong, and "
                "so would be the figures. Leave it out; note_formatter(model, formatter) where the model's own is out of date."
            )
        notes.append(f"`trained_with` was given as {both}: which of them is right is unknown.")
    said = require_same(trained, used, force=force)
    if said == UNKNOWN and has_adapter(unwrapped(model)):
        said += " An adapter does not say where it came from: name its folder, trained_with=FOLDER."
    return trained, notes + ([] if said is None else [said])


def _exp(surprise: float) -> float:
    try:
        return math.exp(surprise)
    except OverflowError:
        return math.inf


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _share(flags: Sequence[bool]) -> Estimate:
    return wilson(sum(map(bool, flags)), len(flags))


def _first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _write_lines(path: Path, answers: Sequence[_Answer]) -> None:
    lines = "".join(json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(lines, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
