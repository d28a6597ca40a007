"""Models that are cut up by FSDP2 (`fully_shard`), over two gloo processes: every figure is that of the whole model.

Norms, distances, projection and the penalties' gradients are in test_recipe.py and test_purifiers.py; how often processes
exchange something, in test_collectives.py; whole trainings, in test_fsdp2.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import END, TrajectoryFilter, label_log_odds
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor
from hf_backdoor_defense.functional.row_scores import row_change, row_cosines
from hf_backdoor_defense.functional.weights import frobenius_norms
from hf_backdoor_defense.models import pooled_features, predict_logits
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers import fusing as trainers_fusing
from hf_backdoor_defense.trainers.fusing import Fusing, forward_with_hidden
from hf_backdoor_defense.trainers.heads import is_causal, shift_labels
from tests.distributed.collectives import Collectives
from tests.distributed.test_purifiers import alike, gradients, shard, whole
from tests.trainers.image_toys import image_list, stack, vit
from tests.trainers.toys import PadCollator, bert, classification_rows, gpt2, language_rows, llama

ODD = 13  # rows, which two processes cannot share evenly


def both(folder: Path) -> None:
    """On each of two processes."""
    rank = PartialState(cpu=True).process_index  # they know of each other already where another part came first
    told = {
        "changes": changes_of_rows(),
        "cosines": cosines_of_rows(),
        "accumulated": accumulated(),
        "columns": columns(),
        "snapshot": snapshots(rank),
        "fused": [fused(make, rank) for make in (gpt2, llama)],
        "passes": passes(),
        "scores": scores(),
    }
    (folder / f"told{rank}.json").write_text(json.dumps(told))


def collate(rows):
    return PadCollator()([{name: value for name, value in row.items() if name != "row_id"} for row in rows])


def pair(model, path: str):
    """The weight `path` of a model, and the same in shards."""
    split = dict(shard(model(), reshard_after_forward=True).named_parameters())[path]
    assert hasattr(split, "full_tensor")
    return dict(model().named_parameters())[path], split


HEAD = "classifier.weight"


def hidden_of(model) -> str:
    width = model.config.intermediate_size
    return next(
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == width
    )


def changes_of_rows() -> list:
    """What ULRL scores: five rows of a head, 24 hidden units."""
    told = []
    for path in (HEAD, hidden_of(vit())):
        (before, cut_before), (after, cut_after) = (pair(lambda seed=seed: vit(seed=seed), path) for seed in (0, 1))
        with Collectives() as talk:
            found = row_change(cut_after, cut_before)
        expected = row_change(after, before)
        assert torch.allclose(found, expected, atol=1e-6) and not hasattr(found, "full_tensor")
        told.append([len(expected), before.numel(), talk.seen])
    return told


def cosines_of_rows() -> list:
    """Rows of both processes, of one of them, and all."""
    told = []
    for path in (HEAD, hidden_of(vit())):
        weight, split = pair(vit, path)
        for rows in ([1, 4], [0], list(range(len(weight)))):
            old = pair(lambda: vit(seed=1), path)[0].detach()[rows]
            values = []
            for parameter in (weight, split):
                parameter.grad = None
                with Collectives() as talk:
                    cosines = row_cosines(parameter, rows, old)
                    (cosines * torch.arange(1.0, len(rows) + 1)).sum().backward()
                values.append((cosines.detach(), whole(parameter.grad)))
            for one, two in zip(*values, strict=True):
                assert torch.allclose(one, two, atol=1e-6), (path, rows)
            assert values[0][1].abs().max() > 1e-3
            told.append([len(rows), talk.seen])
    return told


def accumulated() -> float:
    """Two micro-batches of which only the second exchanges gradients, as accelerate does it: penalties are in both."""
    inputs, found = stack(image_list(8)), []
    labels, path = inputs.pop("labels"), hidden_of(vit())
    old = dict(vit(seed=1).named_parameters())[path].detach()[[1, 3]]
    for split in (False, True):
        model = shard(vit(), reshard_after_forward=True) if split else vit()
        for last in (False, True):
            if split:
                model.set_requires_gradient_sync(last)
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            weights = dict(model.named_parameters())
            norms = frobenius_norms([p for p in weights.values() if p.ndim == 2])
            ((loss + norms.sum() + row_cosines(weights[path], [1, 3], old).sum()) / 2).backward()
        found.append(gradients(model))
    alike(*found, "accumulated gradient")
    return max(float(value.abs().max()) for value in found[0].values())


def columns() -> str:
    """Rows that are cut in the middle, as no plan of ours cuts them."""
    weight = distribute_tensor(torch.ones(4, 6), init_device_mesh("cpu", (2,)), [Shard(1)])
    try:
        row_cosines(weight, [0], torch.ones(1, 6))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def snapshots(rank: int) -> dict:
    """D3's start: prepared whole, then cut like the weights; bfloat16 where that loses nothing."""
    model, objective = vit(layers=2), D3()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective.prepare(SimpleNamespace(model=model, args=SimpleNamespace(seed=0)), checkpoint=None)
    everything = sum(start[name].numel() for name in objective._names)
    shard(model, reshard_after_forward=True)
    objective.on_train_begin(None, None, None, model=model)
    held = 0
    for name, kept in objective._reference.items():
        assert kept.dtype == torch.bfloat16 and hasattr(kept, "full_tensor")
        assert kept.placements == dict(model.named_parameters())[name].placements
        held += kept.to_local().untyped_storage().nbytes()
    with Collectives() as talk:
        state = objective.state_dict()
    saved = {key.removeprefix("W0."): value for key, value in state.items() if key.startswith("W0.")}
    assert saved.keys() == set(objective._names)
    if rank == 0:
        assert all(torch.equal(value.float(), start[name]) for name, value in saved.items())
    return {
        "weights": everything,
        "bytes": held,
        "saved": sum(v.numel() for v in saved.values()),
        "gathered": talk.seen,
    }


