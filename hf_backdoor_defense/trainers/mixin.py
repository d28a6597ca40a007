"""The one `compute_loss`: how a Trainer hosts objectives.

    loss = sum(values) / n + sum(scalar penalties) / accumulation steps + sum(penalties of rows) / r

| symbol | what it is |
|---|---|
| values | [n_valid], one per labeled position or row of the micro-batch, unreduced |
| n | labeled items of the whole optimizer step (all micro-batches, all processes) / processes, when the Trainer counted them |
| | else: items of this micro-batch x accumulation steps |
| r | the same of rows with a label |

`loss_is_scaled_for_ga = True` tells the Trainer that nothing is left to divide. The stock Trainer 5.x multiplies the loss
of most heads by accumulation steps x processes (transformers issue 47688), so `defense=None`, plain cross-entropy
through this mixin, is the baseline to compare with; the stock Trainer is not.

Only public methods are overridden: `train`, `compute_loss`, `get_train_dataloader`, `get_batch_samples`, `prediction_step`,
`log`, `save_model`, `hyperparameter_search`; for publishing (pushing.py) `push_to_hub`, `create_model_card`, `init_hf_repo`.
"""

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_backdoor_defense.data.formatting import FORMATTER_FILE, Formatter, note_formatter
from hf_backdoor_defense.functional.cross_entropy import cross_entropy
from hf_backdoor_defense.objectives import Objective, Step, overrides
from hf_backdoor_defense.trainers.checkpoints import newest, obstacle
from hf_backdoor_defense.trainers.columns import IS_POISONED, ROW_ID, ColumnCollator, model_columns, with_row_ids
from hf_backdoor_defense.trainers.fusing import Fusing, forward_with_hidden
from hf_backdoor_defense.trainers.heads import (
    align,
    base_model,
    is_causal,
    refusals,
    scores_vocabulary,
    take_labels,
)
from hf_backdoor_defense.trainers.labeled import LabeledOnly, only_at, take_labeled
from hf_backdoor_defense.trainers.layers import kept_layers, layers_of, require_own_forward
from hf_backdoor_defense.trainers.processes import (
    LastBatch,
    StepRows,
    agreed,
    last_batch,
    one_order,
    process_reasons,
    without_repeated,
)
from hf_backdoor_defense.trainers.pushing import PushMixin, only_at_the_end
from hf_backdoor_defense.trainers.state import load_renamed, load_states, require_safetensors, save_objectives

logger = logging.getLogger(__name__)

_PLAIN = Objective()  # cross-entropy, of logits and of hidden states


