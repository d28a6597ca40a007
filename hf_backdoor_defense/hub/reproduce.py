"""A published model, loaded and measured again: nothing of it is run but what transformers and peft have for its configuration.

| before | is checked |
|---|---|
| a model is built | `sizes.check_size`: its class is one of transformers, its configuration no larger than its files |
| rows are read | they are the caller's, or anybody's: offline:…, or a Hub data set that is not large |
| a base is loaded | its name is the one that the publication gives, its size is allowed |
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from hf_backdoor_defense.attacks.wording import trigger_line, trigger_words
from hf_backdoor_defense.classifiers import Classifier, load_trained
from hf_backdoor_defense.data import images, sources
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.experiment.remeasure import remeasure
from hf_backdoor_defense.experiment.rows import read_rows
from hf_backdoor_defense.hub.agreement import Agreement, compare
from hf_backdoor_defense.hub.bases import OFFLINE, ON_HUB, is_hub_id
from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.hub.sizes import check_size
from hf_backdoor_defense.pretrained import saved_sha256

SCORES = {"ca": "ca", "asr": "asr", "ftr": "asr", "r_acc": "r_acc"}
"""Metric of a record -> the field of `BackdoorScores`; a clean reference's success is called FTR."""
LARGEST_TRIGGER = 4096
FEW = 50
"""Rows below which a measurement says too little beside a record of more."""
ROWS_GB = 1.0
"""A data set that a stranger's record names is downloaded up to this size; the caller's own at any."""
_BUILT_IN = (sources.OFFLINE, images.OFFLINE_IMAGES)
_MEASUREMENT = {
    "kind", "task", "reader", "split", "limit", "held_out", "eval_rows", "text_column", "image_column", "label_column",
    "max_length", "trigger", "target", "seed", "rows_sha256",
}  # fmt: skip


class Unverifiable(ValueError):
    """Something could not be checked here: it is neither right nor wrong."""


def check_weights(folder: Path, evidence: Evidence, publication: Publication, *, max_gb: float) -> str:
    """That the weights are those the results are about. Returns what was found, in a sentence.

    Args:
        max_gb: download no base that is larger.

    Raises:
        ValueError: they are not, or make no model. Unverifiable: a filter whose base cannot be loaded.
    """
    entry = evidence.entry
    if entry.role == "filter":
        load_filter(folder, evidence, publication, max_gb=max_gb)
        return f"filter and base are what they were calibrated as (SHA-256 {entry.weights_sha256[:12]}…)"
    if not (folder / "adapter_config.json").is_file():
        check_size(folder)
    found = saved_sha256(folder)
    if found != entry.weights_sha256:
        raise ValueError(
            f"the weights (SHA-256 {found[:12]}…) are not those that results.json is about ({str(entry.weights_sha256)[:12]}…)"
        )
    return f"loaded; they are those that results.json is about (SHA-256 {found[:12]}…)"


def load_filter(folder: Path, evidence: Evidence, publication: Publication, *, max_gb: float) -> Any:
    """PSIM's filter on the base that it belongs to. Raises ValueError, or Unverifiable where there is no way to the base."""
    from hf_backdoor_defense.input_filters.psim import PSIMFilter
    from hf_backdoor_defense.models import load_finished_classifier

    entry = evidence.entry
    record = json.loads((folder / "filter.json").read_bytes())
    if record["base_sha256"] != entry.weights_sha256:
        raise ValueError("filter.json and results.json name different bases")
    place = _public_base(evidence, publication)
    _check_hub_size(place, max_gb)
    try:
        base, _ = load_finished_classifier(place, num_labels=len(entry.labels))
    except (ValueError, OSError) as error:
        raise Unverifiable(f"its base `{place}` cannot be loaded here ({error})") from error
    return PSIMFilter.from_pretrained(folder, base)


