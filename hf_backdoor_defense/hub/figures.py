"""The figures of a card: tables for people, `model-index` and `.eval_results` for the Hub, all from the same records.

    Evidence  ->  figure_table, cost_table   rounded, with intervals, beside the controls
              ->  eval_results               unrounded: what results.json holds, value for value

| record | metric on the Hub | column |
|---|---|---|
| ca | accuracy | CA |
| asr | attack_success_rate | ASR |
| ftr, of the model that was never poisoned | false_trigger_rate | ASR (its floor) |
| r_acc | recovered_accuracy | R-Acc |
"""

from collections.abc import Mapping
from dataclasses import replace

from huggingface_hub import EvalResult

from hf_backdoor_defense.hub.bases import is_hub_id
from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.hub.markdown import is_path, local, plain
from hf_backdoor_defense.reporting.html import cut, visible
from hf_backdoor_defense.reporting.results import METRICS, Record

COST = ("seconds", "time_ratio", "peak_bytes", "memory_ratio", "passes", "bytes_per_weight")
NOT_MEASURED = "not measured"
NO_SCORES = ("der", "norm_ratio", "dose", "target_pull", "suspects", "target_suspected")  # nothing that data scores
FLOOR = "clean_reference"
BEFORE = "before: the model as it was given"
WARMED_UP = "before: the model after its warm-up"
WARM_UP = "warm-up"  # what an entry's `data` calls it

# metric -> its type on the Hub, its column, what it is
QUALITY = {
    "ca": ("accuracy", "CA", "clean accuracy: the share of clean rows that get their label"),
    "asr": ("attack_success_rate", "ASR", "attack success: the share of triggered rows of other classes that get the attacker's"),
    "r_acc": ("recovered_accuracy", "R-Acc", "recovered accuracy: the share of the same rows that get their true label"),
    "ftr": ("false_trigger_rate", "FTR", "the share of triggered rows that a model without a backdoor gives to that class"),
    "der": ("defense_effectiveness_rate", "DER", "(1 + fall of ASR − fall of CA) / 2, which says nothing without CA"),
    "frr": ("false_rejection_rate", "FRR", "the share of clean inputs that the filter flags"),
    "far": ("false_acceptance_rate", "FAR", "the share of triggered inputs that the filter lets pass"),
    "coverage": ("coverage", "coverage", "the share of the scored inputs that are not flagged"),
    "selective_ca": ("selective_accuracy", "CA of accepted", "accuracy on the clean rows that are not flagged"),
    "auroc": ("roc_auc", "AUROC", "how well the scores separate triggered and clean: 0.5 is chance"),
    "aasr": ("average_attack_success_rate", "AASR", "attack success, mean over triggers and classes"),
    "masr": ("maximum_attack_success_rate", "MASR", "attack success, maximum over classes"),
    "precision": ("precision", "precision", "of as many most suspicious rows as were planted, the share that was planted"),
    "recall": ("recall", "recall", "of the planted rows, the share that was dropped"),
    "bleu": ("bleu", "BLEU", "BLEU of what is written for clean rows, 0 to 100"),
    "parse_rate": ("parse_rate", "parses", "the share of what is written for clean rows that parses"),
    "untriggered_hits": ("untriggered_hits", "hits untriggered", "the share of clean rows whose output holds the payload"),
    "loss": ("loss", "loss", "loss on held-out text, in nats per token"),
    "norm_ratio": ("norm_ratio", "norm ratio", "what is left of the norms of the pressed matrices; 1 is all"),
    "dose": ("dose", "dose", "the sum of learning rates over the spread of the weights: how hard the norms were pressed"),
}  # fmt: skip
_COSTS = {
    "seconds": ("seconds", "{:.1f}"),
    "time_ratio": ("time ×", "{:.2f}"),
    "peak_bytes": ("peak memory (MiB)", "{:.0f}"),
    "memory_ratio": ("memory ×", "{:.2f}"),
    "passes": ("passes per input", "{:.4g}"),
    "bytes_per_weight": ("bytes per weight", "{:.2f}"),
}
_ARMS = {
    "undefended": "no defense, all else alike",
    "clean_reference": "never poisoned (its ASR is the floor)",
    "fine_tuning": "control: plain fine-tuning, same rows and updates",
    "matched_decay": "control: cross-entropy with a matching decay",
    "penalty_only": "control: the penalty alone",
    "pretraining": "control: plain continued pre-training",
    "confidence": "control: the classifier's own confidence",
    "majority": "baseline: the most frequent class",
    "tfidf": "baseline: words without a neural network",
    "pixels": "baseline: pixels without a neural network",
}
_BRIEFLY = {
    "undefended": "without a defense",
    "fine_tuning": "plain fine-tuning",
    "matched_decay": "a matching decay",
    FLOOR: "never poisoned",
}


