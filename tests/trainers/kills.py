"""Trainings that are killed (signal 9) and resumed in another process, beside the same ones left alone.

Every training is a fork of one process that has only imported: starting Python anew each time would cost ten seconds more.

    python -m tests.trainers.kills FOLDER [CASE…]  ->  FOLDER/CASE/{whole,resumed}/…
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.distributed.worlds import Case, cases
from tests.trainers.text_toys import saved_whole
from tests.trainers.toys import PadCollator, arguments, weights

SAVED, KILLED, FEWEST = 4, 6, 20  # checkpoint; update in which the process dies; updates after resuming, at least


class Kill(TrainerCallback):
    """Signal 9 after the second of four micro-batches of an update that lies inside an epoch (of eight updates)."""

    def __init__(self) -> None:
        self.forwards = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.forwards = self.forwards + 1 if state.global_step == KILLED else 0
        if self.forwards == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, case: Case, *, name: str, kill: bool = False, resume: bool = False) -> None:
    """Train in `folder`; leave the weights in `NAME.safetensors` and what the methods say in `NAME.json`."""
    args = arguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=4,
        save_strategy="steps" if kill or resume else "no",
        save_steps=SAVED,
        lr_scheduler_type="linear",
        optim="adamw_torch",  # has a state of its own to lose
        **case.options,
    )
    trainer = DefendedTrainer(
        case.model(),
        args=args,
        train_dataset=case.rows(60),
        data_collator=PadCollator(),
        aux_datasets=case.aux(),
        defense=case.objectives(),
        callbacks=[Kill()] if kill else [],
    )
    trainer.fuse_bytes = 0 if case.fuse else 2**62
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.state.global_step >= SAVED + FEWEST
    save_file(weights(trainer), folder / f"{name}.safetensors")
    trainer.save_model(str(folder / f"{name}-model"))


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that runs it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return child


def ended(child: int) -> int:
    """The signal that ended the child, or its exit status negated."""
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(folder: Path, chosen: list[str]) -> None:
    """Three children a case; the one left alone runs beside the other two."""
    source = folder / "source"
    if ended(forked(lambda: saved_whole(source, dropout=0.1) and None)):
        raise SystemExit("no model to start from")
    for name, case in cases(source, dropout=0.1).items():
        if name not in chosen:
            continue
        place = folder / name
        whole = forked(lambda place=place, case=case: train(place / "whole", case, name="whole"))
        killed = ended(forked(lambda place=place, case=case: train(place / "killed", case, name="killed", kill=True)))
        resumed = ended(
            forked(lambda place=place, case=case: train(place / "killed", case, name="resumed", resume=True))
        )
        print(f"{name} {ended(whole)} {killed} {resumed}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
