"""Hidden states and projection from one forward: chosen when it pays, equal to full logits, given up where it cannot work."""

import contextlib
import logging

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.trainers import fusing
from hf_backdoor_defense.trainers.fusing import follows_configuration, forward_with_hidden, obstacle, output_head
from hf_backdoor_defense.trainers.heads import align, take_labels
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import (
    FromHidden,
    PadCollator,
    Recorder,
    WeightPull,
    arguments,
    bart,
    bert,
    bert_mlm,
    classification_rows,
    cohere,
    distilbert_mlm,
    gemma2,
    gpt2,
    granite,
    language_rows,
    llama,
    masked_rows,
    roberta_mlm,
    same,
    t5,
    translation_rows,
    weights,
)

ALWAYS, NEVER = 0, 2**62
MODELS = {
    "tied": (gpt2, language_rows),
    "untied": (llama, language_rows),
    "soft-cap": (gemma2, language_rows),
    "scale": (cohere, language_rows),
    "divisor": (granite, language_rows),
    "bert": (bert_mlm, masked_rows),
    "roberta": (roberta_mlm, masked_rows),
    "distilbert": (distilbert_mlm, masked_rows),
    "t5": (t5, translation_rows),
    "t5-untied": (lambda: t5(tied=False), translation_rows),
    "bart": (bart, translation_rows),
}


def make(tmp_path, model, rows, defense=None, fuse_bytes=ALWAYS, **args):
    args = {"per_device_train_batch_size": 4, **args}
    trainer = DefendedTrainer(
        model, args=arguments(tmp_path, **args), train_dataset=rows, data_collator=PadCollator(), defense=defense
    )
    trainer.fuse_bytes = fuse_bytes
    return trainer


def batch(rows, columns=("input_ids", "attention_mask", "labels")):
    return PadCollator()([{name: row[name] for name in columns} for row in rows])


def step_of(model, inputs, labels):
    return Step(
        model=model, inputs=inputs, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=model.training
    )


def gradients(values, model):
    found = torch.autograd.grad(values.sum(), list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_all_gradients_equal_those_from_the_models_own_logits(name):
    build, rows = MODELS[name]
    model = build()
    labels, inputs = take_labels(model, batch(rows(5)))
    hidden, full = step_of(model, inputs, labels), step_of(model, inputs, labels)
    assert obstacle(hidden, model, output_head(model)) is None
    values, outputs = forward_with_hidden(hidden, model, Objective().loss)
    align(full, model(**inputs))
    expected = torch.nn.functional.cross_entropy(full.logits.flatten(0, -2), labels.flatten(), reduction="none")
    expected = expected[labels.flatten() != -100]
    assert outputs.logits.numel() <= 50 < full.logits.numel()  # a placeholder, in BART's case with its bias added
    assert torch.allclose(values, expected, atol=2e-6, rtol=0)
    ours, theirs = gradients(values, model), gradients(expected, model)
    assert same(ours, theirs, atol=3e-5) and len(ours) > 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("defense", [lambda: None, lambda: DeCE(alpha_base=0.7)], ids=["plain", "dece"])
def test_training_from_hidden_states_equals_training_from_logits(tmp_path, name, defense):
    build, rows = MODELS[name]
    trained = []
    for fuse_bytes in (ALWAYS, NEVER):
        logged = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.1}
        trainer = make(tmp_path, build(), rows(8), defense(), fuse_bytes, **logged)
        trainer.train()
        trained.append(weights(trainer))
        used = [entry["fused"] for entry in trainer.state.log_history if "loss" in entry]
        assert used == [float(fuse_bytes == ALWAYS)] * 2
    assert same(*trained, atol=1e-6)
    assert not same(trained[0], weights(build()), atol=1e-4)