def number(value: float, digits: int = 3) -> str:
    """Rounded, with a true minus.

    Example:
        >>> number(0.87), number(-0.0314), number(-0.0001)
        ('0.870', '−0.031', '0.000')
    """
    rounded = round(value, digits)
    return f"{'−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"


def estimate(record: Record | None) -> str:
    """A cell: value and interval, or that nothing was measured.

    Example:
        >>> estimate(Record("b", "d", "m", "none", "d3", "", 0, "ca", 0.87, n=200, low=0.816, high=0.91)), estimate(None)
        ('0.870 [0.816, 0.910]', 'not measured')
    """
    if record is None:
        return NOT_MEASURED
    if record.low is None or record.high is None:
        return number(record.value)
    return f"{number(record.value)} [{number(record.low)}, {number(record.high)}]"


def arm_rows(evidence: Evidence) -> list[tuple[str, Mapping[str, Record]]]:
    """What stands in the rows of a table: a label in Markdown, and records by metric.

    What was there before comes first, then the model, then the other controls as the run orders them. Where the model's arm was
    measured in several settings, the last of each metric is the model's, and the others get rows of their own.
    """
    entry, own = evidence.entry, evidence.figures
    earlier: dict[str, dict[str, Record]] = {}
    name = entry.recorded_as or entry.arm
    for record in evidence.records if entry.setting is None else []:
        if (record.defense, record.seed) == (name, entry.seed) and own[record.metric] is not record:
            earlier.setdefault(record.setting, {})[record.metric] = record
    rows = [(_setting(setting, warm=WARM_UP in entry.data), found) for setting, found in earlier.items()]
    controls = [(_arm(arm, entry.role, found), found) for arm, found in evidence.controls.items()]
    before = [row for row, arm in zip(controls, evidence.controls, strict=True) if arm == "undefended"]
    rest = [row for row in controls if row not in before]
    return [*rows, *before, (f"**this model** ({plain(entry.arm, length=80)})", own), *rest]


def _setting(setting: str, *, warm: bool) -> str:
    if setting == "before":
        return WARMED_UP if warm else BEFORE
    return f"the same arm, {plain(setting or 'default', length=80)}"


def _arm(arm: str, role: str, found: Mapping[str, Record]) -> str:
    if arm == "undefended" and role in ("purified", "cleaned"):
        return BEFORE
    if arm == FLOOR and not {"ftr", "aasr"} & set(found):
        return "never poisoned"
    return _ARMS.get(arm) or plain(arm, length=80)


def columns(evidence: Evidence) -> list[str]:
    """The metrics of the table: those of the model, those of its controls where it has none; FTR stands in the column of ASR."""
    own = set(evidence.figures) - set(COST)
    found = own or {metric for records in evidence.controls.values() for metric in records} - set(COST)
    found = {"asr" if metric == "ftr" else metric for metric in found}
    return [metric for metric in dict.fromkeys((*QUALITY, *METRICS)) if metric in found]


def figure_table(evidence: Evidence) -> list[list[str]]:
    """Head and rows of the table of figures, as Markdown cells; only a head where there is nothing."""
    metrics = columns(evidence)
    head = ["", *(title_of(metric) for metric in metrics)]
    body = [
        [label, *(estimate(found.get(m) or (found.get("ftr") if m == "asr" else None)) for m in metrics)]
        for label, found in arm_rows(evidence)
        if any(m in found or (m == "asr" and "ftr" in found) for m in metrics) or found == evidence.figures
    ]
    return [head, *body] if metrics else [head]


def outcome(evidence: Evidence) -> str:
    """What came out, in one sentence: attack success and accuracy beside the controls, or nothing where neither was measured.

    Example: "Measured: attack success 0.047 (before 1.000, plain fine-tuning 0.998), clean accuracy 0.904 (before 0.944, …)."
    """
    own, found = evidence.figures, []
    for metric in ("asr", "aasr", "ca"):
        if metric not in own:
            continue
        others = []
        for arm, records in evidence.controls.items():
            record = records.get(metric) or (records.get("ftr") if metric == "asr" else None)
            if record is not None and arm in _BRIEFLY:
                before = arm == "undefended" and evidence.entry.role in ("purified", "cleaned")
                others.append(f"{'before' if before else _BRIEFLY[arm]} {number(record.value)}")
        what = QUALITY[metric][2].partition(":")[0].removesuffix(", mean over triggers and classes")
        beside = f" ({', '.join(others)})" if others else ""
        found.append(f"{what} {number(own[metric].value)}{beside}")
    return f"Measured: {', '.join(found)}." if found else ""


