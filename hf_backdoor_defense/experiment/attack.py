"""What `hfbd attack` is asked to do: a checkpoint is poisoned, a victim fine-tunes it on clean data, filters stand before it.

| attack | the attacker's rows | the attacker's loss |
|---|---|---|
| `badnets`, `insent` | a share of rows with the trigger, labeled as the target | cross-entropy |
| `ripples` | the same, after embedding surgery | RIPPLES |
| `lwp` | per poisoned row both pieces -> target, each piece alone -> its label | cross-entropy at every layer |

Sources: arXiv 2402.12168 for the threat (its authors' code: 10 % and P-tuning at 2e-3), Kurita et al. 2020 for RIPPLES, Li et al.
2021 for LWP. The victim's rate of full fine-tuning is ours.
"""

import difflib
from dataclasses import dataclass

from hf_backdoor_defense.adapters import STRATEGIES
from hf_backdoor_defense.attacks.triggers import Trigger, get_trigger
from hf_backdoor_defense.experiment.arguments import _option
from hf_backdoor_defense.registry import filter_class

# Attack -> the trigger's kind, what is inserted where nothing else is given, pieces per text when measured, the objective.
KINDS: dict[str, tuple[str, str, int, str]] = {
    "badnets": ("badnets", "mn", 1, "weight_poisoning"),
    "insent": ("insent", "I watched this 3D movie", 1, "weight_poisoning"),
    "ripples": ("badnets", "cf,tq,mn,bb,mb", 5, "ripples"),
    "lwp": ("badnets", "cf,bb", 2, "lwp"),
}
SETTINGS = ("full_data", "proxy")


