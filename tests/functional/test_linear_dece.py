"""The fused loss against the formula on full logits: values, gradients, which products it takes, and what it refuses."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_backdoor_defense.functional import chunks
from hf_backdoor_defense.functional.chunks import add_product, chunk_rows
from hf_backdoor_defense.functional.dece import dece_loss, dece_loss_and_stats, dece_loss_reference
from hf_backdoor_defense.functional.linear_dece import linear_dece_loss, linear_dece_loss_and_stats

IGNORED = -100
FIELDS = [(a, e) for a in (-math.inf, math.log(0.8), math.log(0.985), 0.0) for e in (0.0, 0.05)]
DECE = {"log_alpha": math.log(0.8), "label_smoothing": 0.05}


def make(n=7, classes=41, d=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, d, generator=generator, dtype=torch.float64) * 3 / d**0.5
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=generator)
    labels[0] = (hidden[0] @ weight.T + bias).argmax()  # one that the model knows
    return [part.to(dtype).requires_grad_() for part in (hidden, weight, bias)], labels


def project(hidden, weight, bias, scale=1.0, softcap=None):
    """The definition: scale (h W^T + b), then c tanh(z / c)."""
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def on_logits(loss, scale=1.0, softcap=None, **fields):
    return lambda h, w, b, labels: loss(project(h, w, b, scale, softcap), labels, **fields)


def fused(**fields):
    return lambda h, w, b, labels: linear_dece_loss(h, w, labels, bias=b, **fields)


def value_and_gradients(loss, tensors, labels, reduce=lambda values: values.sum() / 7):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    values = loss(*leaves, labels)
    return [values.detach(), *torch.autograd.grad(reduce(values), leaves)]


class Products(TorchDispatchMode):
    """The matrix products taken inside, as the number of rows of the batch that each of them saw."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "matmul", "bmm"):
            self.names.append(name)
            self.shapes.append([tuple(a.shape) for a in args if isinstance(a, torch.Tensor) and a.ndim == 2][-2:])
        return function(*args, **(kwargs or {}))


# Value and gradients


