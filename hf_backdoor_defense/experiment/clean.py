"""What `hfbd clean` is asked to do: a checkpoint goes in, a cleaned one comes out, before anyone fine-tunes it.

| method | what it does to the checkpoint |
|---|---|
| `recipe` | pre-training goes on while the norms of chosen matrices are pressed down (`defenses/recipe.py`) |
| `pretraining` | the control: the same training without the norms (`coef` 0), at the same rate, steps and text |

What `recipe` does beyond `pretraining` is the method's; what both do, plain text does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.experiment.arguments import _option
from hf_backdoor_defense.experiment.attack import _known

# Method -> fields that make it what it is.
METHODS: dict[str, dict[str, Any]] = {"recipe": {}, "pretraining": {"coef": 0.0}}
# The authors' run (code of thunlp/RECIPE, commit 775fedf; there on 20,000 texts). The unnamed preset is the default.
PRESETS: dict[str, dict[str, Any]] = {
    "": {"defense": [{}]},
    "paper": {
        "static_masks": True,
        "max_length": 64,
        "batch_size": 32,
        "epochs": 8.0,
        "learning_rate": 2e-5,
        "defense": [{"preset": "paper"}],
    },
}


@dataclass(kw_only=True)
class CleanArguments:
    """Which checkpoint, on which text, how long. The method's own fields are --defense.FIELD VALUE."""

    method: str = _option("recipe", f"{', '.join(METHODS)} (the control: the same without the penalty)")
    model_name: str | None = _option(
        None, "folder, Hub id, or offline:minilm: the pretrained model; it is never changed"
    )
    text: str | None = _option(
        None,
        "plain text: a .txt, .jsonl, .json, .csv or .parquet file, a folder of such, a Hub id, or offline:docstrings",
    )
    text_column: str = _option("text", "column with the text; of no meaning for .txt files")
    limit: int | None = _option(None, "read at most this many texts")
    max_length: int = _option(64, "tokens per text; longer ones are cut")
    epochs: float = _option(8.0, "passes over the text")
    batch_size: int = _option(32, "texts per update")
    learning_rate: float | None = _option(
        None, "peak rate, linear decay to 0; default: the one that reaches --defense.dose, printed"
    )
    static_masks: bool = _option(
        False, "draw masks once and pad to max_length, as the paper's code; default: new masks for every batch"
    )
    held_out: float = _option(0.1, "share of the texts that is never trained on, by a hash of the text: for the loss")
    warm_up: bool = _option(
        False, "train a masked-LM head first where the checkpoint has none (once, kept in output_dir)"
    )
    seed: int = _option(0, "order of texts, masks, dropout; a head that is warmed up")
    output_dir: str = _option("runs/clean", "the run folder; the same command continues a stopped run")
    disable_tqdm: bool = _option(False, "no progress bars")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong without text or weights."""
        _known("method", self.method, METHODS)
        if not self.model_name:
            raise ValueError(
                "No model was given: there is nothing to clean. Set --model_name to a folder or Hub id with a pretrained model."
            )
        if not self.text:
            raise ValueError(
                "No text was given: pre-training goes on with plain text. Set --text to a file, a folder, a Hub id or "
                "offline:docstrings."
            )
        least = {"limit": 2, "max_length": 4, "batch_size": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be finite and above 0, got {value}: nothing would be learned.")
        if not 0 < self.held_out <= 0.5:
            raise ValueError(
                f"`held_out` must be in (0, 0.5], got {self.held_out}: it is the share of texts that the loss is measured on. "
                "For a tenth set 0.1."
            )


def build_method(name: str, fields: Mapping[str, Any]) -> RECIPE:
    """The objective behind a method's name. Raises ValueError for an unknown field, a wrong value, or one that makes another
    method of it.

    >>> build_method("pretraining", {"dose": 0.6})
    RECIPE(coef=0.0, targets='auto', trainable='auto', dose=0.6, allow_unknown_head=False)
    """
    _known("method", name, METHODS)
    named = fields.get("name", name)
    if named != name:
        raise ValueError(
            f"hfbd clean takes its method by --method ({name}), got the defense `{named}`. Leave that one out."
        )
    changed = [f"{key}={fields[key]}" for key, value in METHODS[name].items() if fields.get(key, value) != value]
    if changed:
        raise ValueError(f"{', '.join(changed)} is not `{name}`: the control has no penalty. Use --method recipe.")
    objective = RECIPE.from_dict({**fields, **METHODS[name]})
    if name == "recipe" and objective.coef == 0:
        raise ValueError("coef=0 is no RECIPE but its control. Use --method pretraining.")
    return objective
