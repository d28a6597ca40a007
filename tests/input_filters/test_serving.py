import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_backdoor_defense.filters import Uncalibrated
from hf_backdoor_defense.input_filters import serving
from hf_backdoor_defense.input_filters.serving import FlaggedInput, PSIMClassifier, PSIMPipeline, cut_rows
from tests.input_filters import serving_toys as toys

STRATEGIES = ("lora", "p_tuning", "prompt_tuning", "prefix_tuning")
ODD = ["", "w3", "nothing known here", " ".join(toys.WORDS)]


def watched(module):
    """The ids of every row that reaches a module."""
    seen = []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        ),
        with_kwargs=True,
    )
    return seen


@pytest.fixture(scope="module")
def classifier():
    return PSIMClassifier(toys.base(seed=5), toys.psim())


@pytest.fixture(scope="module")
def texts(classifier):
    rows = [*toys.texts(37, seed=3), *ODD]
    assert 3 < classifier.filter.flag(rows).sum() < 30
    return rows


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_score_is_the_filters_and_the_answers_are_the_victims_own(strategy):
    psim, victim = toys.psim(strategy), toys.base(seed=5).eval()
    classifier = PSIMClassifier(victim, psim, tokenizer=toys.tokenizer())
    rows = [*toys.texts(20), *ODD]
    out = classifier(**psim.tokenizer(rows, padding=True, return_tensors="pt"))
    np.testing.assert_allclose(out.psim_score, psim.score(rows), atol=1e-6)
    assert out.flagged.tolist() == psim.flag(rows).tolist() and 0 < out.flagged.sum() < len(rows)
    for i, text in enumerate(rows):  # one by one, cut by the tokenizer itself
        with torch.no_grad():
            alone = victim(**psim.tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits[0]
        expected = torch.full_like(alone, torch.nan) if out.flagged[i] else alone
        torch.testing.assert_close(out.logits[i], expected, atol=1e-5, rtol=0, equal_nan=True)


def test_flagged_rows_never_reach_the_victim_and_the_others_once():
    classifier = PSIMClassifier(toys.base(seed=5), toys.psim())
    seen = watched(classifier.victim)
    rows = [*toys.texts(30), *ODD]
    inputs = classifier.tokenizer(rows, padding=True, truncation=True, max_length=12, return_tensors="pt")
    flagged = classifier(**inputs).flagged
    ids = [i[m.bool()].tolist() for i, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert seen == [row for row, flag in zip(ids, flagged, strict=True) if not flag]
    for on_flag in ("mark", "abstain"):
        seen.clear()
        PSIMPipeline(model=classifier)(rows, on_flag=on_flag, batch_size=7)
        assert sorted(seen) == sorted(row for row, flag in zip(ids, flagged, strict=True) if not flag)


def test_all_rows_flagged_and_no_row_flagged():
    psim = toys.psim()
    inputs = psim.tokenizer(toys.texts(5), padding=True, return_tensors="pt")
    classifier = PSIMClassifier(toys.base(seed=5), psim)
    seen = watched(classifier.victim)
    psim.calibration = type(psim.calibration)(tail="upper", upper=-99.0)
    out = classifier(**inputs)
    assert out.flagged.all() and out.logits.isnan().all() and out.logits.shape == (5, 3) and not seen
    psim.calibration = type(psim.calibration)(tail="upper", upper=0.0)
    out = classifier(**inputs)
    assert not out.flagged.any() and out.logits.isfinite().all() and len(seen) == 5


def test_psim_never_leaves_evaluation_mode_and_nothing_is_changed(classifier):
    inputs = classifier.tokenizer(toys.texts(6), padding=True, return_tensors="pt")
    before = {name: values.clone() for name, values in classifier.state_dict().items()}
    score = classifier(**inputs).psim_score
    classifier.train()
    assert classifier.victim.training and not any(module.training for module in classifier.psim.modules())
    out = classifier(**inputs)
    assert torch.equal(out.psim_score, score) and not out.psim_score.requires_grad
    classifier.eval()
    assert all(torch.equal(values, before[name]) for name, values in classifier.state_dict().items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_text_of_the_maximum_length_runs_and_both_read_the_same_tokens(strategy):
    psim = toys.psim(strategy, max_length=128)  # 24 positions, 5 of them virtual but for LoRA
    classifier = PSIMClassifier(toys.base(seed=5), psim)
    assert classifier.max_length == (24 if strategy == "lora" else 19)
    psim.calibration = type(psim.calibration)(tail="upper", upper=0.0)
    of_psim, of_victim = watched(classifier.psim), watched(classifier.victim)
    result = PSIMPipeline(model=classifier)(" ".join(toys.WORDS))
    assert len(result) == 1
    assert len(of_victim[0]) == classifier.max_length and of_victim[0][-1] == 3
    assert of_psim == of_victim


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [3, 6, 9])
def test_cut_rows_is_the_tokenizers_own_truncation(side, limit):
    tokenizer = toys.tokenizer(side=side)
    rows = [*toys.texts(9, longest=12), *ODD]
    longest = max(len(ids) for ids in tokenizer(rows)["input_ids"])
    cut = cut_rows(dict(tokenizer(rows, padding=True, return_tensors="pt")), limit, special=torch.tensor([0, 1, 2, 3]))
    expected = tokenizer(rows, truncation=True, max_length=limit, padding="max_length", return_tensors="pt")
    assert longest > limit and cut.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(cut[name], values), name


def test_without_a_closing_token_the_first_ones_are_kept():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])
    cut = cut_rows({"input_ids": ids, "attention_mask": (ids > 0).long()}, 3, special=torch.tensor([0]))
    assert cut["input_ids"].tolist() == [[5, 6, 7], [5, 6, 0]]


