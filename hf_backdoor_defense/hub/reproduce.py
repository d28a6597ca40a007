"""A published model, loaded and measured again: nothing of it is run but what transformers and peft have for its configuration.

| before | is checked |
|---|---|
| a model is built | its class is one of transformers; `config.json` describes no more weights than its files hold |
| rows are read | the source is the caller's, or one that anybody can read: a Hub id or offline:… |
| a base is loaded | its name is the one that the publication gives |
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from hf_backdoor_defense.classifiers import Classifier, load_trained
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.experiment.remeasure import remeasure
from hf_backdoor_defense.experiment.rows import read_rows
from hf_backdoor_defense.hub.agreement import Agreement, compare
from hf_backdoor_defense.hub.bases import OFFLINE, ON_HUB, is_hub_id
from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.pretrained import saved_sha256

SCORES = {"ca": "ca", "asr": "asr", "ftr": "asr", "r_acc": "r_acc"}
"""Metric of a record -> the field of `BackdoorScores`; a clean reference's success is called FTR."""
MOST_LAYERS = 10_000
LARGEST_TRIGGER = 4096
_MEASUREMENT = {
    "kind", "task", "reader", "split", "limit", "held_out", "eval_rows", "text_column", "image_column", "label_column",
    "max_length", "trigger", "target", "seed", "rows_sha256",
}  # fmt: skip
_COUNTS = re.compile(r"(n|num)_.*(layer|block|expert|stage)s?|layers|depths?")


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


def check_size(folder: Path) -> None:
    """Refuse a configuration that describes more than the weight files hold, before memory is taken for it.

    Raises:
        ValueError: that, or no configuration of a model of transformers.
    """
    import transformers
    from safetensors import safe_open

    values = json.loads((folder / "config.json").read_bytes())
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if _COUNTS.fullmatch(key) and isinstance(number, int | float) and not 0 <= number <= MOST_LAYERS:
                raise ValueError(f"config.json has {key} = {number!r}: no model is that deep")
    named = values.get("architectures") or [None]
    kind: Any = getattr(transformers, str(named[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.json names {named[0]!r}, which is no model of transformers: code of others is not run"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in kind(config).parameters())
    stored = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                stored += size
    if described > stored:
        raise ValueError(
            f"config.json describes {described:,} weights, and the files hold {stored:,}: some would be random"
        )


def load_filter(folder: Path, evidence: Evidence, publication: Publication, *, max_gb: float) -> Any:
    """PSIM's filter on the base that it belongs to. Raises ValueError, or Unverifiable where there is no way to the base."""
    from hf_backdoor_defense.input_filters.psim import PSIMFilter
    from hf_backdoor_defense.models import load_finished_classifier

    entry = evidence.entry
    record = json.loads((folder / "filter.json").read_bytes())
    if record["base_sha256"] != entry.weights_sha256:
        raise ValueError("filter.json and results.json name different bases")
    place = _public_base(evidence, publication)
    _check_base_size(place, max_gb)
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
        task: where the rows are; None: where the record says, if anybody can read that. clean: texts, for a filter.
        all_rows: every row of `task`, and not the part that the run measured on.
        options: what else to measure by (columns, split, limit, max_length), over the record's.

    Raises:
        ValueError: the model is none, or the record is none of ours.
        Unverifiable: nothing that could be measured, or rows that cannot be read.
    """
    if evidence.entry.role == "filter":
        return _rate(folder, evidence, publication, clean, options, max_gb)
    recorded = {metric: record for metric, record in evidence.figures.items() if metric in SCORES}
    measurement = _measurement(evidence.entry.measurement)
    if not recorded or (task is None and not measurement):
        raise Unverifiable(
            "the run measured nothing of this model that can be measured again here (a pretrained model: fine-tune it on your "
            "task, and use hfbd eval there)"
        )
    if (folder / "adapter_config.json").is_file():
        classifier = _with_base(folder, evidence, publication, max_gb)
    else:
        check_size(folder)
        classifier = load_trained(str(folder))
    how: dict[str, Any] = {"kind": classifier.kind, **measurement}
    if all_rows or not measurement:
        how = {key: value for key, value in how.items() if key not in ("limit", "held_out", "eval_rows", "split")}
        how |= {"reader": "samples", "split": "test"}
    how |= {"task": task or _readable(measurement.get("task")), **options}
    try:
        found = remeasure(classifier, **how, progress=progress)
    except (ValueError, OSError, TypeError) as error:
        raise Unverifiable(f"`{how['task']}` cannot be measured on: {error}") from error
    same = found.same_rows is True
    agreements = []
    for metric, record in recorded.items():
        estimate = getattr(found.scores, SCORES[metric])
        if estimate is None:
            raise Unverifiable(f"{metric} is on record, and the record does not say with which trigger")
        agreements.append(compare(record, estimate, same_rows=same))
    rows = "the very rows of the record" if same else "rows that are not, or not known to be, those of the record"
    return agreements, f"on {rows} ({how['task']})"


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
    flagged = load_filter(folder, evidence, publication, max_gb=max_gb).flag(texts)
    found = compare(evidence.figures["frr"], wilson(int(flagged.sum()), len(texts)), same_rows=False)
    return [found], f"on clean texts of yours ({clean})"


def _public_base(evidence: Evidence, publication: Publication) -> str:
    given = evidence.entry.base_model
    place = given if given.startswith(OFFLINE) else publication.base_model
    if not place:
        raise Unverifiable(f"its base {given!r} is nothing that anybody can load")
    return place


def _check_base_size(place: str, max_gb: float) -> None:
    if place.startswith(OFFLINE) or constants.HF_HUB_OFFLINE:  # nothing will be downloaded
        return
    try:
        files = HfApi().model_info(place, files_metadata=True).siblings or []
    except (OSError, ValueError, HTTPError) as error:
        raise Unverifiable(f"its base `{place}` cannot be asked for ({error})") from error
    total = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    if total > max_gb * 1e9:
        raise Unverifiable(
            f"its base `{place}` has {total / 1e9:.1f} GB, more than the {max_gb:g} GB allowed (--max_gb)"
        )


def _with_base(folder: Path, evidence: Evidence, publication: Publication, max_gb: float) -> Classifier:
    """An adapter merged into the base that its publication names; one that is built in here is not downloaded."""
    values = json.loads((folder / "adapter_config.json").read_bytes())
    named = values["base_model_name_or_path"]
    if not named or named != publication.base_model:
        raise ValueError(f"the adapter names the base {named!r}, its publication {publication.base_model!r}")
    given = evidence.entry.base_model
    place = given if ON_HUB.get(given) == named else str(named)
    _check_base_size(place, max_gb)
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


def _readable(task: Any) -> str:
    """A source that anybody can read: a file named by a stranger is not looked for here."""
    name = task if isinstance(task, str) else ""
    if name.startswith(OFFLINE) or (is_hub_id(name.partition(":")[0]) and not Path(name).exists()):
        return name
    raise Unverifiable(
        f"it was measured on rows of its publisher ({name[:80]!r}): give them, or others of the same task, with --task"
    )
