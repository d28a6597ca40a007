"""What a run says of every model it leaves: the entries under `models` in `results.json`. Cards and pushes read nothing else.

| verb | leaves | role |
|---|---|---|
| `hfbd train` | `models/seed-S/ARM` | fine_tuned |
| `hfbd clean --method recipe` | `model` | cleaned |
| `hfbd clean --method d3`, ulrl, … | `model` | purified |
| `hfbd detect`, PSIM | `filter` | filter |
| `hfbd attack` | `models/seed-S/NAME`, `model` | attacked |
| a hosted Trainer's push | its output folder, `.` | fine_tuned |

An entry is JSON. Its figures are the records of the same file with its `arm` as `defense` (or what `recorded_as` says), its
`seed` and, where it has one, its `setting`; those of `controls` stand beside them.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

ROLES = ("fine_tuned", "cleaned", "purified", "filter", "attacked")
RELATIONS = ("finetune", "adapter")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of a run.

    Args:
        path: its folder, relative to the run's, with `/`; "." is the run's own.
        arm: what it is called among the models of its seed, and by its records (`defense`). seed: theirs.
        recorded_as, setting: the records' `defense` where it is another, and their `setting` where there are several.
        role: one of `ROLES`. relation: to its base, one of `RELATIONS`.
        pipeline_tag: the Hub's name of its task, for example "text-classification". library: "transformers" or "peft".
        base_model: what it was made from, as it was given: Hub id, folder or offline:…; empty for a model made from nothing.
        weights_sha256: `pretrained.saved_sha256` of its folder: of the model as a user loads it, of an adapter's own tensors. A
            filter's is that of its base, which is what it belongs to.
        labels: names of its classes, by id; empty where it has none.
        method: the objective's fields with its name, {} for plain training. activity: its account.
        inert: why it did nothing, or None.
        attacked: what `backdoored.json` says, or None.
        controls: arms to show beside it, by importance: of "undefended", "clean_reference", "fine_tuning", …
        data: for people, by what it was used for ("trained on", "measured on", "trigger", …).
        measurement: how to measure its figures again (keyword arguments, JSON), or {} where nothing but its loss was measured.

    Raises:
        ValueError: another role or relation.

    Example:
        >>> entry = ModelEntry(path="model", arm="d3", seed=0, role="purified", pipeline_tag="text-classification",
        ...                    base_model="owner/model", weights_sha256="0" * 64, labels=["bad", "good"])
        >>> ModelEntry.from_dict(entry.to_dict()) == entry
        True
    """

    path: str
    arm: str
    seed: int
    role: str
    pipeline_tag: str
    base_model: str
    weights_sha256: str
    library: str = "transformers"
    relation: str = "finetune"
    labels: list[str] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)
    activity: dict[str, float] = field(default_factory=dict)
    inert: str | None = None
    attacked: dict[str, Any] | None = None
    controls: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    measurement: dict[str, Any] = field(default_factory=dict)
    recorded_as: str | None = None
    setting: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("role", ROLES), ("relation", RELATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` of a model must be one of {', '.join(known)}, got {getattr(self, name)!r}: cards know no other."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The entry that `to_dict` wrote. Raises ValueError for anything else."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            unknown = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"an entry under `models` must have the keys of a model, got {unknown}: no run writes that."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"an entry under `models` lacks keys of a model ({error}): no run writes that.") from error