# -- the pipeline ---------------------------------------------------------------------------------------------------------


def expected_results(classifier, rows):
    """By the parts, text by text."""
    results = []
    for text, flagged, score in zip(rows, classifier.filter.flag(rows), classifier.filter.score(rows), strict=True):
        about = {"flagged": bool(flagged), "psim_score": pytest.approx(np.exp(score), abs=1e-6)}
        label, probability = None, None
        if not flagged:
            inputs = classifier.tokenizer(text, truncation=True, max_length=classifier.max_length, return_tensors="pt")
            with torch.no_grad():
                probabilities = F.softmax(classifier.victim(**inputs).logits[0], dim=-1)
            label = f"label {int(probabilities.argmax())}"
            probability = pytest.approx(float(probabilities.max()), abs=1e-5)
        results.append({"label": label, "score": probability, **about})
    return results


@pytest.mark.parametrize("batch_size", [1, 2, 32, 100])
def test_one_result_per_input_in_order_whatever_the_batch(classifier, texts, batch_size):
    results = PSIMPipeline(model=classifier)(texts, batch_size=batch_size)
    assert results == expected_results(classifier, texts)
    json.dumps(results, allow_nan=False)


def as_generator(texts):
    yield from texts


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        as_generator,
        iter,
        lambda texts: Dataset.from_dict({"text": texts})["text"],
        lambda texts: KeyDataset(Dataset.from_dict({"text": texts}), "text"),
        lambda texts: np.array(texts, dtype=object),
        lambda texts: [{"text": text} for text in texts],
    ],
    ids=["tuple", "generator", "iterator", "column", "key_dataset", "array", "dicts"],
)
def test_every_form_of_input_gives_the_same_results(classifier, texts, form):
    assert list(PSIMPipeline(model=classifier)(form(texts), batch_size=4)) == expected_results(classifier, texts)


def test_a_stream_is_read_as_it_is_asked_for(classifier, texts):
    read = []

    def source():
        for text in texts:
            read.append(text)
            yield text

    stream = PSIMPipeline(model=classifier)(source(), batch_size=2)
    next(iter(stream))
    assert len(read) <= 4


def test_nothing_in_nothing_out_and_one_string_in_a_list_as_transformers_has_it(classifier):
    pipe = PSIMPipeline(model=classifier)
    assert pipe([]) == [] and pipe(()) == [] and list(pipe(as_generator([]))) == []
    for text in ("", "w3"):
        assert pipe(text) == expected_results(classifier, [text])
    assert pipe({"text": "w3"}) == expected_results(classifier, ["w3"])[0]
    pair = pipe({"text": "w3 w4", "text_pair": "w5"})
    assert set(pair) == {"label", "score", "flagged", "psim_score"}


