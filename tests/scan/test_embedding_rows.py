"""The scan against numpy, what it must find and where it must be silent, and what a reset leaves."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from hf_backdoor_defense.scan.embedding_rows import ordinary_row, reset_rows, scan_embedding_rows


def gaussian(rows=500, width=24, seed=0, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("rows", "width"), [(2, 1), (7, 3), (500, 24), (8193, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_against_numpy(rows, width, dtype):
    weight = gaussian(rows, width, rows, dtype)
    before = weight.clone()
    scan = scan_embedding_rows(weight, threshold=1.5)
    norms = np.sqrt((weight.double().numpy() ** 2).sum(1))
    median = np.median(norms)
    z = (norms - median) / max(1.4826 * np.median(np.abs(norms - median)), torch.finfo(dtype).eps * median)
    np.testing.assert_allclose(scan.z.numpy(), z, rtol=1e-9, atol=1e-12)
    assert set(scan.rows) == set(np.flatnonzero(np.abs(z) > 1.5).tolist())
    assert np.all(np.diff(np.abs(z)[list(scan.rows)]) <= 0)  # the most outlying first
    assert scan.max_over_median == pytest.approx(norms.max() / median) and scan.largest == np.abs(z).argmax()
    assert torch.equal(weight, before) and scan.z.dtype == torch.float64


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_embeddings_are_silent(seed, dtype):
    assert scan_embedding_rows(0.02 * gaussian(2000, 16 + seed, seed, dtype)).rows == ()


def test_rows_that_are_scaled_or_broken_are_found_and_lead():
    weight = gaussian()
    weight[17] *= 1e8
    weight[3] *= 20
    weight[401, 5] = torch.nan
    weight[90, 0] = -torch.inf
    scan = scan_embedding_rows(weight)
    assert scan.rows == (90, 401, 17, 3)
    assert scan.z[[90, 401]].tolist() == [torch.inf, torch.inf] and scan.max_over_median == torch.inf
    assert scan.largest == 90


def test_a_norm_can_be_too_small():
    weight = gaussian(width=200)
    weight[5] *= 1e-8  # z is at least -1 over the coefficient of variation, here -20
    assert scan_embedding_rows(weight).rows == (5,)


def test_rows_of_zeros_are_neither_judged_nor_counted():
    weight = gaussian(width=200)
    padded = torch.cat([torch.zeros(900, 200), weight])
    scan, padded_scan = scan_embedding_rows(weight), scan_embedding_rows(padded)
    assert padded_scan.rows == () and padded_scan.zeros == 900 and scan.zeros == 0
    assert (padded_scan.median, padded_scan.scale) == (scan.median, scan.scale)
    assert padded_scan.largest == 900 + scan.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_norms_differ_by_rounding_only_and_any_other_row_is_outlying(dtype):
    weight = nn.functional.normalize(gaussian(width=64), dim=1).to(dtype)
    assert scan_embedding_rows(weight).rows == ()
    weight[9] *= 1.25
    assert scan_embedding_rows(weight).rows == (9,)
    same = torch.ones(6, 2, dtype=dtype)
    assert scan_embedding_rows(same).rows == ()
    same[4] *= 2
    assert scan_embedding_rows(same).rows == (4,)


def test_one_row_and_one_column():
    assert scan_embedding_rows(torch.ones(1, 1)).z.tolist() == [0]


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3), {}, "matrix of floats"),
        (torch.ones(3, 2, dtype=torch.int8), {}, "not quantized"),
        (torch.ones(0, 2), {}, "matrix of floats"),
        (torch.zeros(3, 2), {}, "finite and not zero"),
        (torch.full((3, 2), torch.nan), {}, "finite and not zero"),
        (torch.ones(3, 2), {"threshold": 0}, "`threshold` must be a positive number, got 0"),
        (torch.ones(3, 2), {"threshold": float("nan")}, "`threshold`"),
    ],
)
def test_refusals(weight, options, message):
    with pytest.raises(ValueError, match=message):
        scan_embedding_rows(weight, **options)


def test_the_ordinary_row_is_the_mean_of_the_others_at_their_median_norm():
    weight = gaussian(width=3) + 2
    weight[[4, 8]] = 1e9
    weight[11] = torch.nan
    weight[12] = 0
    keep = np.setdiff1d(np.arange(500), [4, 8, 11, 12, 20])
    rows = weight.double().numpy()[keep]
    mean = rows.mean(0)
    expected = mean / np.linalg.norm(mean) * np.median(np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(ordinary_row(weight, [4, 20]).numpy(), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="leave rows"):
        ordinary_row(torch.ones(2, 2), [0, 1])


def tiny_bert(**options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **options
    )
    return BertForMaskedLM(config)


def test_a_reset_is_silent_afterwards_and_touches_nothing_else():
    model = tiny_bert()
    weight = model.get_input_embeddings().weight
    clean = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        weight[7] *= 1e8
        weight[9] = torch.nan
        weight[0] = 1e6  # the padding row, which a literal "[PAD]" in a text reads unmasked
    rows = scan_embedding_rows(weight).rows
    assert rows == (9, 7, 0)
    reset_rows(model, rows)
    assert scan_embedding_rows(weight).rows == () and weight.requires_grad and weight.grad_fn is None
    assert torch.equal(weight[7], weight[9]) and weight[7].norm() > 0 and not weight[0].any()
    assert model.cls.predictions.decoder.weight is weight
    tied = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    others = [row for row in range(60) if row not in rows]
    for name, value in model.state_dict().items():
        assert torch.equal(value, clean[name]) if name not in tied else torch.equal(value[others], clean[name][others])


def test_an_untied_head_and_a_padding_row_that_is_in_order_are_left_alone():
    model = tiny_bert(tie_word_embeddings=False)
    head = model.cls.predictions.decoder.weight.clone()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[0] = embedding.weight[1]
        embedding.weight[5] *= 1e8
    padding = embedding.weight[0].clone()
    reset_rows(model, scan_embedding_rows(embedding.weight).rows)
    assert torch.equal(embedding.weight[0], padding) and torch.equal(model.cls.predictions.decoder.weight, head)
    reset_rows(model, ())
    assert torch.equal(embedding.weight[0], padding)


def test_a_model_without_padding_row_gets_the_ordinary_row_everywhere():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)).half()
    expected = ordinary_row(model.get_input_embeddings().weight, [0]).half()
    reset_rows(model, [0])
    assert torch.equal(model.get_input_embeddings().weight[0], expected)


def test_reset_refuses_rows_outside_and_models_without_tokens():
    with pytest.raises(ValueError, match=r"must be in 0..59, got \[-1, 60\]"):
        reset_rows(tiny_bert(), [3, -1, 60])
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    for model in (nn.Linear(2, 2), ViTModel(config)):
        with pytest.raises(ValueError, match="must have an input embedding"):
            reset_rows(model, [0])
