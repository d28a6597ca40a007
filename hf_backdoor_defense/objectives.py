"""The contract: what a defense (or a weight-poisoning attack) tells the Trainer that hosts it.

A method is one `Objective`: a dataclass whose fields are its hyper-parameters and which is a `TrainerCallback` at the
same time. `trainers/mixin.py` is the only host code there is; it calls what is defined here and nothing else.

What is asked for, and when:

| member | asked for | returns |
|---|---|---|
| `field_reasons` | at construction | what is wrong with the fields themselves |
| `check` | once, before anything else of `train()` | reasons why this host cannot run it |
| `prepare` | once, before the first step (after `load_state_dict` on resume) | - |
| `loss` | on every training micro-batch, of the one objective that overrides it | [n_valid], unreduced |
| `penalties` | on every training micro-batch | by name a scalar, or [batch] values of the rows, added to the loss |
| `observe` | on every training micro-batch | - |
| `ranking` | after training | the training rows, most suspicious first, or None |
| `refit` | after training | what to host in a training without the dropped rows, or None |
| `rows` | after training | values per training row, by name |
| `activity`, `inert` | after training | what it did; why it did nothing |
| `evidence` | after training | what it found, as JSON |
| `state_dict`, `load_state_dict` | with every checkpoint, and on resume | tensors and JSON |

None of them is called while evaluating: an evaluation reports plain cross-entropy, whatever is hosted.
"""

import dataclasses
import difflib
import math
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_backdoor_defense.functional.cross_entropy import cross_entropy, top1, valid
from hf_backdoor_defense.functional.linear_dece import linear_dece_loss_and_stats


@dataclass(frozen=True)
class Projection:
    """The output projection of a language model, as an objective needs it to go from hidden states to logits.

    `weight`: [vocab, d]; `bias`: [vocab] or None; `scale` multiplies the logits; `softcap` c maps them to c·tanh(z/c).

    >>> project = Projection(weight=torch.eye(3, 2), scale=0.5)
    >>> project(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 2., 0.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., vocab]."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What lies between embeddings and head in the loss's own forward, in its graph, for an objective with `takes_layers`.

    `embeddings`: [batch, time, d], which require a gradient even where the embedding is frozen; `hidden_states`: L + 1 of
    [batch, time, d], the last behind the final norm. `again(embeddings)` is a further forward of the batch from other
    embeddings, without the head: its hidden states.
    """

    embeddings: Tensor
    hidden_states: Sequence[Tensor]
    again: Callable[[Tensor], Sequence[Tensor]]


@dataclass(kw_only=True)
class Step:
    """One micro-batch, as an objective sees it.

    `labels` are aligned with the scores (shifted already for causal models) and hold -100 where there is nothing to
    learn. Either `logits` is given, or, for an objective with `takes_hidden` where the host has an output projection and
    full logits would be large, `hidden` and `project` from the same single forward (`outputs` is then None: the head is
    still running). `top1` is what a loss over tokens noted on the way, for the host's token accuracy.
    `model` is the model as the Trainer wrapped it; read it, never keep it. A masked language model is scored at its labels
    only: `labels` is then [1, n_valid], and `batch_labels` are the batch's own.
    """

    model: nn.Module
    inputs: Mapping[str, Any]  # what the forward received; neither row ids nor `is_poisoned` are among it
    labels: Tensor  # [...]
    row_ids: Tensor | None  # [batch]
    epoch: float
    global_step: int
    training: bool
    outputs: Any = None
    logits: Tensor | None = None  # [..., classes]
    hidden: Tensor | None = None  # [..., d]
    project: Projection | None = None
    layers: Layers | None = None  # where an objective `takes_layers`
    top1: Tensor | None = None  # [n_valid], bool
    whole_labels: Tensor | None = None  # [batch, time], where `labels` holds the labeled positions alone
    metrics: dict[str, Tensor] = field(default_factory=dict)
    latest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch_labels(self) -> Tensor:
        """[batch, ...]: labels row by row, whatever the scores are aligned with."""
        return self.labels if self.whole_labels is None else self.whole_labels

    @property
    def batch_index(self) -> Tensor:
        """[n_valid]: the row of the batch that each valid position belongs to, in the order of `loss`'s values."""
        return valid(self.batch_labels).nonzero()[:, 0]

    @property
    def labeled_rows(self) -> Tensor:
        """[batch], bool: the rows that are learned from. Others are no part of a penalty either (a sampler repeats some)."""
        labels = self.batch_labels
        return valid(labels).reshape(len(labels), -1).any(-1)

    def log(self, name: str, value: Tensor, *, latest: bool = False) -> None:
        """Record a scalar; the host averages it over the steps between two logs and adds it to `Trainer.log`.

        `latest`: it is a state, of which the last value counts, and no mean.
        """
        (self.latest if latest else self.metrics)[name] = value.detach()

    def note_top1(self, is_top1: Tensor) -> None:
        """Keep [n_valid] whether each label scores highest: a by-product of the loss that the host reports as accuracy."""
        self.top1 = is_top1.detach()