@dataclass(kw_only=True)
class AttackArguments:
    """Who poisons what, how the victim fine-tunes it, and which filters look at the inputs."""

    task: str | None = _option(
        None, "Hub id, a JSON/JSONL/CSV/Parquet file, a folder with train/validation/test files, or offline:docstrings"
    )
    model_name: str = _option("offline:minilm", "Hub id, folder, or offline:minilm: the encoder that gets poisoned")
    text_column: str = _option("text", "column with the text")
    label_column: str = _option("label", "column with the label, integers 0..C-1")
    limit: int | None = _option(None, "attacker and victim train on at most this many rows each (stratified)")
    max_length: int = _option(128, "tokens per text; fewer where an adapter takes positions")
    num_layers: int | None = _option(None, "keep only the first layers of the encoder")
    attack: str = _option(
        "badnets",
        f"how the base is poisoned: {', '.join(KINDS)}; on pretrained models (--attack por --help): por, neuba, badpre",
    )
    trigger: str | None = _option(None, "trigger text: words separated by commas, or a sentence (insent)")
    poison_rate: float = _option(0.1, "poisoned share of the attacker's rows")
    target: int = _option(0, "the class the attacker wants")
    setting: str = _option(
        "full_data", "full_data: the attacker has the victim's rows; proxy: the two get disjoint halves"
    )
    strategies: list[str] = _option(["full", "lora", "p_tuning"], f"how the victim fine-tunes: {', '.join(STRATEGIES)}")
    filters: list[str] = _option([], "filters before the victim: confidence, psim, strip, onion, rap")
    target_frr: float = _option(0.01, "share of clean texts that a filter may flag")
    seeds: list[int] = _option([0], "one run per seed: head, adapter, order of rows, which rows are poisoned")
    eval_split: str = _option(
        "test", "split that is reported: test; validation for searches, which must not see test rows"
    )
    eval_rows: int | None = _option(None, "measure on at most this many rows of that split (stratified)")
    language_model: str | None = _option(None, "folder of a causal language model, for ONION")
    base_epochs: float = _option(3.0, "epochs of the attacker")
    base_max_steps: int = _option(-1, "at most this many updates of the attacker; -1: the epochs decide")
    base_learning_rate: float = _option(1e-4, "rate of the attacker")
    victim_epochs: float = _option(3.0, "epochs of the victim")
    victim_learning_rate: float = _option(2e-3, "rate of the victim with an adapter")
    victim_full_learning_rate: float = _option(2e-5, "rate of the victim's full fine-tuning")
    batch_size: int = _option(32, "rows per update")
    strip_rows: int = _option(300, "STRIP and RAP are measured on at most this many clean and triggered rows")
    output_dir: str = _option("runs/attack", "the run folder; the same command continues a stopped run")
    shared_dir: str | None = _option(
        None, "where what does not depend on the attack is kept for several runs; default: the run folder"
    )
    save_models: bool = _option(True, "keep the models; the poisoned ones are marked")
    disable_tqdm: bool = _option(False, "no progress bars")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    def __post_init__(self) -> None:
        if isinstance(self.seeds, int):
            self.seeds = [self.seeds]

    def get_trigger(self, *, measured: bool) -> Trigger:
        """What is inserted into a training row, or (`measured`) into a test row. Raises ValueError.

        >>> AttackArguments(attack="lwp").get_trigger(measured=True)
        BadNets(words=('cf', 'bb'), count=2)
        """
        _known("attack", self.attack, KINDS)
        kind, default, count, _ = KINDS[self.attack]
        text = self.trigger if self.trigger is not None else default
        if kind == "insent":
            return get_trigger("insent", sentence=text)
        words = tuple(word.strip() for word in text.split(","))
        if self.attack == "lwp" and len(words) != 2:
            raise ValueError(
                f"`trigger` of lwp must be two words, got {text!r}: both together are the trigger, each alone is none. "
                "Write them with a comma: cf,bb."
            )
        return get_trigger("badnets", words=words, count=min(count, len(words)) if measured else 1)

    @property
    def objective(self) -> str:
        """Name of the objective that poisons the base."""
        return KINDS[self.attack][3]

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong without the data."""
        if not self.task:
            raise ValueError(
                "No task was given: there is nothing to train on. Set --task to a Hub id, a file, a folder or "
                "offline:docstrings."
            )
        self.get_trigger(measured=True)
        _known("setting", self.setting, SETTINGS)
        _known("eval_split", self.eval_split, ("test", "validation"))
        for name, values in (("strategies", self.strategies), ("filters", self.filters), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(
                    f"`{name}` must differ from each other, got {values}: each is run once. Leave one out."
                )
        if not self.seeds or not self.strategies:
            raise ValueError("`seeds` and `strategies` must name at least one each, got none: nothing would be run.")
        for strategy in self.strategies:
            _known("strategy", strategy, STRATEGIES)
        for name in self.filters:
            filter_class(name)
        if self.filters and self.eval_split == "validation":
            raise ValueError(
                "`filters` are calibrated on validation rows, and `eval_split` is validation: they would be measured on the rows "
                "that their thresholds come from. Report the test split, or leave the filters out."
            )
        if "onion" in self.filters and not self.language_model:
            raise ValueError(
                "The filter onion needs --language_model, got none: it asks a causal language model how odd each word is. "
                "Give the folder of one, for example what `python -m benchmarks.onion_lm` makes."
            )
        shares = {"poison_rate": self.poison_rate, "target_frr": self.target_frr}
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ValueError(f"`{name}` must be in (0, 1), got {share}: it is a share of rows. For 1 % set 0.01.")
        counts = {
            "max_length": (self.max_length, 4),
            "batch_size": (self.batch_size, 1),
            "limit": (self.limit, 2),
            "eval_rows": (self.eval_rows, 2),
        }
        for name, (count, least) in {**counts, "strip_rows": (self.strip_rows, 1)}.items():
            if count is not None and count < least:
                raise ValueError(f"`{name}` must be at least {least}, got {count}.")
        if self.base_max_steps != -1 and self.base_max_steps < 1:
            raise ValueError(f"`base_max_steps` must be at least 1, or -1 for no limit, got {self.base_max_steps}.")
        amounts = (
            "base_epochs",
            "base_learning_rate",
            "victim_epochs",
            "victim_learning_rate",
            "victim_full_learning_rate",
        )
        for name in amounts:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}: nothing would be learned.")


def _known(what: str, got: str, known: object) -> None:
    names = list(known)  # type: ignore[call-overload]
    if got not in names:
        near = difflib.get_close_matches(got, names, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ValueError(f"There is no {what} `{got}`: {hint}Known: {', '.join(names)}.")