@pytest.mark.parametrize("name", ["tied", "bert", "t5", "bart"])
def test_accumulation_changes_nothing_on_either_path(tmp_path, name):
    build, rows = MODELS[name]
    trained = []
    for size, steps, fuse_bytes in ((8, 1, NEVER), (2, 4, NEVER), (2, 4, ALWAYS), (1, 8, ALWAYS)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, build(), rows(16), DeCE(alpha_base=0.7), fuse_bytes, **split)
        trainer.train()
        assert trainer.state.global_step == 2
        trained.append(weights(trainer))
    for other in trained[1:]:
        assert same(trained[0], other, atol=2e-6)


@pytest.mark.parametrize("name", ["untied", "bert", "t5", "bart"])
def test_neutral_dece_equals_plain_cross_entropy(tmp_path, name):
    build, rows = MODELS[name]
    plain = make(tmp_path, build(), rows(8), None, NEVER)
    neutral = make(tmp_path, build(), rows(8), DeCE(alpha_base=1.0, label_smoothing=0.0), ALWAYS)
    plain.train(), neutral.train()
    assert same(weights(plain), weights(neutral), atol=1e-6)


def test_ignored_positions_never_reach_the_product(tmp_path):
    seen = []

    class Watches(FromHidden):
        def loss(self, step):
            step.hidden.register_hook(lambda grad: seen.append((grad.abs().sum(-1) > 0, step.labels != -100)))
            return super().loss(step)

    trainer = make(tmp_path, bert_mlm(), masked_rows(8), Watches())
    trainer.labeled_only = False  # else ignored positions do not even reach the head
    trainer.train()
    assert len(seen) == 2
    for touched, labeled in seen:
        assert torch.equal(touched, labeled) and 0 < int(labeled.sum()) < labeled.numel()


# -- the choice -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "small, reason", [(0, "are less than fuse_bytes=67108864"), (1024, "a vocabulary of 50 is never")]
)
def test_small_logits_are_not_fused_by_default_and_the_log_says_so(tmp_path, caplog, monkeypatch, small, reason):
    monkeypatch.setattr(fusing, "SMALL_VOCABULARY", small)
    recorder = Recorder()
    recorder.takes_hidden = True
    with caplog.at_level(logging.INFO, logger="hf_backdoor_defense"):
        trainer = make(tmp_path, gpt2(), language_rows(16), recorder, DefendedTrainer.fuse_bytes)
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "full logits" in record.getMessage()]
    assert len(said) == 1 and reason in said[0]
    assert all(step.hidden is None and step.logits is not None for step in recorder.steps)


def test_a_small_vocabulary_is_not_fused_however_long_the_batch():
    step = Step(
        model=gpt2(), inputs={}, labels=torch.zeros(64, 2**14, dtype=torch.int64), row_ids=None, epoch=0.0, global_step=0,
        training=True,
    )  # fmt: skip
    assert step.labels.numel() * 50 * 4 > DefendedTrainer.fuse_bytes
    assert not fusing.Fusing().chooses(step, step.model)


def test_the_threshold_is_labels_times_vocabulary_times_four_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "SMALL_VOCABULARY", 0)
    rows = [dict(row, input_ids=[3] * 6, attention_mask=[1] * 6, labels=[3] * 6) for row in language_rows(4)]
    size = 4 * 6 * 50 * 4
    for fuse_bytes, fused in ((size, True), (size + 1, False)):
        recorder = Recorder()
        recorder.takes_hidden = True
        make(tmp_path, gpt2(), rows, recorder, fuse_bytes).train()
        assert [step.hidden is not None for step in recorder.steps] == [fused]


@pytest.mark.parametrize("field, value", [("logit_scale", "inv_sqrt_d_model"), ("final_logit_softcapping", 0.0)])
def test_a_configuration_that_tells_no_number_takes_logits(tmp_path, caplog, field, value):
    model, recorder = gpt2(), Recorder()
    recorder.takes_hidden = True
    setattr(model.config, field, value)
    make(tmp_path, model, language_rows(8), recorder).train()
    assert recorder.steps and all(step.logits is not None for step in recorder.steps)
    assert f"{field}={value!r}" in caplog.text


