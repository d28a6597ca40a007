"""Alignment and plain cross-entropy, against loops over positions."""

import math

import pytest
import torch

from hf_backdoor_defense.functional.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    shift_labels,
    valid,
    valid_rows,
)


def make(shape=(3, 5), classes=33, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE_INDEX
    return logits, labels


def loop(logits, labels, smoothing=0.0):
    """One position at a time, in probability space; torch's smoothing convention."""
    values = []
    for row, label in zip(logits.reshape(-1, logits.shape[-1]).tolist(), labels.reshape(-1).tolist(), strict=True):
        if label == -100:
            continue
        weights = [math.exp(z - max(row)) for z in row]
        target = [smoothing / len(row)] * len(row)
        target[label] += 1 - smoothing
        values.append(-sum(y * math.log(w / sum(weights)) for y, w in zip(target, weights, strict=True)))
    return torch.tensor(values, dtype=torch.float64)


def test_shifted_labels_pair_each_position_with_its_successor():
    _, labels = make()
    shifted = shift_labels(labels)
    assert shifted.shape == labels.shape
    for row, original in zip(shifted.tolist(), labels.tolist(), strict=True):
        assert row == original[1:] + [IGNORE_INDEX]


def test_shifting_labels_equals_cutting_logits():
    logits, labels = make()
    torch.testing.assert_close(
        cross_entropy(logits, shift_labels(labels)), cross_entropy(logits[:, :-1], labels[:, 1:]), rtol=0, atol=0
    )


def test_shift_leaves_its_argument_alone_and_handles_short_rows():
    labels = torch.tensor([[4], [5]])
    assert shift_labels(labels).tolist() == [[IGNORE_INDEX], [IGNORE_INDEX]]
    assert labels.tolist() == [[4], [5]]
    assert shift_labels(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


def test_shift_refuses_labels_without_time():
    with pytest.raises(ValueError, match=r"\[batch, time\], got shape \[3\]"):
        shift_labels(torch.zeros(3, dtype=torch.long))


def test_only_the_ignore_index_is_invalid():
    assert valid(torch.tensor([[0, -100], [-1, 7]])).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "classes"), [((7,), 2), ((3, 5), 33), ((2, 1, 3), 101)])
def test_agrees_with_a_loop(shape, classes, smoothing):
    logits, labels = make(shape, classes)
    torch.testing.assert_close(
        cross_entropy(logits, labels, label_smoothing=smoothing), loop(logits, labels, smoothing)
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_is_computed_in_single_precision_at_least(dtype, expected):
    logits, labels = make(dtype=dtype)
    values = cross_entropy(logits, labels)
    assert values.dtype == expected
    torch.testing.assert_close(values.double(), loop(logits.double(), labels), rtol=1e-5, atol=1e-5)


def test_gradcheck_through_ignored_rows():
    logits, labels = make((2, 3), 7)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), logits.requires_grad_())


def test_ignored_rows_get_no_gradient_even_when_they_are_not_finite():
    logits = torch.tensor([[1.0, 2.0], [math.nan, math.inf]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0, IGNORE_INDEX])).sum().backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_labels_sums_to_zero_and_has_a_graph(smoothing):
    logits, _ = make()
    logits.requires_grad_()
    values = cross_entropy(logits, torch.full((3, 5), IGNORE_INDEX), label_smoothing=smoothing)
    assert values.shape == (0,)
    total = values.sum()
    assert total.item() == 0.0
    total.backward()
    assert logits.grad.abs().max().item() == 0.0


def test_valid_rows_does_not_copy_contiguous_logits():
    logits, labels = make()
    flat, targets, rows = valid_rows(logits, labels)
    assert flat.data_ptr() == logits.data_ptr()
    assert torch.equal(labels.reshape(-1)[rows], targets)
    assert valid_rows(logits, torch.zeros_like(labels))[2] is None


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"got logits \[2, 3\] and labels \[3\]"),
        (torch.zeros(2, 3, 4), torch.zeros(6, dtype=torch.long), r"got logits \[2, 3, 4\] and labels \[6\]"),
        (torch.zeros(()), torch.zeros((), dtype=torch.long), r"got logits \[\]"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"in \[0, 3\) or -100, got 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"in \[0, 3\) or -100, got -1"),
        (torch.zeros(2, 3), torch.zeros(2), r"must be integers, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), r"floating point, got torch.int64"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), r"at least 2 classes, got 1"),
    ],
)
def test_refuses_what_does_not_fit(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, labels)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_refuses_smoothing_out_of_range(smoothing):
    logits, labels = make()
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\]"):
        cross_entropy(logits, labels, label_smoothing=smoothing)


def test_labels_of_any_integer_type_are_accepted():
    logits, labels = make()
    assert torch.equal(cross_entropy(logits, labels.int()), cross_entropy(logits, labels))
