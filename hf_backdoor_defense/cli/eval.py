"""`hfbd eval`"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class EvalArguments:
    """Which model to measure, on what, against which trigger."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a finished classifier"})
    task: str | None = field(default=None, metadata={"help": "as for hfbd train; its test split is used"})
    kind: str | None = field(default=None, metadata={"help": "text or image, where the model does not say which"})
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    image_column: str = field(default="image", metadata={"help": "column with the image"})
    label_column: str = field(default="label", metadata={"help": "column with the label"})
    limit: int | None = field(default=None, metadata={"help": "take a stratified share of the data"})
    max_length: int = field(default=128, metadata={"help": "tokens per text"})
    batch_size: int = field(default=64, metadata={"help": "rows per forward"})
    simulate: str | None = field(default=None, metadata={"help": "put this trigger on the non-target rows"})
    trigger: str | None = field(default=None, metadata={"help": "trigger text"})
    target: int = field(default=0, metadata={"help": "the class the attacker wants"})
    seed: int = field(default=0, metadata={"help": "where the trigger goes in each text"})
    clean_reference: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a model known to be clean: its rate is the floor"}
    )
    max_asr_over_floor: float | None = field(default=None, metadata={"help": "gate; needs --clean_reference"})
    max_ca_drop: float | None = field(default=None, metadata={"help": "gate; needs --clean_reference"})
    output: str | None = field(default=None, metadata={"help": "write the records to this JSON file"})


def evaluate(argv: list[str]) -> int:
    """Measure, print a table, check the gates. Returns the exit code."""
    import datasets
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.measure import measure

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    (args,), specs = parse([EvalArguments], argv, {}, "hfbd eval")
    if specs:
        raise ValueError("hfbd eval measures a finished model and takes no --defense. To train with one: hfbd train.")
    options: dict[str, Any] = dict(vars(args))
    table, failures = measure(**options)
    print(table)
    for failure in failures:
        print(failure)
    return 1 if failures else 0
