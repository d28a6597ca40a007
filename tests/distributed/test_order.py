"""Every row is dealt out once an epoch over two processes, whatever the order and whatever dropout draws in between."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows

ROWS, EPOCHS, STRATEGIES = 23, 3, ("random", "group_by_length")


@dataclass(kw_only=True, eq=False)
class Dealt(Objective):
    """Notes which rows with a label came in which epoch."""

    name = "dealt"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[list[int]] = []

    def observe(self, step, values) -> None:
        """One pair a row; what was only repeated has no label."""
        rows = step.row_ids[step.labels != -100].tolist()
        self.seen += [[int(step.epoch), row] for row in rows]


def run(folder: Path, strategy: str, *, batch_size: int) -> DefendedTrainer:
    """With dropout, which draws more numbers for longer texts: the random states of two processes part."""
    args = arguments(
        folder, per_device_train_batch_size=batch_size, num_train_epochs=EPOCHS, train_sampling_strategy=strategy,
    )  # fmt: skip
    trainer = DefendedTrainer(
        bert(dropout=0.3),
        args=args,
        train_dataset=classification_rows(ROWS),
        data_collator=PadCollator(),
        defense=Dealt(),
    )
    trainer.train()
    return trainer


def both(folder: Path) -> None:
    """On each of two processes."""
    for strategy in STRATEGIES:
        trainer = run(folder / strategy, strategy, batch_size=2)
        assert trainer.accelerator.num_processes == 2
        (folder / f"{strategy}{trainer.args.process_index}.json").write_text(json.dumps(trainer.objectives[0].seen))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_row_once_an_epoch(two, strategy):
    ranks = [json.loads((two("test_order") / f"{strategy}{rank}.json").read_text()) for rank in range(2)]
    rows = classification_rows(ROWS)["row_id"]
    for epoch in range(EPOCHS):
        assert Counter(row for seen in ranks for at, row in seen if at == epoch) == Counter(rows)
    orders = [[row for at, row in ranks[0] if at == epoch] for epoch in range(EPOCHS)]
    assert orders[0] != orders[1]  # and another order in each


def test_one_process_keeps_the_order_of_the_trainer(tmp_path):
    trainer = run(tmp_path, "group_by_length", batch_size=4)
    assert trainer.get_train_dataloader().batch_sampler.sampler.generator is None
    assert Counter(map(tuple, trainer.objectives[0].seen)) == Counter(
        (epoch, row) for epoch in range(EPOCHS) for row in classification_rows(ROWS)["row_id"]
    )