@dataclass(frozen=True)
class Ranking:
    """Training rows by suspicion, most suspicious first, and how many of them the method would drop.

    `row_ids`: [rows]; `scores`: [rows], descending; `dropped`: how many of the first rows a refit leaves out (after
    the method's own caps, hence a set of ids and not a number); `columns`: per-row values worth showing, [rows] each.
    """

    row_ids: Tensor
    scores: Tensor
    dropped: frozenset[int]
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Objective(TrainerCallback):
    """Base of every method. The default is plain cross-entropy without penalties.

    Fields of a subclass are its hyper-parameters: JSON scalars, lists and dicts, all with defaults. Two objects are
    equal when their fields are. An object is hosted by one Trainer only; use `dataclasses.replace(objective)` for another run.

    >>> @dataclass(kw_only=True, eq=False)
    ... class Doubled(Objective):
    ...     name = "doubled"
    ...     factor: float = 2.0
    ...     def loss(self, step):
    ...         return self.factor * super().loss(step)
    >>> Doubled.from_dict({"factor": "3"})
    Doubled(factor=3.0)
    >>> Doubled() == Doubled(factor=2.0)
    True
    >>> Doubled.from_dict({"facto": 3})
    Traceback (most recent call last):
    ...
    ValueError: doubled has no field `facto`: did you mean `factor`? Fields: factor.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str | None] = None  # arXiv id
    takes_hidden: ClassVar[bool] = False  # `loss` reads `logits`, or `hidden` with `project`: whichever is given
    takes_layers: ClassVar[bool] = False  # `penalties` reads `step.layers`
    needs_row_ids: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    # -- fields -------------------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if hints[f.name] in (int, float)}
        reasons = [
            f"`{name}` must be a number, got {value!r} ({type(value).__name__}): it is computed with. Use from_dict for text."
            for name, value in given.items()
            if not isinstance(value, numbers.Real)
        ] or self.field_reasons()
        if reasons:
            raise ValueError("\n".join(f"{self.name}: {reason}" for reason in reasons))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_dict() == self.to_dict()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(type(self))

    def field_reasons(self) -> list[str]:
        """What is wrong with the fields, whatever the host: one sentence each (what, got, why, do)."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The name and all fields, ready for JSON and for `from_dict`."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> typing.Self:
        """Build from plain values (YAML, command line). Raises ValueError for an unknown field or a wrong type."""
        values = {key: value for key, value in values.items() if key != "name"}
        preset = values.pop("preset", None)
        if preset is not None:
            values = {**cls._preset_fields(str(preset)), **values}
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ValueError(f"{cls.name} has no field `{key}`: {hint}Fields: {', '.join(names) or 'none'}.")
        hints = typing.get_type_hints(cls)
        return cls(**{key: _convert(value, hints[key], f"{cls.name}.{key}") for key, value in values.items()})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> typing.Self:
        """A named set of fields, some overridden. Raises ValueError for an unknown name."""
        return cls.from_dict({"preset": name, **overrides})

    @classmethod
    def _preset_fields(cls, name: str) -> Mapping[str, Any]:
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise ValueError(f"{cls.name} has no preset `{name}`. Presets: {known}.")
        return cls.presets[name]

    # -- hosting ------------------------------------------------------------------------------------------------------
    def check(self, trainer: Any) -> list[str]:
        """Every reason why this host cannot run the method: one sentence each. Nothing has been changed yet."""
        return []

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Freeze, wrap, relabel, snapshot. On resume `checkpoint` is the folder and the state has been loaded."""

    def loss(self, step: Step) -> Tensor:
        """[n_valid]: one value per labeled position (or row), unreduced. The host divides."""
        if step.logits is None:
            assert step.hidden is not None and step.project is not None
            values, _, is_top1 = linear_dece_loss_and_stats(
                step.hidden,
                step.project.weight,
                step.labels,
                log_alpha=0.0,
                label_smoothing=0.0,
                bias=step.project.bias,
                scale=step.project.scale,
                softcap=step.project.softcap,
            )
            step.note_top1(is_top1)
            return values
        values = cross_entropy(step.logits, step.labels)
        if step.labels.ndim > 1:
            step.note_top1(top1(step.logits, step.labels))
        return values

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """By name a scalar, which the host divides by the accumulation steps; or [batch], one value per row, of which it takes
        the mean over the rows of the whole optimizer step (all micro-batches, all processes), as it does of the loss.
        """
        return {}

    def observe(self, step: Step, values: Tensor) -> None:
        """[n_valid] detached losses of a training micro-batch, for a method that only records."""

    def ranking(self) -> Ranking | None:
        """After training: the rows by suspicion, for a method that ranks training rows; else None."""
        return None

    def refit(self) -> "Objective | None":
        """What to host while training again without the rows that `ranking` drops, or None to train plainly."""
        return None

    def rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """After training: per-row records by name, each (row ids [n], int64; values [n]), for the report."""
        return {}

    def activity(self) -> dict[str, float]:
        """What the method did, in numbers, for the report."""
        return {}

    def evidence(self) -> dict[str, Any]:
        """What it found, layer by layer or class by class, as JSON values for the report."""
        return {}

    def inert(self) -> str | None:
        """Why the method did nothing, if so. The run's report then fails."""
        return None

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name. Called on every process; only the first one writes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


