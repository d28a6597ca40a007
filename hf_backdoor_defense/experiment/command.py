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


def verb_command(
    verb: str, run: Any, objective: Objective | None = None, *, chosen: str, output_dir: str = "runs/again"
) -> list[str]:
    """Words that repeat a run of another verb than train.

    Args:
        run: its options, a dataclass that can be built from nothing. objective: the method whose fields are `--defense.FIELD`.
        chosen: the option that says which of the verb's methods it is: always written.

    Example:
        >>> from hf_backdoor_defense.experiment.clean import CleanArguments
        >>> " ".join(verb_command("clean", CleanArguments(text="notes.txt", epochs=2.0), chosen="method"))
        'hfbd clean --method recipe --text notes.txt --epochs 2.0 --output_dir runs/again'
    """
    given = dataclasses.asdict(run)
    words = ["hfbd", verb, f"--{chosen}", _word(given.pop(chosen))]
    words += _options(given, dataclasses.asdict(type(run)()), left_out=_LEFT_OUT - {"seed"})
    if objective is not None:
        usual = type(objective)().to_dict()
        for key, value in objective.to_dict().items():
            if usual[key] != value:
                words += [f"--defense.{key}", _word(value)]
    return [*words, "--output_dir", output_dir]


def _options(given: dict[str, Any], usual: dict[str, Any], left_out: set[str] = _LEFT_OUT) -> list[str]:
    words = []
    for key, value in given.items():
        if key in left_out or value is None or value == usual.get(key):
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(map(_word, values))]
    return words


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)  # true, null, numbers; lists and objects as the parser reads them
