"""DeCE against a loop in probability space, its limits, its bounds, and the ways in which batches come."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_backdoor_defense.functional.cross_entropy import cross_entropy
from hf_backdoor_defense.functional.dece import (
    dece_loss,
    dece_loss_and_stats,
    dece_loss_from_logps,
    dece_loss_reference,
    minority_bound,
    target_pull,
    threshold,
)

ALPHAS = [0.3, 0.8, 0.985]
SMOOTHINGS = [0.0, 0.05, 0.1]
EVERY = [(alpha, smoothing) for alpha in [0.0, *ALPHAS, 1.0] for smoothing in SMOOTHINGS]
IGNORED = -100


def log(alpha):
    return math.log(alpha) if alpha > 0 else -math.inf


def make(rows=11, classes=33, scale=3.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return logits.to(dtype), labels


def smoothed(labels, classes, smoothing):
    y = torch.full((labels.numel(), classes), smoothing / (classes - 1), dtype=torch.float64)
    return y.scatter(1, labels.unsqueeze(1), 1 - smoothing)


def oracle(logits, labels, alpha, smoothing):
    """In probability space, position by position and class by class; its gradient is autograd's."""
    values = []
    for z, y in zip(logits, smoothed(labels, logits.shape[1], smoothing), strict=True):
        weights = (z - z.max().detach()).exp()
        p = weights / weights.sum()
        q = alpha * p + (1 - alpha) * y
        values.append(-sum(y[k] * q[k].log() for k in range(len(y)) if y[k] > 0))
    return torch.stack(values)


def value_and_gradient(loss, logits, weights=None):
    logits = logits.detach().clone().requires_grad_()
    values = loss(logits)
    (values.sum() if weights is None else values @ weights.to(values.dtype)).backward()
    return values.detach(), logits.grad


def ours(labels, alpha, smoothing, **kwargs):
    return lambda z: dece_loss(z, labels, log_alpha=log(alpha), label_smoothing=smoothing, **kwargs)


# Value and gradient


@pytest.mark.parametrize("function", [dece_loss, dece_loss_reference])
@pytest.mark.parametrize(("alpha", "smoothing"), [(a, s) for a, s in EVERY if a > 0])
def test_agrees_with_a_loop_in_probability_space(function, alpha, smoothing):
    logits, labels = make()
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64)  # no two rows count the same
    expected = value_and_gradient(lambda z: oracle(z, labels, alpha, smoothing), logits, weights)
    found = value_and_gradient(
        lambda z: function(z, labels, log_alpha=log(alpha), label_smoothing=smoothing), logits, weights
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("alpha", "smoothing"), EVERY)
def test_gradcheck(alpha, smoothing):
    logits, labels = make(rows=5, classes=7)
    labels[2] = IGNORED
    assert torch.autograd.gradcheck(ours(labels, alpha, smoothing, chunk_bytes=1), logits.requires_grad_())


