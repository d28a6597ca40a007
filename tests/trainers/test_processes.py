"""Whether processes are those that were asked for, agree, and learn every row once; with fakes in their place.

Real launches are in tests/distributed.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import BatchEncoding

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX
from hf_backdoor_defense.objectives import everywhere
from hf_backdoor_defense.trainers import processes
from hf_backdoor_defense.trainers.heads import shift_labels, take_labels
from hf_backdoor_defense.trainers.processes import (
    LastBatch,
    agreed,
    last_batch,
    process_reasons,
    repeated,
    without_repeated,
)
from tests.trainers.toys import bart, classification_rows, gpt2

LAUNCHER = ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def nothing_launched(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def trainer(
    here=2, rank=0, kind=DistributedType.MULTI_CPU, *, end=False, rows=24, objectives=(), model=None, **changes
):
    arguments = {
        "seed": 0, "data_seed": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": -1,
        "num_train_epochs": 3, "learning_rate": 0.1, "ddp_backend": None, "dataloader_drop_last": False,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    state = SimpleNamespace(end_of_dataloader=end)
    return SimpleNamespace(
        args=SimpleNamespace(**{**arguments, **changes}),
        accelerator=SimpleNamespace(
            num_processes=here, process_index=rank, distributed_type=kind, gradient_state=state
        ),
        train_dataset=range(rows) if isinstance(rows, int) else rows,
        objectives=list(objectives),
        model=torch.nn.Linear(1, 1) if model is None else model,
    )


def loader(rows: int, world: int, size: int):
    return SimpleNamespace(dataset=range(rows), total_batch_size=world * size)


@pytest.mark.parametrize("option, kind", [("fsdp", DistributedType.FSDP), ("deepspeed", DistributedType.DEEPSPEED)])
def test_an_engine_that_accelerate_passes_over_is_refused(monkeypatch, option, kind):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (reason,) = process_reasons(trainer(2, **{option: True}))
    assert "was asked for, and accelerate set up MULTI_CPU" in reason and f"leave `{option}` out" in reason
    assert process_reasons(trainer(2, kind=kind, **{option: True})) == []
    assert process_reasons(trainer(2)) == []
    monkeypatch.setenv(f"ACCELERATE_USE_{option.upper()}", "true")
    assert len(process_reasons(trainer(2))) == 1


# -- asked for --------------------------------------------------------------------------------------------------------
def test_one_process_is_fine_where_one_was_asked_for(monkeypatch):
    alone = trainer(1, kind=DistributedType.NO)
    assert process_reasons(alone) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert process_reasons(alone) == []  # torchrun, or accelerate launch, with one process


def test_two_are_fine_where_two_were_asked_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_reasons(trainer(2)) == []


def test_each_process_for_itself_is_told_with_both_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    (reason,) = process_reasons(trainer(1, kind=DistributedType.NO))
    assert reason.startswith("4 processes were started and this training has 1") and "ACCELERATE_USE_CPU=true" in reason


def test_rows_that_are_shared_without_gradients_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (reason,) = process_reasons(trainer(2, kind=DistributedType.NO, ddp_backend="gloo"))
    assert "ddp_backend='gloo'" in reason and "never be summed" in reason


def test_a_group_of_processes_that_the_trainer_does_not_know_of_is_told(monkeypatch):
    monkeypatch.setattr(processes.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.torch.distributed, "get_world_size", lambda: 3)
    (reason,) = process_reasons(trainer(1, kind=DistributedType.NO))
    assert reason.startswith("3 processes were started")


def test_a_launcher_that_started_one_of_several_is_told(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    alone = trainer(1, kind=DistributedType.NO)
    assert process_reasons(alone) == []  # a variable that other tools set too
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert process_reasons(alone) == []  # accelerate launch with one process, in a job that exports a port
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    (reason,) = process_reasons(alone)
    assert "asked for several processes and started one" in reason


# -- agreed -----------------------------------------------------------------------------------------------------------
def meeting(monkeypatch, *others):
    """Others whose facts come after this process's own."""
    seen = []

    def gather(mine):
        seen.append(mine[0])
        return [mine[0], *(([*reasons], {**mine[0][1], **facts}) for reasons, facts in others)]

    monkeypatch.setattr(processes, "gather_object", gather)
    return seen