@pytest.mark.parametrize(("log_alpha", "smoothing"), FIELDS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.5, 4.0)])
def test_agrees_with_autograd_through_the_formula(log_alpha, smoothing, scale, softcap):
    tensors, labels = make()
    labels[3] = IGNORED
    fields = {"log_alpha": log_alpha, "label_smoothing": smoothing, "scale": scale, "softcap": softcap}
    expected = value_and_gradients(on_logits(dece_loss_reference, **fields), tensors, labels)
    for budget in (1, 3 * 41 * 8, None):
        found = value_and_gradients(fused(**fields, chunk_bytes=budget), tensors, labels)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("classes", [32_000, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_reference_chunked_and_fused_agree_on_large_vocabularies(classes, smoothing):
    tensors, labels = make(classes=classes)
    fields = {"log_alpha": math.log(0.985), "label_smoothing": smoothing}
    truth = value_and_gradients(on_logits(dece_loss_reference, **fields), tensors, labels)
    logits = project(*tensors).detach().requires_grad_()
    (pull,) = torch.autograd.grad(dece_loss_reference(logits, labels, **fields).sum() / 7, logits)
    # A sum of V terms one after the other, as a product of a single row takes it, loses sqrt(V) roundings of its terms' sizes.
    summed = classes**0.5 * 2**-24 * (pull.abs() @ tensors[1].detach().abs()).norm()
    bounds = [2e-6 * part.norm() for part in truth]
    bounds[1] = summed
    single = [tensor.detach().float() for tensor in tensors]
    for loss in (
        on_logits(dece_loss, **fields),
        fused(**fields),  # the default budget
        fused(**fields, chunk_bytes=1),
        fused(**fields, chunk_bytes=7 * classes * 4),
        fused(**fields, chunk_bytes=2 * classes * 4),
    ):
        found = value_and_gradients(loss, single, labels)
        for part, right, bound in zip(found, truth, bounds, strict=True):
            assert part.dtype == torch.float32
            assert (part - right).norm() <= bound


@pytest.mark.parametrize("classes", [32_000, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_half_precision_is_no_worse_than_the_formula_on_half_precision_logits(classes, smoothing):
    tensors, labels = make(classes=classes, dtype=torch.bfloat16)
    fields = {"log_alpha": math.log(0.985), "label_smoothing": smoothing}
    # A plain sum: with 1 / n, the two forms round their gradients at different scales, and chance decides between them.
    direct = on_logits(dece_loss_reference, **fields)
    truth = value_and_gradients(direct, [t.double() for t in tensors], labels, torch.sum)
    rough = value_and_gradients(direct, tensors, labels, torch.sum)
    for budget in (1, 2 * classes * 2, None):
        found = value_and_gradients(fused(**fields, chunk_bytes=budget), tensors, labels, torch.sum)
        assert [part.dtype for part in found] == [torch.float32] + 3 * [torch.bfloat16]
        for mine, other, right in zip(found, rough, truth, strict=True):
            assert (mine - right).norm() <= (other - right).norm() + 1e-6 * right.norm()


def test_many_chunks_in_half_precision_add_up_in_single_precision():
    tensors, labels = make(n=301, classes=64, d=8, dtype=torch.bfloat16)
    right = value_and_gradients(on_logits(dece_loss_reference, **DECE), [t.double() for t in tensors], labels)
    found = value_and_gradients(fused(**DECE, chunk_bytes=1), tensors, labels)
    # One rounding at the end, and the rounding of scores and of their gradient: not one per chunk.
    assert (found[2] - right[2]).norm() <= 1e-2 * right[2].norm()


@pytest.mark.parametrize(("log_alpha", "smoothing"), FIELDS)
def test_gradcheck_in_double_precision(log_alpha, smoothing):
    (hidden, weight, bias), labels = make(n=3, classes=5, d=2)

    def loss(h, w, b):
        values = linear_dece_loss(
            h, w, labels, bias=b, log_alpha=log_alpha, label_smoothing=smoothing, scale=0.7, softcap=3.0, chunk_bytes=1
        )
        assert values.dtype == torch.float64
        return values

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_without_mixture_and_smoothing_it_is_cross_entropy():
    (hidden, weight, _), labels = make(dtype=torch.float32)
    values, logps, is_top1 = linear_dece_loss_and_stats(hidden, weight, labels, log_alpha=0.0, label_smoothing=0.0)
    logits = hidden @ weight.T
    torch.testing.assert_close(values, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(logps, -values.detach())
    assert torch.equal(is_top1, logits.argmax(-1) == labels)


@pytest.mark.parametrize(("log_alpha", "smoothing"), FIELDS)
def test_statistics_are_those_of_the_logits(log_alpha, smoothing):
    (hidden, weight, bias), labels = make(n=12)
    labels[4] = IGNORED
    fields = {"log_alpha": log_alpha, "label_smoothing": smoothing}
    found = linear_dece_loss_and_stats(hidden, weight, labels, bias=bias, **fields)
    expected = dece_loss_and_stats(project(hidden, weight, bias), labels, **fields)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert found[2].any() and not found[2].all()
    assert [part.requires_grad for part in found] == [True, False, False]


def test_leading_dimensions_are_flattened():
    (hidden, weight, bias), labels = make(n=12)
    flat = value_and_gradients(fused(**DECE), (hidden, weight, bias), labels)
    shaped = value_and_gradients(fused(**DECE), (hidden.reshape(3, 4, 16), weight, bias), labels.view(3, 4))
    assert torch.equal(shaped[1].reshape(12, 16), flat[1])
    assert torch.equal(shaped[2], flat[2])


# Which products


def test_a_uniform_upstream_gradient_takes_three_products_and_any_other_five():
    (hidden, weight, _), labels = make()
    with Products() as forward:
        values = linear_dece_loss(hidden, weight, labels, **DECE)
    with Products() as uniform:
        loss = values.sum() / torch.tensor(7)
        loss.backward(retain_graph=True)
    with Products() as other:
        (values @ torch.linspace(-1, 2, 7, dtype=torch.float64)).backward()
    # The reduction `values @ weights` is a dot product, which is not counted.
    assert (len(forward.names), len(uniform.names), len(other.names)) == (3, 0, 2)


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_is_frozen_costs_no_product(frozen):
    (hidden, weight, bias), labels = make()
    expected = value_and_gradients(on_logits(dece_loss_reference, **DECE), (hidden, weight, bias), labels)
    hidden.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "hidden"), bias.requires_grad_(False)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    with Products() as products:
        values = linear_dece_loss(hidden, weight, labels, bias=bias, **DECE)
        if frozen != "both":
            (values.sum() / 7).backward(retain_graph=True)
    assert len(products.names) == (1 if frozen == "both" else 2)
    torch.testing.assert_close(values.detach(), expected[0])
    assert values.requires_grad == (frozen != "both")
    if frozen == "weight":
        torch.testing.assert_close(hidden.grad, expected[1])
        with Products() as other:
            (values * weights).sum().backward()  # each row's gradient is its own: nothing to compute again
        assert other.names == []
        assert weight.grad is None
    if frozen == "hidden":
        torch.testing.assert_close(weight.grad, expected[2])
        assert hidden.grad is None


def test_without_gradients_there_is_one_product():
    (hidden, weight, bias), labels = make()
    with torch.no_grad(), Products() as products:
        values = linear_dece_loss(hidden, weight, labels, bias=bias, **DECE)
    assert len(products.names) == 1
    assert not values.requires_grad
    torch.testing.assert_close(values, linear_dece_loss(hidden, weight, labels, bias=bias, **DECE).detach())


def test_ignored_rows_never_reach_a_product():
    tensors, labels = make(n=9)
    hidden, weight, bias = tensors
    labels[[1, 4, 8]] = IGNORED
    spoiled = hidden.detach().clone()
    spoiled[[1, 4, 8]] = math.nan
    spoiled.requires_grad_()
    with Products() as products:
        values = linear_dece_loss(spoiled, weight, labels, bias=bias, **DECE)
        values.sum().backward()
    assert products.shapes == [[(6, 16), (16, 41)], [(6, 41), (41, 16)], [(41, 6), (6, 16)]]
    keep = labels != IGNORED
    expected = value_and_gradients(fused(**DECE), (hidden[keep], weight, bias), labels[keep], reduce=torch.sum)
    torch.testing.assert_close(spoiled.grad[keep], expected[1])
    torch.testing.assert_close(weight.grad, expected[2])
    assert (spoiled.grad[~keep] == 0).all()


@pytest.mark.parametrize("budget", [1, 2 * 41 * 8, None])
def test_a_weight_per_value_recomputes_to_the_same_gradient(budget):
    tensors, labels = make()
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for reduce in (
        lambda v: (v * weights).sum(),
        lambda v: v @ weights,
        lambda v: v[2] - v[5],
        lambda v: v.pow(2).sum(),
    ):
        expected = value_and_gradients(on_logits(dece_loss_reference, **DECE), tensors, labels, reduce)
        found = value_and_gradients(fused(**DECE, chunk_bytes=budget), tensors, labels, reduce)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_uniform_and_recomputed_gradients_agree_in_half_precision():
    tensors, labels = make(n=20, dtype=torch.bfloat16)
    fast = value_and_gradients(fused(**DECE), tensors, labels, lambda v: v.sum() / 7)
    slow = value_and_gradients(fused(**DECE), tensors, labels, lambda v: (v * torch.full((20,), 1 / 7)).sum())
    for one, other in zip(fast, slow, strict=True):
        assert (one.double() - other.double()).norm() <= 2**-7 * one.double().norm()


# Autograd


def test_backward_may_be_repeated_and_leaves_the_first_result_alone():
    (hidden, weight, bias), labels = make()
    loss = linear_dece_loss(hidden, weight, labels, bias=bias, **DECE).sum() / 7
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    kept = [part.clone() for part in first]
    second = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    for one, before, three in zip(first, kept, second, strict=True):
        assert torch.equal(one, before)
        torch.testing.assert_close(three, 3 * one, rtol=1e-14, atol=0)


def test_a_tied_weight_gets_both_of_its_gradients():
    (_, weight, _), labels = make()
    ids = torch.arange(7)

    def loss(loss_of, weight):
        return loss_of(F.embedding(ids, weight).tanh(), weight).sum() / 7

    expected = torch.autograd.grad(loss(lambda h, w: dece_loss_reference(h @ w.T, labels, **DECE), weight), weight)
    found = torch.autograd.grad(loss(lambda h, w: linear_dece_loss(h, w, labels, **DECE), weight), weight)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_double_backward_is_refused():
    (hidden, weight, _), labels = make()
    loss = linear_dece_loss(hidden, weight, labels, **DECE).sum()
    with pytest.raises(RuntimeError, match="linear_dece_loss cannot be differentiated twice, got create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("log_alpha", "smoothing"), FIELDS)
def test_a_batch_without_labels_sums_to_zero_and_has_a_graph(log_alpha, smoothing, dtype):
    tensors, labels = make(dtype=dtype)
    fields = {"log_alpha": log_alpha, "label_smoothing": smoothing}
    for size in (7, 0):
        batch = [tensors[0][:size], *tensors[1:]]
        found = value_and_gradients(fused(**fields), batch, torch.full_like(labels[:size], IGNORED))
        assert found[0].shape == (0,)
        for gradient, tensor in zip(found[1:], batch, strict=True):
            assert gradient.shape == tensor.shape and gradient.dtype == dtype and (gradient == 0).all()


@pytest.mark.parametrize("reduce", [torch.sum, torch.squeeze, torch.mean])
def test_one_labeled_position(reduce):
    tensors, labels = make()
    labels[1:] = IGNORED
    expected = value_and_gradients(on_logits(dece_loss_reference, **DECE), tensors, labels, reduce)
    torch.testing.assert_close(value_and_gradients(fused(**DECE), tensors, labels, reduce), expected)


def test_autocast_takes_products_in_its_dtype_and_gives_gradients_in_those_of_the_inputs():
    tensors, labels = make(n=20, dtype=torch.float32)
    right = value_and_gradients(on_logits(dece_loss_reference, **DECE), [t.double() for t in tensors], labels)
    low = value_and_gradients(fused(**DECE), [t.bfloat16() for t in tensors], labels)
    seen = []

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "addmm" and args[1].shape == (20, 16):
                seen.append(args[1].dtype)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Types():
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        values = fused(**DECE)(*leaves, labels)
    gradients = torch.autograd.grad(values.sum() / 7, leaves)
    assert seen == [torch.bfloat16]
    assert all(part.dtype == torch.float32 for part in (values, *gradients))
    for found, half, exact in zip([values.detach(), *gradients], low, right, strict=True):
        assert (found - exact).norm() <= (half - exact).norm() + 2**-8 * exact.norm()


# Chunks


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_scores_never_take_more_than_the_budget(rows):
    tensors, labels = make(n=7, classes=50_257, d=4, dtype=torch.bfloat16)
    budget = rows * 50_257 * 2

    class Largest(TorchDispatchMode):
        elements = 0  # of a buffer in the dtype of the scores

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ == "new_empty" and result.dtype == torch.bfloat16:
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        linear_dece_loss(tensors[0], tensors[1], labels, **DECE, chunk_bytes=budget)
    assert largest.elements == chunk_rows(7, rows, padded=False) * 50_257 <= budget // 2


def test_chunks_hold_a_row_at_least_and_are_of_equal_size():
    for count in (1, 7, 100, 8192):
        for most in (0, 1, 3, 64, 10_000):
            size = chunk_rows(count, most, padded=False)
            parts = math.ceil(count / size)
            assert (
                1 <= size <= max(most, 1) and parts == math.ceil(count / max(most, 1)) and size * parts - count < parts
            )
            assert 1 <= chunk_rows(count, most, padded=True) <= max(most, 1)
    assert len({chunk_rows(count, 1766, padded=True) for count in range(1, 9000)}) == 3  # of so many shapes few compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("log_alpha", "smoothing"), FIELDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_function_that_a_gpu_compiles_gives_the_same_on_padded_chunks(
    monkeypatch, dtype, log_alpha, smoothing, softcap
):
    tensors, labels = make(n=200, classes=33, dtype=dtype)
    fields = {"log_alpha": log_alpha, "label_smoothing": smoothing, "softcap": softcap, "chunk_bytes": 70 * 33 * 4}
    expected = value_and_gradients(fused(**fields), tensors, labels)
    calls = []

    def rows(scores, *rest):
        calls.append(scores.shape)
        return chunks.rows_in_place(scores, *rest)

    for module in (chunks, linear_dece_loss_module()):
        monkeypatch.setattr(module, "compiles", lambda tensor: True)
    monkeypatch.setattr(chunks, "_compiled_rows", lambda: rows)
    found = value_and_gradients(fused(**fields), tensors, labels)
    size = 128 if dtype == torch.bfloat16 else 70
    assert calls == [(size, 33)] * math.ceil(200 / size)  # the last chunk too
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


def linear_dece_loss_module() -> types.ModuleType:
    import hf_backdoor_defense.functional.linear_dece as module

    return module


def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch, caplog):
    tensors, labels = make(dtype=torch.float32)
    expected = value_and_gradients(fused(**DECE), tensors, labels)
    state = {"compiles": True, "ran": False}
    monkeypatch.setattr(chunks, "_state", state)
    for module in (chunks, linear_dece_loss_module()):
        monkeypatch.setattr(module, "compiles", lambda tensor: state["compiles"])

    def broken():
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(chunks, "_compiled_rows", broken)
    for _ in range(2):
        torch.testing.assert_close(value_and_gradients(fused(**DECE), tensors, labels), expected)
    assert caplog.text.count("no compiler here") == 1


def test_a_compiled_function_that_fails_after_it_ran_is_no_reason_to_go_on(monkeypatch):
    tensors, labels = make(dtype=torch.float32)
    for module in (chunks, linear_dece_loss_module()):
        monkeypatch.setattr(module, "compiles", lambda tensor: True)
    monkeypatch.setattr(chunks, "_state", {"compiles": True, "ran": False})
    calls = []

    def once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("the device is gone")
        return chunks.rows_in_place(*args)

    monkeypatch.setattr(chunks, "_compiled_rows", lambda: once)
    value_and_gradients(fused(**DECE), tensors, labels)
    with pytest.raises(RuntimeError, match="device is gone"):
        value_and_gradients(fused(**DECE), tensors, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_up_in_blocks_of_columns(dtype):
    generator = torch.Generator().manual_seed(0)
    change, hidden = (torch.randn(5, size, generator=generator).to(dtype) for size in (700, 3))
    into = torch.full((700, 3), math.nan)
    add_product(into, change, hidden, scale=0.5, first=True)
    add_product(into, change, hidden, scale=2.0)
    torch.testing.assert_close(into, 2.5 * change.float().T @ hidden.float(), rtol=1e-5, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3)}, r"`weight` must be \[V, d\]"),
        ({"weight": torch.zeros(4)}, r"`weight` must be \[V, d\]"),
        ({"weight": torch.zeros(4, 5, dtype=torch.uint8)}, "must be floating point.*quantized"),
        ({"bias": torch.zeros(3)}, r"`bias` must be \[V\], got \[3\] for 4 rows"),
        ({"labels": torch.tensor([0])}, r"got hidden \[2, 5\] and labels \[1\]"),
        ({"labels": torch.tensor([0, 4])}, r"in \[0, 4\) or -100, got 4"),
        ({"labels": torch.tensor([0.0, 1.0])}, "must be integers"),
        ({"weight": torch.zeros(4, 5, dtype=torch.bfloat16)}, "must share a dtype"),
        ({"scale": math.inf}, "`scale` must be finite"),
        ({"softcap": 0.0}, "`softcap` None or positive"),
        ({"log_alpha": 0.1}, "`log_alpha` must be at most 0"),
        ({"label_smoothing": 0.75}, r"`label_smoothing` must be in \[0, 0.75\)"),
        ({"chunk_bytes": 0}, "`chunk_bytes` must be positive, got 0"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    given = {"hidden": torch.zeros(2, 5), "weight": torch.zeros(4, 5), "labels": torch.tensor([0, 1]), **DECE}
    with pytest.raises(ValueError, match=message):
        linear_dece_loss(**{**given, **changes})
