"""CROW against the algorithm with three forwards, padding, accumulation, adapters, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import DistributedDataParallelKwargs
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CTRLConfig,
    CTRLLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig

from hf_backdoor_defense import CROWSFTTrainer, CROWTrainer
from hf_backdoor_defense.defenses.crow import CROW
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.trainers import layers, mixin
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.toys import (
    PadCollator,
    arguments,
    bart,
    deep_llama,
    gpt2,
    language_rows,
    same,
    weights,
)


def host(folder, defense=None, model=None, rows=None, **changes):
    return DefendedTrainer(
        deep_llama() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=language_rows(16) if rows is None else rows,
        data_collator=PadCollator(),
        defense=defense,
    )


def lora(model):
    set_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def batch(count=4, extra=0):
    rows = language_rows(count, seed=3).remove_columns("row_id")
    return PadCollator(extra)(list(rows))


def gradients(trainer, inputs):
    """Of one micro-batch, by name, and the loss."""
    model = trainer.model
    model.train()
    model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(model, dict(inputs))
    assert all(p.grad is None for p in model.parameters())  # the inner gradient is taken toward the embeddings alone
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def published(model, inputs, epsilon=0.1, weight=5.5):
    """The algorithm as it was released, with masks: three forwards. Returns loss, C, C at δ, gradients by name."""
    ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))

    def inconsistency(embeddings):
        states = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True).hidden_states[1:-1]
        unit = F.normalize(torch.stack(states), dim=-1)  # [L - 1, batch, time, d]
        distance = 1 - (unit[:-1] * unit[1:]).sum(-1)  # [L - 2, batch, time]
        return ((distance * mask).sum(-1) / mask.sum(-1)).mean()

    e = model.get_input_embeddings()(ids).detach().requires_grad_()
    clean = inconsistency(e)
    (g,) = torch.autograd.grad(clean, e)
    delta = epsilon * g.sign() * mask[..., None]
    adversarial = inconsistency(model.get_input_embeddings()(ids) + delta)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) + weight * adversarial
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), clean.item(), adversarial.item(), dict(zip(trained, found, strict=True))


def frozen(model):
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("change", [lambda model: model, frozen, lora], ids=["full", "frozen embedding", "lora"])
def test_two_forwards_are_the_published_three(tmp_path, change):
    model, inputs = change(deep_llama()).double(), batch()
    expected, clean, adversarial, by_hand = published(copy.deepcopy(model), inputs)
    trainer = host(tmp_path, CROW(), model)
    gradients(host(tmp_path, CROW(), copy.deepcopy(model)), inputs)  # no other run's business
    trainer.compute_loss(model.train(), dict(inputs))  # the first batch is asked, too, whether both forwards are one
    trainer.objectives[0].__post_init__()
    calls = []
    handle = next(m for m in model.modules() if hasattr(m, "self_attn")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    loss, found = gradients(trainer, inputs)
    handle.remove()
    assert len(calls) == 2  # of which one is the loss's own
    assert loss == pytest.approx(expected, rel=1e-12) and found.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name
    activity = trainer.objectives[0].activity()
    assert activity["clean"] == pytest.approx(clean) and activity["adversarial"] == pytest.approx(adversarial)
    assert activity["gap"] > 0 and activity["rows"] == 4 and activity["zero_sign"] == 0
    assert activity["penalty"] == pytest.approx(5.5 * adversarial)
    assert activity["share_of_loss"] == pytest.approx(5.5 * adversarial / expected)


def test_the_step_ascends_and_vanishes_with_epsilon(tmp_path):
    found = []
    for epsilon in (1e-1, 1e-2, 1e-3, 1e-9):
        trainer = host(tmp_path, CROW(epsilon=epsilon), deep_llama().double())
        gradients(trainer, batch())
        found.append(trainer.objectives[0].activity())
    gaps = [each["gap"] for each in found]
    assert all(gap > 0 for gap in gaps[:3]) and gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)  # of first order
    assert gaps[3] == pytest.approx(0, abs=1e-7)
    rms = deep_llama().get_input_embeddings().weight[2:].square().mean().sqrt().item()
    assert found[0]["relative_step"] == pytest.approx(0.1 / rms, rel=0.1)  # not all ids occur


def test_padding_changes_nothing(tmp_path):
    inputs = batch()
    length = inputs["input_ids"].shape[1]
    right = batch(extra=3)
    shift = 3
    left = {name: F.pad(value, (shift, 0), value=-100 if name == "labels" else 0) for name, value in inputs.items()}
    # Every sequence keeps its own padding on the right: positions are given, as for any left-padded batch.
    left["position_ids"] = (torch.arange(length + shift) - shift).clamp(min=0).expand(len(inputs["labels"]), -1)
    left["labels"][:, shift] = -100  # the first token of a sequence is never predicted
    model = deep_llama().double()
    whole, expected = gradients(host(tmp_path, CROW(), copy.deepcopy(model)), inputs)
    for padded in (right, left):
        loss, found = gradients(host(tmp_path, CROW(), copy.deepcopy(model)), padded)
        assert loss == pytest.approx(whole, rel=1e-12)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


def test_rows_without_a_label_are_left_out(tmp_path):
    inputs = batch(4)
    few = {name: value[:3] for name, value in inputs.items()}
    inputs["labels"][3] = -100
    model = deep_llama().double()
    trainers = [host(tmp_path, CROW(), copy.deepcopy(model)) for _ in range(2)]
    (one, expected), (two, found) = (gradients(t, i) for t, i in zip(trainers, (few, inputs), strict=True))
    assert two == pytest.approx(one, rel=1e-12)
    assert all(torch.allclose(found[name], value, atol=1e-12) for name, value in expected.items())
    assert trainers[0].objectives[0].activity() == pytest.approx(trainers[1].objectives[0].activity())


def test_gradients_that_are_there_survive(tmp_path):
    trainer = host(tmp_path, CROW(), deep_llama().double())
    _, once = gradients(trainer, batch())
    trainer.compute_loss(trainer.model, batch()).backward()
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter.grad, 2 * once[name], rtol=1e-12), name


def test_without_weight_it_is_plain_fine_tuning(tmp_path):
    trained = []
    for defense in (None, CROW(weight=0.0)):
        trainer = host(tmp_path, defense)
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained, atol=0.0)


def test_accumulation_checkpointing_and_fusing_train_the_same(tmp_path):
    trained = []
    for changes in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"fuse": 0},
    ):
        fuse = changes.pop("fuse", 2**62)
        # 22 rows: the last step has 6, in micro-batches of 2
        trainer = host(tmp_path, CROW(), rows=language_rows(22), **changes)
        trainer.fuse_bytes = fuse
        trainer.train()
        trained.append(weights(trainer))
    assert not same(trained[0], weights(deep_llama()), atol=1e-3)
    for other in trained[1:]:
        assert same(trained[0], other, atol=1e-6)


def test_beside_dece_the_total_is_the_sum(tmp_path):
    inputs, plain = batch(), deep_llama().double()
    found = [
        gradients(host(tmp_path, defense, copy.deepcopy(plain)), inputs)
        for defense in (None, [CROW()], [DeCE(alpha_base=0.5)], [DeCE(alpha_base=0.5), CROW()])
    ]
    losses = [loss for loss, _ in found]
    assert losses[3] == pytest.approx(losses[1] + losses[2] - losses[0], rel=1e-12)
    for name, value in found[3][1].items():
        parts = [gradient[name] for _, gradient in found]
        assert torch.allclose(value, parts[1] + parts[2] - parts[0], rtol=1e-9, atol=1e-12), name


def test_in_evaluation_there_is_no_penalty(tmp_path):
    rows = language_rows(8)
    plain = host(tmp_path).evaluate(rows)["eval_loss"]
    trainer = host(tmp_path, CROW())
    assert trainer.evaluate(rows)["eval_loss"] == plain and trainer.objectives[0].activity() == {}


def test_saved_and_loaded(tmp_path):
    trainer = host(tmp_path, CROW(epsilon=0.05), logging_strategy="steps", logging_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["crow/gap"] == pytest.approx(logged["crow/adversarial"] - logged["crow/clean"], rel=1e-4)
    assert logged["crow/penalty"] == pytest.approx(5.5 * logged["crow/adversarial"], rel=1e-4)
    trainer.save_model(tmp_path / "final")
    again = load_objective(CROW, tmp_path / "final")
    assert again == trainer.objectives[0] and again.activity() == trainer.objectives[0].activity()


def test_a_step_that_drowns_the_text_is_said_to_be_inert(tmp_path):
    trainer = host(tmp_path, CROW(epsilon=1e3))
    trainer.train()
    assert "times the embeddings themselves" in (trainer.objectives[0].inert() or "")
    assert "no row" in (CROW().inert() or "") and "plain" in (CROW(weight=0.0).inert() or "")


def test_a_text_is_no_number():
    with pytest.raises(ValueError, match=r"crow: `weight` must be a number, got '5' \(str\)"):
        CROW(weight="5")
    assert CROW.from_dict({"weight": "5"}) == CROW(weight=5.0)


@pytest.mark.parametrize("fields, name", [({"epsilon": -1.0}, "epsilon"), ({"epsilon": float("inf")}, "epsilon"),
    ({"weight": -0.1}, "weight"), ({"weight": float("nan")}, "weight")])  # fmt: skip
def test_fields_out_of_range(fields, name):
    with pytest.raises(ValueError, match=f"`{name}` must be finite"):
        CROW(**fields)


def small(kind, config, **fields):
    set_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "intermediate_size": 8,
        "num_attention_heads": 2,
    }
    return kind(config(**{**sizes, **fields}))


def ctrl():
    sizes = {"vocab_size": 50, "n_embd": 8, "dff": 8, "n_layer": 4, "n_head": 2, "n_positions": 32}
    return small(CTRLLMHeadModel, CTRLConfig, **sizes)


def gemma3n():
    sizes = {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 50,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    sizes |= {"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [8] * 4}
    return small(Gemma3nForCausalLM, Gemma3nTextConfig, pad_token_id=0, **sizes, **layers)  # states of four streams


class Typed(LlamaForCausalLM):
    """Adds to its first layer what it reads of the ids, as embeddings per layer do."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        shift = 0 if input_ids is None else input_ids[..., None] / 100
        handle = self.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + shift)
        try:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        finally:
            handle.remove()


