"""What is loaded only with something else: adapter and filter with their base; a model that only its loss speaks for."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.hub import reproduce
from hf_backdoor_defense.hub.card_text import BUILT_IN
from hf_backdoor_defense.hub.sizes import check_numbers, check_size
from hf_backdoor_defense.hub.staging import stage
from hf_backdoor_defense.hub.verify import FAIL, PASS, UNKNOWN, verify
from hf_backdoor_defense.models import OFFLINE_MODEL, load_classifier
from hf_backdoor_defense.pretrained import saved_sha256
from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.results import Record
from hf_backdoor_defense.reporting.sealed import write_results
from tests.hub.published import edit, forge, seal, write_texts
from tests.hub.test_verify import outcomes, text
from tests.input_filters import serving_toys as toys
from tests.input_filters.test_psim import FRESH, fit, fresh, sure
from tests.trainers.image_toys import vit

OF = {"benchmark": "b", "dataset": "d", "model": "m", "attack": "none", "setting": "", "seed": 0}


def run(folder, figures, **about):
    """A run's folder around the model that lies in it: `figures` are (metric, count, n)."""
    entry = ModelEntry(**{"path": "model", "arm": "mine", "seed": 0, "role": "fine_tuned",
                          "pipeline_tag": "text-classification", "base_model": "owner/base", **about})  # fmt: skip
    records = [Record.from_estimate(wilson(count, n), defense="mine", metric=m, **OF) for m, count, n in figures]
    payload = {"schema": 1, "verb": "train", "failures": [], "verdict": "", "command": ["hfbd", "train"],
               "models": [entry.to_dict()], "records": records}  # fmt: skip
    write_results(folder, payload)
    return folder


def test_an_adapter_is_measured_on_the_base_that_is_built_in(tmp_path):
    rows = [json.loads(line) for line in write_texts(tmp_path / "rows.jsonl", 24).read_text().splitlines()]
    base, tokenizer = load_classifier(OFFLINE_MODEL, num_labels=3)
    model = apply_strategy(base, "lora").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        right = int((model(**batch).logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).sum())
    place = tmp_path / "run" / "model"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "README.md").unlink()
    made = run(
        tmp_path / "run", [("ca", right, 24)], base_model=OFFLINE_MODEL, library="peft", relation="adapter",
        weights_sha256=saved_sha256(place), labels=["0", "1", "2"],
        measurement={"kind": "text", "task": "rows.jsonl", "reader": "samples", "split": "test", "max_length": 16},
    )  # fmt: skip
    folder = stage(made, "owner/adapter").write(tmp_path / "folder")
    assert "all-MiniLM-L6-v2" in (folder / "adapter_config.json").read_text()
    found = verify(folder, task=str(tmp_path / "rows.jsonl"))
    assert found.exit_code == 0 and found.figures[0].measured.value == right / 24, found.text()
    # Another base than its publication's would be another model.
    edit(folder, lambda config: config.update(base_model_name_or_path="owner/other"), name="adapter_config.json")
    seal(folder)
    found = verify(folder, task=str(tmp_path / "rows.jsonl"))
    assert outcomes(found)["figures"] == FAIL and "owner/other" in text(found, "figures")


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """A published filter, and where its base is."""
    place = tmp_path_factory.mktemp("filter")
    base = sure()
    base.save_pretrained(place / "base")
    toys.tokenizer().save_pretrained(place / "base")
    fitted = fit(place / "fit")
    fitted.calibrate(fresh(300, 5), target_frr=0.05)
    (place / "run").mkdir()
    fitted.save(place / "run" / "filter")
    flagged = int(fitted.flag(FRESH).sum())
    made = run(
        place / "run", [("frr", flagged, len(FRESH))], path="filter", role="filter", base_model="owner/base", library="peft",
        relation="adapter", weights_sha256=fitted.base_sha256, labels=["LABEL_0", "LABEL_1"], method=fitted.psim.to_dict(),
    )  # fmt: skip
    return stage(made, "owner/filter", license="mit").write(place / "folder"), place / "base"


