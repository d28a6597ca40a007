"""What `hfbd clean --method d3|ulrl|ft_sam|fine_pruning|fine_tuning` is asked to do.

| rows | who sees them |
|---|---|
| `clean`, but for the part held out | the method and the control |
| held out, or `test` | the accuracy before and after, nothing else |
| `test` with the simulated trigger | the attack success before and after, nothing else |
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_backdoor_defense.experiment.arguments import _option
from hf_backdoor_defense.experiment.attack import _known
from hf_backdoor_defense.experiment.purify_training import DEFAULTS, FINE_TUNING, METHODS, purify_settings

# `preset` of `--preset`: the method's own. The unnamed one is the default.
PRESETS: dict[str, dict[str, Any]] = {
    "": {"defense": [{}]},
    **{name: {"defense": [{"preset": name}]} for name in ("official_code", "paper", "many_classes")},
}
_USUAL = "; ".join(
    f"{kind}s: {s.learning_rate:g}, {s.epochs:g} epochs, batches of {s.batch_size}" for kind, s in DEFAULTS.items()
)


@dataclass(kw_only=True)
class PurifyArguments:
    """Which classifier, with which clean rows, by which method. The method's own fields are --defense.FIELD VALUE."""

    method: str = _option("d3", f"{', '.join(METHODS)} (the control alone)")
    model_name: str | None = _option(
        None, "folder or Hub id of the classifier to purify, of texts or images, or of its LoRA adapter; never changed"
    )
    clean: str | None = _option(
        None,
        "labeled rows that you trust. Texts: a .jsonl, .json, .csv or .parquet file, a Hub id, offline:docstrings. Images: an "
        ".npz, a folder of class folders, a Hub id, offline:digits",
    )
    text_column: str = _option("text", "column with the text")
    image_column: str = _option("image", "column with the image")
    label_column: str = _option("label", "column with the class: the model's ids or its names")
    limit: int | None = _option(None, "use at most this many clean rows, evenly over the classes")
    max_length: int = _option(128, "tokens per text")
    held_out: float = _option(
        0.2, "share of the clean rows (at least 10) that is only measured on; not used with --test"
    )
    test: str | None = _option(
        None, "labeled rows to measure on: a file, or the test split of a Hub id or of offline:…"
    )
    simulate: str | None = _option(
        None,
        "measure attack success on --test with this trigger: badnets, insent (texts); patch, blend, sig, wanet (images)",
    )
    trigger: str | None = _option(None, "of texts: words separated by commas (badnets) or a sentence (insent)")
    target: str | None = _option(None, "the class the trigger is meant for, id or name")
    clean_reference: str | None = _option(
        None, "a model of the same task known to be clean, for the floor of attack success"
    )
    control: bool = _option(True, "also fine-tune plainly, same rows, updates and seed, and show it beside the method")
    learning_rate: float | None = _option(None, f"peak rate of SGD, cosine to 0 ({_USUAL})")
    epochs: float | None = _option(None, "passes over the clean rows")
    batch_size: int | None = _option(None, "rows per update")
    seed: int = _option(0, "order of rows, dropout, what the method draws")
    output_dir: str = _option("runs/purify", "the run folder; the same command continues a stopped run")
    disable_tqdm: bool = _option(False, "no progress bars")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    @property
    def has_control(self) -> bool:
        """Whether plain fine-tuning runs beside the method."""
        return self.control and self.method != FINE_TUNING

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong without rows or weights."""
        _known("method", self.method, METHODS)
        if not self.model_name:
            raise ValueError(
                "No model was given: there is nothing to purify. Set --model_name to a folder or Hub id of a trained classifier."
            )
        if not self.clean:
            raise ValueError(
                "No clean rows were given: every method here learns from labeled rows that you trust. Set --clean to a file or a "
                "Hub id; a few hundred rows, 20 of each class at least, are enough."
            )
        for name, bound in {"limit": 1, "max_length": 4, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}.")
        purify_settings("text", learning_rate=self.learning_rate, epochs=self.epochs, batch_size=self.batch_size)
        if not 0 < self.held_out <= 0.5:
            raise ValueError(
                f"`held_out` must be in (0, 0.5], got {self.held_out}: it is the share of clean rows that is measured on. For a "
                "fifth set 0.2."
            )
        if self.test is not None and self.test == self.clean and Path(self.test).exists():
            raise ValueError(
                "`test` and `clean` are the same source: the model would be measured on what it learned. Leave --test out; "
                "--held_out keeps a part of the clean rows aside."
            )
        self._check_simulation()

    def _check_simulation(self) -> None:
        if self.simulate is None:
            given = [n for n in ("trigger", "target", "clean_reference") if getattr(self, n) is not None]
            if given:
                raise ValueError(
                    f"`{given[0]}` belongs to a simulated trigger, and none is simulated. Add --simulate, for example "
                    "--simulate badnets, or leave it out."
                )
            return
        if self.test is None:
            raise ValueError(
                "`simulate` needs --test: attack success is measured on rows that no method sees. Give a file of labeled rows."
            )
        if self.target is None:
            raise ValueError(
                "`simulate` needs --target: attack success counts how often the trigger leads to one class. Give its id or name."
            )