def typed():
    return Typed(deep_llama().config)


@pytest.mark.parametrize(
    "make, said",
    [
        (ctrl, "states differ"),
        (lambda: frozen(ctrl()), "states differ"),
        (typed, "states differ"),
        (gemma3n, "states are"),
    ],
)
def test_a_model_that_starts_from_more_than_its_embeddings_is_refused(tmp_path, make, said):
    trainer = host(tmp_path, CROW(), make())
    with pytest.raises(ValueError, match=f"from its embeddings is not its own: its hidden {said}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_models_that_start_from_their_embeddings_alone_are_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(mixin, "require_own_forward", lambda *args: asked.append(layers.require_own_forward(*args)))
    for model in (
        gpt2(),
        deep_llama(),
        deep_llama().bfloat16(),
        small(Gemma2ForCausalLM, Gemma2Config, head_dim=4, num_key_value_heads=2),
    ):
        before = copy.deepcopy(model.state_dict())
        trainer = host(tmp_path, CROW(include_last=True), model)
        for _ in range(2):
            trainer.compute_loss(model.train(), batch())
        assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert asked == [None] * 4


def test_an_embedding_that_runs_twice_is_refused(tmp_path):
    trainer = host(tmp_path, CROW(include_last=True), gpt2())
    inputs = batch()
    with pytest.raises(ValueError, match="ran 2 times in one forward"):
        trainer.compute_loss(trainer.model, {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])})
    given = {**inputs, "inputs_embeds": trainer.model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del given["input_ids"]
    with pytest.raises(ValueError, match="ran 0 times"):
        trainer.compute_loss(trainer.model, given)


def test_a_foreign_forward_of_the_head_survives(tmp_path):
    model = deep_llama()
    plain, calls = model.lm_head.forward, []

    def foreign(hidden):
        calls.append(1)
        return plain(hidden)

    model.lm_head.forward = foreign
    trainer = host(tmp_path, CROW(), model)
    loss = trainer.compute_loss(model, batch())
    assert model.lm_head.forward is foreign and calls
    assert loss.item() == pytest.approx(gradients(host(tmp_path, CROW(), deep_llama()), batch())[0])


def only(*words):
    model = deep_llama().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
    return model


def last_layer_lora():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[3], task_type="CAUSAL_LM")
    return get_peft_model(deep_llama(), config)