class DefenseMixin(PushMixin):
    """Put before a Trainer class whose `compute_loss` is Trainer's own: see `hosts.defended`.

    Args (beside the Trainer's own, passed through unchanged):
        defense: an `Objective`, several, or None for plain cross-entropy. At most one may replace the loss.
        aux_datasets: further data sets by role, for objectives that need them, for example `{"clean": dataset}`.

    Raises:
        ValueError: what cannot be hosted, all reasons together, before anything is trained or written.
        FloatingPointError: the loss became NaN or infinite; names the step and the rows.
    """

    loss_is_scaled_for_ga = True
    # Logits of a micro-batch that would take at least as many bytes (float32) are not built where that can be helped.
    # Smaller ones are no burden, and full logits are what every objective can read. Set it on a subclass or on the trainer.
    fuse_bytes: int = 2**26
    # A masked language model is scored at its labels only; False scores every position, as the stock Trainer does.
    labeled_only: bool = True
    # How rows of text were rendered; None where that is not known here (rows that came tokenized).
    formatter: Formatter | None = None
    # Trainer's own, named for the type checker.
    args: Any
    data_collator: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        defense: Objective | Sequence[Objective] | None = None,
        aux_datasets: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        objectives = [] if defense is None else [defense] if isinstance(defense, Objective) else list(defense)
        _check_objectives(objectives)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` was given: a defended trainer computes the loss itself and would ignore it. "
                "Remove it, or write the loss as an Objective (`loss(step)`)."
            )
        self.objectives: list[Objective] = objectives
        self.aux_datasets = {role: with_row_ids(rows) for role, rows in (aux_datasets or {}).items()}
        self._terms: dict[str, tuple[Tensor, int]] = {}
        self._has_trained = False
        self._fusing = Fusing()
        self._labeled = LabeledOnly()
        self._has_probed_layers = False
        self._last_batch = LastBatch()
        self._step_rows = StepRows(self, [])
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.args.label_smoothing_factor}: a defended trainer computes the loss "
                "itself, and a method that smooths does so by its own convention. Set it to 0 and use the method's own "
                "field, for example DeCE(label_smoothing=0.05)."
            )
        self._user_optimizer = self.optimizer is not None
        # Row ids travel through the collator to `compute_loss`; what else the model does not read is dropped there.
        keep = model_columns(base_model(self.model), self.label_names) if self.args.remove_unused_columns else None
        self.args = copy.copy(self.args)
        self.args.remove_unused_columns = False
        only_at_the_end(self.args)
        self.train_dataset = with_row_ids(self.train_dataset)
        for objective in objectives:
            self.add_callback(objective)
            objective._hosted = True  # type: ignore[attr-defined]
        self.data_collator = ColumnCollator(self.data_collator, keep, causal=is_causal(base_model(self.model)))

    # -- training -----------------------------------------------------------------------------------------------------
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`, after every objective was checked and prepared. Raises ValueError with all reasons."""
        checkpoint, refused = None, []
        try:
            checkpoint = self._checkpoint(resume_from_checkpoint)
        except ValueError as error:
            if self.accelerator.num_processes == 1:
                raise
            refused = [str(error)]  # told on every process
        reasons = agreed(self, refused + self.reasons(), checkpoint=checkpoint)
        if reasons:
            raise ValueError("This training cannot be defended:\n" + "\n".join(f"- {reason}" for reason in reasons))
        if self._has_trained and not self._user_optimizer:
            self.optimizer = self.lr_scheduler = None  # the Trainer would go on with the moments of the first run
        self._has_trained = True
        self._fusing, self._labeled = Fusing(), LabeledOnly()  # a second training may have another head
        self._has_probed_layers = False
        self._terms.clear()
        if self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            logger.log(
                logging.WARNING if self.objectives else logging.INFO,
                "The training set streams and has no length: the Trainer counts all of max_steps as one epoch, and a stream that "
                "starts again as the next one, so that a schedule by epochs hardly moves. Use a data set with a length where "
                "that matters.",
            )
        if checkpoint is not None:
            load_states(self.objectives, checkpoint)
            load_renamed(self.model, checkpoint)
        # From here on the weights are no longer those of the folder they came from, nor is what lies there of their training.
        note_formatter(base_model(self.model), self.formatter)
        for objective in self.objectives:
            objective.prepare(self, checkpoint=checkpoint)
        try:
            return super().train(
                resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
        finally:
            self._step_rows = StepRows(self, [])  # the rows of the last step are none of a later `compute_loss`

    def reasons(self) -> list[str]:
        """Every reason why `train` would refuse: the host's and the objectives' own. Changes nothing."""
        own = [f"{o.name}: {reason}" for o in self.objectives for reason in o.check(self)]
        return process_reasons(self) + refusals(self) + own

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.hyperparameter_search`; refused where an objective prepares the model once."""
        preparing = [o.name for o in self.objectives if overrides(o, "prepare")]
        if preparing:
            raise ValueError(
                f"hyperparameter_search builds a new model for every trial, but {', '.join(preparing)} prepares one "
                "model once. Search without it, or start one Trainer per trial."
            )
        return super().hyperparameter_search(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The defended loss in training, the mean plain cross-entropy of the batch in evaluation."""
        inputs = dict(inputs)
        row_ids = inputs.pop(ROW_ID, None)
        inputs.pop(IS_POISONED, None)
        unwrapped = self.accelerator.unwrap_model(model)
        core = base_model(unwrapped)
        labels, inputs = take_labels(core, inputs)
        step = Step(
            model=model,
            inputs=inputs,
            labels=labels,
            row_ids=row_ids,
            epoch=float(self.state.epoch or 0.0),
            global_step=self.state.global_step,
            training=model.training,
        )
        if not step.training:
            outputs = model(**inputs)
            align(step, outputs)
            values = cross_entropy(step.logits, step.labels)
            loss = values.sum() / max(values.numel(), 1)
            self.measure(step)
            return (loss, outputs) if return_outputs else loss

        main = next((o for o in self.objectives if overrides(o, "loss")), _PLAIN)
        few = self.labeled_only and self._labeled.chooses(step, unwrapped)
        kept = take_labeled(step) if few else None
        fused = self._fusing.chooses(step, unwrapped, objectives=self.objectives, fuse_bytes=self.fuse_bytes)
        layered = any(o.takes_layers for o in self.objectives)
        if layered and not self._has_probed_layers:  # on every process alike
            require_own_forward(unwrapped, inputs)
            self._has_probed_layers = True
        keeping: Any = kept_layers(core) if layered else contextlib.nullcontext()
        with contextlib.nullcontext() if kept is None else only_at(core, kept), keeping as embeddings:
            if fused:
                values, outputs = forward_with_hidden(step, core, main.loss)
            else:
                outputs = model(**inputs)
                align(step, outputs)
                values = main.loss(step)
        if layered:
            step.layers = layers_of(step, unwrapped, embeddings)
        if scores_vocabulary(core):
            step.log("fused", values.new_full((), float(fused)))
        for objective in self.objectives:
            objective.observe(step, values.detach())
        loss = values.sum() / self._items(values, num_items_in_batch)
        total = loss
        for objective in self.objectives:
            for name, penalty in objective.penalties(step).items():
                if penalty.ndim:
                    penalty = penalty[step.labeled_rows]
                    rows = self._step_rows.per_process(penalty, accumulation=self._accumulation_steps())
                    total = total + penalty.sum() / rows
                    penalty = penalty.sum() / max(len(penalty), 1)
                else:
                    total = total + penalty / self._accumulation_steps()
                step.log(f"{objective.name}/{name}", penalty)
        self._require_finite(total, row_ids)
        self.measure(step)
        self._remember(step.metrics)
        self._terms.update({name: (value, 1) for name, value in step.latest.items()})
        return (total, outputs) if return_outputs else total

    def get_train_dataloader(self) -> Any:
        """As the Trainer's own; with several processes every row is dealt out once an epoch, whatever the sampler."""
        loader = super().get_train_dataloader()
        self._last_batch = last_batch(self, loader)
        return one_order(self, loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the Trainer's own; rows that are only repeated to fill an epoch's last batch over all processes are not learned."""
        batches, items = super().get_batch_samples(
            (without_repeated(self, batch, self._last_batch) for batch in epoch_iterator), num_batches, device
        )
        self._step_rows = StepRows(self, batches)
        return batches, items

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own; row ids reach neither `generate` nor a forward that bypasses `compute_loss`."""
        seen = {name: value for name, value in inputs.items() if name not in (ROW_ID, IS_POISONED)}
        return super().prediction_step(model, seen, *args, **kwargs)

    def _accumulation_steps(self) -> int:
        # The Trainer sets the attribute per optimizer step: the last one of an epoch may hold fewer micro-batches.
        return int(getattr(self, "current_gradient_accumulation_steps", None) or self.args.gradient_accumulation_steps)

    def _items(self, values: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if num_items_in_batch is None:
            n = torch.tensor(max(values.numel(), 1) * self._accumulation_steps(), device=values.device)
        else:
            n = torch.as_tensor(num_items_in_batch, device=values.device).clamp(min=1)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                n = n / self.accelerator.num_processes  # counted over all processes; DDP averages the gradients
        return n.to(values.dtype)

    def _require_finite(self, loss: Tensor, row_ids: Tensor | None) -> None:
        if torch.isfinite(loss):
            return
        rows = "unknown (the data set has no row_id)" if row_ids is None else row_ids.tolist()
        raise FloatingPointError(
            f"The loss is {loss.item()} at step {self.state.global_step}, rows {rows}: the run stops before the weights "
            "are spoiled. Look at these rows, lower the learning rate or train in float32."
        )

    def _checkpoint(self, resume: str | bool | None) -> str | None:
        if not resume:
            return None
        found = newest(self.args.output_dir, world_size=self.accelerator.num_processes) if resume is True else resume
        checkpoint = None if found is None else str(found)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but `{self.args.output_dir}` holds no checkpoint to go on with (the log "
                "says why others were passed over). Start without it, or name the folder of a checkpoint."
            )
        require_safetensors(checkpoint)
        if why := obstacle(checkpoint, world_size=self.accelerator.num_processes):
            raise ValueError(f"`{checkpoint}` {why} resume_from_checkpoint=True finds an earlier one.")
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        unrepeatable = self.args.train_sampling_strategy == "group_by_length" and self.accelerator.num_processes == 1
        if unrepeatable and (state.epoch or 0.0) % 1 > 1e-6:
            logger.warning(
                "%s lies inside an epoch, and group_by_length does not repeat the order of rows: the rest of this epoch may see "
                "rows twice. Checkpoints at the end of an epoch (save_strategy=epoch) continue exactly.",
                checkpoint,
            )
        return checkpoint

    # -- reporting and saving -----------------------------------------------------------------------------------------
    def measure(self, step: Step) -> None:
        """For a host that logs more: called once per micro-batch, after its loss, in training and in evaluation."""

    def _remember(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            total, count = self._terms.get(name, (torch.zeros_like(value), 0))
            self._terms[name] = (total + value, count + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the objectives' terms (means since the last training log, or latest values, of this process)."""
        if "loss" in logs:
            logs = {**logs, **{name: (total / count).item() for name, (total, count) in self._terms.items()}}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, and `defense.json` with `defense.safetensors` beside the weights, and `formatter.json` where
        the host has a formatter; one of an earlier training does not stay beside new weights.
        """
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        save_objectives(self.objectives, folder, write=self.args.should_save)
        if self.args.should_save:
            if self.formatter is None:
                (folder / FORMATTER_FILE).unlink(missing_ok=True)
            else:
                self.formatter.save(folder)


def _check_objectives(objectives: list[Objective]) -> None:
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"`defense` must be an Objective or a list of them, got {objective!r}. For example defense=DeCE()."
            )
        if getattr(objective, "_hosted", False):
            raise ValueError(
                f"This {objective.name} object is hosted by another Trainer already: it keeps that run's state. "
                "Use dataclasses.replace(objective) for another run."
            )
    replacing = [o.name for o in objectives if overrides(o, "loss")]
    if len(replacing) > 1:
        raise ValueError(f"{' and '.join(replacing)} both replace the loss: only one can. Train them in separate runs.")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise ValueError(f"The same method is given twice ({', '.join(names)}): leave one out.")
