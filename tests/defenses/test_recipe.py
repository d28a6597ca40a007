"""RECIPE against a plain loop, against closed forms, and against what it must refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.recipe import RECIPE, PenaltyOnly
from hf_backdoor_defense.pretrained import load_pretrained_whole
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.named import RecipeTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.text_toys import (
    causal_lm,
    config,
    masked_lm,
    rows,
    saved_trunk,
    saved_whole,
    static_rows,
    tokenizer,
)
from tests.trainers.toys import Recorder, arguments, bert, same, weights

PAPER = {
    "optim": "adamw_torch", "learning_rate": 2e-5, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear", "train_sampling_strategy": "sequential",
}  # fmt: skip


def host(folder, defense, *, model=None, dataset=None, tokens=None, **changes):
    model = masked_lm(folder / "source") if model is None else model
    dataset = static_rows() if dataset is None else dataset
    tokens = tokenizer() if tokens is None else tokens
    return DefendedTrainer(
        model,
        args=arguments(folder / "run", **changes),
        train_dataset=dataset,
        data_collator=language_collator(model, tokens, dataset),
        processing_class=tokens,
        defense=defense,
    )


def ups(model):
    """The up-projections, named without the code under test."""
    return {n: p for n, p in model.named_parameters() if n.endswith("intermediate.dense.weight")}


def test_twenty_steps_are_those_of_a_plain_loop(tmp_path):
    data = static_rows(200)
    assert len(data) >= 160
    trainer = host(tmp_path, RECIPE(coef=0.7), dataset=data, max_steps=20, **PAPER)
    start = weights(trainer)
    trainer.train()

    model = masked_lm(tmp_path / "again")
    assert same(weights(model), start)
    matrices = list(ups(model).values())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is w for w in matrices))
    optimizer = torch.optim.AdamW(matrices, lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.train()
    for step in range(20):
        batch = data[8 * step : 8 * step + 8]
        given = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask", "labels")}
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        at, labels = (given["labels"] != -100).nonzero(as_tuple=True), given["labels"][given["labels"] != -100]
        masked = -torch.log_softmax(logits[at], dim=-1)[torch.arange(len(labels)), labels].mean()
        loss = masked + 0.7 * sum((w * w).sum() ** 0.5 for w in matrices)
        optimizer.zero_grad()
        loss.backward()
        total = sum((w.grad * w.grad).sum() for w in matrices) ** 0.5
        for w in matrices:
            w.grad *= min(1.0, 1.0 / (float(total) + 1e-6))
        optimizer.param_groups[0]["lr"] = 2e-5 * (20 - step) / 20
        optimizer.step()
    assert same(weights(trainer), weights(model), atol=1e-6)
    moved = {n for n, p in start.items() if not torch.equal(p, weights(trainer)[n])}
    assert moved == set(ups(model)) and len(moved) == 2  # all else is bit for bit what it was


def test_without_a_coefficient_it_is_no_defense(tmp_path):
    ends = []
    for name, objective in (("zero", RECIPE(coef=0.0, trainable="all")), ("none", None)):
        trainer = host(tmp_path / name, objective, dataset=rows())
        trainer.train()  # masks are drawn on the way, from the seed that the constructor set
        ends.append(weights(trainer))
        assert objective is None or "plain continued pre-training" in objective.inert()
    assert same(*ends) and not same(ends[0], weights(masked_lm(tmp_path / "start")), atol=1e-4)


def test_batches_may_be_cut(tmp_path):
    plain = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "trainable": "all"}
    ends = []
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        options = {**plain, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = host(tmp_path / str(size), RECIPE(trainable=options.pop("trainable")), **options)
        trainer.train()
        ends.append(weights(trainer))
    assert same(ends[0], ends[1], atol=1e-6) and same(ends[0], ends[2], atol=1e-6)
    assert not same(ends[0], weights(masked_lm(tmp_path / "start")), atol=1e-3)


@pytest.mark.parametrize("dose", [0.6, 1.25])
def test_the_penalty_alone_is_a_soft_threshold_whatever_its_coefficient(tmp_path, dose):
    ratios = []
    for coef in (0.01, 100.0):
        objective = PenaltyOnly(coef=coef, dose=dose)
        model = masked_lm(tmp_path / str(coef) / "source")
        first = {n: p.detach().clone() for n, p in ups(model).items()}
        rate = objective.suggest_learning_rate(model, steps=120)
        trainer = host(
            tmp_path / str(coef), objective, model=model, **{**PAPER, "learning_rate": rate, "max_steps": 120}
        )
        trainer.train()
        activity = objective.activity()
        left = [float(p.detach().norm() / first[n].norm()) for n, p in ups(model).items()]
        assert activity["norm_ratio"] == pytest.approx(sum(left) / len(left), abs=1e-6)
        assert activity["dose"] == pytest.approx(dose * 121 / 120, rel=1e-3)  # the first update has the whole rate
        threshold = activity["sum_lr"]
        exact = [float((w.abs() - threshold).clamp(min=0).norm() / w.norm()) for w in first.values()]
        assert activity["predicted_norm_ratio"] == pytest.approx(sum(exact) / len(exact), abs=2e-3)
        assert activity["norm_ratio"] == pytest.approx(activity["predicted_norm_ratio"], abs=0.03)
        assert activity["gaussian_norm_ratio"] == pytest.approx(activity["predicted_norm_ratio"], abs=0.05)
        assert objective.inert() is None
        ratios.append(activity["norm_ratio"])
    assert ratios[0] == pytest.approx(ratios[1], abs=1e-3)


def test_the_pretraining_loss_is_logged_beside_the_norms(tmp_path):
    logs = {}
    for objective in (RECIPE(), PenaltyOnly()):
        trainer = host(tmp_path / objective.name, objective, logging_strategy="steps", logging_steps=1, max_steps=1)
        trainer.train()
        logs[objective.name] = next(entry for entry in trainer.state.log_history if "loss" in entry)
    one, alone = logs["recipe"], logs["penalty_only"]
    norms = sum(float(p.detach().norm()) for p in ups(masked_lm(tmp_path / "start")).values())
    assert one["recipe/norm"] == alone["penalty_only/norm"] == pytest.approx(norms, rel=1e-5)
    assert one["loss"] == pytest.approx(norms + one["recipe/pretraining_loss"], rel=1e-4)
    assert alone["loss"] == pytest.approx(norms, rel=1e-4)
    assert alone["penalty_only/pretraining_loss"] == pytest.approx(one["recipe/pretraining_loss"], rel=1e-5)
    assert one["recipe/norm_ratio"] == 1.0 and one["recipe/sum_lr"] == one["recipe/dose"] == 0.0


def test_the_dose_in_the_log_is_the_one_reached_and_no_mean_over_the_window(tmp_path):
    trainer = host(tmp_path, RECIPE(), logging_strategy="steps", logging_steps=4, max_steps=4, learning_rate=0.01)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # A constant rate; the fourth update is not done yet. Rates are float32 in the log.
    assert entry["recipe/sum_lr"] == pytest.approx(3 * 0.01, rel=1e-6)
    assert entry["recipe/norm_ratio"] < 1


def test_masked_labels_are_not_shifted(tmp_path):
    recorder = Recorder()
    trainer = host(tmp_path, [RECIPE(), recorder], per_device_train_batch_size=24, max_steps=1)
    model = masked_lm(tmp_path / "same").train()
    batch = trainer.data_collator([{**row} for row in static_rows()])
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    trainer.train()
    assert float(recorder.values[0].mean()) == pytest.approx(own.item(), rel=1e-5)


def test_checkpointing_changes_nothing(tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = host(tmp_path / str(checkpointing), RECIPE(), gradient_checkpointing=checkpointing, max_steps=4)
        trainer.train()
        ends.append(weights(trainer))
    assert same(ends[0], ends[1], atol=1e-6) and not same(ends[0], weights(masked_lm(tmp_path / "start")), atol=1e-4)


def test_resumed_at_half_it_ends_where_it_would_have(tmp_path):
    options = {"num_train_epochs": 4, "save_strategy": "epoch", **PAPER, "learning_rate": 1e-3}
    whole = host(tmp_path / "whole", RECIPE(), dataset=rows(), **options)
    whole.train()
    again = host(tmp_path / "again", RECIPE(), dataset=rows(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-6"))
    assert same(weights(whole), weights(again)) and again.state.global_step == 12
    assert whole.objectives[0].activity() == again.objectives[0].activity()
    halfway = load_objective(RECIPE, tmp_path / "whole" / "run" / "checkpoint-6")
    assert 0 < halfway.activity()["dose"] < whole.objectives[0].activity()["dose"]
    assert 1 > halfway.activity()["norm_ratio"] > whole.objectives[0].activity()["norm_ratio"]


def test_what_trained_before_trains_afterwards(tmp_path):
    trainer = host(tmp_path, RECIPE(), max_steps=1)
    before = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == before
    assert not before["bert.pooler.dense.weight"] and before["cls.predictions.bias"]


def test_the_pooler_survives_and_a_classifier_reads_it(tmp_path):
    trainer = host(tmp_path, RECIPE(trainable="all"), max_steps=2)
    pooler = trainer.model.bert.pooler.dense.weight.detach().clone()
    trainer.train()
    trainer.save_model(tmp_path / "final")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(classifier.bert.pooler.dense.weight, pooler)
    assert trainer.objectives[0].activity()["pooler_kept"] == 1.0


# -- what it is hosted on ---------------------------------------------------------------------------------------------
def test_it_acts_on_a_causal_model(tmp_path):
    model = causal_lm(tmp_path / "source")
    start = weights(model)
    data, recipe = rows(), RECIPE(trainable="targets")
    args = arguments(tmp_path / "run", max_steps=30, **{k: v for k, v in PAPER.items() if k != "learning_rate"})
    args.learning_rate = recipe.suggest_learning_rate(model, 30)
    trainer = RecipeTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), defense=recipe)
    trainer.train()
    moved = {n for n, p in weights(trainer).items() if not torch.equal(p, start[n])}
    assert moved == {f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2)}
    assert recipe.inert() is None and recipe.activity()["norm_ratio"] < 0.8


def test_it_acts_on_a_vision_transformer(tmp_path):
    set_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    ViTForImageClassification(ViTConfig(**small, **shape)).save_pretrained(tmp_path / "source")
    model = ViTForImageClassification.from_pretrained(tmp_path / "source")
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"pixel_values": images.tolist(), "labels": [i % 3 for i in range(24)]})
    recipe = RECIPE()
    args = arguments(tmp_path / "run", optim="adamw_torch", learning_rate=1e-3, num_train_epochs=4)
    trainer = RecipeTrainer(model, args=args, train_dataset=data, data_collator=default_data_collator, defense=recipe)
    assert trainer.reasons() == []
    trainer.train()
    assert recipe.inert() is None and recipe.activity()["n_targets"] == 10 and recipe.activity()["norm_ratio"] < 0.99


def test_it_takes_hidden_states_for_a_large_vocabulary(tmp_path):
    ends = []
    for fuse_bytes in (0, 2**62):
        trainer = host(tmp_path / str(fuse_bytes), RECIPE(trainable="all"), max_steps=3, logging_steps=1)
        trainer.fuse_bytes = fuse_bytes
        trainer.args.logging_strategy = "steps"
        recorded = []
        trainer.measure = lambda step, recorded=recorded: recorded.append(step.hidden is not None)
        trainer.train()
        assert recorded == [fuse_bytes == 0] * 3
        ends.append(weights(trainer))
    assert same(ends[0], ends[1], atol=1e-6)


# -- doses ------------------------------------------------------------------------------------------------------------
def test_the_suggested_rate_adds_up_to_the_dose():
    model = BertForMaskedLM(config())
    every = torch.cat([p.detach().flatten() for p in ups(model).values()]).double()
    rate = RECIPE(dose=0.8).suggest_learning_rate(model, steps=50)
    assert rate * 50 / 2 / float(every.std(correction=0)) == pytest.approx(0.8, rel=1e-6)
    with pytest.raises(ValueError, match="steps` must be at least 1, got 0"):
        RECIPE().suggest_learning_rate(model, 0)
    with pytest.raises(ValueError, match="no parameter matches"):
        RECIPE(targets=["nowhere"]).suggest_learning_rate(model, 5)


def test_a_small_dose_is_said_with_the_rate_that_would_do(tmp_path, caplog):
    trainer = host(tmp_path, RECIPE(), max_steps=5, **PAPER)
    with caplog.at_level("WARNING"):
        trainer.train()
    (said,) = [r.getMessage() for r in caplog.records if "next to nothing" in r.getMessage()]
    rate = RECIPE().suggest_learning_rate(masked_lm(tmp_path / "start"), 5)
    assert f"{rate:.1e}" in said and "1.25" in said
    assert "too small" in trainer.objectives[0].inert()


def test_the_papers_preset():
    assert RECIPE.paper_bert() == RECIPE(coef=1.0, targets="bert", trainable="targets") == RECIPE.preset("paper")
    assert RECIPE.paper_bert(coef=0.5).coef == 0.5


# -- what is refused --------------------------------------------------------------------------------------------------
def quantized(model):
    model.config.quantization_config = {"quant_method": "toy"}
    return model


def adapted(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["query"], r=2))


REFUSALS = {
    "no match": (lambda folder: masked_lm(folder), {"targets": ["nowhere"]}, {}, "no parameter matches.*intermediate"),
    "no preset": (lambda folder: masked_lm(folder), {"targets": "bret"}, {}, "no preset of `targets` for bret"),
    "bad pattern": (lambda folder: masked_lm(folder), {"targets": ["("]}, {}, "no regular expression"),
    "bfloat16": (lambda folder: masked_lm(folder).bfloat16(), {}, {}, r"bfloat16.*model.float\(\)"),
    "half": (lambda folder: masked_lm(folder).half(), {}, {}, "weights are float16"),
    "quantized": (lambda folder: quantized(masked_lm(folder)), {}, {}, "quantized.*in float32"),
    "adapter": (lambda folder: adapted(masked_lm(folder)), {}, {}, "carries an adapter.*merge_and_unload"),
    "fresh head": (lambda folder: load_pretrained_whole(str(saved_trunk(folder)))[0], {}, {}, "head.*warm_up_mlm_head"),
    "unknown head": (lambda folder: BertForMaskedLM(config()), {}, {}, "nobody can tell.*allow_unknown_head"),
    "classifier": (lambda folder: bert(), {}, {}, "no pre-training head.*load_pretrained_whole"),
    "reentrant": (lambda folder: masked_lm(folder), {},
                  {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
                  "use_reentrant': False"),
}  # fmt: skip
NEIGHBORS = {
    "no match": (lambda folder: masked_lm(folder), {"targets": [r"intermediate\.dense\.weight"]}, {}),
    "no preset": (lambda folder: masked_lm(folder), {"targets": "bert"}, {}),
    "bad pattern": (lambda folder: masked_lm(folder), {"targets": [r"(query|key)\.weight"]}, {}),
    "bfloat16": (lambda folder: masked_lm(folder).bfloat16().float(), {}, {"bf16": True}),
    "half": (lambda folder: masked_lm(folder).half().float(), {}, {}),
    "quantized": (lambda folder: masked_lm(folder), {}, {}),
    "adapter": (lambda folder: adapted(masked_lm(folder)).merge_and_unload(), {}, {}),
    "fresh head": (lambda folder: load_pretrained_whole(str(saved_whole(folder)))[0], {}, {}),
    "unknown head": (lambda folder: BertForMaskedLM(config()), {"allow_unknown_head": True}, {}),
    "classifier": (lambda folder: masked_lm(folder), {}, {}),
    "reentrant": (lambda folder: masked_lm(folder), {},
                  {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_and_its_neighbor_that_passes(tmp_path, name):
    make, fields, options, message = REFUSALS[name]
    trainer = host(tmp_path, RECIPE(**fields), model=make(tmp_path / "source"), **options)
    assert len(trainer.objectives[0].check(trainer)) == 1
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert list((tmp_path / "run").iterdir()) == []  # the Trainer makes the folder
    make, fields, options = NEIGHBORS[name]
    assert host(tmp_path, RECIPE(**fields), model=make(tmp_path / "neighbor"), **options).reasons() == []


def test_all_reasons_come_together(tmp_path):
    model = load_pretrained_whole(str(saved_trunk(tmp_path / "source")))[0].bfloat16()
    trainer = host(tmp_path, RECIPE(targets=["nowhere"]), model=model)
    with pytest.raises(ValueError) as refused:
        trainer.train()
    said = str(refused.value)
    assert all(part in said for part in ("no parameter matches", "drawn at random", "bfloat16"))


def test_weight_decay_is_warned_of_and_runs(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        host(tmp_path / "decay", RECIPE(), weight_decay=0.01).reasons()
        host(tmp_path / "none", RECIPE()).reasons()
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("recipe:")]
    assert len(said) == 1 and "weight_decay is 0.01" in said[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coef": -1.0}, "coef. must be finite and >= 0, got -1.0"),
        ({"coef": math.inf}, "got inf"),
        ({"dose": 0.0}, "dose. must be finite and above 0, got 0.0"),
        ({"dose": math.nan}, "got nan"),
        ({"targets": []}, "targets. is empty"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        RECIPE(**fields)
    assert RECIPE(coef=0.0, dose=1e-6, targets=["x"]).coef == 0.0


def test_two_methods_may_be_hosted_together(tmp_path):
    alone, joined = host(tmp_path / "a", RECIPE()), host(tmp_path / "b", [DeCE(alpha_base=1.0), RECIPE()])
    alone.train(), joined.train()
    assert same(weights(alone), weights(joined), atol=1e-6)
    with pytest.raises(ValueError, match="both replace the loss"):
        host(tmp_path / "c", [DeCE(), PenaltyOnly()])


def test_a_compiled_model_is_seen_through():
    compiled = torch.compile(BertForMaskedLM(config()), backend="eager")
    args = SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None, weight_decay=0.0)
    trainer = SimpleNamespace(model=compiled, args=args)
    objective = RECIPE(allow_unknown_head=True)
    assert objective.check(trainer) == []
    objective.prepare(trainer, checkpoint=None)
    step = SimpleNamespace(model=compiled, log=lambda name, value, latest=False: None)
    total = sum(float(p.detach().norm()) for p in ups(compiled._orig_mod).values())
    assert float(objective.penalties(step)["norm"].detach()) == pytest.approx(total, rel=1e-6)


def test_the_std_is_that_of_all_entries_together():
    model = BertForMaskedLM(config())
    first, second = ups(model).values()
    with torch.no_grad():
        first.fill_(1.0), second.fill_(3.0)  # each alone has no deviation
    assert RECIPE(dose=1.0).suggest_learning_rate(model, 1) == pytest.approx(2.0)
