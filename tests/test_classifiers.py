"""Trained classifiers: LoRA merged as the formula says, half precision made whole, everything else refused with advice."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.classifiers import classifier_of, load_trained
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.vision import new_digits_vit
from tests.trainers.toys import bert, same, weights


@pytest.fixture
def folder(classifier, tmp_path):
    return shutil.copytree(classifier, tmp_path / "model")


@pytest.fixture
def digits(tmp_path):
    model, processor = new_digits_vit()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_text_classifier_comes_as_it_is_with_its_tokenizer_and_names(folder):
    found = load_trained(str(folder))
    assert found.kind == "text" and found.labels == ["class 0", "class 1", "class 2"] and found.notes == ()
    assert same(weights(found.model), load_file(folder / "model.safetensors"))
    rows = found.rows(
        Dataset.from_dict({"text": ["a1 the", "b2", ""], "label": [0, 1, 2], "extra": [1, 2, 3]}), max_length=8
    )
    assert set(rows.column_names) <= {"input_ids", "attention_mask", "token_type_ids", "label"}
    batch = found.collator()([rows[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 4) and batch["labels"].tolist() == [0, 1, 2]  # two words, [CLS] and [SEP]


def test_an_image_classifier_comes_with_its_image_processor(digits):
    found = load_trained(str(digits))
    assert found.kind == "image" and found.labels == [str(i) for i in range(10)]
    rows = found.rows(Dataset.from_dict({"image": [[[0] * 8] * 8], "label": [3], "source": ["a"]}))
    assert rows.column_names == ["image", "label"]
    batch = found.collator()([{"image": np.full((8, 8), 255, np.uint8), "label": 3}])
    assert batch["pixel_values"].shape == (1, 1, 8, 8) and batch["labels"].tolist() == [3]


def lora(folder, tmp_path, **overrides):
    base = BertForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(1)
    model = apply_strategy(base, "lora", r=2, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_lora_adapter_is_merged_base_plus_scaled_product_and_brings_its_head(folder, tmp_path, caplog):
    model, adapter = lora(folder, tmp_path)
    found = load_trained(str(adapter))
    assert "merged into its base" in caplog.text and "merged" in found.notes[0]
    stored, base, own = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(folder / "model.safetensors"),
        weights(found.model),
    )
    assert own.keys() == base.keys() and not any("lora" in name for name in own)
    changed = 0
    for name, value in own.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in stored:
            a, b = (stored[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
            expected = base[name].double() + 16 / 2 * b @ a  # alpha / r
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
            changed += 1
        elif name.startswith("classifier"):
            assert torch.equal(value, stored[f"base_model.model.{name}"])
        else:
            assert torch.equal(value, base[name])
    assert changed == 4  # query and value of two layers
    assert all(p.requires_grad for p in found.model.parameters()) and not hasattr(found.model, "peft_config")
    batch = found.collator()([{"input_ids": [2, 7, 3]}, {"input_ids": [2, 9, 12, 3]}])
    with torch.no_grad():
        torch.testing.assert_close(found.model(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_lora_adapter_on_a_base_without_a_head(encoder, tmp_path):
    base = BertForSequenceClassification.from_pretrained(encoder, num_labels=4)
    apply_strategy(base, "lora").save_pretrained(tmp_path / "adapter")
    found = load_trained(str(tmp_path / "adapter"))
    head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert len(found.labels) == 4 and torch.equal(found.model.classifier.weight, head)


def test_a_model_in_memory_is_copied_and_its_lora_merged_in_the_copy(folder, tmp_path):
    model, adapter = lora(folder, tmp_path)
    before = weights(model)
    found = classifier_of(model, AutoTokenizer.from_pretrained(folder))
    assert same(weights(model), before) and hasattr(model, "peft_config")
    assert same(weights(found.model), weights(load_trained(str(adapter)).model))
    plain = bert()
    copied = classifier_of(plain)
    assert copied.model is not plain and weights_sha256(copied.model) == weights_sha256(plain)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_and_that_is_said(folder, kind, caplog):
    model = BertForSequenceClassification.from_pretrained(folder).to(kind)
    model.save_pretrained(folder)
    found = load_trained(str(folder))
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    name = str(kind).removeprefix("torch.")
    assert f"were {name} and are float32 now" in caplog.text and name in found.notes[0]
    assert same(weights(found.model), {n: v.float() for n, v in weights(model).items()})
    assert {p.dtype for p in classifier_of(model).model.parameters()} == {torch.float32} and model.dtype == kind


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def encoder_only(folder, tmp_path):
    BertModel.from_pretrained(folder).save_pretrained(folder)


def no_head_weights(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: v for n, v in tensors.items() if "classifier" not in n}, folder / "model.safetensors", {"format": "pt"}
    )


def masked(folder, tmp_path):
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)


def prompt(folder, tmp_path):
    apply_strategy(BertForSequenceClassification.from_pretrained(folder), "prompt_tuning").save_pretrained(
        tmp_path / "p"
    )
    shutil.copy(tmp_path / "p" / "adapter_config.json", folder)


def adapter_of_pickles(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    apply_strategy(BertForSequenceClassification.from_pretrained(base), "lora").save_pretrained(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def adapter_of_nothing(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    apply_strategy(BertForSequenceClassification.from_pretrained(base), "lora").save_pretrained(folder)
    shutil.rmtree(base)


REFUSED = {
    "encoder": (encoder_only, "no classification head"),
    "masked language model": (masked, "no classification head"),
    "head without weights": (no_head_weights, "no weights of a head"),
    "regression": (lambda f, t: config(f, problem_type="regression"), "one class per row"),
    "several labels": (lambda f, t: config(f, problem_type="multi_label_classification"), "one class per row"),
    "quantized": (lambda f, t: config(f, quantization_config={"quant_method": "bitsandbytes"}), "quantized weights"),
    "pickle": (lambda f, t: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no safetensors weights"),
    "prompt tuning": (prompt, "only LoRA can be merged"),
    "adapter as pickle": (adapter_of_pickles, "no adapter_model.safetensors"),
    "adapter without its base": (adapter_of_nothing, "neither a folder with a model nor reachable"),
    "nothing": (lambda f, t: shutil.rmtree(f), "neither a folder with a model nor reachable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_purified_is_refused_with_advice(folder, tmp_path, name):
    spoil, message = REFUSED[name]
    spoil(folder, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_trained(str(folder))


def test_models_in_memory_are_refused_alike(folder):
    with pytest.raises(ValueError, match="only LoRA can be merged"):
        classifier_of(apply_strategy(bert(), "prompt_tuning"))
    model = bert()
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="one class per row"):
        classifier_of(model)
    with pytest.raises(ValueError, match="must be a trained classifier"):
        classifier_of(BertModel(bert().config))


def test_weights_that_were_attacked_on_purpose_are_named_once(folder, digits, caplog):
    for place in (folder, digits):
        mark_backdoored(place, {"attack": "badnets", "seed": 3})
        caplog.clear()
        assert load_trained(str(place)).attacked == {"backdoored": True, "attack": "badnets", "seed": 3}
        assert caplog.text.count("on purpose") == 1
    assert classifier_of(BertForSequenceClassification.from_pretrained(folder)).attacked["attack"] == "badnets"


def test_rows_and_batches_that_cannot_be_made_say_why(folder, digits):
    text, image = load_trained(str(folder)), load_trained(str(digits))
    with pytest.raises(ValueError, match="at most 24 tokens"):
        text.rows(Dataset.from_dict({"text": ["a1"]}), max_length=64)
    with pytest.raises(ValueError, match="column `text`"):
        text.rows(Dataset.from_dict({"sentence": ["a1"]}))
    with pytest.raises(ValueError, match="column `image`"):
        image.rows(Dataset.from_dict({"text": ["a1"]}))
    text.processor.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        text.collator()
    with pytest.raises(ValueError, match="needs its tokenizer"):
        classifier_of(bert()).collator()
    with pytest.raises(ValueError, match="need a tokenizer"):
        classifier_of(bert()).rows(Dataset.from_dict({"text": ["a1"]}), max_length=8)
    ready = Dataset.from_dict({"input_ids": [[2, 3]], "label": [0], "text": ["a1"]})
    assert classifier_of(bert()).rows(ready).column_names == ["input_ids", "label"]
