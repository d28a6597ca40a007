"""What a card may say: one model of a run, read from `results.json` alone.

    RUN/results.json  ->  read_evidence  ->  card, .eval_results, model-index

A published folder holds the same `results.json`, and in `publication.json` which of its models it is and what its card says
beside the results (`Publication`), so that the card can be rendered again from the two, byte for byte.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.results import Record, read_records
from hf_backdoor_defense.reporting.sealed import RESULTS

PUBLICATION = "publication.json"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is decided when a model is published, and cannot be read from its results.

    Args:
        repo_id: "ORG/NAME". arm, seed: which model of the run.
        license: a Hub license id. base_model: Hub id of the base, or None where it is not on the Hub.
        datasets: Hub ids. language: ISO codes, or [].
        forced: published although the report says INERT or a gate failed.
    """

    repo_id: str
    arm: str
    seed: int
    license: str
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    forced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"schema": 1, **asdict(self)}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """What stands in a published folder. Raises ValueError."""
        path = Path(folder) / PUBLICATION
        try:
            values = json.loads(path.read_bytes())
            if values.pop("schema") != 1 or not set(values) <= {f.name for f in fields(cls)}:
                raise ValueError("another schema")
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{folder}` must hold {PUBLICATION} as `hfbd push` writes it ({error}): it was not published by this package, "
                "and nothing says which figures belong to its weights."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One model of a run and all that was measured beside it."""

    payload: dict[str, Any]
    entry: ModelEntry
    records: list[Record]

    @property
    def figures(self) -> dict[str, Record]:
        """The model's own records by metric."""
        return self.of(self.entry.recorded_as or self.entry.arm)

    def of(self, arm: str) -> dict[str, Record]:
        """Records of an arm at the model's seed and setting, by metric; of metrics measured before and after, the later."""
        about = self.entry
        found = [record for record in self.records if (record.defense, record.seed) == (arm, about.seed)]
        return {record.metric: record for record in found if about.setting in (None, record.setting)}

    @property
    def controls(self) -> dict[str, dict[str, Record]]:
        """Records of the arms beside it, in their order; those that were measured."""
        return {arm: found for arm in self.entry.controls if (found := self.of(arm))}

    @property
    def failures(self) -> list[str]:
        """Why the report is no good: INERT and gates."""
        return list(self.payload.get("failures") or [])

    @property
    def verdict(self) -> str:
        """The run's sentence."""
        return str(self.payload.get("verdict") or "")

    @property
    def command(self) -> list[str]:
        """Words that repeat the run, or []."""
        return list(self.payload.get("command") or [])

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and commit of the run, or {}."""
        return dict(self.records[0].env) if self.records else {}


def entries(payload: dict[str, Any]) -> list[ModelEntry]:
    """The models that results name. Raises ValueError for entries that no run writes."""
    return [ModelEntry.from_dict(values) for values in payload.get("models") or []]


def read_evidence(folder: str | Path, *, arm: str | None = None, seed: int | None = None) -> Evidence:
    """The evidence of one model of the run in `folder`; which one, where there are several, say `arm` and `seed`.

    Raises:
        ValueError: no run folder, no results in it, no model in them, several that fit, or none.
    """
    folder = Path(folder)
    path = folder / RESULTS
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {RESULTS}"
        raise ValueError(
            f"`{folder}` must be the folder of a finished run, but {what}: a card is made from its results. Finish the run with "
            "the command that started it, or name its --output_dir."
        )
    records = read_records(path)
    payload = json.loads(path.read_bytes())
    found = entries(payload)
    if not found:
        raise ValueError(
            f"`{folder}` holds results, but they name no model: there is nothing to publish. hfbd train keeps the models of a "
            "simulated attack only with --save_models; hfbd eval and a run of an earlier version leave none."
        )
    fitting = [e for e in found if arm in (None, e.arm) and seed in (None, e.seed)]
    if len(fitting) != 1:
        names = ", ".join(f"--arm {e.arm} --seed {e.seed}" for e in found)
        raise ValueError(
            f"`{folder}` must name one model{'' if arm is None and seed is None else ' that fits'}, got {len(fitting)}. Choose "
            f"with one of: {names}."
        )
    return Evidence(payload=payload, entry=_marked(folder, fitting[0]), records=records)


def _marked(folder: Path, entry: ModelEntry) -> ModelEntry:
    """The entry, with what stands beside its weights of an attack, or beside its base's, where the results do not say it."""
    if entry.attacked is not None:
        return entry
    from hf_backdoor_defense.models import BACKDOOR_FILE, attack_on, backdoor_mark  # loads torch

    if (folder / PUBLICATION).is_file():  # what a folder around a published one says is not about it
        mark = folder / BACKDOOR_FILE
        return replace(entry, attacked=json.loads(mark.read_text())) if mark.is_file() else entry
    found = backdoor_mark(folder / entry.path)
    if found is not None:
        return replace(entry, attacked=json.loads(found.read_text()))
    base = entry.base_model
    of_base = (
        attack_on(base) if is_local(base) and entry.role != "filter" else None
    )  # a filter is made for attacked bases
    return entry if of_base is None else replace(entry, attacked=of_base)


def is_local(name: str) -> bool:
    """Whether a run means a folder of its machine by `name`: it writes `./` before a relative one.

    >>> is_local("./a/b"), is_local("/a"), is_local("owner/name")
    (True, True, False)
    """
    return name.startswith((".", "/", "~"))
