"""Every row of the registry against every invariant of the contract."""

import dataclasses
import json

import pytest
import torch

from hf_backdoor_defense.attacks.planting import PairCollator, pairs
from hf_backdoor_defense.objectives import Objective, overrides
from hf_backdoor_defense.registry import (
    ATTACKS,
    COMPARATORS,
    CONTROLS,
    DEFENSES,
    DETECTORS,
    GENERATIVE,
    PRETRAINING,
    PURIFIERS,
    objective_class,
)
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.text_toys import masked_lm, rows, texts, tokenizer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, deep_llama, language_rows

# Fields under which a method must act on the toy (defaults where not listed), other than its defaults, and neutralized.
ACTS = {"matched_decay": {"pull": [0.9]}, "trajectory": {"drop_share": 0.1},
        "psim": {"stop_margin": None, "train_head": True}, "fine_pruning": {"tolerance": 0.9}}  # fmt: skip
# What a preset leaves open.
OPEN = {("d3", "paper"): {"warm_up": "noise"}}
OTHER = {
    "dece": {"alpha_base": 0.9, "label_smoothing": 0.1, "warmup_epochs": 1, "schedule": "fractional"},
    "trajectory": {"fractions": [0.0, 0.5], "drop_share": 0.2, "class_cap": 0.4, "rerank": False, "min_rise": 1.0},
    "matched_decay": {"pull": [0.5, 0.25]},
    "gce": {"q": 0.7},
    "in_trust": {"alpha": 0.5, "beta": 0.5, "delta": 0.25, "label_floor": 1e-3},
    "focal": {"gamma": 0.5},
    "smoothed": {"label_smoothing": 0.3},
    "weight_poisoning": {"target": 2, "setting": "proxy"},
    "ripples": {"lam": 0.5, "hvp": "difference"},
    "lwp": {"target": 1},
    "psim": {"strategy": "p_tuning", "labels": "hashed", "peft_config": {"num_virtual_tokens": 3}, "stop_every": 2},
    "recipe": {"coef": 0.5, "targets": [r"query\.weight$"], "trainable": "all", "dose": 0.5},
    "penalty_only": {"coef": 2.0, "targets": "roberta"},
    "por": {"triggers": ["cf", "bb"], "clean_coef": 1.0, "place": "pooler"},
    "neuba": {"triggers": ["mm"], "mlm_coef": 0.01},
    "badpre": {"triggers": ["cf"], "poison_coef": 0.5},
    "d3": {"lam": 0.5, "eps": 0.3, "hinge": "batch", "rescale": False, "warm_up": "far", "targets": ["classifier"]},
    "ulrl": {
        "unlearn_epochs": 2,
        "unlearn_milestones": [1],
        "units": "hidden",
        "head": "classifier",
        "hidden_share": 0.25,
    },
    "crow": {"epsilon": 0.05, "weight": 11.0, "include_last": True},
    "ft_sam": {"rho": 0.5, "adaptive": False, "label_smoothing": 0.0},
    "fine_pruning": {"step": 0.25, "tolerance": 0.5},
}
NEUTRAL = {
    "dece": {"alpha_base": 1.0},
    "trajectory": {"drop_share": 0.0, "rerank": False},
    "matched_decay": {"pull": [1.0]},
    "gce": {"q": 0.0},
    "in_trust": {"alpha": 1.0, "beta": 0.0},
    "focal": {"gamma": 0.0},
    "smoothed": {"label_smoothing": 0.0},
    "ripples": {"lam": 0.0},
    "psim": {"stop_margin": 0.99},
    "recipe": {"coef": 0.0},
    "penalty_only": {"coef": 0.0},
    "badpre": {"poison_coef": 0.0},
    "d3": {"warm_up": "near", "eps": 100.0},
    "ulrl": {"unlearn_epochs": 0},
    "ft_sam": {"rho": 0.0},
    "crow": {"weight": 0.0},
    "fine_pruning": {"tolerance": 0.0},
}
NEVER_NEUTRAL = {
    "weight_poisoning",
    "lwp",
    "por",
    "neuba",
}  # no field turns them off: inert where no weight changes, tests/attacks
NAMES = [*DEFENSES, *COMPARATORS, *CONTROLS, *PRETRAINING, *PURIFIERS, *GENERATIVE, *DETECTORS, *ATTACKS]
BEFORE_FINE_TUNING = {"recipe", "penalty_only", "por", "neuba", "badpre"}  # hosted on a masked language model