def test_the_check_leaves_quantized_layers_in_training_mode():
    """In evaluation bitsandbytes rewrites 4-bit weights for inference, and nothing behind them is trained any more."""
    seen = {}

    class Quantized(torch.nn.Linear):
        def forward(self, hidden):
            seen["quantized"] = self.training
            return super().forward(hidden)

    Quantized.__module__ = "bitsandbytes.nn.modules"
    model = llama().train()
    projection = model.model.layers[0].mlp.up_proj
    layer = Quantized(projection.in_features, projection.out_features, bias=False)
    model.model.layers[0].mlp.up_proj = layer
    model.model.norm.register_forward_hook(lambda module, args, output: seen.update(other=module.training))
    assert follows_configuration(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    assert seen == {"quantized": True, "other": False}
    assert all(module.training for module in model.modules())


def test_running_out_of_memory_in_the_check_is_not_taken_for_an_unknown_head(monkeypatch):
    model = gpt2()

    def forward(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        fusing.follows_configuration(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


def test_the_log_names_the_fused_implementation_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_backdoor_defense"):
        make(tmp_path, gpt2(), language_rows(16), DeCE()).train()
    said = [r for r in caplog.records if "fused" in r.getMessage() or "full logits" in r.getMessage()]
    assert len(said) == 1 and "loss and output projection are fused" in said[0].getMessage()


@pytest.mark.parametrize("defense", [WeightPull, Recorder])
def test_an_objective_that_does_not_take_hidden_states_gets_logits_beside_one_that_does(tmp_path, caplog, defense):
    with caplog.at_level(logging.INFO, logger="hf_backdoor_defense"):
        trainer = make(tmp_path, gpt2(), language_rows(8), [DeCE(), defense()])
        trainer.train()
    assert f"full logits: {defense.name} takes nothing else" in caplog.text
    if defense is Recorder:
        assert all(step.logits is not None for step in trainer.objectives[1].steps)


def test_a_classifier_has_no_choice_and_logs_none(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_backdoor_defense"):
        trainer = make(tmp_path, bert(), classification_rows(8), DeCE(), logging_strategy="steps", logging_steps=1)
        trainer.train()
    assert "full logits" not in caplog.text
    assert not any("fused" in entry for entry in trainer.state.log_history)


# -- what follows the head --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_tells_all_and_finding_out_leaves_no_trace(name):
    build, rows = MODELS[name]
    model = build()
    model.train()
    model.get_output_embeddings().eval()  # a mode of its own, which the pass must not change
    inputs = take_labels(model, batch(rows(3)))[1]
    before, random = [module.training for module in model.modules()], torch.get_rng_state()
    assert follows_configuration(model, inputs)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(model.get_output_embeddings())
    assert model(**inputs).logits.shape[-1] == 50


@pytest.mark.parametrize(
    ("build", "field"), [(gemma2, "final_logit_softcapping"), (granite, "logits_scaling"), (cohere, "logit_scale")]
)
def test_a_part_that_the_configuration_hides_is_found(build, field):
    model = build()
    inputs = take_labels(model, batch(language_rows(2)))[1]
    shown = type(model.config)(**{**model.config.to_dict(), field: None if "cap" in field else 1.0})
    own = model.forward

    def forward(**kwargs):
        model.config, hidden = hidden_config, model.config
        try:
            return own(**kwargs)
        finally:
            model.config = hidden

    hidden_config, model.config = model.config, shown
    model.forward = forward
    assert not follows_configuration(model, inputs)


def _doubled(outputs):
    outputs["logits"] = outputs["logits"] * 2
    return outputs


def test_a_head_that_does_more_than_project_is_trained_from_logits_with_a_warning(tmp_path, caplog):
    trained = []
    for fuse_bytes in (ALWAYS, NEVER):
        model = llama()
        model.forward = lambda own=model.forward, **kwargs: _doubled(own(**kwargs))
        trainer = make(tmp_path, model, language_rows(8), DeCE(), fuse_bytes)
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained)
    warned = [
        r
        for r in caplog.records
        if r.levelno == logging.WARNING and "LlamaForCausalLM does something" in r.msg % r.args
    ]
    assert len(warned) == 1


def test_a_head_whose_scores_are_read_otherwise_is_found():
    model = llama()
    own = model.forward
    model.forward = lambda **kwargs: own(**kwargs).logits.view(2, -1, 50) and None  # would not stand a placeholder
    assert not follows_configuration(model, batch(language_rows(2), ("input_ids", "attention_mask")))


def test_the_head_is_whole_again_even_after_an_error(tmp_path):
    class Breaks(FromHidden):
        def loss(self, step):
            raise RuntimeError("inside")

    model = gpt2()
    with pytest.raises(RuntimeError, match="inside"):
        make(tmp_path, model, language_rows(8), Breaks()).train()
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 50)


# -- heads that cannot be read ----------------------------------------------------------------------------------------
def _adapter(target, **more):
    from peft import LoraConfig, get_peft_model

    return lambda: get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=target, **more))


