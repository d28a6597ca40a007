"""The control: the classifier's own confidence, bound to its weights."""

import numpy as np
import pytest
import torch

from hf_backdoor_defense.filters import FILTER_FILE, Uncalibrated
from hf_backdoor_defense.input_filters.confidence import ConfidenceFilter
from hf_backdoor_defense.input_filters.strip import STRIP
from tests.input_filters import serving_toys as toys

TEXTS = sorted(set(toys.texts(400)))


def confidence(seed=0):
    return ConfidenceFilter(toys.base(seed, dropout=0.0).eval(), toys.tokenizer(), max_length=12)


def test_the_score_is_the_log_of_the_largest_softmax_of_each_text_alone():
    found = confidence()
    for text, score in zip(TEXTS[:10], found.score(TEXTS[:10]), strict=True):
        inputs = found.tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            logits = found.model(**inputs).logits[0].double().numpy()
        assert score == pytest.approx(np.log(np.exp(logits).max() / np.exp(logits).sum()), abs=1e-6)
    assert len(found.score(["", "w1"])) == 2


def test_it_flags_what_is_surer_than_clean_text_and_says_how_often_clean_text_is():
    found = confidence()
    with pytest.raises(Uncalibrated, match="no threshold yet"):
        found.flag(TEXTS[:3])
    rule = found.calibrate(TEXTS[:150], target_frr=0.1)
    scores = found.score(TEXTS[150:300])
    assert rule.lower is None and found.flag(TEXTS[150:300]).tolist() == (scores > rule.upper).tolist()
    measured = found.measure_frr(TEXTS[150:300])
    assert (
        measured["value"] == np.mean(scores > rule.upper) and measured["low"] <= measured["value"] <= measured["high"]
    )
    with pytest.raises(ValueError, match="2 of 2 texts are among those that confidence was calibrated on"):
        found.measure_frr(TEXTS[:2])


def test_saved_and_loaded_for_the_same_weights_only(tmp_path):
    found = confidence()
    found.calibrate(TEXTS[:150], target_frr=0.1)
    found.save(tmp_path)
    again = ConfidenceFilter.from_pretrained(tmp_path, found.model, found.tokenizer)
    assert again.calibration == found.calibration and again.calibrated_on == found.calibrated_on
    assert again.flag(TEXTS).tolist() == found.flag(TEXTS).tolist() and again.max_length == 12
    with pytest.raises(ValueError, match="other weights"):
        ConfidenceFilter.from_pretrained(tmp_path, confidence(seed=1).model, found.tokenizer)
    with pytest.raises(ValueError, match="holds the filter 'confidence', not 'strip'"):
        STRIP.from_pretrained(tmp_path, found.model, found.tokenizer)
    (tmp_path / FILTER_FILE).write_text('{"version": 2}')
    with pytest.raises(ValueError, match="version 2"):
        ConfidenceFilter.from_pretrained(tmp_path, found.model, found.tokenizer)
