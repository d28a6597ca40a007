"""Curves while training: what is measured after every epoch, by predicting or by writing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_backdoor_defense.data.formatting import Formatter, require_same, stored_formatter
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.evaluation.generation import GenerationReport, evaluate_generation, require_hit
from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.evaluation.texts import python_parses
from hf_backdoor_defense.models import unwrapped

_SHARES = ("backdoor_ca", "backdoor_asr", "backdoor_r_acc")


class _EveryEpoch(TrainerCallback):
    """Measures once an epoch: behind its last step, before a checkpoint of that step is saved, which thereby holds the point; or
    at its end, where the steps of an epoch are not known before.
    """

    _measured: int | None = None  # the step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A training begins."""
        self._measured = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and record where the step closes an epoch."""
        if state.epoch and float(state.epoch).is_integer():
            self._once(state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and record, unless the last step did."""
        self._once(state, kwargs["model"])

    def _once(self, state: Any, model: Any) -> None:
        if self._measured != state.global_step:
            self._measured = state.global_step
            state.log_history.append(
                {"epoch": round(state.epoch or 0.0, 4), "step": state.global_step, **self._measure(state, model)}
            )

    def _measure(self, state: Any, model: Any) -> dict[str, Any]:
        """What is recorded beside epoch and step."""
        raise NotImplementedError


class BackdoorEvalCallback(_EveryEpoch):
    """Evaluates at the end of every epoch and writes `backdoor_ca`, `backdoor_asr`, `backdoor_r_acc` into the Trainer's log
    history, which is saved with every checkpoint: a resumed run continues the curve.

    It only reports. Nothing it measures may choose a checkpoint or a hyper-parameter.

    With several processes it is collective: each measures its part of the rows, and all exchange the counts. Add it on every
    process, with the same rows; on the first alone it would wait for the others forever.

    Args: as `evaluate_backdoor`.
    """

    def __init__(
        self,
        clean: Any,
        triggered: Any = None,
        *,
        target: int | None = None,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        batch_size: int = 64,
    ) -> None:
        self.clean, self.triggered, self.target = clean, triggered, target
        self.collate, self.batch_size = collate, batch_size

    def _measure(self, state: Any, model: Any) -> dict[str, Any]:
        scores = evaluate_backdoor(
            model,
            self.clean,
            self.triggered,
            target=self.target,
            collate=self.collate,
            batch_size=self.batch_size,
            gather=True,  # every process is here
        )
        assert scores.ca is not None
        entry: dict[str, Any] = {"backdoor_ca": scores.ca.value}
        if scores.asr is not None and scores.r_acc is not None:
            entry |= {"backdoor_asr": scores.asr.value, "backdoor_r_acc": scores.r_acc.value}
        return entry | {f"backdoor_{name}_n": value.n for name, value in vars(scores).items() if value is not None}


