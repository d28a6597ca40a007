"""Curves while training: what is measured after every epoch, by predicting or by writing."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.evaluation.generation import GenerationReport, evaluate_generation, require_hit
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.evaluation.texts import python_parses

_SHARES = ("backdoor_ca", "backdoor_asr", "backdoor_r_acc")


class BackdoorEvalCallback(TrainerCallback):
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

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and record."""
        scores = evaluate_backdoor(
            kwargs["model"],
            self.clean,
            self.triggered,
            target=self.target,
            collate=self.collate,
            batch_size=self.batch_size,
            gather=True,  # every process is here
        )
        assert scores.ca is not None
        entry = {"epoch": round(state.epoch or 0.0, 4), "step": state.global_step, "backdoor_ca": scores.ca.value}
        if scores.asr is not None and scores.r_acc is not None:
            entry |= {"backdoor_asr": scores.asr.value, "backdoor_r_acc": scores.r_acc.value}
        entry |= {f"backdoor_{name}_n": value.n for name, value in vars(scores).items() if value is not None}
        state.log_history.append(entry)


class GenerationEvalCallback(TrainerCallback):
    """Lets the model write at the end of every epoch: `history` gets the report, the Trainer's log history its figures as
    `generation_bleu`, `generation_asr` and so on. Of a resumed run the log history is whole, while `history` begins anew.

    It only reports, and it is collective, as `BackdoorEvalCallback`. A few dozen rows make a curve.

    Args: as `evaluate_generation`; without `trained_with`, since the formatter is that of the training under way, and without
        `samples`, which the last epoch alone would leave.

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
    ) -> None:
        require_hit(triggered, hit)  # now, and not after an epoch
        self.tokenizer, self.rows, self.formatter = tokenizer, rows, formatter
        self.triggered, self.hit, self.parses = triggered, hit, parses
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.history: list[GenerationReport] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and record."""
        report = evaluate_generation(
            kwargs["model"],
            self.tokenizer,
            self.rows,
            formatter=self.formatter,
            trained_with=self.formatter,
            triggered=self.triggered,
            hit=self.hit,
            parses=self.parses,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            gather=True,  # every process is here
        )
        self.history.append(report)
        entry = {"epoch": round(state.epoch or 0.0, 4), "step": state.global_step}
        state.log_history.append(entry | {f"generation_{name}": value for name, value in report.metrics().items()})


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
