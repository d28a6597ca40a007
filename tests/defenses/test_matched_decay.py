"""The control's factor; that it scales the step is shown in tests/trainers/test_mixin.py."""

import pytest

from hf_backdoor_defense.defenses.matched_decay import MatchedDecay


def test_each_epoch_has_its_factor_and_the_last_one_holds():
    control = MatchedDecay(pull=[0.9, 0.5])
    assert [control.factor(epoch) for epoch in (0.0, 0.99, 1.0, 1.5, 7.0)] == [0.9, 0.9, 0.5, 0.5, 0.5]
    assert control.activity() == {"factor_min": 0.5, "factor_max": 0.9}


def test_only_factors_in_0_to_1_are_taken():
    for bad in ([], [0.0], [1.1], [0.9, -1.0]):
        with pytest.raises(ValueError, match="pull"):
            MatchedDecay(pull=bad)
    assert "plain fine-tuning" in MatchedDecay(pull=[1.0, 1.0]).inert()
    assert MatchedDecay(pull=[1.0, 0.9]).inert() is None