class GenerationEvalCallback(_EveryEpoch):
    """Lets the model write at the end of every epoch: `history` gets the report, the Trainer's log history its figures as
    `generation_bleu`, `generation_asr` and so on. Of a resumed run the log history is whole, while `history` begins anew.

    It only reports, and it is collective, as `BackdoorEvalCallback`. A few dozen rows make a curve.

    The formatter of the training under way is asked of its Trainer: `DefendedSFTTrainer(formatter=...)` notes it on the model.
    Another one is refused before the first step.

    Args: as `evaluate_generation`; `samples` is a folder, which gets a file `step-<global step>.jsonl` from each evaluation.

    Example:
        >>> watch = GenerationEvalCallback(tokenizer, clean, formatter=formatter, triggered=triggered,
        ...     hit=CODE_ATTACK.hit)  # doctest: +SKIP
        >>> trainer.add_callback(watch)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> [report.asr.value for report in watch.history]  # doctest: +SKIP
        [0.1, 0.93, 0.95]
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Any,
        *,
        formatter: Formatter,
        triggered: Any = None,
        hit: Callable[[str], bool] | None = None,
        parses: Callable[[str], bool] | None = python_parses,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        force: bool = False,
        samples: str | Path | None = None,
    ) -> None:
        require_hit(triggered, hit)  # now, and not after an epoch
        self.tokenizer, self.formatter, self.hit, self.parses = tokenizer, formatter, hit, parses
        # An iterator gives its rows once, and every epoch wants them.
        self.rows = list(rows)
        self.triggered = None if triggered is None else list(triggered)
        self.max_new_tokens, self.batch_size, self.force = max_new_tokens, batch_size, force
        self.samples = None if samples is None else Path(samples)
        self.history: list[GenerationReport] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError where the model is trained with another formatter, unless `force`."""
        super().on_train_begin(args, state, control, **kwargs)
        require_same(stored_formatter(unwrapped(kwargs["model"])), self.formatter, force=self.force)

    def _measure(self, state: Any, model: Any) -> dict[str, Any]:
        report = evaluate_generation(
            model,
            self.tokenizer,
            self.rows,
            formatter=self.formatter,
            triggered=self.triggered,
            hit=self.hit,
            parses=self.parses,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            force=self.force,
            samples=None if self.samples is None else self.samples / f"step-{state.global_step}.jsonl",
            gather=True,  # every process is here
        )
        self.history.append(report)
        entry: dict[str, Any] = {f"generation_{name}": value for name, value in report.metrics().items()}
        entry |= {f"generation_{name}_n": estimate.n for name, estimate in report.estimates().items()}
        return entry if report.note is None else entry | {"generation_note": report.note}


def curve(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The recorded points of a run, oldest first: epoch, ca and (where measured) asr and r_acc.

    >>> curve([{"loss": 1.0}, {"epoch": 1.0, "step": 4, "backdoor_ca": 0.5, "backdoor_asr": 0.9, "backdoor_r_acc": 0.1}])
    [{'epoch': 1.0, 'ca': 0.5, 'asr': 0.9, 'r_acc': 0.1}]
    """
    return [
        {key.removeprefix("backdoor_"): float(entry[key]) for key in ("epoch", *_SHARES) if key in entry}
        for entry in log_history
        if "backdoor_ca" in entry
    ]


def last_scores(log_history: list[dict[str, Any]], *, step: int) -> BackdoorScores | None:
    """The point that was recorded at a step, the last one usually, with its intervals; None where there is none.

    >>> last_scores([{"backdoor_ca": 0.9, "backdoor_ca_n": 10, "epoch": 1.0, "step": 3}], step=3).ca.n
    10
    """
    entry = next((e for e in reversed(log_history) if "backdoor_ca_n" in e and e["step"] == step), None)
    if entry is None:
        return None
    found = {
        name.removeprefix("backdoor_"): wilson(round(entry[name] * entry[f"{name}_n"]), entry[f"{name}_n"])
        if name in entry
        else None
        for name in _SHARES
    }
    return BackdoorScores(**found)


def last_generation(log_history: list[dict[str, Any]], *, step: int) -> tuple[dict[str, Estimate], str | None]:
    """What a `GenerationEvalCallback` recorded at a step: estimates by metric ({} where there are none), and the note on the
    formatter, if the evaluation carried one.

    >>> entry = {"generation_bleu": 61.2, "generation_bleu_n": 4, "generation_asr": 0.5, "generation_asr_n": 2, "step": 3}
    >>> found, note = last_generation([entry], step=3)
    >>> found["bleu"], found["asr"].n, round(found["asr"].low, 3), note
    (Estimate(value=61.2, n=4, low=None, high=None), 2, 0.095, None)
    """
    entry: dict[str, Any] = next((e for e in reversed(log_history) if "generation_bleu" in e and e["step"] == step), {})
    found = {}
    for name, value in entry.items():
        n = entry.get(f"{name}_n")
        if n is not None:
            estimate = Estimate(value, n, None, None) if name.endswith("bleu") else wilson(round(value * n), n)
            found[name.removeprefix("generation_")] = estimate
    return found, entry.get("generation_note")