@pytest.mark.parametrize("alpha", [1e-9, 1 - 1e-12, *ALPHAS])
@pytest.mark.parametrize("classes", [2, 33, 1009])
def test_agrees_with_the_reference_at_large_logits(alpha, classes):
    logits, labels = make(classes=classes, scale=30.0)
    found = value_and_gradient(ours(labels, alpha, 0.05), logits)
    expected = value_and_gradient(
        lambda z: dece_loss_reference(z, labels, log_alpha=log(alpha), label_smoothing=0.05), logits
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("upstream_graph", [False, True])
def test_double_backward_is_refused(upstream_graph):
    logits, labels = make()
    logits.requires_grad_()
    loss = dece_loss(logits, labels, log_alpha=log(0.8), label_smoothing=0.05)
    weights = torch.ones_like(loss, requires_grad=upstream_graph)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice, got create_graph=True"):
        torch.autograd.grad((loss * weights).sum(), logits, create_graph=True)


def test_backward_may_be_repeated():
    logits, labels = make()
    logits.requires_grad_()
    loss = dece_loss(logits, labels, log_alpha=log(0.8), label_smoothing=0.05).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


# Limits and bounds


def test_without_mixture_and_smoothing_it_is_cross_entropy():
    logits, labels = make(dtype=torch.float32)
    found = value_and_gradient(ours(labels, 1.0, 0.0), logits)
    expected = value_and_gradient(lambda z: F.cross_entropy(z, labels, reduction="none"), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("classes", [2, 33])
def test_without_mixture_it_is_torch_smoothing_by_another_convention(classes):
    logits, labels = make(classes=classes)
    found = value_and_gradient(ours(labels, 1.0, 0.1), logits)
    other = 0.1 * classes / (classes - 1)
    expected = value_and_gradient(lambda z: F.cross_entropy(z, labels, reduction="none", label_smoothing=other), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_prediction_without_share_leaves_the_entropy_of_the_label(smoothing):
    logits, labels = make()
    y = smoothed(labels, 33, smoothing)
    values, gradient = value_and_gradient(ours(labels, 0.0, smoothing), logits)
    torch.testing.assert_close(values, torch.special.entr(y).sum(-1))
    assert gradient.abs().max() == 0
    reference, _ = value_and_gradient(
        lambda z: dece_loss_reference(z, labels, log_alpha=-math.inf, label_smoothing=smoothing), logits
    )
    torch.testing.assert_close(reference, values)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_minimum_is_where_the_prediction_is_the_smoothed_label(alpha):
    _, labels = make()
    y = smoothed(labels, 33, 0.05)
    best, gradient = value_and_gradient(ours(labels, alpha, 0.05), y.log())
    torch.testing.assert_close(best, torch.special.entr(y).sum(-1))
    assert gradient.abs().max() < 1e-15
    for seed in range(5):
        step, _ = make(scale=0.1, seed=seed)
        assert (ours(labels, alpha, 0.05)(y.log() + step) > best).all()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_value_and_gradient_are_bounded(alpha, smoothing, scale):
    logits, labels = make(rows=64, scale=scale)
    y = smoothed(labels, 33, smoothing)
    values, gradient = value_and_gradient(ours(labels, alpha, smoothing), logits)
    entropy = torch.special.entr(y).sum(-1)
    assert (values >= entropy - 1e-12).all()
    assert (values <= entropy + abs(math.log1p(-alpha)) + 1e-12).all()
    assert (gradient.abs() <= torch.maximum(logits.softmax(-1), y) + 1e-12).all()
    assert gradient.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_with_respect_to_probabilities_is_bounded(alpha):
    logits, labels = make(rows=64, scale=30.0)
    logps = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    _, by_logp = value_and_gradient(lambda lp: dece_loss_from_logps(lp, log_alpha=log(alpha)), logps)
    assert (by_logp.abs() / logps.exp()).max() <= alpha / (1 - alpha) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "smoothing"), EVERY)
def test_stays_finite_at_extreme_logits(alpha, smoothing, dtype):
    logits = torch.full((3, 33), -200.0)
    logits[0, 5] = logits[1, 6] = 200.0
    logits[2, ::2] = 200.0
    labels = torch.tensor([5, 5, 1])  # certain and right, certain and wrong, one of the unlikely half
    values, gradient = value_and_gradient(ours(labels, alpha, smoothing), logits.to(dtype))
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.float().abs().max() <= 1


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_classes_that_the_model_excludes_cost_nothing_extra(smoothing):
    logits, labels = make(rows=4)
    logits[:, 20] = -math.inf
    labels[0], labels[1:] = 20, 3
    values, gradient = value_and_gradient(ours(labels, 0.8, smoothing), logits)
    torch.testing.assert_close(values, oracle(logits, labels, 0.8, smoothing))
    assert gradient.isfinite().all()
    assert (gradient[:, 20] == 0).all()


def test_a_confident_float32_row_keeps_its_digits():
    logits, labels = torch.tensor([[150.0, 140.0, 140.0]]), torch.tensor([0])
    found = value_and_gradient(ours(labels, 0.985, 0.0), logits)
    expected = value_and_gradient(lambda z: oracle(z, labels, 0.985, 0.0), logits.double())
    torch.testing.assert_close([part.double() for part in found], list(expected), rtol=0, atol=1e-7)


# The pull toward the label


@pytest.mark.parametrize("alpha", [0.8, 0.985])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_half_of_the_pull_is_kept_at_the_threshold(alpha, smoothing):
    tau = threshold(log_alpha=log(alpha), label_smoothing=smoothing)
    assert tau == pytest.approx((1 - alpha) * (1 - smoothing) / alpha)
    logps = torch.tensor([tau / 2, tau, tau * 2], dtype=torch.float64).log()
    pull = target_pull(logps, log_alpha=log(alpha), label_smoothing=smoothing)
    torch.testing.assert_close(pull, torch.tensor([1 / 3, 1 / 2, 2 / 3], dtype=torch.float64))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.45])
