"""From plans to `ModelEntry`: what each verb says of the models that it leaves in its folder.

| verb | models | measured again by |
|---|---|---|
| train | every arm under `models/`: of an attack that was simulated only with `save_models` | the task's split, the arm's seed |
| purify | `model` | `--test`, or the rows that were held out of `--clean` |
| clean | `model` | nothing: only its loss was measured |
| detect | `filter`, where it holds a trained module (PSIM) | nothing: its rate belongs to texts that its owner keeps |
| attack | every base and victim under `models/` | the rows of the split that were measured on |
| implant | `model` | nothing: victims are fine-tuned for that |

A folder counts as a model when it is there: what a run does not keep is not named.
"""

import json
from pathlib import Path
from typing import Any

from hf_backdoor_defense.attacks.wording import trigger_line
from hf_backdoor_defense.experiment.attack_plan import TRIGGER_SEED, AttackPlan
from hf_backdoor_defense.experiment.clean_plan import CleanPlan
from hf_backdoor_defense.experiment.detect import DetectPlan
from hf_backdoor_defense.experiment.implant import ImplantPlan
from hf_backdoor_defense.experiment.purify_plan import PurifyPlan
from hf_backdoor_defense.experiment.purify_training import FINE_TUNING
from hf_backdoor_defense.experiment.remeasure import rows_digest
from hf_backdoor_defense.models import attack_on, backdoor_mark
from hf_backdoor_defense.pretrained import saved_sha256
from hf_backdoor_defense.reporting.entries import ModelEntry

UNTOUCHED = ("undefended", "clean_reference")
OFFLINE_MODELS = ("offline:digits-vit",)
"""Names of models that are made from nothing."""


def train_entries(plan: Any, results: dict[int, Any], between: dict[int, Any]) -> list[dict[str, Any]]:
    """Of `hfbd train`: the arms whose models are kept, seed by seed.

    Args:
        results, between: as `summary.write_outcome` takes them.
    """
    run, kind = plan.run, plan.kind
    labels, trigger = plan.data["train"].features["label"].names, run.get_trigger()
    judged = plan.data[run.eval_split]
    rows_sha256 = None
    found = []
    for seed, arms in results.items():
        for arm, result in arms.items():
            place = f"models/seed-{seed}/{arm}"
            if not (plan.folder / place).is_dir():
                continue
            rows_sha256 = rows_sha256 or rows_digest(judged)
            account = {} if arm in UNTOUCHED else last_account(arm, arms, between.get(seed, {}))
            data = {
                "trained on": f"{run.task}: {result['rows']} {kind.name}s",
                "measured on": f"{len(judged)} {run.eval_split} rows of {run.task}",
            }
            if trigger is not None:
                if arm != "clean_reference":
                    data["poisoned"] = f"{plan.planted['requested']} rows, a share of {run.poison_rate:g}, on purpose"
                data["trigger"] = trigger_line(trigger.to_dict(), labels, run.target)
            controls = [*UNTOUCHED, *(["matched_decay"] if arm == "dece" else [])]
            found.append(
                _entry(
                    plan.folder,
                    place,
                    arm=arm,
                    seed=seed,
                    role="fine_tuned",
                    pipeline_tag=f"{kind.name}-classification",
                    base_model="" if run.model_name in OFFLINE_MODELS else run.model_name,
                    labels=labels,
                    method=account.get("config", {}),
                    activity=account.get("activity", {}),
                    inert=account.get("inert"),
                    controls=[name for name in controls if name in arms and name != arm],
                    data=data,
                    measurement={
                        "kind": kind.name, "task": str(run.task), "reader": "splits", "split": run.eval_split,
                        "limit": run.limit, **_columns(run, kind.name), "max_length": run.max_length,
                        **_simulated(trigger, run.target, seed), "rows_sha256": rows_sha256,
                    },
                )
            )  # fmt: skip
    return found


