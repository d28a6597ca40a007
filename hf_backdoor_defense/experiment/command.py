"""The command line that repeats a run: what differs from the defaults, and nothing else."""

import dataclasses
import json
from typing import Any

from transformers import TrainingArguments

from hf_backdoor_defense.experiment.arguments import RunArguments, defaults
from hf_backdoor_defense.objectives import Objective

# Where a run is put and how it is shown; `seed` is refused in favor of `seeds`.
_LEFT_OUT = {
    "output_dir", "run_name", "logging_dir", "disable_tqdm", "seed", "dry_run", "push_to_hub", "hub_token", "push_to_hub_token",
}  # fmt: skip


def command(
    run: RunArguments, training: TrainingArguments, defenses: list[Objective], *, output_dir: str = "runs/again"
) -> list[str]:
    """Words for `shlex.join`. A run that was started from a script may hold objects no command can name: they are left out.

    Example:
        >>> run = RunArguments(task="offline:docstrings", simulate="badnets", seeds=[0, 1])
        >>> " ".join(command(run, TrainingArguments(**defaults()), []))
        'hfbd train --task offline:docstrings --simulate badnets --seeds 0 1 --output_dir runs/again'
    """
    words = ["hfbd", "train"]
    words += _options(dataclasses.asdict(run), dataclasses.asdict(RunArguments()))
    words += _options(training.to_dict(), TrainingArguments(**defaults()).to_dict())
    words += ["--output_dir", output_dir]
    if defenses:
        words += ["--defense", *(objective.name for objective in defenses)]
    for objective in defenses:
        usual = type(objective)().to_dict()
        changed = {f"defense.{objective.name}.{k}": v for k, v in objective.to_dict().items() if usual[k] != v}
        for key, value in changed.items():
            words += [f"--{key}", _word(value)]
    return words


def _options(given: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    words = []
    for key, value in given.items():
        if key in _LEFT_OUT or value is None or value == usual.get(key):
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(map(_word, values))]
    return words


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)  # true, null, numbers; lists and objects as the parser reads them