def with_base(monkeypatch, place):
    """The Hub's `owner/base` is a folder here."""
    from hf_backdoor_defense import models

    load = models.load_finished_classifier
    monkeypatch.setattr(models, "load_finished_classifier", lambda name, **options: load(
        str(place) if name == "owner/base" else name, **options))  # fmt: skip


def test_a_filter_is_loaded_on_its_base_and_its_rate_measured_on_texts_of_yours(filtered, monkeypatch, tmp_path):
    folder, base = filtered
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps({"text": each}) + "\n" for each in FRESH))
    found = verify(folder, clean=str(clean))
    assert outcomes(found)["weights"] == UNKNOWN and found.exit_code == 2  # offline, and the base is not here
    with_base(monkeypatch, base)
    found = verify(folder)
    assert (outcomes(found)["weights"], outcomes(found)["figures"], found.exit_code) == (PASS, UNKNOWN, 2)
    assert "--clean" in text(found, "figures")
    found = verify(folder, clean=str(clean))
    assert found.exit_code == 0, found.text()
    [rate] = found.figures
    assert (rate.metric, rate.measured) == ("frr", rate.recorded) and rate.recorded.n == len(FRESH)


def test_a_filter_on_another_base_or_with_another_adapter_fails(filtered, monkeypatch, tmp_path):
    folder, base = filtered
    other = tmp_path / "other"
    sure(seed=1).save_pretrained(other)
    toys.tokenizer().save_pretrained(other)
    with_base(monkeypatch, other)
    assert outcomes(verify(folder))["weights"] == FAIL
    with_base(monkeypatch, base)
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy, lambda record: record.update(base_sha256="0" * 64), name="filter.json")
    seal(copy)
    assert outcomes(verify(copy))["weights"] == FAIL
    forge(copy, lambda results: results["models"][0].update(weights_sha256="0" * 64))
    assert outcomes(verify(copy))["weights"] == FAIL


def test_a_pretrained_model_is_loaded_and_nothing_is_claimed_of_its_figures(tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    place = tmp_path / "run" / "model"
    BertForMaskedLM(config).save_pretrained(place)
    made = run(tmp_path / "run", [], role="cleaned", pipeline_tag="fill-mask", weights_sha256=saved_sha256(place))
    found = verify(stage(made, "owner/cleaned", license="mit").write(tmp_path / "folder"), task="offline:docstrings")
    assert (outcomes(found)["weights"], outcomes(found)["figures"], found.exit_code) == (PASS, UNKNOWN, 2)
    assert "publisher's claim" in found.sentence


def test_models_whose_saved_names_differ_or_are_tied_are_as_large_as_they_say(tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path / "tied")
    for name in ("vit", "tied"):
        check_size(tmp_path / name)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "larger")
    model.config.num_hidden_layers = 2
    model.config.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="describes"):
        check_size(tmp_path / "larger")


def test_a_base_over_the_limit_or_out_of_reach_is_not_downloaded(monkeypatch):
    asked = []

    class Client:
        def model_info(self, name, files_metadata):
            asked.append(name)
            if name == "owner/away":
                raise ConnectionError("no way there")
            sizes = {"model.safetensors": 3e9, "pytorch_model.bin": 9e9}
            return type(
                "Info", (), {"siblings": [type("F", (), {"rfilename": n, "size": s}) for n, s in sizes.items()]}
            )

    monkeypatch.setattr(reproduce, "HfApi", Client)
    monkeypatch.setattr(reproduce.constants, "HF_HUB_OFFLINE", False)
    reproduce._check_hub_size("owner/base", 4.0)
    reproduce._check_hub_size(OFFLINE_MODEL, 0.0)
    for name, limit in (("owner/base", 2.0), ("owner/away", 4.0)):
        with pytest.raises(reproduce.Unverifiable):
            reproduce._check_hub_size(name, limit)
    assert asked == ["owner/base", "owner/base", "owner/away"]


def client(sizes):
    """A Hub with one data set whose files have these sizes."""
    files = [type("F", (), {"rfilename": f"{i}.parquet", "size": size}) for i, size in enumerate(sizes)]
    info = type("Info", (), {"siblings": files})
    return lambda: type("Client", (), {"dataset_info": lambda self, name, files_metadata: info})()