def test_abstain_mark_and_raise(classifier, texts):
    flags = classifier.filter.flag(texts)
    first = int(flags.argmax())
    pipe = PSIMPipeline(model=classifier, on_flag="abstain")
    results = pipe(texts, batch_size=5)
    assert [r["label"] == "ABSTAIN" for r in results] == flags.tolist() == [r["score"] is None for r in results]
    assert [r["label"] is None for r in pipe(texts, on_flag="mark")] == flags.tolist()
    with pytest.raises(FlaggedInput, match=f"input {first} was flagged") as error:
        pipe(texts, on_flag="raise", batch_size=5)
    assert error.value.index == first and isinstance(error.value, ValueError)
    got, stream = [], pipe(as_generator(texts), on_flag="raise")
    with pytest.raises(FlaggedInput) as error:
        got.extend(stream)
    assert error.value.index == first
    clean = [text for text, flag in zip(texts, flags, strict=True) if not flag]
    assert pipe(clean, on_flag="raise") == expected_results(classifier, clean)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_with_top_k_the_two_fields_stand_beside_the_labels(classifier, texts, top_k):
    plain = expected_results(classifier, texts)
    results = PSIMPipeline(model=classifier)(texts, top_k=top_k, batch_size=8)
    for result, simple in zip(results, plain, strict=True):
        assert {"flagged": simple["flagged"], "psim_score": simple["psim_score"]} == {
            "flagged": result["flagged"],
            "psim_score": result["psim_score"],
        }
        if simple["flagged"]:
            assert result["labels"] == []
        else:
            assert len(result["labels"]) == (top_k or 3)
            assert result["labels"][0] == {"label": simple["label"], "score": simple["score"]}
            if top_k is None:
                assert sum(entry["score"] for entry in result["labels"]) == pytest.approx(1, abs=1e-6)
    abstained = PSIMPipeline(model=classifier, top_k=top_k)(texts, on_flag="abstain")
    flagged = next(r for r in abstained if r["flagged"])
    assert flagged["labels"] == [{"label": "ABSTAIN", "score": None}]


def test_through_transformers_own_function(classifier, texts):
    expected = expected_results(classifier, texts)
    task = serving.register()
    assert serving.register() == task
    assert pipeline(task, model=classifier, device="cpu", batch_size=4)(texts) == expected
    tokenizer = toys.tokenizer()
    own = pipeline(
        "text-classification", model=classifier, tokenizer=tokenizer, pipeline_class=PSIMPipeline, device="cpu"
    )
    assert own(texts) == expected and "PSIMClassifier" in repr(own)
    stock = pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")
    for result, known in zip(stock(texts, truncation=True, max_length=12, batch_size=4), expected, strict=True):
        if known["flagged"]:
            assert np.isnan(result["score"])
        else:
            assert result == {"label": known["label"], "score": known["score"]}


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_refusals_say_what_to_do(classifier):
    psim = toys.psim()
    several = toys.base()
    several.config.problem_type = "multi_label_classification"
    for victim, reason in (
        (toys.base(labels=1), "regression"),
        (several, "multi_label"),
        (several.bert, "BertModel is no"),
    ):
        with pytest.raises(ValueError, match=reason):
            PSIMClassifier(victim, psim)
    calibration, psim.calibration = psim.calibration, None
    with pytest.raises(Uncalibrated, match="calibrate"):
        PSIMClassifier(toys.base(), psim)
    psim.calibration = calibration
    for other in (toys.tokenizer(words=toys.WORDS[:-1]), toys.tokenizer(lowercase=False)):
        with pytest.raises(ValueError, match="both models read the same ids"):
            PSIMClassifier(toys.base(), psim, tokenizer=other)
        with pytest.raises(ValueError, match="both models read the same ids"):
            PSIMPipeline(model=classifier, tokenizer=other)
    with pytest.raises(ValueError, match="no room"):
        PSIMClassifier(toys.adapted(toys.base(), "p_tuning", num_virtual_tokens=22), psim)
    with pytest.raises(ValueError, match="must be a PSIMClassifier"):
        PSIMPipeline(model=toys.base(), tokenizer=toys.tokenizer())
    with pytest.raises(ValueError, match="on_flag"):
        PSIMPipeline(model=classifier)("w1", on_flag="drop")
    with pytest.raises(ValueError, match="must be a string"):
        PSIMPipeline(model=classifier)(["w1", None])
    with pytest.raises(ValueError, match="`labels` must be"):
        classifier(torch.tensor([[2, 5, 3]]), labels=torch.tensor([1]))


def test_a_victim_with_an_adapter_of_another_kind_is_served():
    psim = toys.psim("lora")
    victim = toys.adapted(toys.base(), "p_tuning", seed=7)
    rows = toys.texts(12)
    out = PSIMClassifier(victim, psim)(**psim.tokenizer(rows, padding=True, return_tensors="pt"))
    kept = ~out.flagged
    assert 0 < kept.sum() and out.logits[kept].isfinite().all() and out.flagged.tolist() == psim.flag(rows).tolist()