def measured_again(
    folder: Path,
    evidence: Evidence,
    publication: Publication,
    *,
    task: str | None,
    clean: str | None,
    all_rows: bool,
    options: Mapping[str, Any],
    max_gb: float,
    progress: bool,
) -> tuple[list[Agreement], str]:
    """The model's figures beside what is measured now, and on which rows.

    Args:
        task: where the rows are; None: where the record says, if anybody can read that. Of rows that are not those of the record,
            the record's `limit` and `eval_rows` take nothing. clean: texts, for a filter.
        all_rows: every row of `task`, and not the part that the run measured on.
        options: what else to measure by (columns, split, limit, max_length), over the record's.

    Raises:
        ValueError: the model is none, or the record is none of ours.
        Unverifiable: nothing that could be measured, rows that cannot be read, or too few.
    """
    if evidence.entry.role == "filter":
        return _rate(folder, evidence, publication, clean, options, max_gb)
    recorded = {metric: record for metric, record in evidence.figures.items() if metric in SCORES}
    measurement = _measurement(evidence.entry.measurement)
    _check_trigger(evidence, measurement)
    if not recorded or (task is None and not measurement):
        raise Unverifiable(_why_not(evidence, bool(recorded)))
    if (folder / "adapter_config.json").is_file():
        classifier = _with_base(folder, evidence, publication, max_gb)
    else:
        check_size(folder)
        classifier = load_trained(str(folder))
    how: dict[str, Any] = {"kind": classifier.kind, **measurement}
    if all_rows or not measurement:
        how = {key: value for key, value in how.items() if key not in ("limit", "held_out", "eval_rows", "split")}
        how |= {"reader": "samples", "split": "test"}
    how |= {"task": task or _readable(measurement.get("task"), max_gb), **options}
    otherwise = None if task is None else {"limit": options.get("limit")}
    try:
        found = remeasure(classifier, **how, otherwise=otherwise, progress=progress)
    except (ValueError, OSError, TypeError) as error:
        raise Unverifiable(f"`{how['task']}` cannot be measured on: {error}") from error
    same = found.same_rows is True
    agreements = []
    for metric, record in recorded.items():
        estimate = getattr(found.scores, SCORES[metric])
        if estimate is None:
            raise Unverifiable(f"{metric} is on record, and the record does not say with which trigger")
        _check_enough(metric, record.n, estimate.n)
        agreements.append(compare(record, estimate, same_rows=same))
    rows = "the very rows of the record" if same else "rows that are not, or not known to be, those of the record"
    return agreements, f"on {rows} ({how['task']})"


def measured_trigger(evidence: Evidence) -> str | None:
    """The trigger and the class that figures are measured with, in words, or None where none is."""
    trigger, target = evidence.entry.measurement.get("trigger"), evidence.entry.measurement.get("target")
    labels = evidence.entry.labels
    if not isinstance(trigger, dict) or not trigger:
        return None
    named = labels[target] if isinstance(target, int) and 0 <= target < len(labels) else target
    return f"{trigger_words(trigger)}, for the class {named}"


def _check_trigger(evidence: Evidence, measurement: Mapping[str, Any]) -> None:
    """That the trigger of the data is the one that is measured with: a card shows either."""
    entry, trigger, target = evidence.entry, measurement.get("trigger"), measurement.get("target")
    if not trigger or "trigger" not in entry.data:
        return
    if type(target) is not int or not 0 <= target < len(entry.labels):
        raise ValueError(f"the target in results.json must be a class of the model, got {target!r}")
    said, measured = entry.data["trigger"], trigger_line(trigger, entry.labels, target)
    if said != measured:
        raise ValueError(f"results.json names the trigger {str(said)[:200]!r}, and measures with {measured[:200]!r}")


def _check_enough(metric: str, recorded: int | None, measured: int) -> None:
    if recorded is not None and measured < min(recorded, FEW):
        raise Unverifiable(
            f"{metric} was measured on {measured} rows, too few to say anything of a record of {recorded}: give more with --task"
        )


def _why_not(evidence: Evidence, recorded: bool) -> str:
    entry = evidence.entry
    if recorded:
        return "its results do not say on which rows it was measured: give labeled rows with --task"
    if not entry.pipeline_tag.endswith("classification"):
        return (
            "the run measured nothing of this model that can be measured again here (it is no classifier: fine-tune it on your "
            "task, and use hfbd eval there)"
        )
    return "its results hold no accuracy and no attack success of this model: measure it with hfbd eval"


