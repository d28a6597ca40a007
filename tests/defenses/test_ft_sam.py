"""FT-SAM: the perturbation by numpy, the weights restored bit for bit, and radius 0 as plain fine-tuning."""

import numpy as np
import pytest
import torch

from hf_backdoor_defense.defenses.ft_sam import FTSAM, perturbation
from hf_backdoor_defense.defenses.robust_losses import Smoothed
from tests.trainers.image_toys import host, resnet, vit
from tests.trainers.toys import same, weights


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


def test_what_is_not_additive_is_refused(tmp_path):
    refused = host(tmp_path, FTSAM(), model=vit(), gradient_accumulation_steps=2).reasons()
    assert any("one batch per update" in reason for reason in refused)
    assert host(tmp_path, FTSAM(), model=vit()).reasons() == []