@pytest.mark.parametrize(
    ("sizes", "max_gb", "allowed"),
    [([3e8, 3e8], 20.0, True), ([6e8, 6e8], 20.0, False), ([3e8], 0.1, False), ([1e3, None], 20.0, False), ([], 20.0, True)],
)  # fmt: skip
def test_data_that_a_record_names_is_downloaded_only_where_it_is_small(monkeypatch, sizes, max_gb, allowed):
    monkeypatch.setattr(reproduce, "HfApi", client(sizes))
    monkeypatch.setattr(reproduce.constants, "HF_HUB_OFFLINE", False)
    for name in ("owner/rows", "owner/rows:part"):
        if allowed:
            assert reproduce._readable(name, max_gb) == name
        else:
            with pytest.raises(reproduce.Unverifiable, match="--task"):
                reproduce._readable(name, max_gb)


def test_files_that_a_record_names_are_never_read(monkeypatch, tmp_path):
    def nobody():
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(reproduce, "HfApi", nobody)
    monkeypatch.setattr(reproduce.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows").mkdir()
    (tmp_path / "offline:mine").mkdir()
    for name in ("rows", "rows.csv", "./rows", "data/rows.jsonl", "data/rows.npz", "/etc/hosts", "~/rows", "a/../rows",
                 "here/rows", "offline:mine", "offline:../x", "", None, 7):  # fmt: skip
        with pytest.raises(reproduce.Unverifiable, match="--task"):
            reproduce._readable(name, 20.0)
    assert [reproduce._readable(name, 20.0) for name in BUILT_IN] == list(BUILT_IN)


def test_a_classifier_that_says_nothing_of_its_rows_is_not_called_pretrained(tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    place = tmp_path / "run" / "model"
    BertForSequenceClassification(config).save_pretrained(place)
    about = {"weights_sha256": saved_sha256(place), "labels": ["a", "b"]}
    for figures, said in (([], "hfbd eval"), ([("ca", 50, 60)], "--task")):
        folder = stage(run(tmp_path / "run", figures, **about), "owner/m", license="mit").write(tmp_path / said)
        found = verify(folder)
        assert outcomes(found)["figures"] == UNKNOWN and said in text(found, "figures")
        assert "fine-tune" not in text(found, "figures")


@pytest.mark.parametrize(
    "values",
    [
        {"num_labels": 3_000_000},
        {"id2label": {str(i): "x" for i in range(2000)}},
        {"encoder_layers": 65},
        {"audio": {"decoder_layers": 10**9}},
        {"parts": [{"n_layer": -70}]},
        {"depths": [40, 40]},
        {"num_experts": 1e300},
        {"num_hidden_layers": float("nan")},
        {"text_config": {"vocab_size": 10**7}},
        {"d_model": 10**6},
        {"num_queries": 10**6},
    ],
)
def test_numbers_that_no_tensor_speaks_for_are_refused(values):
    with pytest.raises(ValueError, match="no such model would be whole"):
        check_numbers(values, tensors=40, longest=900)


def test_numbers_that_tensors_speak_for_are_not(tmp_path):
    values = {
        "num_hidden_layers": 64, "max_position_embeddings": 10**7, "num_positions": 10**7, "vocab_size": 30_522,
        "bos_token_id": 10**6, "id2label": {str(i): "x" for i in range(2000)}, "layer_types": ["full"] * 48,
        "mlp_only_layers": [40, 50, 60],
        "depths": [2, 2, 18, 2], "vision": {"hidden_size": 1280, "feature_layer": -2}, "num_labels": None, "n_layers": True,
    }  # fmt: skip
    check_numbers(values, tensors=60, longest=30_522)


def test_a_configuration_that_is_too_long_is_not_parsed(tmp_path):
    (tmp_path / "config.json").write_text("[" * (2**23 + 1))
    with pytest.raises(ValueError, match="bytes"):
        check_size(tmp_path)
