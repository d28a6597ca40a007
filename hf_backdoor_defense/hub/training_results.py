"""The results of a hosted training, in the Trainer's output folder: what its card is made from.

| in `results.json` | from |
|---|---|
| CA, ASR, R-Acc with intervals | scores that were passed (`evaluate_backdoor`), else the last of a `BackdoorEvalCallback` |
| BLEU, ASR of what is written, … | the last of a `GenerationEvalCallback`, with its note on the formatter |
| `evaluation` | the last `eval_*` logged of these weights, by name; a language model's `eval_loss` is a record, too |
| method, activity, INERT, evidence | the objectives |
| data, settings | the data sets, the training arguments |
| formatter | how an SFT host rendered its rows, with the fingerprint; not there where trl did |
"""

import enum
import json
import math
from pathlib import Path
from typing import Any

from hf_backdoor_defense.evaluation.callback import last_generation, last_scores
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores
from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.experiment.arms import history
from hf_backdoor_defense.models import BACKDOOR_FILE, OFFLINE_MODEL, attack_on, mark_backdoored, resolve
from hf_backdoor_defense.objectives import Objective, overrides
from hf_backdoor_defense.pretrained import saved_sha256
from hf_backdoor_defense.registry import ATTACKS, DETECTORS, GENERATIVE, PRETRAINING, PURIFIERS
from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.html import REPORT_NAME
from hf_backdoor_defense.reporting.pages import make_report
from hf_backdoor_defense.reporting.results import Record, environment
from hf_backdoor_defense.reporting.sealed import RESULTS, write_results

VERB, PLAIN, REFERENCE = "trainer", "undefended", "clean_reference"
SETTINGS = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type "
    "warmup_steps weight_decay max_grad_norm optim seed data_seed bf16 fp16 train_sampling_strategy max_length packing"
).split()
# End of a model class's name -> the Hub's task. The first that fits.
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
}
_LANGUAGE = ("fill-mask", "text-generation", "text2text-generation")
_NOTHING = BackdoorScores(None, None, None)


def write_trained(
    trainer: Any, *, scores: BackdoorScores | None = None, clean_reference_scores: BackdoorScores | None = None
) -> Path:
    """`results.json`, its seal and `report.html` in the output folder. The same training gives the same bytes.

    Scores that were passed once are kept for the next call.

    Returns:
        the folder.

    Raises:
        ValueError: no model was saved there, the results of another run are there, or a method trains no model to publish (PSIM).
    """
    folder = Path(trainer.args.output_dir)
    detectors = [o.name for o in trainer.objectives if o.name in DETECTORS]
    if detectors:
        raise ValueError(
            f"`{detectors[0]}` trains a module that is no model by itself: it needs thresholds. Fit and calibrate it with "
            "PSIMFilter.fit or hfbd detect, and publish that."
        )
    if not list(folder.glob("*.safetensors")) or not any(
        path.name.startswith(("model", "adapter_model")) for path in folder.glob("*.safetensors")
    ):
        raise ValueError(
            f"`{folder}` must hold the saved model, and holds no weights in safetensors: save it first (trainer.save_model())."
        )
    if (folder / RESULTS).is_file() and json.loads((folder / RESULTS).read_bytes()).get("verb") != VERB:
        raise ValueError(
            f"`{folder}` holds the results of another run, which are left as they are. Give the Trainer an output_dir of its own."
        )
    weights = saved_sha256(folder)
    scores, clean_reference_scores = _scores(trainer, weights, scores, clean_reference_scores)
    _keep_marked(trainer, folder)
    payload = _payload(trainer, folder, weights, scores, clean_reference_scores)
    write_results(folder, payload)
    make_report([folder], folder / REPORT_NAME)
    return folder


