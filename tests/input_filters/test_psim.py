"""The filter that PSIM's module is: what it learns from, what it promises, and whom it belongs to."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.filters import FILTER_FILE, Uncalibrated
from hf_backdoor_defense.functional.thresholds import clopper_pearson, conformal_threshold
from hf_backdoor_defense.input_filters.psim import PSIMFilter, PsimNotUsable, training_arguments
from hf_backdoor_defense.models import weights_sha256
from tests.input_filters import serving_toys as toys
from tests.trainers.toys import weights


def sure(seed=0, labels=2):
    """A base that is sure of every text."""
    model = toys.base(seed, labels, dropout=0.0)
    with torch.no_grad():
        model.classifier.weight.mul_(8)
    return model


LONG = {"num_train_epochs": 8, "learning_rate": 3e-2, "disable_tqdm": True, "use_cpu": True}


def fresh(count, seed):
    """Texts that no module here was trained on."""
    seen = set(toys.texts(200))
    return [text for text in toys.texts(2 * count, seed=seed) if text not in seen][:count]


def fit(folder, base=None, count=200, psim=None, **options):
    args = training_arguments(
        folder, num_train_epochs=4, learning_rate=2e-2, disable_tqdm=True, use_cpu=True, **options
    )
    psim = psim or PSIM(stop_margin=0.3, stop_every=1, train_head=True)
    base = sure() if base is None else base
    return PSIMFilter.fit(base, toys.tokenizer(), toys.texts(count), psim=psim, args=args, max_length=20)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    found = fit(tmp_path_factory.mktemp("fit"))
    found.calibrate(fresh(300, 5), target_frr=0.05)
    return found


FRESH = [text for text in fresh(300, 8) if text not in fresh(300, 5)][:150]


def test_fit_lowers_clean_confidence_and_leaves_the_base_alone(tmp_path):
    base = sure()
    before = weights(base)
    found = fit(tmp_path, base)
    activity = found.psim.activity()
    assert activity["conf_p95_before"] > 0.85 and activity["conf_p95_after"] <= 0.8 and activity["stopped"] == 1
    assert found.base_sha256 == weights_sha256(sure())
    for name, tensor in found.model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if plain in before:
            assert torch.equal(tensor, before[plain]), name
    assert not found.model.training


def test_the_score_is_the_logarithm_of_the_largest_probability(fitted):
    logits = fitted.logits(FRESH).double().numpy()
    expected = -np.log1p(np.exp(-np.abs(logits[:, 1] - logits[:, 0])))  # of two classes: the logistic of the margin
    np.testing.assert_allclose(fitted.score(FRESH), expected, atol=1e-9)


def test_scores_do_not_depend_on_order_batch_or_neighbors(fitted):
    exact = copy.deepcopy(fitted)
    exact.model.double()  # in float32 a product of one row rounds differently from one of many
    whole = exact.score(FRESH)
    np.testing.assert_allclose(exact.score(FRESH[::-1])[::-1], whole, atol=1e-9)
    exact.batch_size = 1
    np.testing.assert_allclose(exact.score(FRESH[:20]), whole[:20], atol=1e-9)
    assert len(fitted.score(["", "w1", "unknown words only", " ".join(toys.WORDS)])) == 4


def test_the_rate_is_kept_on_fresh_clean_texts_and_the_interval_is_stated(fitted):
    measured = fitted.measure_frr(fresh(400, 21))
    assert measured["n"] == 400 and measured["low"] <= 0.05 and measured["value"] < 0.12
    calibration = fitted.calibration
    assert calibration.frr_low < 0.05 < calibration.frr_high and calibration.n == 300


def test_texts_it_was_trained_on_calibrate_nothing(fitted):
    with pytest.raises(ValueError, match="1 of 300 texts were used to train"):
        fitted.calibrate([*fresh(299, 5), toys.texts(200)[7]])
    with pytest.raises(ValueError, match="at least 199"):
        fitted.calibrate(fresh(150, 5))
    fitted.calibrate(fresh(300, 5), target_frr=0.05)


def test_other_texts_than_it_was_calibrated_on_are_noticed(fitted):
    short = ["w3 w4 w3 w4"] * 60
    flagged = fitted.flag(short)
    fitted.calibration = type(fitted.calibration)(
        tail="upper", upper=float(fitted.score(short)[0]) - 1e-3, target_frr=0.01, frr_high=0.05
    )
    with pytest.raises(PsimNotUsable, match="other texts"):
        fitted.measure_frr(short)
    fitted.calibrate(fresh(300, 5), target_frr=0.05)
    assert fitted.flag(short).tolist() == flagged.tolist()


def test_saved_and_loaded_it_flags_the_same(fitted, tmp_path):
    fitted.measure_frr(FRESH)
    fitted.save(tmp_path / "psim")
    names = {path.name for path in (tmp_path / "psim").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "psim.safetensors", FILTER_FILE} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    again = PSIMFilter.from_pretrained(tmp_path / "psim", base=sure())
    np.testing.assert_allclose(again.score(FRESH), fitted.score(FRESH), atol=1e-9)
    assert again.flag(FRESH).tolist() == fitted.flag(FRESH).tolist()
    assert again.calibration == fitted.calibration and again.seen == fitted.seen and again.psim == fitted.psim
    assert again.measured_frr == fitted.measured_frr
    fitted.save(tmp_path / "psim")  # over its own: no new file, nothing left over
    assert {path.name for path in (tmp_path / "psim").iterdir()} == names


def test_another_base_is_an_error_unless_asked_for_and_then_uncalibrated(fitted, tmp_path, caplog):
    fitted.save(tmp_path)
    with pytest.raises(ValueError, match="trained on other weights than the base given"):
        PSIMFilter.from_pretrained(tmp_path, base=sure(seed=1))
    with pytest.raises(ValueError, match="trained on other weights"):
        PSIMFilter.from_pretrained(tmp_path, base=sure().bfloat16())  # the same base in another precision
    again = PSIMFilter.from_pretrained(tmp_path, base=sure(seed=1), allow_other_base=True)
    assert "calibrate anew" in caplog.text
    with pytest.raises(Uncalibrated):
        again.flag(FRESH)


def test_a_base_with_an_adapter_a_pickle_and_a_half_written_folder_are_refused(fitted, tmp_path):
    fitted.save(tmp_path / "a")
    with pytest.raises(ValueError, match="carries an adapter already"):
        PSIMFilter.from_pretrained(tmp_path / "a", base=toys.adapted(sure(), "lora"))
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        PSIMFilter.from_pretrained(tmp_path / "a", base=sure())
    (tmp_path / "a" / FILTER_FILE).unlink()
    with pytest.raises(ValueError, match="no filter was saved there"):
        PSIMFilter.from_pretrained(tmp_path / "a", base=sure())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        fitted.save(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def test_what_the_artefact_says(fitted, tmp_path):
    fitted.save(tmp_path)
    record = json.loads((tmp_path / FILTER_FILE).read_text())
    assert record["base_sha256"] == fitted.base_sha256 and record["labels"] == ["label 0", "label 1"]
    assert record["psim"]["name"] == "psim" and record["dtype"] == "float32" and record["max_length"] == 20
    assert record["calibration"]["target_frr"] == 0.05


def test_the_published_rule_flags_above_its_probability(tmp_path):
    psim = PSIM.preset("paper", strategy="lora")
    found = fit(tmp_path, psim=psim)
    rule = found.calibrate(FRESH)
    assert rule.upper == pytest.approx(np.log(0.7)) and rule.lower is None
    probabilities = torch.softmax(found.logits(FRESH).double(), -1).amax(-1).numpy()
    assert found.flag(FRESH).tolist() == (probabilities > 0.7).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"psim": PSIM(stop_margin=0.01, train_head=True), "max_steps": 12}, "fell only to"),
        ({"base": toys.base(labels=2), "psim": PSIM(stop_margin=0.45)}, "not confident on clean text"),
    ],
)
def test_not_usable_is_said_from_clean_text_alone(tmp_path, options, message):
    with pytest.raises(PsimNotUsable, match=message):
        fit(tmp_path, **options)


def test_a_module_that_answers_every_text_alike_is_not_usable(fitted):
    class Constant(nn.Module):
        config = fitted.model.config

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **kwargs):
            return {"logits": torch.zeros(len(input_ids), 2)}

    found = PSIMFilter(Constant(), toys.tokenizer(), base_sha256="")
    with pytest.raises(PsimNotUsable, match="300 of 300 clean texts"):
        found.calibrate(fresh(300, 5))
    assert found.calibration is None


def test_too_few_texts_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="at least 128 different clean texts.*got 100"):
        fit(tmp_path, count=100)


@pytest.mark.parametrize("strategy", ["p_tuning", "prompt_tuning", "prefix_tuning"])
def test_the_longest_text_fits_beside_virtual_tokens(strategy):
    model = toys.adapted(toys.base(), strategy)
    found = PSIMFilter(model, toys.tokenizer(), base_sha256="", max_length=500)
    assert found.max_length == 24 - 5
    assert np.isfinite(found.score([" ".join(toys.WORDS), ""])).all()


def test_the_same_texts_and_seed_give_the_same_module_in_any_order(tmp_path):
    texts = toys.texts(200)
    found = []
    for order in (texts, texts[::-1]):
        args = training_arguments(tmp_path, max_steps=3, disable_tqdm=True, use_cpu=True)
        psim = PSIM(stop_margin=None, train_head=True)
        found.append(PSIMFilter.fit(sure(), toys.tokenizer(), order, psim=psim, args=args))
    for (name, one), other in zip(found[0].model.named_parameters(), found[1].model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_rows_it_was_calibrated_or_trained_on_measure_nothing(fitted):
    with pytest.raises(ValueError, match="1 of 3 texts are among those that psim was calibrated on"):
        fitted.measure_frr([*FRESH[:2], fresh(300, 5)[7]])
    with pytest.raises(ValueError, match="1 of 1 texts were used to train"):
        fitted.measure_frr([toys.texts(200)[0]])


def test_a_correct_filter_is_not_called_unusable(fitted):
    """A calibration of 199 rows may have a rate of three times what was asked for, and is exchangeable all the same."""
    rng, raised = np.random.default_rng(0), 0
    for _ in range(400):
        rule = conformal_threshold(rng.normal(size=199), 0.01)
        flagged = int(rule.flags(rng.normal(size=2000)).sum())
        raised += clopper_pearson(flagged, 2000)[0] > rule.frr_high
    assert raised / 400 < 0.03


@pytest.mark.parametrize("strategy", ["lora", "p_tuning"])
def test_a_base_on_which_it_failed_is_given_back_and_the_arguments_stay(tmp_path, strategy):
    base = sure()
    args = training_arguments(tmp_path, max_steps=1, learning_rate=0.0, disable_tqdm=True, use_cpu=True, seed=7)
    for _ in range(2):  # the second try finds the base as the first one did
        with pytest.raises(PsimNotUsable, match="did not lower"):
            psim = PSIM(strategy=strategy, train_head=True)
            PSIMFilter.fit(base, toys.tokenizer(), toys.texts(200), psim=psim, args=args, seed=3)
        assert weights_sha256(base) == weights_sha256(sure()) and args.seed == 7


def test_a_changed_file_is_noticed(fitted, tmp_path):
    fitted.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors` is not the file"):
        PSIMFilter.from_pretrained(tmp_path, base=sure())


@pytest.mark.parametrize("names", [["../secret"], ["adapter_config.json"], []])
def test_a_filter_is_bound_to_its_own_files_and_no_others(fitted, tmp_path, names):
    fitted.save(tmp_path)
    record = json.loads((tmp_path / "filter.json").read_text())
    (tmp_path / "filter.json").write_text(json.dumps({**record, "files": dict.fromkeys(names, "0" * 64)}))
    with pytest.raises(ValueError, match="must be bound to adapter_model.safetensors"):
        PSIMFilter.from_pretrained(tmp_path)


def test_a_save_that_is_killed_leaves_the_old_one_whole(fitted, tmp_path, monkeypatch):
    folder = tmp_path / "psim"
    fitted.save(folder)
    monkeypatch.setattr(fitted.tokenizer, "save_pretrained", lambda place: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fitted.save(folder)
    monkeypatch.undo()
    assert PSIMFilter.from_pretrained(folder, base=sure()).flag(FRESH).tolist() == fitted.flag(FRESH).tolist()
    fitted.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["psim"]
