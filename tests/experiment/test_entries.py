"""What runs say of their models, where no run is needed: the rest is checked in every verb's own tests by `named`."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_backdoor_defense.cli import options
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.experiment.attack import AttackArguments
from hf_backdoor_defense.experiment.clean import CleanArguments
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.detect import DetectArguments
from hf_backdoor_defense.experiment.implant import ImplantArguments
from hf_backdoor_defense.experiment.purify_arguments import PurifyArguments
from hf_backdoor_defense.models import tensors_sha256, weights_sha256
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole, saved_sha256
from tests.trainers.text_toys import tokenizer
from tests.trainers.toys import bert, llama

RUNS = {
    "clean": ("method", CleanArguments(method="pretraining", text="a b.txt", epochs=0.5, seed=3, static_masks=True)),
    "purify": (
        "method",
        PurifyArguments(method="ulrl", model_name="m", clean="c", control=False, held_out=0.3, seed=2),
    ),
    "detect": ("filter", DetectArguments(filter="psim", model="m", input="i", target_frr=0.02, max_flagged=0.5)),
    "attack": ("attack", AttackArguments(task="t", attack="lwp", seeds=[1, 2], strategies=["lora"], save_models=False)),
    "implant": ("attack", ImplantArguments(text="t", triggers=["cf", "mn"], cache="c", seeds=[4], epochs=1e-3)),
}


@pytest.mark.parametrize("verb", RUNS)
def test_a_command_gives_the_same_run_again(verb):
    chosen, run = RUNS[verb]
    words = verb_command({"purify": "clean", "implant": "attack"}.get(verb, verb), run, chosen=chosen)
    assert words[:3] == ["hfbd", words[1], f"--{chosen}"] and words[-2:] == ["--output_dir", "runs/again"]
    (again,), defenses = options.parse([type(run)], words[2:], {}, "hfbd")
    assert again == dataclasses.replace(run, output_dir="runs/again") and defenses == []


def test_a_command_names_a_methods_changed_fields_and_no_others():
    words = verb_command("clean", PurifyArguments(method="d3"), D3(lam=2.0), chosen="method")
    assert words == ["hfbd", "clean", "--method", "d3", "--defense.lam", "2.0", "--output_dir", "runs/again"]


def test_a_saved_model_is_known_by_what_its_class_loads(tmp_path):
    # ViT's weights have other names in its files than in the model; a causal one is cut into several files.
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    for name, model, size in (("vit", ViTForImageClassification(config), "1GB"), ("llama", llama(), "10KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        assert saved_sha256(tmp_path / name) == weights_sha256(model), name
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1


def test_a_whole_pretrained_model_is_known_with_its_pooler(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    tensors = load_file(tmp_path / "mlm" / "model.safetensors")
    pooler = {f"bert.pooler.{name}": value for name, value in BertModel(config).pooler.state_dict().items()}
    save_file({**tensors, **pooler}, tmp_path / "mlm" / "model.safetensors", metadata={"format": "pt"})
    words.save_pretrained(tmp_path / "mlm")
    model, _ = load_pretrained_whole(str(tmp_path / "mlm"))
    assert "bert.pooler.dense.weight" in model.state_dict()
    save_pretrained_whole(model, words, tmp_path / "again")
    assert saved_sha256(tmp_path / "again") == saved_sha256(tmp_path / "mlm") == weights_sha256(model)
    model.bert.pooler.dense.weight.data[0, 0] += 1
    save_pretrained_whole(model, words, tmp_path / "other")
    assert saved_sha256(tmp_path / "other") != saved_sha256(tmp_path / "mlm")


def test_an_adapter_needs_no_base_and_a_foreign_class_none_at_all(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2))
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved_sha256(tmp_path / "adapter") == tensors_sha256(stored)
    bert().save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["SomebodysModel"]}))
    assert saved_sha256(tmp_path / "foreign") == tensors_sha256(load_file(tmp_path / "foreign" / "model.safetensors"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no safetensors weights"),
        ({"model.safetensors": b"\x80\x04cut"}, "no safetensors file"),
        ({"pytorch_model.bin": b""}, "no safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        saved_sha256(tmp_path)
