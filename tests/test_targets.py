"""The matrices of every family, against lists written down by hand for tiny models."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from hf_backdoor_defense.targets import PUBLISHED, TARGETS, no_match, target_weights

S = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 20,
}  # fmt: skip
V = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4, "num_channels": 1,
}  # fmt: skip
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
UP, QUERY, GATED = ("intermediate.dense",), ("attention.self.query",), ("mlp.gate_proj", "mlp.up_proj")
VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1", "mlp.fc2")
CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2")


def t5(kinds):
    return [("encoder.block", f"layer.1.DenseReluDense.{k}") for k in kinds] + [
        ("decoder.block", f"layer.2.DenseReluDense.{k}") for k in kinds
    ]


CASES = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**S)), [("bert.encoder.layer", n) for n in UP]),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**S)), [("roberta.encoder.layer", n) for n in UP + QUERY]),
    "xlm-roberta": (lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(**S)),
                    [("roberta.encoder.layer", n) for n in UP + QUERY]),
    "electra": (lambda: ElectraForMaskedLM(ElectraConfig(embedding_size=8, **S)),
                [("electra.encoder.layer", n) for n in UP]),
    "deberta": (lambda: DebertaForMaskedLM(DebertaConfig(**S)), [("deberta.encoder.layer", n) for n in UP]),
    "deberta-v2": (lambda: DebertaV2ForMaskedLM(DebertaV2Config(**S)), [("deberta.encoder.layer", n) for n in UP]),
    "distilbert": (lambda: DistilBertForMaskedLM(DistilBertConfig(
        vocab_size=20, dim=8, n_layers=2, n_heads=2, hidden_dim=12)), [("distilbert.transformer.layer", "ffn.lin1")]),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**V)), [("vit.layers", n) for n in VIT]),
    "clip": (lambda: CLIPModel(CLIPConfig(text_config=S, vision_config=V, projection_dim=4)),
             [("vision_model.encoder.layers", n) for n in CLIP]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)),
             [("transformer.h", "mlp.c_fc")]),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**S)), [("model.layers", n) for n in GATED]),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=1, **S)),
                [("model.layers", n) for n in GATED]),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **S)), [("model.layers", n) for n in GATED]),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), t5(["wi"])),
    "t5, gated": (lambda: T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **T5)),
                  t5(["wi_0", "wi_1"])),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(
        vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12)),
        [("model.encoder.layers", "fc1"), ("model.decoder.layers", "fc1")]),
    "opt": (lambda: OPTForCausalLM(OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, word_embed_proj_dim=8)),
        [("model.decoder.layers", "fc1")]),
}  # fmt: skip


def expected(parts):
    return {f"{stem}.{layer}.{name}.weight" for stem, name in parts for layer in range(2)}


def test_every_family_has_a_case():
    assert {name.partition(",")[0] for name in CASES} == set(TARGETS) and set(PUBLISHED) <= set(TARGETS)


@pytest.mark.parametrize("name", CASES)
def test_the_matrices_of_a_family(name):
    make, parts = CASES[name]
    model = make()
    found = target_weights(model)
    assert set(found) == expected(parts)
    assert all(found[n] is p for n, p in model.named_parameters() if n in found)
    assert set(target_weights(model, name.partition(",")[0])) == set(found)


def test_old_names_of_vision_transformers():
    layer = "vit.encoder.layer.0."
    wanted = ["intermediate.dense", "output.dense", *(f"attention.attention.{k}" for k in ("query", "key", "value"))]
    others = ["attention.output.dense", "layernorm_before"]
    names = [f"{layer}{n}.weight" for n in wanted + others] + [f"{layer}{n}.bias" for n in wanted]
    tensors = [(n, torch.zeros(2) if n.endswith("bias") else torch.zeros(2, 2)) for n in names]
    model = SimpleNamespace(named_parameters=lambda: tensors, config=SimpleNamespace(model_type="vit"))
    assert set(target_weights(model)) == {f"{layer}{n}.weight" for n in wanted}


def test_patterns_of_ones_own_take_matrices_only():
    model = BertForMaskedLM(BertConfig(**S))
    found = target_weights(model, [r"layer\.1\.attention\.self\.(query|key)\."])
    assert set(found) == {f"bert.encoder.layer.1.attention.self.{n}.weight" for n in ("query", "key")}
    assert target_weights(model, ["nowhere"]) == {}
    said = no_match(model, ["nowhere"])
    assert "['nowhere']" in said and "bert.encoder.layer.0.attention.output.dense.weight" in said


@pytest.mark.parametrize(("targets", "message"), [("bret", "no preset of `targets` for bret"), (["a", "("], r"'\('")])
def test_what_is_no_preset_and_no_pattern(targets, message):
    with pytest.raises(ValueError, match=message):
        target_weights(BertForMaskedLM(BertConfig(**S)), targets)
    with pytest.raises(ValueError, match="a model without a model_type"):
        target_weights(torch.nn.Linear(2, 2))