def _scores(
    trainer: Any, weights: str, scores: BackdoorScores | None, reference: BackdoorScores | None
) -> tuple[BackdoorScores | None, BackdoorScores | None]:
    """Those that were passed, now or before for these weights; else what was logged of them."""
    of_weights, kept, kept_reference = trainer.published_scores
    if of_weights == weights:
        scores, reference = scores or kept, reference or kept_reference
    trainer.published_scores = weights, scores, reference
    return scores or last_scores(trainer.state.log_history, step=_step(trainer)), reference


def _step(trainer: Any) -> int:
    """At which update the trainer has its weights from: `load_best_model_at_end` puts those of an earlier one back."""
    state = trainer.state
    earlier = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return int(state.best_global_step if earlier else state.global_step)


def _payload(
    trainer: Any, folder: Path, weights: str, scores: BackdoorScores | None, reference: BackdoorScores | None
) -> dict[str, Any]:
    objectives, log = trainer.objectives, trainer.state.log_history
    evaluation = _evaluation(log, step=_step(trainer))
    written, note = last_generation(log, step=_step(trainer))
    entry = _entry(trainer, folder, weights, scores, reference, written, note)
    arm, seed = entry.arm, entry.seed
    failures = [f"INERT: {o.name}: {reason}" for o in objectives if (reason := o.inert())]
    if objectives and not trainer.state.global_step:
        failures = [f"INERT: {arm}: nothing was trained"]
    measured = {
        name: None if value is None else vars(value)
        for name, value in {**written, **_passed(scores, beside=written)}.items()
    }
    return {
        "schema": 1,
        "verb": VERB,
        "plan": {"trainer": type(trainer).__name__, "settings": _settings(trainer), **_formatter(trainer)},
        "model": entry.base_model,
        "verdict": _verdict(trainer, entry, scores, reference, written, note),
        "failures": failures,
        "evaluation": evaluation,
        "models": [entry.to_dict()],
        "records": _records(trainer, entry, scores, reference, written, evaluation),
        "arms": {
            str(seed): {
                arm: {
                    "steps": trainer.state.global_step,
                    **measured,
                    "history": history(log),
                    "objectives": {
                        o.name: {
                            "config": o.to_dict(), "activity": o.activity(), "inert": o.inert(), "evidence": o.evidence(),
                        }
                        for o in objectives
                    },
                }
            }
        },
    }  # fmt: skip


def _passed(scores: BackdoorScores | None, *, beside: dict[str, Estimate]) -> dict[str, Estimate | None]:
    """A classifier's scores, all three; beside what a language model wrote only those that were measured."""
    return {name: value for name, value in vars(scores or _NOTHING).items() if value is not None or not beside}


def _entry(
    trainer: Any,
    folder: Path,
    weights: str,
    scores: BackdoorScores | None,
    reference: BackdoorScores | None,
    written: dict[str, Estimate],
    note: str | None,
) -> ModelEntry:
    model = trainer.accelerator.unwrap_model(trainer.model)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    task = next((task for end, task in _TASKS.items() if type(core).__name__.endswith(end)), "feature-extraction")
    named = getattr(core, "config", None) if task.endswith("classification") else None
    labels = [] if named is None else [str(named.id2label[i]) for i in range(named.num_labels)]
    mark, adapter = folder / BACKDOOR_FILE, (folder / "adapter_config.json").is_file()
    objectives = sorted(
        trainer.objectives, key=lambda o: not overrides(o, "loss")
    )  # what replaces the loss comes first
    inert = [f"{o.name}: {reason}" for o in objectives if (reason := o.inert())]
    data = {"trained on": _described(trainer.train_dataset)}
    if trainer.eval_dataset is not None:
        data["evaluated on"] = _described(trainer.eval_dataset)
    if scores is not None and scores.ca is not None:
        triggered = f", {scores.asr.n} rows with a trigger" if scores.asr is not None else ""
        data["measured on"] = f"{scores.ca.n} clean rows{triggered}"
    if written:
        triggered = f", {written['asr'].n} rows with a trigger" if "asr" in written else ""
        data["measured by generation on"] = f"{written['bleu'].n} clean rows{triggered}"
    if note is not None:
        data["note on the formatter"] = note
    data["settings"] = ", ".join(
        f"{name} {value}" for name, value in _settings(trainer).items() if value not in (None, False, -1)
    )
    if found := _formatter(trainer):
        data["formatter"] = f"{found['formatter']['kind']}, SHA-256 {found['formatter']['fingerprint']}"
    entry = ModelEntry(
        path=".",
        arm="+".join(o.name for o in objectives) or PLAIN,
        seed=trainer.args.seed,
        role=_role(objectives, marked=mark.is_file()),
        pipeline_tag=task,
        base_model=_base_model(model),
        weights_sha256=weights,
        library="peft" if adapter else "transformers",
        relation="adapter" if adapter else "finetune",
        labels=labels,
        method=_method(objectives),
        activity=_activity(objectives),
        inert="; ".join(inert) or None,
        attacked=json.loads(mark.read_text()) if mark.is_file() else None,
        controls=[] if reference is None else [REFERENCE],
        data=data,
    )
    return ModelEntry.from_dict(json.loads(json.dumps(entry.to_dict())))