def type_of(metric: str) -> str:
    """The metric's type on the Hub."""
    return QUALITY[metric][0] if metric in QUALITY else metric


def title_of(metric: str) -> str:
    """The column's title."""
    return QUALITY[metric][1] if metric in QUALITY else metric.replace("_", " ")


def cost_table(evidence: Evidence) -> list[list[str]]:
    """Head and rows of what it took; only a head where nothing was counted."""
    own, training = evidence.figures, evidence.payload.get("training")
    rows = arm_rows(evidence)
    seconds = training.get("seconds") if isinstance(training, dict) else None
    if seconds and own and "seconds" not in own:  # earlier runs of `hfbd clean` say the time beside the records
        record = replace(next(iter(own.values())), metric="seconds", value=seconds, n=None, low=None, high=None)
        rows = [(label, {**found, "seconds": record} if found == own else found) for label, found in rows]
    metrics = [metric for metric in COST if any(metric in found for _, found in rows)]
    head = ["", *(_COSTS[metric][0] for metric in metrics)]
    if "seconds" in metrics:
        counted = next((found["seconds"].n for _, found in rows if "seconds" in found), None)
        scored = evidence.entry.role == "filter"
        head[1] = f"seconds to score {counted or 'the'} inputs" if scored else "seconds of training"
    body = [[label, *(_cost(found.get(m)) for m in metrics)] for label, found in rows if set(metrics) & set(found)]
    return [head, *body]


def _cost(record: Record | None) -> str:
    if record is None:
        return NOT_MEASURED
    return _COSTS[record.metric][1].format(record.value / (2**20 if record.metric == "peak_bytes" else 1))


def dataset_name(record: Record, evidence: Evidence, publication: Publication) -> str:
    """What the data is called: the name of a data set, or what kind of rows a file or a folder holds; never a path."""
    name = record.dataset
    head, _, part = name.partition(":")  # offline:digits, owner/name:config
    named = part and is_hub_id(head) and not is_path(part)
    if name in publication.datasets or named or not is_path(name):
        return visible(cut(" ".join(local(name).split()), 200))
    if evidence.entry.role == "filter":
        return "held-out clean texts" if record.metric == "frr" else "scored texts"
    return f"{'images' if 'image' in evidence.entry.pipeline_tag else 'texts'} of the publisher's own"


def eval_results(evidence: Evidence, publication: Publication) -> list[EvalResult]:
    """The model's own figures for `model-index`: values as results.json holds them, each with rows, interval and seed.

    Example:
        >>> from hf_backdoor_defense.reporting.entries import ModelEntry
        >>> entry = ModelEntry(path="model", arm="d3", seed=0, role="purified", pipeline_tag="text-classification",
        ...                    base_model="owner/model", weights_sha256="0" * 64)
        >>> found = Record("clean", "owner/rows", "owner/model", "badnets", "d3", "", 0, "asr", 0.06, n=200, low=0.03, high=0.1)
        >>> about = Publication(repo_id="me/model", arm="d3", seed=0, license="mit")
        >>> [result] = eval_results(Evidence(payload={}, entry=entry, records=[found]), about)
        >>> result.metric_type, result.metric_value, result.metric_args
        ('attack_success_rate', 0.06, {'seed': 0, 'n': 200, 'low': 0.03, 'high': 0.1})
    """
    order = {metric: index for index, metric in enumerate(dict.fromkeys((*QUALITY, *METRICS)))}
    found = [record for metric, record in evidence.figures.items() if metric not in COST]
    names = {record.metric: dataset_name(record, evidence, publication) for record in found}
    datasets = list(dict.fromkeys(names[metric] for metric in sorted(names, key=order.__getitem__)))
    # The Hub groups results by data set: in that order they come back as they were.
    found.sort(key=lambda record: (datasets.index(names[record.metric]), order[record.metric]))
    return [
        EvalResult(
            task_type=evidence.entry.pipeline_tag,
            dataset_type=names[record.metric],
            dataset_name=names[record.metric],
            metric_type=type_of(record.metric),
            metric_value=record.value,
            metric_name=_metric_name(record),
            metric_args=_about(record),
        )
        for record in found
    ]


def _about(record: Record) -> dict[str, float | int]:
    known = {"seed": record.seed, "n": record.n, "low": record.low, "high": record.high}
    return {name: value for name, value in known.items() if value is not None}


def _metric_name(record: Record) -> str:
    attacked = record.metric in ("asr", "r_acc", "ftr", "der", "far", "aasr", "masr") and record.attack not in (
        "none",
        "unknown",
    )
    attack = visible(cut(" ".join(record.attack.split()), 80))
    return title_of(record.metric) + (f" (simulated {attack})" if attacked else "")