@pytest.mark.parametrize("above", [True, False])
def test_a_minority_pulls_its_label_up_only_above_the_bound(share, above):
    """By autograd, on two rows that look alike: the rare label's logit, from almost nothing."""
    alpha = minority_bound(share) + (1e-3 if above else -1e-3)
    probabilities = torch.full((50,), 1e-9, dtype=torch.float64)
    probabilities[0], probabilities[1] = 1 - 1e-6, 1e-6
    logits = probabilities.log().requires_grad_(True)
    losses = dece_loss(logits.expand(2, -1), torch.tensor([0, 1]), log_alpha=log(alpha), label_smoothing=0.0)
    ((1 - share) * losses[0] + share * losses[1]).backward()
    assert (logits.grad[1].item() < 0) == above  # descent raises the logit


@pytest.mark.parametrize("share", [0.0, 0.5, -0.1, float("nan")])
def test_the_bound_is_about_a_minority(share):
    with pytest.raises(ValueError, match="`share` must be in"):
        minority_bound(share)


def test_threshold_at_the_ends():
    assert threshold(log_alpha=0.0, label_smoothing=0.05) == 0.0
    assert threshold(log_alpha=-math.inf, label_smoothing=0.05) == math.inf
    assert threshold(log_alpha=-1000.0, label_smoothing=0.05) == math.inf
    assert threshold(log_alpha=5 * math.log(0.985), label_smoothing=0.05) == pytest.approx(0.075, abs=1e-3)


def test_pull_at_the_ends():
    logps = torch.tensor([-1e4, -5.0, 0.0])
    assert target_pull(logps, log_alpha=0.0, label_smoothing=0.05).tolist() == [1.0, 1.0, 1.0]
    assert target_pull(logps, log_alpha=-math.inf, label_smoothing=0.05).tolist() == [0.0, 0.0, 0.0]
    assert target_pull(logps.bfloat16(), log_alpha=log(0.8), label_smoothing=0.0).dtype == torch.float32


@pytest.mark.parametrize("alpha", ALPHAS)
def test_without_smoothing_the_gradient_is_the_pull_times_that_of_cross_entropy(alpha):
    logits, labels = make()
    logps = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    pull = target_pull(logps, log_alpha=log(alpha), label_smoothing=0.0)
    _, gradient = value_and_gradient(ours(labels, alpha, 0.0), logits)
    _, plain = value_and_gradient(lambda z: F.cross_entropy(z, labels, reduction="none"), logits)
    torch.testing.assert_close(gradient, pull.unsqueeze(1) * plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS, 1.0])