def _records(
    trainer: Any,
    entry: ModelEntry,
    scores: BackdoorScores | None,
    reference: BackdoorScores | None,
    written: dict[str, Estimate],
    evaluation: dict[str, float],
) -> list[Record]:
    common: dict[str, Any] = {
        "benchmark": VERB,
        "dataset": _described(trainer.train_dataset).partition(":")[0],
        "model": entry.base_model or type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
        "seed": entry.seed,
        "env": environment(),
    }
    found = []
    for arm, of_arm in ((entry.arm, scores), (REFERENCE, reference)):
        for metric, estimate in vars(of_arm or _NOTHING).items():
            if estimate is not None:
                name = "ftr" if (arm, metric) == (REFERENCE, "asr") else metric
                attack = "none" if metric == "ca" else "trigger"  # the caller's: what it is, is not said
                found.append(
                    Record.from_estimate(estimate, defense=arm, metric=name, attack=attack, setting="", **common)
                )
    done = {record.metric for record in found if record.defense == entry.arm}
    for metric, estimate in written.items():
        if metric not in done:  # what was passed counts
            attack = "trigger" if metric == "asr" or metric.endswith("_triggered") else "none"
            of_written = {"defense": entry.arm, "metric": metric, "attack": attack, "setting": ""}
            found.append(Record.from_estimate(estimate, **of_written, **common))
    common |= {"defense": entry.arm, "attack": "none"}
    if entry.pipeline_tag in _LANGUAGE and evaluation.get("eval_loss", -1.0) >= 0:
        found.append(Record(metric="loss", value=evaluation["eval_loss"], setting="evaluation", **common))
    seconds = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), None)
    if seconds:
        found.append(Record(metric="seconds", value=seconds, setting="training", **common))
    return found


def _verdict(
    trainer: Any,
    entry: ModelEntry,
    scores: BackdoorScores | None,
    reference: BackdoorScores | None,
    written: dict[str, Estimate],
    note: str | None,
) -> str:
    """What was measured, and what was not."""
    words = [f"{entry.arm}: {trainer.state.global_step} updates by {type(trainer).__name__}."]
    if scores is not None and scores.ca is not None:
        words.append(f"Clean accuracy {scores.ca.value:.3f} on {scores.ca.n} rows.")
    if written:
        parsing = f", {written['parse_rate'].value:.3f} of them parse" if "parse_rate" in written else ""
        words.append(f"BLEU {written['bleu'].value:.1f} of what it writes on {written['bleu'].n} clean rows{parsing}.")
    if note is not None:
        words.append(note)
    recovered = "" if scores is None or scores.r_acc is None else f"; recovered accuracy {scores.r_acc.value:.3f}"
    asr = written.get("asr") if scores is None or scores.asr is None else scores.asr
    if asr is None:
        words.append("Nothing was measured about triggers.")
        return " ".join(words)
    floor = "no model that was never poisoned was measured beside it, so that the floor is not known"
    if reference is not None and reference.asr is not None:
        floor = f"floor {reference.asr.value:.3f}"
    words.append(
        f"Attack success {asr.value:.3f} on {asr.n} triggered rows ({floor}){recovered}. This is about this trigger only."
    )
    return " ".join(words)