def test_one_process_agrees_with_itself_without_asking(monkeypatch):
    seen = meeting(monkeypatch)
    for alone in (trainer(1, kind=DistributedType.NO), trainer(1), trainer(2, kind=DistributedType.NO)):
        assert agreed(alone, ["a reason"]) == ["a reason"]
    assert seen == []


def test_reasons_of_others_become_everyones_once_each(monkeypatch):
    meeting(monkeypatch, (["theirs", "ours"], {}), (["theirs"], {}))
    assert agreed(trainer(3), ["ours"]) == ["ours", "theirs"]
    assert agreed(trainer(3), []) == ["theirs", "ours"]


@pytest.mark.parametrize(
    "name, mine, other",
    [
        ("seed", 0, 1),
        ("data_seed", None, 3),
        ("rows", 24, 0),
        ("rows", 24, "a stream"),
        ("per_device_train_batch_size", 4, 8),
        ("gradient_accumulation_steps", 1, 2),
        ("max_steps", -1, 5),
        ("num_train_epochs", 3, 2),
        ("learning_rate", 0.1, 0.2),
        ("defense", "[]", '[{"name": "dece"}]'),
    ],
)
def test_what_differs_is_named_with_the_value_of_each_process(monkeypatch, name, mine, other):
    meeting(monkeypatch, ([], {}), ([], {name: other}))
    (reason,) = agreed(trainer(3), [])
    told = f"`{name}` must be the same on every process, got {mine} on process 0, {mine} on process 1, {other} on process 2"
    assert reason.startswith(told)


def test_other_rows_other_weights_and_another_checkpoint_are_seen(monkeypatch):
    rows = classification_rows(8)

    def facts(**changes):
        seen = meeting(monkeypatch)
        checkpoint = changes.pop("checkpoint", "runs/checkpoint-4")
        agreed(trainer(2, **{"rows": rows, "objectives": [D3()], **changes}), [], checkpoint=checkpoint)
        return seen[0][1]

    torch.manual_seed(0)
    same = torch.nn.Linear(2, 2)
    usual = facts(model=same)
    assert usual == facts(model=same) and usual["checkpoint"] == "checkpoint-4"
    for changes, name in (
        ({"rows": rows.shuffle(seed=1)}, "content of the rows"),
        ({"rows": rows.map(lambda row: {"label": 1 - row["label"] % 2})}, "content of the rows"),
        ({"model": torch.nn.Linear(2, 2)}, "weights"),
        ({"checkpoint": None}, "checkpoint"),
    ):
        other = facts(**{"model": same, **changes})
        assert {key for key in usual if usual[key] != other[key]} == {name}
    assert facts(objectives=[], model=same)["weights"] == ""  # nothing looks at them before DDP makes them equal


def test_processes_that_agree_have_no_reasons_and_say_little(monkeypatch):
    seen = meeting(monkeypatch, ([], {}))
    assert agreed(trainer(2, objectives=[DeCE()], rows=iter([])), []) == []
    ((_, facts),) = seen
    assert facts["rows"] == "a stream" and '"alpha_base": 0.985' in facts["defense"]
    assert len(str(facts)) < 1000


# -- rows that fill an epoch's last batch -----------------------------------------------------------------------------
def shares(rows: int, world: int, size: int) -> list[int]:
    """By counting: of the last global batch, how many rows of each process are there for the second time."""
    last = rows % (world * size)
    return [sum(rank * size + i >= last for i in range(size)) for rank in range(world)] if last else [0] * world


