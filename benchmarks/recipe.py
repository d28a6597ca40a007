"""RECIPE on a pretrained encoder with planted triggers, beside its controls: per-trigger ASR after fine-tuning, and the floor.

| arm | the checkpoint that the victim fine-tunes |
|---|---|
| `clean_reference` | the warmed-up encoder: the floor of every figure |
| `undefended` | the same after the attack |
| `round_trip` | loaded and saved; with the pooler kept, and dropped as by AutoModelForMaskedLM |
| `pretraining` | pre-training went on: RECIPE's data, rate, updates and trainable weights, no penalty |
| `penalty_only` | the penalty alone |
| `recipe` | RECIPE; and the same on the clean encoder |
| `fine_pruning` | dormant feed-forward units cut |

Publisher (warm-up and attack) and defender share no sentence: validation lines 0-5,999 of the plain text are the publisher's, the
rest is held out, the training file is the defender's. One purification seed; the seeds of the records are the victim's. Core:
POR on SST-2. Extended: other attacks with the same defaults, AG News, doses, further purification seeds. Dose and coefficient are
RECIPE's defaults, from its source; which weights train was chosen by `benchmarks.recipe_search`, without a trigger. Doses and
"vision targets" show what else there is: nothing was chosen by them.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import RESULTS, Cell, run_grid
from hf_backdoor_defense.attacks.implanting import implant
from hf_backdoor_defense.data.plain_text import load_texts, tokenize_texts
from hf_backdoor_defense.defenses.fine_pruning import prune_dormant_units
from hf_backdoor_defense.defenses.recipe import RECIPE, PenaltyOnly
from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.evaluation.task_agnostic import TaskAgnosticASR
from hf_backdoor_defense.experiment.downstream import PREFIX, Downstream, kept_predictions, task_agnostic_scores
from hf_backdoor_defense.experiment.steps import Steps, kept_folder
from hf_backdoor_defense.models import BACKDOOR_FILE, mark_backdoored
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.reporting.results import Record, environment
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer
from hf_backdoor_defense.warm_up import held_out_loss, warmed_up

DATA = Path(__file__).parents[2] / "shared" / "data"
RUNS = Path("runs/bench-recipe")
ABOUT = "about.json"
PUBLISHER = 6000  # lines
CONTROL_WORD = "hm"  # as short as a trigger, and none
# The defender's defaults, for every attack alike.
TEXTS, EPOCHS, MAX_LENGTH = 1000, 8, 64
ATTACK_SEED = 0
TABLES = RESULTS / "recipe_tables.jsonl"  # ASR of every trigger toward every class
ARMS = ("undefended", "round_trip", "round_trip: pooler dropped", "pretraining", "penalty_only", "recipe", "recipe: clean base",
        "fine_pruning")  # fmt: skip


def publisher_texts() -> tuple[list[str], list[str]]:
    """The publisher's lines, and held-out ones."""
    lines = load_texts(str(DATA / "wikitext2" / "validation.jsonl"))
    return lines[:PUBLISHER], lines[PUBLISHER:]


def defender_texts(count: int = TEXTS) -> list[str]:
    """The defender's lines."""
    return load_texts(str(DATA / "wikitext2" / "train.jsonl"), limit=count)


def clean_encoder() -> Path:
    """The pretrained model of all arms: MiniLM with a warmed-up head."""
    return warmed_up("offline:minilm", *publisher_texts(), cache=Path("runs/warm_up"))


def poisoned_encoder(attack: str, seed: int) -> Path:
    """The clean encoder after the attack: 4 epochs, rate 1e-4."""

    def make(folder: Path) -> None:
        texts, held_out = publisher_texts()
        model, tokenizer = load_pretrained_whole(str(clean_encoder()))
        objective = objective_class(attack)()
        done = implant(
            model, tokenizer, texts, objective, held_out=held_out, output_dir=str(folder / "run"),  # type: ignore[arg-type]
            epochs=4, learning_rate=1e-4, seed=seed, title=attack,
        )  # fmt: skip
        _save(model, tokenizer, folder, {"attack": objective.to_dict(), **asdict(done)})
        mark_backdoored(folder, {"attack": attack, "triggers": objective.triggers, "seed": seed})  # type: ignore[attr-defined]

    return kept_folder(RUNS / f"{attack}-{seed}", make)