@pytest.mark.parametrize("make", [lambda: only("lm_head", "model.norm"), last_layer_lora])
def test_a_penalty_that_reaches_no_trained_weight_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"layers 1 to L - 1\): the penalty changes nothing"):
        host(tmp_path, CROW(), make()).train()


def test_a_penalty_that_reaches_some_is_not(tmp_path):
    for fields, model in (
        ({}, only("layers.2.mlp")),
        ({"include_last": True}, only("layers.3.mlp")),
        ({}, lora(deep_llama())),
    ):
        before = weights(model)
        trainer = host(tmp_path, CROW(**fields), model, max_steps=1)
        trainer.train()
        assert trainer.objectives[0]._has_reached and not same(before, weights(trainer.model), atol=0.0)


def test_the_loss_keeps_no_cache(tmp_path):
    model, told = deep_llama(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: told.append(kwargs.get("use_cache")), with_kwargs=True)
    # `register_forward_pre_hook` runs hooks in their order: what the host's own adds is seen by the core.
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: told.append(kwargs.get("use_cache")), with_kwargs=True
    )
    trainer = host(tmp_path, CROW(), model)
    trainer.compute_loss(model, batch())
    assert told[1::2] and set(told[1::2]) == {False}


def test_the_rows_of_the_last_step_divide_no_later_loss(tmp_path):
    trainer = host(tmp_path, CROW(), deep_llama().double(), learning_rate=1e-12)
    fresh, _ = gradients(host(tmp_path, CROW(), deep_llama().double()), batch(3))
    trainer.train()
    after, _ = gradients(trainer, batch(3))
    assert after == pytest.approx(fresh, rel=1e-6)


