"""RECIPE from end to end in small, over three seeds of attack, cleaning and fine-tuning: who still obeys a trigger?

What holds: pre-training alone leaves most of the backdoor, and RECIPE with the same rate, steps and text takes most of it away
(mean AASR of seeds 0 to 2: 91 % poisoned, 85 % after pre-training alone, 34 % after RECIPE, 19 % for a clean model).

What does not hold. Pre-training alone costs the attack four to eleven points on average (four runs) and not twenty; on seed
100 twice the steps took no more, and an attack that plain training washes out would test nothing. And with BERT's own
targets, the up-projections alone, RECIPE lay -7 to 14 points below pre-training alone (three tries on seed 100). So the
targets are those that the paper has for vision transformers.
"""

import numpy as np
import pytest
import torch

from hf_backdoor_defense.defenses.recipe import RECIPE
from tests.experiment import small_encoder

SEEDS = (0, 1, 2)
pytestmark = pytest.mark.timeout(900)  # two and a half minutes on an idle core, a multiple of that on a busy one


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Beside another busy process two threads made a step many times as slow."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def texts():
    return small_encoder.collect()


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    """Folder and held-out loss of the pre-trained encoder."""
    folder = tmp_path_factory.mktemp("base")
    return folder, small_encoder.pretrain(texts, folder)


@pytest.fixture(scope="module")
def found(texts, base, tmp_path_factory):
    """Figures of the victims, by arm [seeds], and the attacks and defenses behind them."""
    figures = {"aasr": {}, "ca": {}}
    attacks, defenses = [], {"pre-training": [], "RECIPE": []}

    def tested(arm, source, folder, seed):
        for name, value in small_encoder.victim(source, folder / "victim", texts, seed=seed).items():
            figures[name].setdefault(arm, []).append(value)

    for seed in SEEDS:
        tested("clean", base[0], tmp_path_factory.mktemp("clean"), seed)
        poisoned = tmp_path_factory.mktemp("poisoned")
        attacks.append(small_encoder.attack(base[0], poisoned, texts, seed=seed))
        tested("poisoned", poisoned, poisoned, seed)
        for arm, coef in (("pre-training", 0.0), ("RECIPE", 1.0)):
            folder = tmp_path_factory.mktemp("cleaned")
            defenses[arm].append(small_encoder.purify(poisoned, folder, texts, coef=coef, seed=seed))
            tested(arm, folder, folder, seed)
    return {name: {arm: np.array(v) for arm, v in arms.items()} for name, arms in figures.items()}, attacks, defenses


def test_nobody_shares_a_sentence(texts):
    parts = [set(texts.publisher), set(texts.defender), set(texts.held_out)]
    parts += [{row.text for row in rows} for rows in (texts.train, texts.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert [len(part) for part in (texts.publisher, texts.held_out, texts.train, texts.test)] == [3000, 200, 800, 250]


def test_the_encoder_predicts_more_than_frequencies(base):
    # 0.40 to 0.49 nats over seven draws of the sentences; another Python brings other sentences.
    assert base[1].loss < base[1].unigram - 0.2


def test_the_attack_took(found):
    _, attacks, _ = found
    for attack in attacks:
        assert attack.inert is None and attack.end["sign_agreement"] > 0.95
        assert attack.end["target_mse"] < 0.5 * attack.start["target_mse"]


def test_both_kinds_of_pre_training_get_the_same_dose_and_one_shrinks(found):
    _, _, defenses = found
    for plain, recipe in zip(defenses["pre-training"], defenses["RECIPE"], strict=True):
        assert plain.activity()["sum_lr"] == pytest.approx(recipe.activity()["sum_lr"])
        assert recipe.activity()["dose"] == pytest.approx(RECIPE().dose, rel=0.02)
        assert abs(plain.activity()["norm_ratio"] - 1) < 0.1
        assert recipe.activity()["norm_ratio"] == pytest.approx(recipe.activity()["predicted_norm_ratio"], abs=0.1)
        assert recipe.inert() is None and "plain" in plain.inert()


def test_recipe_removes_what_pre_training_leaves(found):
    # Means over the seeds: one attack or one fine-tuning may lie ten points beside the next.
    aasr = {arm: values.mean() for arm, values in found[0]["aasr"].items()}
    # Triggers mean nothing to a clean model: its AASR is the floor.
    assert aasr["poisoned"] >= aasr["clean"] + 0.4
    assert aasr["pre-training"] >= aasr["clean"] + 0.3  # else the control, too, removes it, and nothing was tested
    assert aasr["pre-training"] >= aasr["RECIPE"] + 0.2


def test_recipe_costs_no_accuracy(found):
    ca = found[0]["ca"]
    assert ca["RECIPE"].mean() >= ca["poisoned"].mean() - 0.03