def trained(folder, objective):
    host = causal_host if objective.name in GENERATIVE else classifier_host
    trainer = (language_host if objective.name in BEFORE_FINE_TUNING else host)(folder, objective)
    trainer.train()
    return trainer


def language_host(folder, objective):
    model, tokens, data = masked_lm(folder / "source"), tokenizer(), rows(40)
    if objective.name == "por":
        data = pairs(texts(40), tokens, objective.triggers, seed=0, max_length=14)
        collate = PairCollator(tokens, len(objective.triggers))
    else:
        collate = language_collator(model, tokens, data)
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "num_train_epochs": 25}
    return DefendedTrainer(
        model,
        args=arguments(folder, **options, remove_unused_columns=objective.name != "por"),
        train_dataset=data,
        data_collator=collate,
        processing_class=tokens,
        defense=objective,
    )


def causal_host(folder, objective):
    return DefendedTrainer(
        deep_llama(),
        args=arguments(folder),
        train_dataset=language_rows(16),
        data_collator=PadCollator(),
        defense=objective,
    )


def classifier_host(folder, objective):
    return DefendedTrainer(
        bert(),
        args=arguments(folder, num_train_epochs=2),
        train_dataset=classification_rows(40),
        data_collator=PadCollator(),
        aux_datasets={role: classification_rows(20, seed=1) for role in ("clean", "held_out")},
        defense=objective,
    )


def test_the_tables_cover_the_registry():
    assert set(OTHER) == set(NEUTRAL) | NEVER_NEUTRAL == set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_fields_and_json(name):
    kind = objective_class(name)
    assert issubclass(kind, Objective) and kind.name == name and kind.__doc__
    assert all(field.default is not dataclasses.MISSING or field.default_factory for field in dataclasses.fields(kind))
    presets = [kind.preset(preset, **OPEN.get((name, preset), {})) for preset in kind.presets]
    for objective in (kind(), kind(**OTHER[name]), *presets):
        again = kind.from_dict(json.loads(json.dumps(objective.to_dict())))
        assert again == objective and again is not objective
    assert kind() != kind(**OTHER[name])
    assert kind().to_dict()["name"] == name and isinstance(kind().state_dict(), dict)


@pytest.mark.parametrize("name", NAMES)
def test_it_acts_at_its_defaults_and_reports_it(tmp_path, name):
    objective = objective_class(name)(**ACTS.get(name, {}))
    trained(tmp_path, objective)
    assert objective.inert() is None
    activity = objective.activity()
    assert activity and all(isinstance(value, float) for value in activity.values())


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutralized_it_says_inert(tmp_path, name):
    objective = objective_class(name)(**NEUTRAL[name])
    trained(tmp_path, objective)
    assert objective.inert()


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_with_other_values(tmp_path, name):
    objective = objective_class(name)(**OTHER[name])
    trainer = trained(tmp_path, objective)
    trainer.save_model(tmp_path / "final")
    again = load_objective(objective_class(name), tmp_path / "final")
    assert again == objective and again.activity() == pytest.approx(objective.activity())
    before, after = objective.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_no_model(tmp_path, name):
    objective = objective_class(name)(**ACTS.get(name, {}))
    trained(tmp_path, objective)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(objective).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_type_is_refused_with_the_field(name):
    field = dataclasses.fields(objective_class(name))[0].name
    with pytest.raises(ValueError, match=field):
        objective_class(name).from_dict({field: {"not": "this"}})


def test_defaults_of_the_base_are_neutral():
    base = Objective()
    assert base.check(None) == [] and base.penalties(None) == {} and base.ranking() is None and base.refit() is None
    assert base.inert() is None and base.state_dict() == {}
    assert not any(overrides(base, method) for method in ("loss", "penalties", "prepare", "observe"))
