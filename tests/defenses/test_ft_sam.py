"""FT-SAM: the perturbation by numpy, updates by a loop of its own, weights restored bit for bit, radius 0 as fine-tuning."""

import math
import re

import numpy as np
import pytest
import torch

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.ft_sam import FTSAM, perturbation
from hf_backdoor_defense.defenses.robust_losses import Smoothed
from tests.trainers.image_toys import Watched, fake, host, image_list, resnet, vit
from tests.trainers.toys import Recorder, WeightPull, bert, bert_mlm, bert_tokens, gpt2, same, weights


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_perturbation_by_numpy(adaptive):
    generator = torch.Generator().manual_seed(0)
    w, g = ([torch.randn(shape, generator=generator) for shape in ((3, 5), (4,))] for _ in range(2))
    a, b = ([t.double().numpy() for t in tensors] for tensors in (w, g))
    scaled = [np.abs(x) * y if adaptive else y for x, y in zip(a, b, strict=True)]
    norm = np.sqrt(sum((s**2).sum() for s in scaled)) + 1e-12
    for e, x, y in zip(perturbation(w, g, 2.0, adaptive), a, b, strict=True):
        assert np.allclose(e.numpy(), 2.0 * (x**2 * y if adaptive else y) / norm, atol=1e-6)


def test_radius_zero_is_fine_tuning_with_the_same_loss(tmp_path):
    ends = []
    for objective in (FTSAM(rho=0.0, label_smoothing=0.1), Smoothed(label_smoothing=0.1), FTSAM(rho=0.5)):
        trainer = host(tmp_path / objective.name, objective, num_train_epochs=2)
        trainer.train()
        ends.append(weights(trainer))
    assert same(ends[0], ends[1], atol=1e-6) and not same(ends[0], ends[2], atol=1e-3)


def test_weights_come_back_bit_for_bit_and_statistics_move_once(tmp_path):
    ends = []
    for rho in (0.0, 0.5):
        trainer = host(tmp_path / str(rho), FTSAM(rho=rho), model=resnet(), lr=0.0, num_train_epochs=1)
        trainer.train()
        ends.append(weights(trainer))
    plain = host(tmp_path / "plain", None, model=resnet(), lr=0.0)
    plain.train()
    assert same(ends[0], weights(plain)) and same(ends[1], weights(plain))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_updates_equal_a_loop_of_its_own(tmp_path, adaptive, precision):
    rows, bf16 = Watched(image_list(16)), precision == "bf16"
    objective = FTSAM(rho=0.5, adaptive=adaptive, label_smoothing=0.1)
    trainer = host(tmp_path, objective, rows=rows, lr=0.05, momentum=0.0, max_steps=2, bf16=bf16)
    trainer.train()
    model = vit().train()

    def gradients(inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(pixel_values=inputs["pixel_values"]).logits.float()
        chances = logits.log_softmax(-1)
        wanted = 0.9 * torch.nn.functional.one_hot(inputs["labels"], 5) + 0.1 / 5
        return torch.autograd.grad(-(wanted * chances).sum(-1).mean(), list(model.parameters()))

    for inputs in rows.batches(8)[:2]:
        old = [p.detach().clone() for p in model.parameters()]
        first = gradients(inputs)
        norm = sum(((w.abs() * g if adaptive else g) ** 2).sum() for w, g in zip(old, first, strict=True)).sqrt()
        with torch.no_grad():
            for p, g in zip(model.parameters(), first, strict=True):
                p.add_(0.5 * (p.square() * g if adaptive else g) / norm)
        second = gradients(inputs)
        with torch.no_grad():
            for p, w, g in zip(model.parameters(), old, second, strict=True):
                p.copy_(w - 0.05 * g)
    assert all(value.dtype == torch.float32 for value in weights(trainer).values())
    assert same(weights(trainer), weights(model), atol=1e-6) and not same(weights(model), weights(vit()), atol=1e-3)
    assert objective.activity()["ft_sam_updates"] == 2 and objective.inert() is None


@pytest.mark.parametrize(
    "make, changes, message",
    [(vit, {"gradient_accumulation_steps": 2}, "2 accumulation steps and 1 processes.*one batch per update on one process"),
     (vit, {"world_size": 2}, "1 accumulation steps and 2 processes"), (vit, {"fp16": True}, "bf16=True, or float32"),
     (gpt2, {}, "GPT2LMHeadModel is no sequence or image classifier"), (bert_mlm, {}, "is no sequence or image classifier"),
     (bert_tokens, {}, "is no sequence or image classifier"), (lambda: vit().bfloat16(), {}, "bfloat16")],
)  # fmt: skip
def test_what_it_cannot_perturb_is_refused(make, changes, message):
    (reason,) = FTSAM().check(fake(make(), **changes))
    assert re.search(message, reason), reason


@pytest.mark.parametrize("other, refused", [(WeightPull, True), (D3, True), (Recorder, False)])
def test_what_adds_to_the_gradients_is_refused_beside_it(other, refused):
    trainer, objective = fake(vit()), FTSAM()
    trainer.objectives = [objective, other()]
    reasons = objective.check(trainer)
    assert len(reasons) == refused and all(reason.startswith(f"{other.name} adds") for reason in reasons)


def test_deepspeed_and_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    (reason,) = FTSAM().check(fake(vit(), {"deepspeed_plugin": object()}))
    assert "DeepSpeed" in reason
    adapted = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    (reason,) = FTSAM().check(fake(adapted))
    assert "merge it first" in reason


@pytest.mark.parametrize("make, changes", [(vit, {}), (bert, {}), (resnet, {}), (vit, {"bf16": True})])
def test_its_neighbor_is_not(make, changes, caplog):
    assert FTSAM().check(fake(make(), **changes)) == [] and not caplog.text
    assert FTSAM().check(fake(make(), max_grad_norm=1.0)) == [] and "max_grad_norm=1" in caplog.text


@pytest.mark.parametrize(
    "fields", [{"rho": -1.0}, {"rho": math.nan}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}]
)
def test_fields_that_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`"):
        FTSAM(**fields)
