"""The fused and the chunked loss on a CUDA device, compiled row function included, against float64 on the same device."""

import math

import pytest
import torch

from hf_backdoor_defense.functional import chunks
from hf_backdoor_defense.functional.dece import dece_loss, dece_loss_reference
from hf_backdoor_defense.functional.linear_dece import linear_dece_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: the compiled row function runs nowhere else"
    ),
]
VOCABULARY, WIDTH, ROWS = 50_257, 64, 37  # odd on purpose


def make(dtype: torch.dtype, *, frozen: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 3 / WIDTH**0.5).to("cuda", dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::5] = -100
    return hidden, weight.requires_grad_(not frozen), labels.cuda()


def truth(hidden, weight, labels, softcap, **fields):
    """Values and gradients in float64, of the same numbers."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    values = dece_loss_reference(logits, labels, **fields)
    values.sum().div(7).backward()
    return values.detach(), wide[0].grad, wide[1].grad


def error(ours: torch.Tensor, true: torch.Tensor) -> float:
    return float((ours.double() - true).norm() / true.norm())


@pytest.mark.parametrize("chunk_bytes", [None, 2**21], ids=["default", "small"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.05])
@pytest.mark.parametrize("alpha", [1.0, 0.985, 0.3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_fused_loss_is_right(dtype, bound, alpha, label_smoothing, softcap, frozen, chunk_bytes):
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, labels = make(dtype, frozen=frozen)
    fields = {"log_alpha": math.log(alpha), "label_smoothing": label_smoothing}
    values = linear_dece_loss(hidden, weight, labels, softcap=softcap, chunk_bytes=chunk_bytes, **fields)
    values.sum().div(7).backward()
    expected, grad_hidden, grad_weight = truth(hidden, weight, labels, softcap, **fields)
    assert error(values.detach(), expected) < bound and error(hidden.grad, grad_hidden) < bound
    assert weight.grad is None if frozen else error(weight.grad, grad_weight) < bound


@pytest.mark.parametrize("label_smoothing", [0.0, 0.05])
def test_the_loss_on_logits_is_right(label_smoothing):
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, labels = make(torch.float32, frozen=False)
    fields = {"log_alpha": math.log(0.8), "label_smoothing": label_smoothing}
    values = dece_loss(hidden @ weight.T, labels, **fields)
    values.sum().div(7).backward()
    expected, grad_hidden, grad_weight = truth(hidden, weight, labels, None, **fields)
    assert error(values.detach(), expected) < 2e-5
    assert error(hidden.grad, grad_hidden) < 2e-5 and error(weight.grad, grad_weight) < 2e-5


def test_the_row_function_was_compiled():
    hidden, weight, labels = make(torch.bfloat16, frozen=False)
    linear_dece_loss(hidden, weight, labels, log_alpha=math.log(0.8), label_smoothing=0.05).sum().backward()
    assert chunks._state["compiles"] and chunks._state["ran"]