def row_sums(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values of each row of the batch, without waiting for the device.

    Args:
        values: [n_valid], one per labeled position, in the order of `loss`. labels: [batch, ...], a step's `batch_labels`.

    Returns:
        sums [batch], of the dtype of `values`; counts [batch], int64.

    >>> row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[-100, 5], [6, 7]]))
    (tensor([1., 6.]), tensor([1, 2]))
    """
    counts = valid(labels).reshape(len(labels), -1).sum(-1) if len(labels) else labels.new_zeros(0)
    rows = torch.arange(len(labels), device=labels.device)
    # `output_size` spares the question how long the result is, and with it a wait for the GPU.
    row = torch.repeat_interleave(rows, counts, output_size=values.numel())
    return values.new_zeros(len(labels)).index_add_(0, row, values.detach()), counts


def everywhere(value: Any) -> list[Any]:
    """`value` as every process has it, by rank; call it on all of them. [value] with one process.

    For records that are sums over the rows that a process saw: what is saved and reported is about all of them.

    >>> everywhere({"rows": 3})
    [{'rows': 3}]
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def is_first_process() -> bool:
    """Whether this process goes on with what a checkpoint holds of all of them; the others start their sums anew."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def overrides(objective: Objective, method: str) -> bool:
    """Whether an objective brings its own `method` (for example "loss"), rather than the default.

    >>> overrides(Objective(), "loss")
    False
    """
    return getattr(type(objective), method) is not getattr(Objective, method)


def planned_epochs(args: Any, rows: int) -> float:
    """How many epochs a training over `rows` rows will last, whichever way TrainingArguments give its length.

    >>> from transformers import TrainingArguments
    >>> planned_epochs(TrainingArguments(max_steps=6, per_device_train_batch_size=4, use_cpu=True), rows=10)
    2.0
    """
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    return args.max_steps / math.ceil(batches / args.gradient_accumulation_steps)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A YAML or command-line value as the field's type: "1e-3" and 1 are floats where a float is expected."""
    allowed = (
        typing.get_args(hint)
        if typing.get_origin(hint) is typing.Union or isinstance(hint, type(int | None))
        else (hint,)
    )
    for kind in allowed:
        origin = typing.get_origin(kind) or kind
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is int and isinstance(value, str) and value.lstrip("-").isdigit():
            return int(value)
        if origin is typing.Literal and value in typing.get_args(kind):
            return value
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
        if origin is tuple and isinstance(value, list):
            return tuple(value)
    names = (typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else (kind,) for kind in allowed)
    expected = " or ".join(str(getattr(one, "__name__", one)) for kind in names for one in kind)
    raise ValueError(f"`{where}` must be {expected}, got {value!r} ({type(value).__name__}).")
