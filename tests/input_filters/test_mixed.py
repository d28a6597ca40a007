import copy

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_backdoor_defense.filters import Uncalibrated
from hf_backdoor_defense.input_filters.mixed import MixedClassifier, share_base
from hf_backdoor_defense.input_filters.psim import PSIMFilter
from hf_backdoor_defense.input_filters.serving import PSIMClassifier, PSIMPipeline
from tests.input_filters import serving_toys as toys

ROWS = [*toys.texts(33), "", "w3", " ".join(toys.WORDS)]


@pytest.fixture
def pair(tmp_path):
    """Two models, and the same two adapters loaded on one base."""
    base = toys.base()
    victim = toys.adapted(copy.deepcopy(base), "lora", seed=7, r=3)
    victim.save_pretrained(tmp_path / "victim")
    psim = toys.psim(model=copy.deepcopy(base))
    psim.save(tmp_path / "psim")
    loaded = PSIMFilter.from_pretrained(tmp_path / "psim", base)
    return PSIMClassifier(victim, psim), MixedClassifier(loaded, tmp_path / "victim", tokenizer=toys.tokenizer())


@pytest.mark.parametrize("mix_up_to", [100, 1, 0], ids=["one batch", "last row mixed", "in turn"])
def test_one_base_gives_what_two_models_give(pair, mix_up_to):
    apart, mixed = pair
    mixed.mix_up_to = mix_up_to
    flagged = 0
    for start in range(0, len(ROWS), 7):
        inputs = apart.tokenizer(ROWS[start : start + 7], padding=True, return_tensors="pt")
        expected, got = apart(**inputs), mixed(**inputs)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-6, rtol=0, equal_nan=True)
        torch.testing.assert_close(got.psim_score, expected.psim_score, atol=1e-6, rtol=0)
        assert torch.equal(got.flagged, expected.flagged)
        flagged += int(got.flagged.sum())
    assert 3 < flagged < 30


def test_one_row_alone_and_the_pipeline(pair):
    apart, mixed = pair
    one = mixed.tokenizer("w3", return_tensors="pt")
    torch.testing.assert_close(mixed(**one).logits, apart(**one).logits, atol=1e-6, rtol=0, equal_nan=True)
    expected = PSIMPipeline(model=apart)(ROWS)
    for result, known in zip(PSIMPipeline(model=mixed, on_flag="abstain")(ROWS, batch_size=5), expected, strict=True):
        assert result["flagged"] == known["flagged"] and (
            result["label"] == "ABSTAIN" or result["label"] == known["label"]
        )
        assert result["psim_score"] == pytest.approx(known["psim_score"], abs=1e-6)


def test_the_filter_of_a_shared_base_still_scores_as_psim(pair):
    apart, mixed = pair
    expected = apart.filter.score(ROWS)
    assert mixed.filter.score(ROWS) == pytest.approx(expected, abs=1e-6)
    for rows in (ROWS[:4], ROWS):  # mixed, in turn
        mixed(**mixed.tokenizer(rows, padding=True, return_tensors="pt"))
        assert mixed.filter.score(ROWS) == pytest.approx(expected, abs=1e-6)
    assert len(list(mixed.parameters())) < len(list(apart.parameters()))  # the base is there once


def test_it_stays_in_evaluation_mode_and_the_base_reads_a_small_batch_once(pair):
    _, mixed = pair
    mixed.train()
    assert not any(module.training for module in mixed.modules())
    passes = []
    encoder = mixed.psim.get_base_model().bert
    encoder.register_forward_hook(lambda module, args, output: passes.append(len(output[0])))
    mixed(**mixed.tokenizer(ROWS[:4], padding=True, return_tensors="pt"))
    assert passes == [8]
    passes.clear()
    flagged = mixed(**mixed.tokenizer(ROWS, padding=True, return_tensors="pt")).flagged
    assert passes == [len(ROWS), len(ROWS) - int(flagged.sum())]


def test_refusals_name_the_way_with_two_models(tmp_path):
    base = toys.base()
    toys.adapted(copy.deepcopy(base), "p_tuning", seed=7).save_pretrained(tmp_path / "p_tuning")
    toys.adapted(copy.deepcopy(base), "lora", seed=7).save_pretrained(tmp_path / "lora")
    toys.adapted(toys.base(labels=4), "lora").save_pretrained(tmp_path / "four")
    lora = toys.psim(model=copy.deepcopy(base))
    for folder, reason in (("p_tuning", "victim P_TUNING"), ("missing", "no adapter_config.json")):
        with pytest.raises(ValueError, match=f"{reason}.*(?s:.)*PSIMClassifier"):
            share_base(lora.model, tmp_path / folder)
    with pytest.raises(ValueError, match="PSIM P_TUNING.*PSIMClassifier"):
        share_base(toys.psim("p_tuning", model=copy.deepcopy(base)).model, tmp_path / "lora")
    with pytest.raises(ValueError, match="plain BertForSequenceClassification"):
        share_base(base, tmp_path / "lora")
    with pytest.raises(ValueError, match="does not fit PSIM's base"):
        share_base(lora.model, tmp_path / "four")
    lora.calibration, calibration = None, lora.calibration
    with pytest.raises(Uncalibrated):
        MixedClassifier(lora, tmp_path / "lora")
    lora.calibration = calibration
    MixedClassifier(lora, tmp_path / "lora")  # after all of that, nothing was left behind
    with pytest.raises(ValueError, match="'victim' already"):
        share_base(lora.model, tmp_path / "lora")


def test_pickled_weights_are_not_read(tmp_path):
    toys.adapted(toys.base(), "lora").save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        share_base(toys.psim().model, tmp_path)


def test_a_head_of_several_layers_needs_two_models(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=44,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    model = toys.adapted(RobertaForSequenceClassification(config), "lora")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RobertaClassificationHead.*PSIMClassifier"):
        share_base(model, tmp_path)