def test_encoders_are_warned_of(tmp_path, caplog):
    host(tmp_path, CROW(), small(BertForMaskedLM, BertConfig)).reasons()
    assert "BertForMaskedLM is no decoder of text" in caplog.text
    caplog.clear()
    for model in (deep_llama(), gpt2(), lora(deep_llama())):
        host(tmp_path, CROW(), model).reasons()
    assert "no decoder" not in caplog.text


def compiled():
    model = deep_llama()
    model._compiled_call_impl = model._call_impl  # as model.compile() leaves it, without waiting for a compiler
    return model


def checkpointed(reentrant):
    model = deep_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=4, state_size=2))


def everything_frozen():
    return deep_llama().requires_grad_(False)


def prompted():
    return get_peft_model(deep_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def two_layer_bert():
    return BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))


@pytest.mark.parametrize(
    "model, fields, said",
    [
        (lambda: deep_llama(layers=2), {}, "needs at least one inner pair of layers, got L = 2"),
        (lambda: deep_llama(layers=1), {"include_last": True}, "got L = 1. Use a model of at least 2"),
        (two_layer_bert, {}, "got L = 2"),
        (bart, {}, "is an encoder-decoder"),
        (everything_frozen, {}, "every parameter is frozen"),
        (prompted, {}, "PROMPT_TUNING puts virtual tokens"),
        (compiled, {}, "model.compile()"),
        (lambda: get_peft_model(compiled(), LoraConfig(r=2, target_modules="all-linear")), {}, "model.compile()"),
        (lambda: checkpointed(True), {}, "use_reentrant=False"),
        (mamba, {}, "MambaForCausalLM has no attention"),
    ],
)
def test_models_that_are_refused(tmp_path, model, fields, said):
    reasons = host(tmp_path, CROW(**fields), model()).reasons()
    assert any(said in reason for reason in reasons), reasons