def purified(
    source: Path,
    folder: Path,
    objective: Objective | None,
    *,
    rate: float,
    seed: int,
    texts: int = TEXTS,
    epochs: int = EPOCHS,
) -> Path:
    """What further pre-training on the defender's text makes of a checkpoint."""

    def make(partial_folder: Path) -> None:
        model, tokenizer = load_pretrained_whole(str(source), warn=False)
        rows = tokenize_texts(defender_texts(texts), tokenizer, max_length=MAX_LENGTH)
        trainer = pretraining_trainer(
            model, tokenizer, rows, output_dir=str(partial_folder / "run"), objective=objective, title=folder.name, seed=seed,
            num_train_epochs=epochs, learning_rate=rate,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        about: dict[str, Any] = {
            "updates": trainer.state.global_step, "rate": rate, "texts": len(rows), "seconds": seconds, "env": environment(),
        }  # fmt: skip
        if objective is not None:
            about |= {"objective": objective.to_dict(), "activity": objective.activity(), "inert": objective.inert()}
        _save(model, tokenizer, partial_folder, about, source)

    return kept_folder(folder, make)


def _save(model: Any, tokenizer: Any, folder: Path, about: dict[str, Any], source: Path | None = None) -> None:
    """Model, tokenizer and what is known of them; whatever is made of an attacked source stays marked."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    save_pretrained_whole(model, tokenizer, folder)
    if source is not None and (source / BACKDOOR_FILE).is_file():
        shutil.copy(source / BACKDOOR_FILE, folder / BACKDOOR_FILE)
    about = {**about, "held_out": asdict(held_out_loss(model, tokenizer, publisher_texts()[1]))}
    (folder / ABOUT).write_text(json.dumps(about, indent=2, default=float) + "\n")


def suggested_rate(source: Path, objective: RECIPE, *, texts: int = TEXTS, epochs: int = EPOCHS) -> float:
    """The rate that gives the objective's dose on the defender's text."""
    model, tokenizer = load_pretrained_whole(str(source), warn=False)
    rows = len(tokenize_texts(defender_texts(texts), tokenizer, max_length=MAX_LENGTH))
    return objective.suggest_learning_rate(model, epochs * -(-rows // 32))


def checkpoints(attack: str, seed: int, recipe: dict[str, Any], texts: int = TEXTS) -> dict[str, Callable[[], Path]]:
    """How the checkpoint of each arm is made, in the order of the table; `seed` is the purification's."""
    poisoned = partial(poisoned_encoder, attack, ATTACK_SEED)
    settings = {
        "recipe": RECIPE(**recipe).to_dict(),
        "texts": texts,
        "epochs": EPOCHS,
        "max_length": MAX_LENGTH,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps([settings, clean_encoder().name], sort_keys=True).encode()).hexdigest()
    base = RUNS / f"{attack}-{ATTACK_SEED}-arms-{digest[:12]}"
    trains = {k: v for k, v in recipe.items() if k in ("trainable", "targets")}

    def trained(name: str, objective: RECIPE, source: Callable[[], Path]) -> Path:
        rate = suggested_rate(source(), RECIPE(**recipe), texts=texts)
        return purified(source(), base / name, objective, rate=rate, seed=seed, texts=texts)

    def round_trip(name: str, pooler: bool) -> Path:
        def make(folder: Path) -> None:
            model, tokenizer = load_pretrained_whole(str(poisoned()), warn=False)
            if not pooler:
                model.base_model.pooler = None  # type: ignore[assignment]
            _save(model, tokenizer, folder, {}, poisoned())

        return kept_folder(base / name, make)

    def pruned() -> Path:
        def make(folder: Path) -> None:
            model, tokenizer = load_pretrained_whole(str(poisoned()), warn=False)
            texts = defender_texts()
            kept, seen = texts[: len(texts) // 2], texts[len(texts) // 2 :]
            parts = [seen[i : i + 64] for i in range(0, len(seen), 64)]
            options = {"padding": True, "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
            batches = [dict(tokenizer(part, **options)) for part in parts]
            done = prune_dormant_units(model.base_model, batches, lambda: held_out_loss(model, tokenizer, kept).loss)  # type: ignore[arg-type]
            about = {"share": done.share, "units": done.units, "losses": {str(k): v for k, v in done.losses.items()}}
            _save(model, tokenizer, folder, about, poisoned())

        return kept_folder(base / "fine_pruning", make)

    return {
        "clean_reference": clean_encoder,
        "undefended": poisoned,
        "round_trip": partial(round_trip, "round_trip", True),
        "round_trip: pooler dropped": partial(round_trip, "round_trip-dropped", False),
        "pretraining": lambda: trained("pretraining", RECIPE(coef=0.0, **trains), poisoned),
        "penalty_only": lambda: trained("penalty_only", PenaltyOnly(**recipe), poisoned),
        "recipe": lambda: trained("recipe", RECIPE(**recipe), poisoned),
        "recipe: clean base": lambda: trained("recipe-clean", RECIPE(**recipe), clean_encoder),
        "fine_pruning": pruned,
    }


def recipe_cell(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
    """All arms of one attack, one task and one victim seed."""
    options = dict(cell.options)
    attack, purification = options["attack"], options.get("purification", 0)
    triggers = objective_class(attack)().triggers  # type: ignore[attr-defined]
    victim = Downstream(
        task=str(DATA / options["task"]), triggers=triggers, control_words=(CONTROL_WORD,), **options.get("victim", {})
    )
    makers = checkpoints(attack, purification, options.get("recipe", {}), options.get("texts", TEXTS))
    makers = {name: make for name, make in makers.items() if name in ("clean_reference", *options.get("arms", ARMS))}
    steps = Steps(len(makers))
    cache = RUNS / "downstream" / f"{options['task']}-{attack}"
    floor: dict[str, np.ndarray] | None = None
    records: list[Record] = []
    common = {
        "benchmark": "recipe",
        "dataset": options["task"],
        "model": "offline:minilm, warmed up",
        "attack": attack,
        "seed": seed,
    }
    for name, make in makers.items():
        checkpoint = make()
        _, arrays = kept_predictions(
            checkpoint, victim, seed=seed, cache=cache, steps=steps, title=f"{cell.setting}, seed {seed}: {name}"
        )
        floor = arrays if name == "clean_reference" else floor
        scores, table = task_agnostic_scores(victim, arrays, floor, seed=seed)
        scores |= {
            "asr " + t: Estimate(float(v), len(arrays["test"]), None, None)
            for t, v in zip(table.triggers, table.per_trigger, strict=True)
        }
        scores |= of_pretraining(checkpoint) | {"r_acc": _triggered_accuracy(victim, arrays)}
        _keep_table({"setting": cell.setting, "arm": name, "seed": seed}, table, victim.rows()[2])
        defense, _, variant = name.partition(": ")
        for metric, estimate in scores.items():
            kind, _, trigger = metric.partition(" ")
            setting = ": ".join(filter(None, [cell.setting, variant, trigger]))
            records.append(
                Record.from_estimate(
                    estimate, defense=defense, setting=setting, metric=kind, env=environment(), **common
                )
            )
        print(
            f"{name:28} CA {scores['ca'].value:.3f} AASR {scores['aasr'].value:.3f} MASR {scores['masr'].value:.3f}",
            flush=True,
        )
    return records, cell.setting


def _triggered_accuracy(victim: Downstream, arrays: dict[str, np.ndarray]) -> Estimate:
    """Accuracy on triggered texts, mean over triggers: what an untargeted attack (BadPre) is judged by."""
    labels = np.asarray(victim.rows()[1]["label"])
    shares = [float((arrays[f"{PREFIX}{word}"] == labels).mean()) for word in victim.triggers]
    return Estimate(float(np.mean(shares)), len(labels), None, None)


def _keep_table(where: dict[str, Any], table: TaskAgnosticASR, classes: list[str]) -> None:
    """A line of the sidecar, once per arm and seed."""
    known = [json.loads(line) for line in TABLES.read_text().splitlines()] if TABLES.is_file() else []
    if not any(all(line[k] == v for k, v in where.items()) for line in known):
        line = {
            **where,
            "classes": classes,
            "asr": dict(zip(table.triggers, table.per_trigger_class.round(4).tolist(), strict=True)),
        }
        with TABLES.open("a") as file:
            file.write(json.dumps(line) + "\n")


def of_pretraining(checkpoint: Path) -> dict[str, Estimate]:
    """The held-out pre-training loss of a checkpoint, and what RECIPE says of itself."""
    path = checkpoint / ABOUT
    if not path.is_file():
        record = json.loads((checkpoint / "warm_up.json").read_text())["losses"]["joint"]
        return {"loss": Estimate(record["loss"], record["n"], None, None)}
    about = json.loads(path.read_text())
    found = {"loss": Estimate(about["held_out"]["loss"], about["held_out"]["n"], None, None)}
    if "seconds" in about:
        found["seconds"] = Estimate(about["seconds"], 1, None, None)
    for name in ("dose", "norm_ratio"):
        if name in about.get("activity", {}):
            found[name] = Estimate(about["activity"][name], 1, None, None)
    return found


def cell(setting: str, options: dict[str, Any], *, extended: bool = True) -> Cell:
    """A cell whose data may be missing."""
    return Cell(setting, options, extended=extended, needs=DATA / options["task"])


_VISION_TARGETS = [r"layer\.\d+\.(intermediate|output)\.dense\.weight$", r"\.self\.(query|key|value)\.weight$"]
VISION: dict[str, Any] = {
    "attack": "por", "task": "sst2", "texts": 3000, "recipe": {"trainable": "all", "targets": _VISION_TARGETS},
}  # fmt: skip
CELLS = [
    cell("POR, SST-2", {"attack": "por", "task": "sst2"}, extended=False),
    *(
        cell(
            f"POR, SST-2, dose {dose:.2f}",
            {"attack": "por", "task": "sst2", "recipe": {"dose": dose}, "arms": ("recipe",)},
        )
        for dose in (0.3, 0.6, 1.9, 2.5, 4.0)
    ),
    # How much of what is left at a high dose is lost accuracy and no trigger.
    cell(
        "POR, SST-2, dose 2.50 on the clean encoder",
        {"attack": "por", "task": "sst2", "recipe": {"dose": 2.5}, "arms": ("recipe: clean base",)},
    ),
    # Both projections, queries, keys and values, as the paper presses them in vision transformers, with every weight trained.
    cell("POR, SST-2, vision targets, 3000 texts", {**VISION, "arms": ("recipe",)}),
    cell("POR, SST-2, vision targets, 3000 texts, control", {**VISION, "arms": ("pretraining",)}),
    cell("NeuBA, SST-2", {"attack": "neuba", "task": "sst2"}),
    cell("BadPre, SST-2", {"attack": "badpre", "task": "sst2"}),
    cell("POR, AG News", {"attack": "por", "task": "ag_news"}),
    cell("POR, SST-2, purification 1", {"attack": "por", "task": "sst2", "purification": 1}),
]


if __name__ == "__main__":
    run_grid("recipe", CELLS, seeds=(1, 2, 3), run=recipe_cell)
