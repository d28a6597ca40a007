"""Backdoored classifiers, purified with a few clean rows: D3 and ULRL beside FT-SAM and plain fine-tuning, for images and texts.

| arm | what it is |
|---|---|
| `clean_reference` | trained on clean rows: the floor of ASR (its FTR) |
| `undefended` | trained on the poisoned rows |
| `fine_tuning` | the undefended model, trained on with the clean rows: the control, at every method's settings |
| `retrained` | a fresh model (texts: the pretrained encoder) trained on the clean rows alone: what they are worth by themselves |
| `ft_sam`, `d3`, `ulrl` (extended: `fine_pruning`) | the same rows, optimizer, rate, updates and seed |
| setting "CELL: clean model" | the same four on the clean reference: what a defense costs where there is nothing to purify |

The clean rows are a share of the training rows as they were before the attack; no method sees the test rows or a trigger. The
attacker trains with SGD (rate 0.05, images) or AdamW (texts): what is planted so survives plain fine-tuning, which is what makes
it a test. Defaults of the methods and the rate of the host come from `benchmarks.purify_search` (validation rows, other seeds).

Core: digits {patch, blend} with 20 % clean rows and SST-2 BadNets with 300, three seeds; sign digits {patch, SIG}, one seed.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PrinterCallback, TrainingArguments, set_seed

from benchmarks.grid import Cell, run_grid
from hf_backdoor_defense.attacks.image_triggers import get_image_trigger
from hf_backdoor_defense.attacks.poisoning import poison_dataset, trigger_dataset
from hf_backdoor_defense.attacks.triggers import get_trigger
from hf_backdoor_defense.classifiers import Classifier
from hf_backdoor_defense.data.images import load_images
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.evaluation.metrics import Estimate, defense_effectiveness_rate
from hf_backdoor_defense.experiment.attack_models import silent
from hf_backdoor_defense.experiment.purify import purify
from hf_backdoor_defense.experiment.steps import kept_folder
from hf_backdoor_defense.models import load_classifier, mark_backdoored
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.reporting.results import Record, environment
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.vision import load_image_classifier, new_digits_vit

DATA = Path(__file__).parents[2] / "shared" / "data"
RUNS = Path("runs/bench-purify")
METHODS = ("fine_tuning", "ft_sam", "d3", "ulrl")
TARGET = 0
MAX_LENGTH = 64  # tokens


@dataclass(frozen=True)
class Problem:
    """What is attacked and how. `clean`: rows of the defender, a share of the training rows or (1 and more) a number."""

    task: str
    kind: str
    trigger: dict[str, Any]
    rate: float = 0.1
    clean_label: bool = False
    clean: float = 0.2
    limit: int | None = None
    on_clean: bool = True
    epochs: int = 100
    variants: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # further settings of D3, reported as "CELL: NAME"

    def get_trigger(self) -> Any:
        return (get_trigger if self.kind == "text" else get_image_trigger)(**self.trigger)


@dataclass(frozen=True)
class Rows:
    """Training rows before and after the attack, rows that are judged, the defender's."""

    train: Dataset
    poisoned: Dataset
    judged: Dataset
    triggered: Dataset
    clean: Dataset


