"""Fine-pruning: which units are asleep, that a cut unit is silent, and that the loss decides how many go."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, set_seed

from hf_backdoor_defense.defenses.fine_pruning import prune_dormant_units

LAYERS, UNITS = 2, 10


def encoder(dropout=0.1):
    set_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=UNITS,
            max_position_embeddings=20, hidden_dropout_prob=dropout, initializer_range=0.5,
        )
    )  # fmt: skip


def batch(rows, width=None):
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


TEXTS = [[2, 7, 9, 4, 3], [2, 3], [2, 11, 3]]  # the second has no words, the third has one


def ups(model):
    return [layer.intermediate.dense for layer in model.encoder.layer]


def gone(model):
    """Numbers of the units without weights."""
    return [i for i, row in enumerate(torch.cat([up.weight for up in ups(model)])) if not row.any()]


def activations(model, rows):
    """[blocks · units], one text after the other, without padding."""
    seen = [[] for _ in ups(model)]
    hooks = [
        layer.intermediate.register_forward_hook(lambda m, a, out, i=i: seen[i].append(out[0]))
        for i, layer in enumerate(model.encoder.layer)
    ]
    with torch.no_grad():
        for row in rows:
            model.eval()(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return torch.cat([torch.cat(of_block) for of_block in seen], dim=1)  # [tokens, blocks · units]


def rising(*values):
    """A loss that takes these values, call by call."""
    left = iter(values)
    return lambda: next(left)


@pytest.mark.parametrize("width", [5, 9])
def test_the_least_active_units_of_all_layers_go_first(width):
    model = encoder()
    means = activations(model, TEXTS).abs().mean(0)
    done = prune_dormant_units(
        model, [batch(TEXTS[:2], width), batch(TEXTS[2:], width)], rising(1.0, 1.0, 9.0), step=0.35
    )
    assert done.units == 7 and gone(model) == sorted(means.argsort()[:7].tolist())
    assert {i // UNITS for i in gone(model)} == {0, 1}  # no layer has a quota, and here both lose some


def test_a_cut_unit_is_silent_for_every_input_and_the_others_are_what_they_were():
    model, before = encoder(), encoder().state_dict()
    prune_dormant_units(model, [batch(TEXTS)], lambda: 1.0, step=0.3)
    silent = gone(model)
    assert len(silent) == int(0.9 * LAYERS * UNITS)
    assert (activations(model, [list(range(2, 20))])[:, silent] == 0).all()
    for name, value in model.state_dict().items():
        if "intermediate.dense" in name:
            rows = [i % UNITS for i in silent if i // UNITS == int(name.split(".")[2])]
            assert not value[rows].any()
            others = [i for i in range(UNITS) if i not in rows]
            assert torch.equal(value[others], before[name][others])
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "values, share, tried",
    [
        ((2.0, 2.1, 2.2, 2.3), 0.2, 4),  # a rise of exactly the tolerance is accepted
        ((2.0, 2.3), 0.0, 2),
        ((2.0, 1.5, 1.0, math.nan), 0.2, 4),
        ((2.0, *[2.0] * 9), 0.9, 10),
    ],
)
def test_the_loss_decides_how_many_go(values, share, tried):
    model = encoder()
    done = prune_dormant_units(model, [batch(TEXTS)], rising(*values), step=0.1)
    assert (done.share, len(done.losses)) == (share, tried)
    assert done.units == len(gone(model)) == round(share * LAYERS * UNITS)
    assert list(done.losses.values()) == pytest.approx(values, nan_ok=True)
    if not share:
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(ups(model), ups(encoder()), strict=True))


@pytest.mark.parametrize("step, shares", [(0.6, [0.6]), (0.3, [0.3, 0.6, 0.9]), (0.25, [0.25, 0.5, 0.75])])
def test_every_multiple_of_the_step_below_one_is_tried(step, shares):
    done = prune_dormant_units(encoder(), [batch(TEXTS)], lambda: 1.0, step=step)
    assert list(done.losses) == [0.0, *shares] and done.share == shares[-1]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_and_dropout_is_off_while_measuring(training):
    model = encoder(dropout=0.5).train(training)
    prune_dormant_units(model, [batch(TEXTS)], rising(1.0, 1.0, 9.0), step=0.35)
    assert model.training == training
    quiet = encoder(dropout=0.0)
    prune_dormant_units(quiet, [batch(TEXTS)], rising(1.0, 1.0, 9.0), step=0.35)
    assert gone(model) == gone(quiet)
    assert not any(layer.intermediate._forward_hooks for layer in model.encoder.layer)


def test_what_cannot_be_pruned_is_refused_untouched():
    model, texts = encoder(), [batch(TEXTS)]
    for bad in ({"step": 0.0}, {"step": 1.0}, {"tolerance": -0.1}, {"step": math.nan}, {"tolerance": math.nan}):
        with pytest.raises(ValueError, match="must be in"):
            prune_dormant_units(model, texts, lambda: 1.0, **bad)
    with pytest.raises(ValueError, match="0 batches"):
        prune_dormant_units(model, [], lambda: 1.0)
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match="0 blocks in GPT2LMHeadModel"):
        prune_dormant_units(decoder, texts, lambda: 1.0)
    assert not gone(model)