def test_models_that_are_not(tmp_path):
    for model, fields in (
        (deep_llama(layers=3), {}),
        (deep_llama(layers=2), {"include_last": True}),
        (lora(deep_llama()), {}),
        (checkpointed(False), {}),
    ):
        assert host(tmp_path, CROW(**fields), model).reasons() == []
    unused = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert host(tmp_path, CROW(), **unused).reasons() == []


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=False",
        ),
        ({"torch_compile": True}, "torch_compile=False"),
        ({"ddp_static_graph": True}, "processes would train different models"),
    ],
)
def test_runs_that_are_refused(tmp_path, changes, said):
    reasons = host(tmp_path, CROW(), **changes).reasons()
    assert any(said in reason for reason in reasons), reasons


def test_accelerates_static_graph_is_refused(tmp_path):
    trainer = host(tmp_path, CROW())
    trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(static_graph=True)
    assert any("`static_graph`" in reason for reason in trainer.reasons())


def test_joined_rows_are_refused(tmp_path):
    trainer = host(tmp_path, CROW())
    trainer.model.train()
    joined = {"input_ids": torch.arange(2, 8)[None], "labels": torch.arange(2, 8)[None]}
    with pytest.raises(ValueError, match="joins several rows"):
        trainer.compute_loss(trainer.model, {**joined, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})
    assert torch.isfinite(trainer.compute_loss(trainer.model, joined))
    whole = {**joined, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with pytest.raises(ValueError, match="joins several rows"):
        trainer.compute_loss(trainer.model, {**whole, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 0, 0, 1, 2, 0]])}
    assert torch.isfinite(trainer.compute_loss(trainer.model, {**joined, **padded}))
    with pytest.raises(ValueError, match=r"must be \[batch, time\]"):
        trainer.compute_loss(trainer.model, {**joined, "attention_mask": torch.ones(1, 1, 6, 6)})


def test_few_rows_and_a_hot_rate_are_warned_of(tmp_path, caplog):
    host(tmp_path, CROW(), learning_rate=4e-4, rows=language_rows(100)).reasons()
    assert not [r for r in caplog.records if "crow" in r.message]
    host(tmp_path, CROW(), learning_rate=5e-4, rows=language_rows(99)).reasons()
    assert "99 clean rows" in caplog.text and "defense=None at the same rate" in caplog.text


def test_named_trainers(tmp_path):
    trainer = CROWTrainer(
        deep_llama(), args=arguments(tmp_path), train_dataset=language_rows(8), data_collator=PadCollator()
    )
    assert trainer.objectives == [CROW()]


def sft(folder, **changes):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_length": None,
    }
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return CROWSFTTrainer(
        deep_llama(),
        args=SFTConfig(str(folder), **{**values, **quiet, **changes}),
        train_dataset=language_rows(8).remove_columns(["attention_mask", "row_id"]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def test_trl_with_an_adapter_and_its_checkpointing(tmp_path):
    trainer = sft(tmp_path)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert trainer.objectives[0].inert() is None and trainer.objectives[0].activity()["rows"] == 8


def test_trl_joins_no_rows(tmp_path):
    assert any(
        "packing=False and padding_free=False" in reason
        for reason in sft(tmp_path, packing=True, max_length=16).reasons()
    )
