"""Fine-pruning: which units are asleep, that a cut unit is silent, and that the loss, or the accuracy, decides how many go."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, set_seed

from hf_backdoor_defense.defenses import fine_pruning
from hf_backdoor_defense.defenses.fine_pruning import FinePruning, prune_dormant_units
from tests.trainers.image_toys import fake, host, image_list, resnet, stack, vit
from tests.trainers.toys import bert, bert_mlm, same, weights

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


# -- of a classifier --------------------------------------------------------------------------------------------------
def learned(seed=0):
    """A classifier that tells the pictures apart, so that an accuracy can be lost."""
    model, batch = vit(seed=seed), stack(image_list(40))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def trained():
    return learned().state_dict()


def pruning(folder, trained, objective, *, rows=None, validation=40, **changes):
    model = vit()
    model.load_state_dict(trained)
    aux = {"validation": image_list(validation, seed=1)} if isinstance(validation, int) else validation
    return host(
        folder, objective, model=model, rows=image_list(24) if rows is None else rows, aux=aux, lr=0.01, **changes
    )


def columns(model, rows):
    """[16] mean |input of the head|, row by row: the normalized first token of the last block."""
    total = torch.zeros(16, dtype=torch.float64)
    for row in rows:
        with torch.no_grad():
            total += model.eval().vit(torch.tensor([row["pixel_values"]])).last_hidden_state[0, 0].double().abs()
    return total / len(rows)


def right(model, rows):
    with torch.no_grad():
        return [
            int(model.eval()(torch.tensor([r["pixel_values"]])).logits[0].argmax()) == r["label"] for r in rows
        ].count(True)


@pytest.mark.parametrize("step, tolerance", [(0.01, 0.1), (0.1, 0.3), (0.2, 0.1)])
def test_the_last_head_within_the_tolerance_is_kept(tmp_path, trained, step, tolerance):
    objective = FinePruning(step=step, tolerance=tolerance)
    trainer = pruning(tmp_path, trained, objective)
    objective.prepare(trainer, checkpoint=None)
    rows, validation = image_list(24), image_list(40, seed=1)
    model = vit()
    model.load_state_dict(trained)
    means = columns(model, rows)
    evidence = objective.evidence()
    assert evidence["activations"] == pytest.approx(means.tolist(), rel=1e-5)
    order, before, kept, tried = means.argsort().tolist(), right(model, validation), [], [0.0]
    share = 1
    while share * step < 1:
        count = max(1, round(share * step * 16))
        share += 1
        if count == 16 or count / 16 in tried:
            continue
        tried.append(count / 16)
        with torch.no_grad():
            model.classifier.weight[:, order[:count]] = 0
        if (before - right(model, validation)) / before >= tolerance:
            break
        kept = order[:count]
    assert evidence["cut"] == sorted(kept) and [s for s, _ in evidence["accuracy_by_share"]] == tried
    assert before >= 30 and 0 < len(kept) < 15  # both sides of the tolerance were seen
    expected = trained["classifier.weight"].clone()
    expected[:, kept] = 0
    assert same(weights(trainer), {**trained, "classifier.weight": expected})
    assert objective.activity() == {"fine_pruning_share": len(kept) / 16}


@pytest.mark.parametrize("found, cut", [((10, 9, 9, 0), 0), ((10, 10, 9, 0), 1), ((30, 28, 27, 0), 1), ((30, 31, 28, 26), 2),
                                        ((7, 7, 7, 6), 2), ((0, 0, 0, 0), 0)])  # fmt: skip
def test_the_tolerance_itself_is_too_much(tmp_path, trained, monkeypatch, found, cut):
    """A tenth of ten and of thirty is one and three, whatever floating point makes of it."""
    left = iter(found)

    def logits(model, rows, collate, **options):
        hits = next(left)
        labels = [row["label"] if i < hits else (row["label"] + 1) % 5 for i, row in enumerate(rows)]
        return torch.nn.functional.one_hot(torch.tensor(labels), 5).float()

    objective = FinePruning(step=1 / 16, tolerance=0.1)
    trainer = pruning(tmp_path, trained, objective)
    monkeypatch.setattr(fine_pruning, "_head_inputs", lambda *args: torch.arange(16.0))
    monkeypatch.setattr(fine_pruning, "predict_logits", logits)
    objective.prepare(trainer, checkpoint=None)
    assert objective.evidence()["cut"] == list(range(cut))


def test_what_was_cut_stays_cut_and_all_else_trains(tmp_path, trained):
    objective = FinePruning(step=0.1, tolerance=0.3)
    trainer = pruning(tmp_path, trained, objective, num_train_epochs=2)
    trainer.train()
    cut = objective.evidence()["cut"]
    head = trainer.model.classifier.weight.detach()
    others = [i for i in range(16) if i not in cut]
    assert cut and not head[:, cut].any()
    assert bool((head[:, others] != trained["classifier.weight"][:, others]).all())
    assert objective.inert() is None


def test_the_validation_rows_alone_set_the_threshold(tmp_path, trained):
    found = []
    relabeled = [{**row, "label": (row["label"] + 1) % 5} for row in image_list(24)]
    other = [{**row, "label": 0} for row in image_list(24, seed=7)]
    validation = image_list(40, seed=1)
    shifted = [{**row, "label": (row["label"] + i % 2) % 5} for i, row in enumerate(validation)]
    cases = {
        "plain": {},
        "labels of the rows": {"rows": relabeled},
        "further sets": {"validation": {"validation": validation, "test": other, "held_out": other}},
        "truth": {"rows": [{**row, "is_poisoned": True} for row in image_list(24)]},
        "validation": {"validation": {"validation": shifted}},
    }  # fmt: skip
    for name, options in cases.items():
        objective = FinePruning(step=0.1, tolerance=0.1)
        trainer = pruning(tmp_path / name, trained, objective, **options)
        trainer.eval_dataset = other
        objective.prepare(trainer, checkpoint=None)
        found.append((objective.evidence()["cut"], objective.evidence()["accuracy_by_share"]))
    assert found[0] == found[1] == found[2] == found[3] != found[4]


def test_without_validation_rows_a_fifth_by_identity_is_taken(tmp_path, trained):
    found = []
    for rows in (image_list(60), image_list(60)[::-1]):
        objective = FinePruning(step=0.1)
        objective.prepare(pruning(tmp_path, trained, objective, rows=rows, validation={}), checkpoint=None)
        found.append(objective.evidence()["accuracy_by_share"])
    assert found[0] == found[1]  # by identity, not by place


def test_where_nothing_may_be_lost_it_says_inert(tmp_path, trained):
    objective = FinePruning(tolerance=0.0)
    assert objective.inert()
    trainer = pruning(tmp_path, trained, objective, max_steps=1)
    trainer.train()
    assert objective.activity() == {"fine_pruning_share": 0.0} and "plain fine-tuning" in objective.inert()


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, trained):
    settings = {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2}
    whole, half = FinePruning(step=0.1, tolerance=0.3), FinePruning(step=0.1, tolerance=0.3)
    through = pruning(tmp_path / "a", trained, whole, **settings)
    through.train()
    again = pruning(tmp_path / "b", vit(seed=5).state_dict(), half, validation={}, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(through), weights(again)) and half.evidence() == whole.evidence() and whole.evidence()["cut"]


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))


def frozen():
    model = vit()
    model.classifier.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make, message",
    [(bert_mlm, "no head to prune"), (lora, "merge it first"), (frozen, "classifier is frozen"),
     (lambda: vit().bfloat16(), "bfloat16")],
)  # fmt: skip
def test_what_has_no_head_to_prune_is_refused(make, message):
    assert sum(message in reason for reason in FinePruning().check(fake(make()))) == 1


def test_a_head_in_pieces_is_refused():
    trainer = fake(vit())
    trainer.is_fsdp_enabled = True
    (reason,) = FinePruning().check(trainer)
    assert "FSDP cuts the head" in reason


@pytest.mark.parametrize("make", [vit, bert, resnet])
def test_its_neighbor_is_not(make):
    assert FinePruning().check(fake(make())) == []


@pytest.mark.parametrize(
    "fields", [{"step": 0.0}, {"step": 1.0}, {"tolerance": -0.1}, {"tolerance": 1.0}, {"step": math.nan}]
)
def test_fields_that_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be in"):
        FinePruning(**fields)