def test_without_smoothing_log_probabilities_are_enough(alpha):
    logits, labels = make()

    def shortcut(z):
        logps = -F.cross_entropy(z, labels, reduction="none")
        return dece_loss_from_logps(logps, log_alpha=log(alpha))

    found, expected = value_and_gradient(shortcut, logits), value_and_gradient(ours(labels, alpha, 0.0), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_smoothing_goes_to_zero_continuously():
    logits, labels = make()
    torch.testing.assert_close(ours(labels, 0.8, 1e-12)(logits), ours(labels, 0.8, 0.0)(logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "smoothing"), EVERY)
def test_target_log_probabilities_come_along_without_a_graph(alpha, smoothing):
    logits, labels = make()
    labels[3] = IGNORED
    logits.requires_grad_()
    loss, logps, _ = dece_loss_and_stats(logits, labels, log_alpha=log(alpha), label_smoothing=smoothing)
    assert loss.requires_grad
    assert not logps.requires_grad
    torch.testing.assert_close(logps, -cross_entropy(logits, labels).detach(), rtol=1e-12, atol=1e-14)


# Batches: ignored rows, padding, chunks, types


@pytest.mark.parametrize(("alpha", "smoothing"), EVERY)
def test_ignored_rows_leave_the_result_and_get_no_gradient(alpha, smoothing):
    logits, labels = make(rows=12)
    logits, labels = logits.view(3, 4, 33), labels.view(3, 4).clone()
    labels[0, 1:3] = labels[2, 3] = IGNORED
    logits[0, 1] = math.nan
    keep = labels != IGNORED
    values, gradient = value_and_gradient(ours(labels, alpha, smoothing), logits)
    expected, kept = value_and_gradient(ours(labels[keep], alpha, smoothing), logits[keep])
    assert torch.equal(values, expected)
    assert torch.equal(gradient[keep], kept)
    assert (gradient[~keep] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "smoothing"), EVERY)
def test_a_batch_without_labels_sums_to_zero_and_has_a_graph(alpha, smoothing, dtype):
    logits, labels = make(dtype=dtype)
    values, gradient = value_and_gradient(ours(torch.full_like(labels, IGNORED), alpha, smoothing), logits)
    assert values.shape == (0,)
    assert values.sum() == 0
    assert (gradient == 0).all()


def test_a_batch_without_rows():
    values, gradient = value_and_gradient(ours(torch.zeros(0, dtype=torch.long), 0.8, 0.05), torch.zeros(0, 33))
    assert values.shape == (0,)
    assert gradient.shape == (0, 33)


def test_appended_padding_changes_nothing():
    logits, labels = make(rows=12)
    logits, labels = logits.view(3, 4, 33), labels.view(3, 4)
    padded_logits = torch.cat([logits, torch.randn(3, 2, 33, dtype=torch.float64)], dim=1)
    padded_labels = torch.cat([labels, torch.full((3, 2), IGNORED)], dim=1)
    values, gradient = value_and_gradient(ours(labels, 0.8, 0.05), logits)
    padded_values, padded_gradient = value_and_gradient(ours(padded_labels, 0.8, 0.05), padded_logits)
    assert torch.equal(padded_values, values)
    assert torch.equal(padded_gradient[:, :4], gradient)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [33, 1009])
def test_the_chunk_size_does_not_matter(classes, dtype, ignored):
    logits, labels = make(rows=17, classes=classes, dtype=dtype)
    if ignored:
        labels[[0, 8, 9]] = IGNORED
    weights = torch.linspace(-1, 2, int((labels != IGNORED).sum()), dtype=torch.float64)
    expected = value_and_gradient(ours(labels, 0.8, 0.05), logits, weights)  # the default: one chunk
    row = 2 * classes * (8 if dtype == torch.float64 else 4)  # both buffers
    rtol = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]  # rounding depends on alignment
    for rows in (1, 7, 17):
        found = value_and_gradient(ours(labels, 0.8, 0.05, chunk_bytes=rows * row), logits, weights)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9 * rtol)