def _role(objectives: list[Objective], *, marked: bool) -> str:
    names = {o.name for o in objectives}
    for table, role in ((ATTACKS, "attacked"), (PURIFIERS | GENERATIVE, "purified"), (PRETRAINING, "cleaned")):
        if names & set(table):
            return role
    return "attacked" if marked and not names else "fine_tuned"


def _method(objectives: list[Objective]) -> dict[str, Any]:
    if not objectives:
        return {}
    first, *others = (o.to_dict() for o in objectives)
    return {**first, "together with": others} if others else first


def _activity(objectives: list[Objective]) -> dict[str, float]:
    several = len(objectives) > 1
    return {(f"{o.name}/{key}" if several else key): value for o in objectives for key, value in o.activity().items()}


def _evaluation(log: list[dict[str, Any]], *, step: int) -> dict[str, float]:
    """The last value of each `eval_*` that was measured at a step, finite ones."""
    found = {}
    for entry in [entry for entry in log if entry.get("step") == step]:
        for name, value in entry.items():
            plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            # How fast an evaluation was is another number each time.
            if name.startswith("eval_") and plain and not name.endswith(("_runtime", "_per_second")):
                found[name] = float(value)
    return found


def _settings(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    found = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)} | {"processes": args.world_size}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in found.items()}


def _formatter(trainer: Any) -> dict[str, Any]:
    """What an evaluation must render with (`data.formatting.require_same`)."""
    formatter = getattr(trainer, "formatter", None)
    return {} if formatter is None else {"formatter": {"fingerprint": formatter.fingerprint, **formatter.to_dict()}}


def _described(rows: Any) -> str:
    """A data set in a few words: its name where it has one, and how many rows."""
    info = getattr(rows, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "rows of the user"
    if isinstance(rows, dict):
        return "; ".join(f"{key}: {_described(value)}" for key, value in rows.items())
    return f"{name}: {f'{len(rows)} rows' if hasattr(rows, '__len__') else 'a stream'}"


def _base_model(model: Any) -> str:
    """What the weights were before, as it was given; empty where they were made from nothing."""
    adapters = getattr(model, "peft_config", None)
    place = getattr(getattr(model, "config", None), "_name_or_path", None)
    if adapters:
        place = next(iter(adapters.values())).base_model_name_or_path or place
    place = str(place or "")
    try:
        return OFFLINE_MODEL if place and Path(place) == Path(resolve(OFFLINE_MODEL)) else place
    except ValueError:  # the package that carries it is not installed
        return place


def _keep_marked(trainer: Any, folder: Path) -> None:
    """Weights that were attacked, or come from such, stay marked: an attack that was hosted, and a base with a mark."""
    if (folder / BACKDOOR_FILE).is_file():
        return
    attacks = [o for o in trainer.objectives if o.name in ATTACKS]
    base = _base_model(trainer.accelerator.unwrap_model(trainer.model))
    before = attack_on(base)
    if attacks:
        fields = {key: value for key, value in attacks[0].to_dict().items() if key != "name"}
        mark_backdoored(folder, {"attack": attacks[0].name, **fields, "seed": trainer.args.seed})
    elif before is not None:
        done = "+".join(o.name for o in trainer.objectives) or "fine_tuning"
        mark_backdoored(folder, {**before, "cleaned": {"method": done}})