def _changed(change):
    model = llama()
    change(model)
    return model


class Sharded(torch.Tensor):
    """Stands for a tensor that is not whole on this process."""


def _shard(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Sharded))


class Rounded(nn.Linear):
    """Stands for a quantized layer: its weight is not what it multiplies with."""


def _quantize(model):
    model.lm_head = Rounded(16, 50, bias=False)


OBSTACLES = {
    "adapter": (_adapter(["q_proj", "lm_head"]), r"is a peft\.\S+Linear \(adapters"),
    "copy": (_adapter(["q_proj"], modules_to_save=["lm_head"]), r"is a peft\.\S+ModulesToSaveWrapper"),
    "quantized": (lambda: _changed(_quantize), "Rounded"),
    "sharded": (lambda: _changed(_shard), "the weight of its output projection is a Sharded"),
    "hooked": (lambda: _changed(lambda m: m.lm_head.register_forward_hook(lambda *a: None)), "hooks of another"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_head_that_cannot_be_read_is_trained_from_logits_with_a_warning(tmp_path, caplog, name):
    build, message = OBSTACLES[name]
    losses = []
    for fuse_bytes in (ALWAYS, NEVER):
        trainer = make(
            tmp_path, build(), language_rows(8), DeCE(), fuse_bytes, logging_strategy="steps", logging_steps=1
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert [entry["fused"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    warned = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "full logits" in r.getMessage()
    ]
    import re

    assert len(warned) == 1 and re.search(message, warned[0])


def test_other_obstacles_are_named():
    model = llama()
    step = step_of(model, {}, torch.zeros(1, 2, dtype=torch.long))
    assert "no output projection" in obstacle(step, model, None)
    assert "not in memory" in obstacle(step, model, nn.Linear(16, 50, device="meta"))
    assert "of torch.int8" in obstacle(step, model, _integers())
    moved = nn.Linear(16, 50)
    moved.forward = lambda hidden: hidden
    assert "hooks" in obstacle(step, model, moved)
    assert "from labels" in obstacle(step_of(model, {"labels": step.labels}, step.labels), model, model.lm_head)
    wrapped = nn.Module()
    wrapped.static_graph = True
    assert "static graph" in obstacle(step_of(wrapped, {}, step.labels), model, model.lm_head)
    model.compile()
    assert "compiled" in obstacle(step, model, model.lm_head)


def _integers():
    head = nn.Linear(16, 50)
    head.weight = nn.Parameter(torch.zeros(50, 16, dtype=torch.int8), requires_grad=False)
    return head


def test_a_language_model_without_output_projection_is_trained_from_logits(tmp_path, caplog):
    trained = []
    for hidden in (True, False):
        model = llama()
        if hidden:
            model.get_output_embeddings = lambda: None
        trainer = make(tmp_path, model, language_rows(8), DeCE(), ALWAYS if hidden else NEVER)
        trainer.train()
        trained.append(weights(trainer))
    assert "LlamaForCausalLM has no output projection" in caplog.text
    assert same(*trained)


def test_outputs_without_logits_are_an_error_that_lists_what_came(tmp_path):
    model = llama()
    model.get_output_embeddings = lambda: None
    model.forward = lambda **kwargs: {"features": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM returned no `logits` \(it returned: features\)"):
        make(tmp_path, model, language_rows(8)).train()


# -- adapters and precision -------------------------------------------------------------------------------------------
def _prompts(kind):
    def build():
        import peft

        torch.manual_seed(0)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
        return peft.get_peft_model(llama(), config)

    return build


def _lora():
    torch.manual_seed(0)
    model = _adapter(["q_proj", "down_proj"])()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "build",
    [_lora, _prompts("PromptTuningConfig"), _prompts("PromptEncoderConfig"), _prompts("PrefixTuningConfig")],
    ids=["lora", "prompt", "p-tuning", "prefix"],
)
def test_adapters_and_virtual_tokens(tmp_path, build):
    trained = []
    for fuse_bytes in (ALWAYS, NEVER):
        trainer = make(
            tmp_path, build(), language_rows(8), DeCE(), fuse_bytes, logging_strategy="steps", logging_steps=1
        )
        before = weights(trainer)
        trainer.train()
        trained.append(weights(trainer))
        assert trainer.state.log_history[0]["fused"] == float(fuse_bytes == ALWAYS)
        assert not same(before, trained[-1], atol=1e-9)
        frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
        assert frozen and all(torch.equal(before[name], trained[-1][name]) for name in frozen)
    assert same(*trained, atol=1e-7)


@pytest.mark.parametrize("build", [gpt2, gemma2], ids=["plain", "soft-cap"])
def test_under_bf16_autocast_both_paths_are_equally_far_from_float32(build):
    model = build()
    labels, inputs = take_labels(model, batch(language_rows(8)))
    results = {}
    for name, cast in (("exact", False), ("full", True), ("hidden", True)):
        step = step_of(model, inputs, labels)
        context = torch.autocast("cpu", dtype=torch.bfloat16) if cast else contextlib.nullcontext()
        with context:
            if name == "hidden":
                assert follows_configuration(model, inputs)
                values, _ = forward_with_hidden(step, model, DeCE(alpha_base=0.7).loss)
            else:
                align(step, model(**inputs))
                values = DeCE(alpha_base=0.7).loss(step)
        assert values.dtype == torch.float32
        results[name] = torch.cat([g.flatten().double() for g in gradients(values, model).values()])
    far = {name: (results[name] - results["exact"]).norm() for name in ("full", "hidden")}
    assert far["hidden"] <= 1.5 * far["full"] and far["full"] < 0.1 * results["exact"].norm()


def test_every_named_term_arrives_in_the_log_and_none_in_an_evaluation(tmp_path):
    class Listener(TrainerCallback):
        def __init__(self):
            self.heard = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.heard.append(dict(logs))

    class Pull(WeightPull):
        takes_hidden = True

    rows = language_rows(16)
    trainer = make(tmp_path, gpt2(), rows, [DeCE(alpha_base=0.9), Pull()], logging_strategy="steps", logging_steps=2)
    listener = Listener()
    trainer.add_callback(listener)
    trainer.train()
    trainer.evaluate(rows)
    terms = {"dece/alpha", "dece/target_pull", "weight_pull/norm", "fused"}
    training = [entry for entry in listener.heard if "loss" in entry]
    assert len(training) == 2 and all(terms <= entry.keys() for entry in training)
    assert training[0]["dece/alpha"] == pytest.approx(0.9, abs=1e-6) and training[0]["fused"] == 1.0
    (evaluation,) = [entry for entry in listener.heard if "eval_loss" in entry]
    assert not any("/" in name or "fused" in name for name in evaluation)
    assert evaluation["eval_loss"] > 0