def rows_of(problem: Problem, seed: int, *, judged: str = "test") -> Rows:
    """All rows of one seed. Where validation rows are not judged, they are trained on."""
    loader: Callable[..., Any] = load if problem.kind == "text" else load_images
    data = loader(problem.task, limit=problem.limit)
    train = data["train"]
    if judged == "test" and problem.kind == "image":
        train = concatenate_datasets([train, data["validation"]])
    trigger = problem.get_trigger()
    poisoned = poison_dataset(
        train, trigger, target=TARGET, rate=problem.rate, clean_label=problem.clean_label, seed=seed
    )
    count = round(problem.clean * len(train)) if problem.clean < 1 else int(problem.clean)
    order = sorted(range(len(train)), key=lambda i: _digest(f"clean|{seed}|{train['row_id'][i]}"))
    return Rows(
        train=train,
        poisoned=poisoned.dataset,
        judged=data[judged],
        triggered=trigger_dataset(data[judged], trigger, target=TARGET, seed=seed),
        clean=train.select(sorted(order[:count])),
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def fresh(problem: Problem, names: list[str], seed: int, image: Any) -> Classifier:
    """The model before training: a tiny ViT from scratch, or the pretrained encoder with a head that is drawn."""
    if problem.kind == "text":
        model, processor = load_classifier("offline:minilm", num_labels=len(names), label_names=names, seed=seed)
        return Classifier(model=model, processor=processor, kind="text", labels=names)
    channels = 1 if image.mode == "L" else 3
    model, processor = new_digits_vit(
        len(names), image_size=image.size[0], channels=channels, seed=seed, label_names=names
    )
    return Classifier(model=model, processor=processor, kind="image", labels=names)


def trained(
    problem: Problem, train: Dataset, seed: int, folder: Path, *, mark: dict[str, Any] | None = None, longer: int = 1
) -> Path:
    """A model trained on `train`, saved once. Images: SGD 0.05 with momentum; texts: AdamW, 3 epochs of 5e-5.

    `longer`: so many times the epochs, for few rows.
    """

    def make(partial_folder: Path) -> None:
        names = train.features["label"].names
        classifier = fresh(problem, names, seed, train[0].get("image"))
        text = problem.kind == "text"
        rows = classifier.rows(
            train.remove_columns([c for c in train.column_names if c == "original_label"]), max_length=MAX_LENGTH
        )
        set_seed(seed)
        args = TrainingArguments(
            str(partial_folder / "run"), seed=seed, report_to="none", save_strategy="no", remove_unused_columns=False,
            num_train_epochs=longer * (3 if text else problem.epochs), per_device_train_batch_size=32 if text else 64,
            learning_rate=5e-5 if text else 0.05, lr_scheduler_type="linear" if text else "cosine", warmup_steps=0.1,
            logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length" if text else "random",
        )  # fmt: skip
        sgd = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
        trainer = DefendedTrainer(
            classifier.model, args=args, train_dataset=rows, data_collator=classifier.collator(),
            **({} if text else {"optimizer_cls_and_kwargs": sgd}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        classifier.model.save_pretrained(str(partial_folder))
        classifier.processor.save_pretrained(str(partial_folder))
        (partial_folder / "about.json").write_text(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
        if mark is not None:
            mark_backdoored(partial_folder, mark)

    return kept_folder(folder, make)


def loaded(problem: Problem, folder: Path, names: list[str]) -> Classifier:
    """A model of `trained`."""
    loader: Callable[..., Any] = load_classifier if problem.kind == "text" else load_image_classifier
    model, processor = loader(str(folder), num_labels=len(names))
    return Classifier(model=model, processor=processor, kind=problem.kind, labels=names)  # type: ignore[arg-type]


def scored(classifier: Classifier, rows: Rows) -> BackdoorScores:
    """CA, ASR and R-Acc on the judged rows."""
    return evaluate_backdoor(
        classifier.model,
        classifier.rows(rows.judged, max_length=MAX_LENGTH),
        classifier.rows(rows.triggered, max_length=MAX_LENGTH),
        target=TARGET,
        collate=classifier.collator(),
    )


def purified(
    problem: Problem, folder: Path, rows: Rows, defense: str | Objective | None, seed: int, **settings: Any
) -> tuple[BackdoorScores, dict[str, Any]]:
    """What a method makes of the model in `folder`: scores and report. Nothing is written."""
    classifier = loaded(problem, folder, rows.train.features["label"].names)
    result = purify(
        classifier.model, rows.clean, defense=defense, processor=classifier.processor, max_length=MAX_LENGTH, seed=seed,
        show_progress=False, **settings,
    )  # fmt: skip
    return scored(dataclasses.replace(classifier, model=result.model), rows), result.report


def models(problem: Problem, rows: Rows, seed: int, folder: Path, *, clean: bool = True) -> dict[str, Path]:
    """The clean reference (if asked for) and the undefended model of one seed, trained once."""
    mark = {"attack": problem.trigger, "target": TARGET, "rate": problem.rate, "seed": seed}
    reference = RUNS / "clean" / f"{_key(problem)}-{len(rows.train)}-{seed}"
    found = {"clean_reference": trained(problem, rows.train, seed, reference)} if clean else {}
    return found | {"undefended": trained(problem, rows.poisoned, seed, folder / "undefended", mark=mark)}


def _key(problem: Problem) -> str:
    return Path(problem.task.replace(":", "-")).stem


def run_cell(
    problem: Problem, methods: tuple[str, ...], cell: Cell, seed: int, folder: Path
) -> tuple[list[Record], str]:
    """Records of one cell and seed."""
    rows = rows_of(problem, seed)
    names = rows.train.features["label"].names
    places = models(problem, rows, seed, folder)
    before = {arm: scored(loaded(problem, place, names), rows) for arm, place in places.items()}
    common: dict[str, Any] = {
        "benchmark": "purify", "dataset": _key(problem), "model": "minilm" if problem.kind == "text" else "tiny-vit",
        "attack": problem.trigger["name"], "seed": seed, "env": environment(),
    }  # fmt: skip
    records: list[Record] = []
    for arm, found in before.items():
        records += _scores(found, arm, cell.setting, common)
        print(f"{cell.setting} {seed} {arm:16} {_line(found)}", flush=True)
    alone = trained(
        problem, rows.clean, seed, RUNS / "retrained" / f"{_key(problem)}-{len(rows.clean)}-{seed}", longer=3
    )
    records += _scores(scored(loaded(problem, alone, names), rows), "retrained", cell.setting, common)
    for arm, place in places.items():
        if arm == "clean_reference" and not problem.on_clean:
            continue
        setting = cell.setting if arm == "undefended" else f"{cell.setting}: clean model"
        for method in methods:
            found, report = _kept(
                folder / arm / f"{method}.json", partial(purified, problem, place, rows, method, seed)
            )
            records += _scores(found, method, setting, common)
            records += _costs(found, before[arm], report, method, setting, common)
            suspects = f" suspects {report['evidence']['suspected_classes']}" if method == "ulrl" else ""
            print(f"{setting} {seed} {method:16} {_line(found)}{suspects}", flush=True)
    for name, fields in problem.variants.items():
        setting = f"{cell.setting}: {name}"
        make = partial(purified, problem, places["undefended"], rows, D3.from_dict(fields), seed)
        found, report = _kept(folder / "undefended" / f"{name.replace(' ', '-')}.json", make)
        records += _scores(found, "d3", setting, common)
        records += _costs(found, before["undefended"], report, "d3", setting, common)
        print(f"{setting} {seed} {_line(found)}", flush=True)
    return records, ""


def _kept(
    path: Path, make: Callable[[], tuple[BackdoorScores, dict[str, Any]]]
) -> tuple[BackdoorScores, dict[str, Any]]:
    """Scores and report of a purification, made once."""
    if not path.is_file():
        scores, report = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps({"scores": asdict(scores), "report": report}, default=float) + "\n")
        partial_path.replace(path)
    kept = json.loads(path.read_text())
    estimates = {name: None if value is None else Estimate(**value) for name, value in kept["scores"].items()}
    return BackdoorScores(**estimates), kept["report"]


def _scores(found: BackdoorScores, arm: str, setting: str, common: dict[str, Any]) -> list[Record]:
    asr = "ftr" if arm == "clean_reference" or setting.endswith("clean model") else "asr"
    pairs = (("ca", found.ca), (asr, found.asr), ("r_acc", found.r_acc))
    return [
        Record.from_estimate(value, defense=arm, setting=setting, metric=metric, **common)
        for metric, value in pairs
        if value is not None
    ]


def _costs(
    after: BackdoorScores,
    before: BackdoorScores,
    report: dict[str, Any],
    method: str,
    setting: str,
    common: dict[str, Any],
) -> list[Record]:
    """Seconds; DER where there was an attack; for ULRL how many classes were suspected, and whether the target was."""
    assert after.ca and before.ca and after.asr and before.asr
    fields: dict[str, Any] = {"defense": method, "setting": setting, **common}
    records = [Record(metric="seconds", value=report["seconds"], **fields)]
    if not setting.endswith("clean model"):
        der = defense_effectiveness_rate(
            ca_before=before.ca.value, ca_after=after.ca.value, asr_before=before.asr.value, asr_after=after.asr.value
        )
        records.append(Record(metric="der", value=der, **fields))
    if method == "ulrl" and report["evidence"]["units"] == "rows":
        suspected = report["evidence"]["suspected_classes"]
        records.append(Record(metric="suspects", value=len(suspected), **fields))
        records.append(Record(metric="target_suspected", value=float(TARGET in suspected), **fields))
    return records


def _line(found: BackdoorScores) -> str:
    shown = ((name, getattr(found, name)) for name in ("ca", "asr", "r_acc"))
    return "  ".join(f"{name} {value.value:.3f}" for name, value in shown if value is not None)


DIGITS = Problem("offline:digits", "image", {"name": "patch"})
SIGNS = Problem(str(DATA / "sign_digits" / "sign_digits_32.npz"), "image", {"name": "patch"}, on_clean=False)
SST2 = Problem(str(DATA / "sst2"), "text", {"name": "badnets", "words": ["cf"]}, clean=300, limit=1000, on_clean=False,
               variants={"d3 from W0": {"warm_up": "near", "lam": 2.0}})  # fmt: skip
PROBLEMS: dict[str, Problem] = {
    "digits patch": DIGITS,
    "digits blend": dataclasses.replace(
        DIGITS, trigger={"name": "blend"}, on_clean=False
    ),  # the clean model is the same
    "sst2 badnets": SST2,
    "signs patch": SIGNS,
    "signs sig": dataclasses.replace(SIGNS, trigger={"name": "sig"}, clean_label=True, rate=0.08, on_clean=False),
    "digits wanet": dataclasses.replace(DIGITS, trigger={"name": "wanet"}, on_clean=False),
    "digits patch 10 %": dataclasses.replace(DIGITS, clean=0.1),
    "digits patch 5 %": dataclasses.replace(DIGITS, clean=0.05),
    "sst2 insent": dataclasses.replace(SST2, trigger={"name": "insent"}),
    "ag_news badnets": dataclasses.replace(SST2, task=str(DATA / "ag_news")),
}
CORE = ("digits patch", "digits blend", "sst2 badnets", "signs patch", "signs sig")
ONE_SEED = ("signs patch", "signs sig")
SEEDS = (1, 2, 3)


def main() -> None:
    """The command line."""

    def run(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
        if cell.setting in ONE_SEED and seed != SEEDS[0]:
            return [], ""
        with silent():
            return run_cell(PROBLEMS[cell.setting], METHODS, cell, seed, folder)

    cells = [
        Cell(
            setting=name,
            extended=name not in CORE,
            needs=Path(problem.task) if problem.task.startswith(str(DATA)) else None,
        )
        for name, problem in PROBLEMS.items()
    ]
    run_grid("purify", cells, SEEDS, run=run)


if __name__ == "__main__":
    main()
