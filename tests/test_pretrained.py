"""Whole checkpoints: what survives a load and a save, and who can tell a trained head from a drawn one."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_backdoor_defense.models import mark_backdoored
from hf_backdoor_defense.pretrained import (
    MISSING_KEYS,
    float32_reasons,
    head_is_fresh,
    load_pretrained_whole,
    mark_head_trained,
    pooler_of,
    save_pretrained_whole,
)
from tests.trainers.text_toys import VOCABULARY, causal_lm, config, saved_trunk, saved_whole, tokenizer
from tests.trainers.toys import same, weights

SMALL = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip


def stored(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_everything_survives_two_rounds_and_reaches_a_classifier(tmp_path):
    first = stored(saved_whole(tmp_path / "0"))
    for i in range(2):
        model, tokens = load_pretrained_whole(str(tmp_path / str(i)))
        save_pretrained_whole(model, tokens, tmp_path / str(i + 1))
        assert same(stored(tmp_path / str(i + 1)), first)
        assert not any(p.requires_grad for p in pooler_of(model).parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "2", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(classifier.bert.pooler.dense.weight, first["bert.pooler.dense.weight"])
    assert tokens("a1")["input_ids"] == tokenizer()("a1")["input_ids"]


def test_a_bare_round_trip_drops_the_pooler(tmp_path):
    saved_whole(tmp_path / "whole")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "bare")
    lost = set(stored(tmp_path / "whole")) - set(stored(tmp_path / "bare"))
    assert lost == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert lost <= set(info["missing_keys"])


def test_the_pooler_takes_part_in_no_score(tmp_path):
    saved_whole(tmp_path)
    whole, bare = load_pretrained_whole(str(tmp_path))[0], AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.tensor([[2, 7, 8, 3]])
    assert torch.equal(whole.eval()(input_ids=ids).logits, bare.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(("kind", "make"), [("roberta", RobertaModel), ("albert", AlbertModel)])
def test_other_families_keep_theirs(tmp_path, kind, make):
    set_seed(0)
    settings = RobertaConfig(**SMALL) if kind == "roberta" else AlbertConfig(embedding_size=8, **SMALL)
    save_pretrained_whole(make(settings), tokenizer(), tmp_path / "a")
    model, tokens = load_pretrained_whole(str(tmp_path / "a"))
    save_pretrained_whole(model, tokens, tmp_path / "b")
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert all(torch.equal(value, after[f"{kind}.{name}"]) for name, value in before.items())
    assert model(input_ids=torch.tensor([[2, 7, 3]])).logits.shape == (1, 3, len(VOCABULARY))


def test_a_head_that_is_missing_is_drawn_from_the_seed_and_named(tmp_path, caplog):
    saved_trunk(tmp_path / "trunk")
    with caplog.at_level(logging.WARNING):
        model, tokens = load_pretrained_whole(str(tmp_path / "trunk"), seed=3)
    assert "drawn at random" in caplog.text and "UNEXPECTED" not in caplog.text
    missing = getattr(model.config, MISSING_KEYS)
    assert missing and all(name.startswith("cls.predictions") for name in missing)
    again, other = (weights(load_pretrained_whole(str(tmp_path / "trunk"), seed=seed)[0]) for seed in (3, 4))
    head = "cls.predictions.transform.dense.weight"
    assert same(weights(model), again) and not torch.equal(again[head], other[head])
    save_pretrained_whole(model, tokens, tmp_path / "saved")  # a folder that has all keys, and says what they are
    for loaded in (
        load_pretrained_whole(str(tmp_path / "saved"))[0],
        BertForMaskedLM.from_pretrained(tmp_path / "saved"),
    ):
        assert head_is_fresh(loaded) is True
    mark_head_trained(model)
    assert head_is_fresh(model) is False
    save_pretrained_whole(model, tokens, tmp_path / "trained")
    assert head_is_fresh(load_pretrained_whole(str(tmp_path / "trained"))[0]) is False
    assert MISSING_KEYS not in json.loads((tmp_path / "trained" / "config.json").read_text())


def test_who_can_tell_whether_a_head_is_fresh(tmp_path, monkeypatch):
    whole, trunk = saved_whole(tmp_path / "whole"), saved_trunk(tmp_path / "trunk")
    assert head_is_fresh(load_pretrained_whole(str(whole))[0]) is False
    assert head_is_fresh(load_pretrained_whole(str(trunk))[0]) is True
    assert head_is_fresh(AutoModelForMaskedLM.from_pretrained(whole)) is False
    assert head_is_fresh(AutoModelForMaskedLM.from_pretrained(trunk)) is True
    assert head_is_fresh(AutoModelForSequenceClassification.from_pretrained(whole)) is True
    hub = AutoModelForMaskedLM.from_pretrained(whole)
    hub.config._name_or_path = "somebody/some-bert"
    assert head_is_fresh(hub) is None
    monkeypatch.chdir(whole)  # a model that was built comes from no folder, wherever one stands
    assert head_is_fresh(BertForMaskedLM(config())) is None


def test_heads_with_old_names_and_tied_names_are_known(tmp_path):
    folder = saved_whole(tmp_path / "whole")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in stored(folder).items()
    }
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert head_is_fresh(AutoModelForMaskedLM.from_pretrained(folder)) is False


def test_causal_models_have_a_tied_head_or_their_own(tmp_path):
    model = causal_lm(tmp_path / "gpt2")
    assert type(model).__name__ == "GPT2LMHeadModel" and head_is_fresh(model) is False and pooler_of(model) is None


def test_layers_can_be_left_out(tmp_path):
    model, tokens = load_pretrained_whole(str(saved_whole(tmp_path / "a")), num_layers=1)
    save_pretrained_whole(model, tokens, tmp_path / "b")
    again = load_pretrained_whole(str(tmp_path / "b"))[0]
    assert len(again.bert.encoder.layer) == 1 and pooler_of(again) is not None and head_is_fresh(again) is False


def test_a_checkpoint_keeps_its_precision(tmp_path):
    model, tokens = load_pretrained_whole(str(saved_whole(tmp_path / "a")))
    save_pretrained_whole(model.bfloat16(), tokens, tmp_path / "b")
    again = load_pretrained_whole(str(tmp_path / "b"))[0]
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert "bfloat16" in float32_reasons(again)[0] and float32_reasons(again.float()) == []


def test_an_attacked_checkpoint_says_so(tmp_path, caplog):
    folder = saved_whole(tmp_path / "a")
    mark_backdoored(folder, {"attack": "por"})
    load_pretrained_whole(str(folder), warn=False)
    assert "on purpose" not in caplog.text
    load_pretrained_whole(str(folder))
    assert "on purpose" in caplog.text


def test_what_is_refused(tmp_path):
    folder = saved_whole(tmp_path / "whole")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter.*merge_and_unload"):
        load_pretrained_whole(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="neither a folder with a model"):
        load_pretrained_whole(str(tmp_path / "nowhere"))
    t5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is a t5 model.*no masked and no causal"):
        load_pretrained_whole(str(tmp_path / "t5"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantized weights"):
        load_pretrained_whole(str(folder))
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_pretrained_whole(str(folder))[0] is not None
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights"):
        load_pretrained_whole(str(folder))


def test_roberta_for_masked_lm_without_a_pooler_stays_without(tmp_path):
    RobertaForMaskedLM(RobertaConfig(**SMALL)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load_pretrained_whole(str(tmp_path))[0]
    assert pooler_of(model) is None and head_is_fresh(model) is False