def last_account(
    name: str, arms: dict[str, dict[str, Any]], between: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What a method said of itself in the last training that hosted it.

    >>> last_account("dece", {"dece": {"objectives": {"dece": {"inert": None}}}}, {})
    {'inert': None}
    """
    trainings = [arms[name], *reversed(between.get(name, [])), arms.get("undefended", {})]
    return next((t["objectives"][name] for t in trainings if name in t.get("objectives", {})), {})


def purify_entry(plan: PurifyPlan, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of `hfbd clean --method d3`, ulrl, …: the purified model; of the control alone, a fine-tuned one."""
    run, own, classifier = plan.run, arms[plan.method], plan.classifier
    source = run.clean if run.test is None else run.test
    data = {
        "clean rows": f"{run.clean}: {len(plan.clean)} {classifier.kind}s to train on",
        "measured on": f"{len(plan.test)} rows that were not trained on, {'held out' if run.test is None else f'of {run.test}'}",
    }
    if plan.target is not None:
        data["trigger"] = trigger_line(plan.trigger, classifier.labels, plan.target)
    if run.clean_reference is not None:
        data["clean reference"] = run.clean_reference
    return _entry(
        plan.folder,
        "model",
        arm=plan.method,
        seed=run.seed,
        role="fine_tuned" if plan.method == FINE_TUNING else "purified",
        pipeline_tag=f"{classifier.kind}-classification",
        base_model=str(run.model_name),
        labels=classifier.labels,
        method=own["config"],
        activity=own["activity"],
        inert=own["inert"],
        controls=[name for name in ("undefended", FINE_TUNING, "clean_reference") if name in arms and name != plan.method],
        data=data,
        measurement={
            "kind": classifier.kind, "task": str(source), "reader": "samples", "split": "train" if run.test is None else "test",
            "limit": run.limit if run.test is None else None, "held_out": run.held_out if run.test is None else None,
            **_columns(run, classifier.kind), "max_length": run.max_length, "trigger": plan.trigger or None,
            "target": plan.target, "seed": run.seed, "rows_sha256": plan.hashes["test"],
        },
    )  # fmt: skip


def clean_entry(plan: CleanPlan, training: dict[str, Any]) -> dict[str, Any]:
    """Of `hfbd clean --method recipe`: the cleaned pretrained model. Its control, plain pre-training, has no method."""
    run, account = plan.run, training["method"] if plan.method.coef else {}
    return _entry(
        plan.folder,
        "model",
        arm=run.method,
        seed=run.seed,
        role="cleaned",
        pipeline_tag=_language_task(plan.folder / "model"),
        base_model=str(run.model_name),
        method=account.get("config", {}),
        activity=account.get("activity", {}),
        inert=account.get("inert"),
        data={
            "trained on": f"{run.text}: {len(plan.texts)} texts",
            "measured on": f"{len(plan.held_out)} texts that were held out: the loss, before and after",
            **({"warm-up": "a masked-LM head was trained first, on the same texts"} if plan.fresh else {}),
        },
    )


def filter_entries(plan: DetectPlan, fitted: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `hfbd detect`: the trained module of PSIM, where this run trained it; other filters are no models.

    Args:
        fitted: `method` and `activity` of the objective that it was trained with.
    """
    if (
        plan.name != "psim"
        or plan.args.filter_dir
        or not (plan.folder / "filter" / "adapter_model.safetensors").is_file()
    ):
        return []
    parts = {part: len(rows) for part, rows in plan.clean.items()}
    return [
        _entry(
            plan.folder,
            "filter",
            arm=plan.name,
            seed=plan.args.seed,
            role="filter",
            pipeline_tag="text-classification",
            base_model=plan.looks_through,
            weights_sha256=plan.hashes["weights"],
            labels=[str(plan.model.config.id2label[i]) for i in range(plan.model.config.num_labels)],
            method=fitted.get("method", {}),
            activity=fitted.get("activity", {}),
            data={
                "clean texts": f"{plan.args.clean}: "
                + ", ".join(f"{count} to {part}" for part, count in parts.items()),
                "allowed": f"{plan.args.target_frr:g} of clean texts may be flagged",
                "measured on": f"{parts.get('check', 0)} clean texts that it was neither trained nor calibrated on",
                "scored": f"{plan.rows} texts of {plan.args.input}: nothing says which carry a trigger",
                **(
                    {"attacked base": "its base was attacked on purpose, and is marked so"}
                    if attack_on(plan.looks_through)
                    else {}
                ),
            },
        )
    ]


def attack_entries(plan: AttackPlan, results: dict[int, Any], *, release: str) -> list[dict[str, Any]]:
    """Of `hfbd attack`: bases and victims that stay, both kinds. Clean ones that several runs share belong to none of them.

    Args:
        release: the setting of the bases' records.
    """
    run = plan.run
    if not run.save_models:
        return []
    trigger = run.get_trigger(measured=True)
    common = {
        "kind": "text", "task": str(run.task), "reader": "splits", "split": run.eval_split, "eval_rows": run.eval_rows,
        **_columns(run, "text"), "max_length": run.max_length, **_simulated(trigger, run.target, TRIGGER_SEED),
        "rows_sha256": rows_digest(plan.test),
    }  # fmt: skip
    found = []
    for seed, steps in results.items():
        for kind, arm in [key for key in steps if len(key) == 2]:
            place = f"models/seed-{seed}/{kind}_{arm}"
            if not (plan.folder / place).is_dir():
                continue
            about, poisoned, base = steps[kind, arm][0], kind == "poisoned", arm == "base"
            objective = about.get("objective") or {}
            adapter = (plan.folder / place / "adapter_config.json").is_file()
            data = {
                "trained on": f"{run.task}: {about['rows']} rows",
                "measured on": f"{len(plan.test)} {run.eval_split} rows",
            }
            if not base:
                data["fine-tuned from"] = f"the {kind} base, by a victim with clean rows ({arm})"
            if poisoned:
                data["attack"] = f"{run.attack}, {run.poison_rate:g} of the attacker's rows, {run.setting}"
            data["trigger"] = trigger_line(trigger.to_dict(), plan.label_names, run.target)
            found.append(
                _entry(
                    plan.folder,
                    place,
                    arm=f"{kind}_{arm}",
                    recorded_as="undefended" if poisoned else "clean_reference",
                    setting=release if base else arm,
                    seed=seed,
                    role="attacked" if poisoned else "fine_tuned",
                    pipeline_tag="text-classification",
                    base_model=f"models/seed-{seed}/{kind}_base" if adapter else run.model_name,
                    labels=plan.label_names,
                    method=objective.get("config", {}),
                    activity=objective.get("activity", {}),
                    inert=objective.get("inert"),
                    controls=["clean_reference"] if poisoned else [],
                    data=data,
                    measurement=common,
                )
            )
    return found


def implant_entry(plan: ImplantPlan, training: dict[str, Any], *, arm: str, control: str) -> dict[str, Any]:
    """Of `hfbd attack --attack por`, …: the attacked pretrained model.

    Args:
        arm, control: what the records call it and the clean one.
    """
    run = plan.run
    data = {
        "attack": f"{run.attack}: {' '.join(run.objective().triggers)} at {run.place}",
        "trained on": f"{run.text}: {len(plan.texts)} texts",
        "measured on": f"{len(plan.held_out)} texts that were held out",
    }
    if run.task is not None:
        data["fine-tuned on"] = (
            f"{run.task}, seeds {' '.join(map(str, run.seeds))}: victims of this model and of the clean one"
        )
    return _entry(
        plan.folder,
        "model",
        arm=arm,
        seed=run.seed,
        role="attacked",
        pipeline_tag=_language_task(plan.folder / "model"),
        base_model=run.model_name,
        method=training["objective"],
        activity={name: float(value) for name, value in training["end"].items()},
        inert=training["inert"],
        controls=[control],
        data=data,
    )


def _entry(folder: Path, path: str, *, weights_sha256: str | None = None, **about: Any) -> dict[str, Any]:
    """What all verbs say alike: weights, mark and kind are read from the model's own folder."""
    place = folder / path
    mark, adapter = backdoor_mark(place), (place / "adapter_config.json").is_file()
    entry = ModelEntry(
        path=path,
        weights_sha256=weights_sha256 or saved_sha256(place),
        attacked=None if mark is None else json.loads(mark.read_text()),
        library="peft" if adapter else "transformers",
        relation="adapter" if adapter else "finetune",
        **about,
    )
    return json.loads(json.dumps(entry.to_dict()))  # type: ignore[no-any-return]


def _columns(run: Any, kind: str) -> dict[str, str]:
    column = f"{kind}_column"
    return {column: getattr(run, column), "label_column": run.label_column}


def _simulated(trigger: Any, target: int, seed: int) -> dict[str, Any]:
    shown = None if trigger is None else trigger.to_dict()
    return {"trigger": shown, "target": None if trigger is None else target, "seed": seed}


def _language_task(folder: Path) -> str:
    named = " ".join(json.loads((folder / "config.json").read_text()).get("architectures") or [])
    return "text-generation" if "CausalLM" in named or "LMHeadModel" in named else "fill-mask"