def _rate(
    folder: Path,
    evidence: Evidence,
    publication: Publication,
    clean: str | None,
    options: Mapping[str, Any],
    max_gb: float,
) -> tuple[list[Agreement], str]:
    if "frr" not in evidence.figures or clean is None:
        raise Unverifiable("a filter's rate is measured on clean texts of yours: give them with --clean FILE")
    column = str(options.get("text_column", "text"))
    try:
        texts = [row[column] for row in read_rows(clean, column)]
    except (ValueError, OSError) as error:
        raise Unverifiable(str(error)) from error
    _check_enough("frr", evidence.figures["frr"].n, len(texts))
    flagged = load_filter(folder, evidence, publication, max_gb=max_gb).flag(texts)
    found = compare(evidence.figures["frr"], wilson(int(flagged.sum()), len(texts)), same_rows=False)
    return [found], f"on clean texts of yours ({clean})"


def _public_base(evidence: Evidence, publication: Publication) -> str:
    given = evidence.entry.base_model
    place = given if given.startswith(OFFLINE) else publication.base_model
    if not place:
        raise Unverifiable(f"its base {given!r} is nothing that anybody can load")
    return place


def _check_hub_size(name: str, max_gb: float, *, data: bool = False) -> None:
    """Refuse to download a base, or a data set, that is larger. Raises Unverifiable, also where its size is not known."""
    if name in _BUILT_IN or name.startswith(OFFLINE) or constants.HF_HUB_OFFLINE:  # nothing will be downloaded
        return
    what, ask = ("data set", HfApi().dataset_info) if data else ("base", HfApi().model_info)
    try:
        files = ask(name, files_metadata=True).siblings or []
    except (OSError, ValueError, HTTPError) as error:
        raise Unverifiable(f"its {what} `{name}` cannot be asked for ({error})") from error
    sizes = [file.size for file in files if data or file.rfilename.endswith(".safetensors")]
    total = sum(size or 0 for size in sizes)
    if total > max_gb * 1e9 or (data and None in sizes):
        do = "give its rows, or others of the same task, with --task" if data else "--max_gb"
        raise Unverifiable(
            f"its {what} `{name}` has {total / 1e9:.1f} GB or more, and {max_gb:g} GB are allowed ({do})"
        )


def _with_base(folder: Path, evidence: Evidence, publication: Publication, max_gb: float) -> Classifier:
    """An adapter merged into the base that its publication names; one that is built in here is not downloaded."""
    values = json.loads((folder / "adapter_config.json").read_bytes())
    named = values["base_model_name_or_path"]
    if not named or named != publication.base_model:
        raise ValueError(f"the adapter names the base {named!r}, its publication {publication.base_model!r}")
    given = evidence.entry.base_model
    place = given if ON_HUB.get(given) == named else str(named)
    _check_hub_size(place, max_gb)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        changed = {**values, "base_model_name_or_path": place, "revision": None}
        Path(scratch, "adapter_config.json").write_text(json.dumps(changed))
        try:
            return load_trained(scratch)
        except (ValueError, OSError) as error:
            raise Unverifiable(f"adapter and base `{place}` cannot be loaded here ({error})") from error


def _measurement(values: Any) -> dict[str, Any]:
    """The record's measurement, if it is one that a run writes: its numbers decide how much is computed here."""
    if not isinstance(values, dict) or not set(values) <= _MEASUREMENT:
        raise ValueError("`measurement` in results.json is none that a run writes")
    trigger = values.get("trigger") or {}
    if not isinstance(trigger, dict) or len(json.dumps(trigger)) > LARGEST_TRIGGER:
        raise ValueError("the trigger in results.json is none that a run writes")
    if any(isinstance(value, int) and abs(value) > LARGEST_TRIGGER for value in trigger.values()):
        raise ValueError("the trigger in results.json has numbers that no run writes")
    return {key: value for key, value in values.items() if value is not None}


def _readable(task: Any, max_gb: float) -> str:
    """A source that anybody can read. Whatever else a stranger names, a file most of all, is not looked for here."""
    name = task if isinstance(task, str) else ""
    if name in _BUILT_IN:
        return name
    repository, _, _ = name.partition(":")
    is_file = PurePath(repository).suffix.lower() in {*sources.FORMATS, ".npz"}
    # The reader takes a path that exists before a Hub id: then the rows must be named by whoever verifies.
    if repository.count("/") == 1 and is_hub_id(repository) and not is_file and not Path(name).exists():
        _check_hub_size(repository, min(max_gb, ROWS_GB), data=True)
        return name
    raise Unverifiable(
        f"it was measured on rows of its publisher ({name[:80]!r}): give them, or others of the same task, with --task"
    )