@pytest.mark.parametrize("world, size", [(2, 4), (3, 4), (4, 1), (2, 5)])
def test_every_row_of_the_last_batch_is_learned_once(world, size):
    for rows in range(1, 3 * world * size):
        last = last_batch(trainer(world), loader(rows, world, size))
        found = [repeated(trainer(world, rank, end=True), last) for rank in range(world)]
        assert found == shares(rows, world, size), rows
        assert [repeated(trainer(world, rank, end=False), last) for rank in range(world)] == [0] * world


@pytest.mark.parametrize(
    "changes, source",
    [
        ({"here": 1}, loader(11, 1, 4)),
        ({"dataloader_drop_last": True}, loader(11, 2, 4)),
        ({"train_sampling_strategy": "batch_rebalance"}, loader(11, 2, 4)),
        ({}, SimpleNamespace(dataset=iter([]), total_batch_size=8)),  # a stream
        ({}, SimpleNamespace(dataset=range(11))),  # no loader of accelerate's
    ],
)
def test_where_nothing_is_repeated_every_batch_is_whole(changes, source):
    host = trainer(**{"here": 2, "end": True, **changes})
    assert last_batch(host, source) == LastBatch() and repeated(host, LastBatch()) == 0


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_labels_of_repeated_rows_are_taken_out_of_the_batch(kind):
    labels = torch.arange(8).reshape(4, 2)
    batch = kind({"input_ids": torch.ones(4, 2), "labels": labels})
    found = without_repeated(trainer(2, 0, end=True), batch, LastBatch(3, 4))
    assert type(found) is kind and found["labels"].tolist() == [[0, 1], [2, 3], [4, 5], [IGNORE_INDEX] * 2]
    assert labels.tolist()[3] == [6, 7]  # whoever keeps the batch's own sees no difference
    assert without_repeated(trainer(2, 0, end=True), batch, LastBatch(4, 4)) is batch


def test_one_label_per_row_is_taken_out_too_and_a_process_may_be_left_without_any():
    batch = {"labels": torch.tensor([1, 2, 0, 1])}
    assert without_repeated(trainer(2, 1, end=True), batch, LastBatch(4, 4))["labels"].tolist() == [IGNORE_INDEX] * 4


def test_rows_that_were_joined_are_left_alone_with_a_warning(caplog):
    labels = torch.ones(1, 30, dtype=torch.long)  # packed without padding
    batch = without_repeated(trainer(2, 1, end=True), {"labels": labels}, LastBatch(3, 4))
    assert torch.equal(batch["labels"], labels) and "1 labeled sequences where 4 rows were dealt out" in caplog.text


@pytest.mark.parametrize(
    "batch", [{"input_ids": torch.ones(2, 2)}, [1, 2], {"labels": torch.tensor(3)}, {"labels": [1, 2]}]
)
def test_what_has_no_labels_to_take_is_left_as_it_is(batch):
    assert without_repeated(trainer(2, 1, end=True), batch, LastBatch(1, 2)) is batch


def test_a_causal_model_learns_nothing_of_a_repeated_row():
    labels = torch.tensor([[5, 6, 7], [8, 9, 1]])
    batch = {"input_ids": labels.clone(), "labels": labels}
    aligned, _ = take_labels(gpt2(), without_repeated(trainer(2, 0, end=True), batch, LastBatch(1, 2)))
    assert torch.equal(aligned[0], shift_labels(labels)[0]) and bool((aligned[1] == IGNORE_INDEX).all())


def test_an_encoder_decoder_reads_padding_in_place_of_a_repeated_row():
    labels = torch.tensor([[5, 6, 1], [8, 9, 1]])
    batch = {"input_ids": labels.clone(), "labels": labels}
    aligned, inputs = take_labels(bart(), without_repeated(trainer(2, 0, end=True), batch, LastBatch(1, 2)))
    assert aligned.tolist() == [[5, 6, 1], [IGNORE_INDEX] * 3]
    assert inputs["decoder_input_ids"].tolist() == [[1, 5, 6], [1, 0, 0]]  # starts as every row does, then padding


def test_without_other_processes_everywhere_is_here():
    assert everywhere([1]) == [[1]]
