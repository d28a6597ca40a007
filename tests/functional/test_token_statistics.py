"""Entropy and top-1 of labeled positions against a numpy loop."""

import numpy as np
import pytest
import torch

from hf_backdoor_defense.functional.token_statistics import entropy_and_top1


def loop(logits, labels):
    """The same, row by row, in float64."""
    entropies, hits = [], []
    for row, label in zip(
        logits.double().numpy().reshape(-1, logits.shape[-1]), labels.numpy().reshape(-1), strict=True
    ):
        if label == -100:
            continue
        p = np.exp(row - row.max())
        p /= p.sum()
        entropies.append(-sum(x * np.log(x) for x in p if x > 0))
        hits.append(int(row.argmax()) == label)
    return np.array(entropies), np.array(hits, dtype=bool)


@pytest.mark.parametrize("rows_per_block", [1, 2, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_to_a_loop_over_rows(rows_per_block, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 5, 11, generator=generator)).to(dtype)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[1] = logits[1].argmax(-1)  # otherwise hardly any label would have the highest score
    labels[0, :2] = labels[2, 4] = -100
    entropy, top1 = entropy_and_top1(logits, labels, chunk_bytes=rows_per_block * 11 * 4)
    expected, hits = loop(logits, labels)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(entropy.double().numpy(), expected, atol=1e-5)
    assert (top1.numpy() == hits).all() and 0 < hits.sum() < len(hits)


def test_limits():
    uniform, certain = torch.zeros(2, 7), torch.full((1, 7), -torch.inf)
    certain[0, 3] = 0
    assert torch.allclose(entropy_and_top1(uniform, torch.tensor([0, 6]))[0], torch.full((2,), 7.0).log())
    entropy, top1 = entropy_and_top1(certain, torch.tensor([3]))
    assert entropy.item() == 0 and top1.item()


def test_nothing_labeled_is_empty():
    entropy, top1 = entropy_and_top1(torch.zeros(2, 3, 5), torch.full((2, 3), -100))
    assert entropy.shape == top1.shape == (0,) and top1.dtype == torch.bool


def test_a_budget_below_one_row_takes_one_row_and_no_gradient_is_kept():
    logits = torch.randn(4, 9, requires_grad=True)
    entropy, _ = entropy_and_top1(logits, torch.arange(4), chunk_bytes=1)
    assert entropy.shape == (4,) and not entropy.requires_grad