def fused(make, rank: int) -> str:
    """DeCE in the place of a head, tied to the embeddings (GPT-2) or not.

    The first process finds its batch too small for it, and asks the model all the same: nobody waits for a question of the other.
    """
    inputs = collate(list(language_rows(8)))
    labels, found, objective = shift_labels(inputs.pop("labels")), [], DeCE(alpha_base=0.7)
    for split in (False, True):
        model = shard(make(), reshard_after_forward=True) if split else make()
        assert is_causal(model)
        step = Step(
            model=model, inputs=inputs, labels=labels, row_ids=None, epoch=1.0, global_step=0, training=True
        )  # fmt: skip
        fusing = Fusing()
        if split and rank == 0:
            with mock.patch.object(trainers_fusing, "SMALL_VOCABULARY", 0):
                assert not fusing.chooses(step, model, objectives=[objective], fuse_bytes=2**62)
        assert fusing.chooses(step, model, objectives=[objective], fuse_bytes=0)
        forward_with_hidden(step, model, objective.loss)[0].mean().backward()
        found.append(gradients(model))
        if split:
            assert all(hasattr(p.grad, "full_tensor") for p in model.parameters())
    alike(*found, f"fused gradient of {make.__name__}")
    return make.__name__


def passes() -> list[int]:
    """The trajectory filter's snapshots of rows that do not divide: no process waits for the other."""
    rows, model = classification_rows(ODD), bert()
    labels = torch.tensor(rows["label"])
    logits = predict_logits(model, rows, collate)
    features = torch.nn.functional.normalize(pooled_features(model, rows, collate), dim=-1)
    objective, split = TrajectoryFilter(batch_size=4), shard(bert(), reshard_after_forward=True)
    host = SimpleNamespace(aux_datasets={}, train_dataset=rows, data_collator=collate)
    objective.prepare(host, checkpoint=None)
    objective.on_train_begin(None, None, None, model=split)
    objective.on_train_end(None, None, None, model=split)
    assert torch.allclose(objective._snapshots[END], label_log_odds(logits, labels), atol=1e-5)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    cosines = features @ torch.nn.functional.normalize(means, dim=-1).T / objective.temperature
    others = torch.tensor([[c for c in range(3) if c != label] for label in labels.tolist()])
    start = cosines.gather(1, labels[:, None])[:, 0] - cosines.gather(1, others).exp().sum(1).log()
    assert torch.allclose(objective._snapshots["0"], start, atol=1e-4)
    ranking = objective.ranking()
    assert ranking is not None
    return sorted(ranking.row_ids.tolist())


def scores() -> dict:
    """CA, ASR and recovered accuracy, gathered from shards, against one process with the whole model."""
    rows, found = classification_rows(37).remove_columns("row_id"), []
    few = [row for row in rows if row["label"] != 0]
    ids = [[49, *row["input_ids"]] for row in few]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "label": [row["label"] for row in few]}
    for model, gather in ((bert(), False), (shard(bert(), reshard_after_forward=True), True)):
        said = evaluate_backdoor(
            model, rows, Dataset.from_dict(columns), target=0, collate=collate, batch_size=8, gather=gather
        )
        found.append({name: vars(value) for name, value in vars(said).items()})
    assert found[0] == found[1]
    return found[1]


@pytest.fixture(scope="module", params=[0, 1])
def told(request, two):
    return {"rank": request.param, **json.loads((two("test_sharded") / f"told{request.param}.json").read_text())}


def test_changes_of_rows_cost_one_number_per_row(told):
    for rows, entries, seen in told["changes"]:
        assert [name for name, _ in seen] == ["all_gather_into_tensor"] and rows < entries
        assert seen[0][1] <= rows + 1  # padded to what two processes share


def test_cosines_of_rows_cost_one_number_per_row(told):
    assert [rows for rows, _ in told["cosines"]] == [2, 1, 5, 2, 1, 24]
    for rows, seen in told["cosines"]:
        assert seen == [["allreduce_", rows]]


def test_penalties_add_up_over_micro_batches(told):
    assert told["accumulated"] > 0.1


def test_rows_that_are_cut_in_the_middle_are_refused(told):
    assert told["columns"].startswith(
        "Rows must be whole to be compared, got weights that are cut along another dimension"
    )


def test_the_start_is_held_in_shards_and_written_by_one_process(told):
    snapshot = told["snapshot"]
    half = snapshot["weights"]  # bytes: two per weight, on two processes
    assert 0.9 * half <= snapshot["bytes"] <= 1.1 * half
    assert snapshot["saved"] == (snapshot["weights"] if told["rank"] == 0 else 0)
    assert max(size for _, size in snapshot["gathered"]) < snapshot["weights"] / 4  # one weight after the other


def test_a_fused_head_has_the_gradients_of_a_whole_one(told):
    assert told["fused"] == ["gpt2", "llama"]


def test_rows_that_do_not_divide_are_ranked_once(told):
    assert told["passes"] == list(range(1000, 1000 + ODD))


def test_scores_are_gathered_from_shards(told):
    assert told["scores"]["ca"]["n"] == 37 and told["scores"]["asr"]["n"] > 20