def test_logits_need_not_be_contiguous():
    logits, labels = make(rows=12)
    wide = logits.view(3, 4, 33).transpose(0, 1)
    values, gradient = value_and_gradient(ours(labels.view(3, 4).T, 0.8, 0.05), wide)
    expected, rows = value_and_gradient(ours(labels, 0.8, 0.05), logits)
    torch.testing.assert_close(values, expected.view(3, 4).T.reshape(-1), rtol=0, atol=0)
    torch.testing.assert_close(gradient, rows.view(3, 4, 33).transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_no_worse_than_the_naive_form(dtype, smoothing, scale):
    logits, labels = make(rows=64, classes=1009, scale=scale, dtype=dtype)

    def naive(z):  # the mixture of probabilities in the model's own dtype
        y = smoothed(labels, 1009, smoothing).to(z.dtype)
        return -torch.special.xlogy(y, 0.8 * z.softmax(-1) + 0.2 * y + 1e-30).sum(-1)

    truth = value_and_gradient(naive, logits.double())
    rough = value_and_gradient(naive, logits)
    found = value_and_gradient(ours(labels, 0.8, smoothing), logits)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-6
    for mine, other, right in zip(found, rough, truth, strict=True):
        error, allowed = ((part.double() - right).norm() for part in (mine, other))
        assert error <= allowed + tolerance * right.norm()


class LargestTensor(TorchDispatchMode):
    """The largest single-precision tensor that any operation inside gave back, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.dtype == torch.float32:
                self.elements = max(self.elements, part.numel())
        return result


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("alpha", "smoothing"), [(0.8, 0.05), (0.8, 0.0), (1.0, 0.05)])
def test_no_single_precision_tensor_exceeds_the_budget(alpha, smoothing, ignored):
    logits, labels = make(rows=64, classes=1009, dtype=torch.bfloat16)
    if ignored:
        labels[::5] = IGNORED
    budget = 2 * 4 * 1009 * 4  # two buffers of four rows
    with LargestTensor() as largest:
        value_and_gradient(ours(labels, alpha, smoothing, chunk_bytes=budget), logits)
    assert 1009 * 4 < largest.elements <= budget // 4


# Refusals


@pytest.mark.parametrize("function", [dece_loss, dece_loss_reference, dece_loss_and_stats])
@pytest.mark.parametrize(
    ("log_alpha", "smoothing", "message"),
    [
        (0.1, 0.05, "`log_alpha` must be at most 0, got 0.1"),
        (math.nan, 0.05, "`log_alpha` must be at most 0, got nan"),
        (-0.1, -0.05, r"`label_smoothing` must be in \[0, 0.75\), got -0.05"),
        (-0.1, 0.75, r"`label_smoothing` must be in \[0, 0.75\), got 0.75"),
        (-0.1, math.nan, r"`label_smoothing` must be in \[0, 0.75\), got nan"),
    ],
)
def test_refuses_fields_out_of_range(function, log_alpha, smoothing, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 4), torch.tensor([0, 1]), log_alpha=log_alpha, label_smoothing=smoothing)


def test_helpers_refuse_fields_out_of_range():
    with pytest.raises(ValueError, match="`log_alpha`"):
        dece_loss_from_logps(torch.zeros(2), log_alpha=0.5)
    with pytest.raises(ValueError, match="`log_alpha`"):
        target_pull(torch.zeros(2), log_alpha=0.5, label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\), got 1.0"):
        threshold(log_alpha=-0.5, label_smoothing=1.0)


@pytest.mark.parametrize("function", [dece_loss, dece_loss_reference])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"in \[0, 4\) or -100, got 4"),
        (torch.tensor([0, -1]), r"in \[0, 4\) or -100, got -1"),
        (torch.tensor([0]), r"got logits \[2, 4\] and labels \[1\]"),
        (torch.tensor([0.0, 1.0]), "must be integers"),
    ],
)
def test_refuses_labels_that_do_not_fit(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 4), labels, log_alpha=-0.1, label_smoothing=0.05)


def test_refuses_chunks_without_room():
    with pytest.raises(ValueError, match="`chunk_bytes` must be positive, got 0"):
        ours(torch.tensor([0]), 0.8, 0.05, chunk_bytes=0)(torch.zeros(1, 4))
