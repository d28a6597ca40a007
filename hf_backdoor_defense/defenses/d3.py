"""D3: move chosen weights as far from their poisoned values as a bound on the clean loss allows.

    loss = c_h · relu(CE_i − eps) − c_d · Σ_l ‖W_l − W0_l‖_F         then W_l <- W_l · ‖W0_l‖ / ‖W_l‖ after every update

| symbol | what it is | shape |
|---|---|---|
| W_l, W0_l | a selected weight (never a bias), and its poisoned value | [out, in, …] |
| r_l | ‖W0_l‖, the radius on which W_l is held | scalar |
| CE_i | cross-entropy of a clean row | [n_valid] |
| c_h, c_d | lam and 1; with `rescale` and lam > 1: lam/(lam + 1) and 1/(lam + 1) | scalars |

Plain fine-tuning of a backdoored model ends where the clean loss *and* the loss of the backdoor are low. Here the selected
weights leave that place. The distance term is no part of the graph: its gradient, −c_d·(W − W0)/‖W − W0‖, is added to `.grad`
once per update, after clipping. At W = W0 it is 0, so a warm-up moves the weights first.

The code's own setting (preset "official_code") moves the head alone. The attacker is stopped, but the trunk still sends triggered
inputs astray: few get their true label back. The default here moves every Linear, from a noisy start, which brings them back, at
a price in clean accuracy (`benchmarks/results/purify_search.jsonl`).

Source: arXiv 2411.09585; authors' code shawkui/Distance_Driven_Detoxification, commit ab96c36.
"""

import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_backdoor_defense.functional.spheres import distances, project_, pull_away_
from hf_backdoor_defense.models import unwrapped
from hf_backdoor_defense.objectives import Objective, Step, everywhere, is_first_process
from hf_backdoor_defense.pretrained import float32_reasons
from hf_backdoor_defense.targets import LINEAR, classification_head, input_embeddings

logger = logging.getLogger(__name__)

_MOST = 0.6  # share of all weights beyond which a random start leaves no model
_STILL = 1e-3  # largest d/r below which nothing has moved


@dataclass(kw_only=True, eq=False)
class D3(Objective):
    """Purify a trained classifier with a few hundred clean rows. Prefer `ULRL` for four classes or more.

    The training set *is* the clean set. SGD with momentum, no weight decay, `max_grad_norm=0`.

    Args:
        lam: weight of the hinge.
        eps: clean loss that is low enough, in nats.
        hinge: "sample" per row (the code), "batch" on the mean (the paper).
        rescale: divide by lam + 1 where lam > 1.
        warm_up: "random" direction, "noise" of the weight's own deviation, "far" (−W0), "near" (none).
        targets: "head", "all-linear" (without patch embedding and tied output), or names of modules, `*` allowed.

    >>> D3(lam=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: d3: `lam` must be finite and >= 0, got -1.0: it weighs the clean loss. Use 5.0.
    """

    name = "d3"
    paper = "2411.09585"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official_code": {
            "lam": 0.5, "eps": 0.1, "hinge": "sample", "rescale": True, "warm_up": "random", "targets": "head",
        },
        "paper": {"lam": 10.0, "eps": 0.1, "hinge": "batch", "rescale": False, "targets": "head"},  # as summaries have it
    }  # fmt: skip

    lam: float = 5.0
    eps: float = 0.1
    hinge: Literal["sample", "batch"] = "sample"
    rescale: bool = True
    warm_up: Literal["random", "noise", "far", "near"] = "noise"
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._names: list[str] = []
        self._reference: dict[str, Tensor] = {}
        self._ended = False  # then W0 is saved no more: poisoned weights are not handed on with the purified ones
        self._radius = torch.zeros(0)
        self._distance = torch.zeros(0)  # as of the last update
        self._active: tuple[Tensor | int, int] = (0, 0)  # rows with a loss above eps, rows
        self._is_whole = True  # whether these are of all processes
        self._pulled = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "D3":
        """As `Objective.from_dict`; the preset "paper" must be given a `warm_up`, since the paper's is not known."""
        if values.get("preset") == "paper" and "warm_up" not in values:
            raise ValueError(
                "d3: the preset `paper` needs `warm_up` (random, noise, far or near), got none: how the paper starts is not "
                "known. For a head set warm_up='random'."
            )
        return super().from_dict(values)

    def field_reasons(self) -> list[str]:
        """A weight and a bound that are ones."""
        reasons = []
        if not (math.isfinite(self.lam) and self.lam >= 0):
            reasons.append(f"`lam` must be finite and >= 0, got {self.lam}: it weighs the clean loss. Use 5.0.")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            reasons.append(f"`eps` must be finite and >= 0, got {self.eps}: it is a loss in nats. Use 0.1.")
        if not self.targets:
            reasons.append("`targets` is empty: nothing would be moved. Use 'head', 'all-linear', or name modules.")
        return reasons

    # -- hosting ------------------------------------------------------------------------------------------------------
    def check(self, trainer: Any) -> list[str]:
        """Weights that exist, can move, and are not held back by something else."""
        model, args = unwrapped(trainer.model), trainer.args
        reasons = []
        try:
            selected = select_weights(model, self.targets)
        except ValueError as error:
            selected, reasons = {}, [str(error)]
        reasons += self._weight_reasons(model, selected)
        groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
        if decay := max([args.weight_decay, *(group.get("weight_decay", 0.0) for group in groups)]):
            reasons.append(
                f"weight_decay is {decay:g}: the projection holds the norms fixed, decay fights it. Set weight_decay=0."
            )
        if args.load_best_model_at_end:
            reasons.append(
                "load_best_model_at_end keeps the checkpoint of lowest clean loss, which is the least moved one. Set it to False."
            )
        state = getattr(trainer.accelerator, "state", None)
        if getattr(state, "deepspeed_plugin", None) is not None:
            reasons.append(
                "DeepSpeed steps inside backward, before the distance is added, and its own copies overwrite the projection. "
                "Use DDP or FSDP2."
            )
        if getattr(getattr(state, "fsdp_plugin", None), "cpu_ram_efficient_loading", False):
            reasons.append(
                "fsdp_cpu_ram_efficient_loading leaves ranks without weights, and every rank needs the start. Set it to False."
            )
        moved = sum(weight.numel() for weight in selected.values())
        total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        if self.warm_up == "random" and self.targets != "head" and moved > _MOST * total:
            reasons.append(
                f"warm_up='random' with targets={self.targets!r} throws the model away ({moved:,} of {total:,} weights). Use "
                "warm_up='noise', or targets='head'."
            )
        if self.hinge == "batch" and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
            reasons.append(
                f"hinge='batch' with {args.gradient_accumulation_steps} accumulation steps and {args.world_size} processes: a "
                "hinge on the batch mean is not additive; use hinge='sample', or one batch per update."
            )
        if not reasons:
            self._warn(trainer)
        return reasons

    def _weight_reasons(self, model: nn.Module, selected: Mapping[str, Tensor]) -> list[str]:
        reasons = []
        quantized = (
            float32_reasons(model) if getattr(getattr(model, "config", None), "quantization_config", None) else []
        )
        reasons += quantized
        if adapters := [name for name in selected if ".lora_" in name or "lora_embedding" in name]:
            reasons.append(
                f"{adapters[0]} belongs to an adapter: merge first (model.merge_and_unload()); distance must start from the "
                "merged weight."
            )
        if frozen := [name for name, weight in selected.items() if not weight.requires_grad]:
            how = "Merge the adapter first, or unfreeze" if hasattr(model, "peft_config") else "Unfreeze"
            reasons.append(
                f"{len(frozen)} selected weights are frozen ({frozen[0]}): they cannot move. {how} "
                "them, requires_grad_(True), or select others by `targets`."
            )
        embeddings = input_embeddings(model)
        if shared := [name for name, weight in selected.items() if weight is embeddings]:
            reasons.append(
                f"{shared[0]} is tied to the input embeddings: moving it moves every word. Leave it out of `targets`."
            )
        if not quantized and (
            coarse := {w.dtype for w in selected.values() if w.dtype not in (torch.float32, torch.float64)}
        ):
            kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in coarse))
            reasons.append(
                f"selected weights are {kinds}: factors within 2^-9 of 1 round away there. Load with dtype=float32 (bf16=True in "
                "the arguments, which computes in bf16, is fine)."
            )
        return reasons

    def _warn(self, trainer: Any) -> None:
        args = trainer.args
        if self.warm_up == "near":
            logger.warning("d3: warm_up='near' starts where the distance has no gradient, and may move nothing.")
        if "adam" in str(args.optim).lower() and getattr(trainer, "optimizer_cls_and_kwargs", None) is None:
            logger.warning(
                "d3: %s scales every gradient by its own size, so that `lam` loses its meaning. Use SGD: "
                "optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': …, 'momentum': 0.9}), or purify().", args.optim,
            )  # fmt: skip
        if args.max_grad_norm:
            logger.warning("d3: max_grad_norm=%g clips the hinge, not the distance. Set it to 0.", args.max_grad_norm)

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Select; on a fresh start keep W0 and its norms, and warm up."""
        model = unwrapped(trainer.model)
        selected = select_weights(model, self.targets)
        self._ended = False
        # At the level that is shown without being asked for: what is moved decides what is cleaned.
        logger.warning("d3: %d weights are moved: %s", len(selected), _shown(selected))
        if checkpoint is not None:
            device = next(iter(selected.values())).device
            self._reference = {name: value.to(device) for name, value in self._reference.items()}
            self._radius = self._radius.to(device)
            return
        self._names = list(selected)
        self._reference = {name: _snapshot(weight.detach()) for name, weight in selected.items()}
        self._radius = torch.stack([torch.linalg.vector_norm(w.detach()) for w in selected.values()])
        self._distance = torch.zeros_like(self._radius)
        self._active, self._pulled = (0, 0), 0
        with torch.no_grad():
            for index, weight in enumerate(selected.values()):
                generator = torch.Generator().manual_seed(trainer.args.seed + index)
                weight.copy_(_warmed_up(weight.cpu(), self.warm_up, generator))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Lay W0 out like the parameters (FSDP2). Of what a checkpoint counted, the first process goes on with the sum."""
        if not is_first_process():
            self._active = (0, 0)
        self._is_whole = False
        for name, weight in self._selected(model).items():
            reference = self._reference[name]
            if hasattr(weight, "device_mesh") and not hasattr(reference, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                whole = reference.to(weight.device_mesh.device_type)
                self._reference[name] = distribute_tensor(whole, weight.device_mesh, weight.placements)  # type: ignore[arg-type]
            else:
                self._reference[name] = reference.to(weight.device)
        self._radius = self._radius.to(next(iter(self._reference.values())).device)

    def _selected(self, model: nn.Module) -> dict[str, Tensor]:
        inside = dict(unwrapped(model).named_parameters())
        return {name: inside[name] for name in self._names}

    def loss(self, step: Step) -> Tensor:
        """c_h · relu(CE − eps), gated by the batch's mean or row by row."""
        over = super().loss(step) - self.eps
        values = over * (over.mean() > 0) if self.hinge == "batch" else over.clamp(min=0)
        if len(over):  # a process may have none in an epoch's last batch
            active = (over > 0).sum()
            step.log("d3/hinge_active", active / len(over))
            self._active = (self._active[0] + active, self._active[1] + len(over))
        return self._coefficients()[0] * values

    def _coefficients(self) -> tuple[float, float]:
        divisor = self.lam + 1 if self.rescale and self.lam > 1 else 1.0
        return self.lam / divisor, 1 / divisor

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """None in the graph; how far the weights are, for the log."""
        if len(self._distance):
            step.log("d3/distance", (self._distance / self._radius.clamp(min=1e-30)).mean(), latest=True)
        return {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The gradient of the distance, once per update."""
        selected = self._selected(model)
        self._distance = pull_away_(list(selected.values()), list(self._reference.values()), self._coefficients()[1])
        self._pulled += 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Back onto the spheres."""
        project_([w.detach() for w in self._selected(model).values()], self._radius)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """How far the weights came."""
        self._distance = distances([w.detach() for w in self._selected(model).values()], list(self._reference.values()))
        self._active, self._ended, self._is_whole = self._active_everywhere(), True, True
        if self.inert():
            logger.warning("d3: %s.", self.inert())

    def _active_everywhere(self) -> tuple[int, int]:
        """`_active`, summed over processes; call it on all of them."""
        here = (int(self._active[0]), self._active[1])
        totals, counts = zip(*([here] if self._is_whole else everywhere(here)), strict=True)
        return sum(totals), sum(counts)

    # -- reporting ----------------------------------------------------------------------------------------------------
    def _ratios(self) -> list[float]:
        return (self._distance / self._radius.clamp(min=1e-30)).tolist() if len(self._distance) else []

    def activity(self) -> dict[str, float]:
        """`d3_distance_mean`, `d3_distance_max`: d/r, in [0, 2]; `d3_hinge_active`: share of rows with a loss above eps."""
        ratios, (total, count) = self._ratios(), self._active
        return {
            "d3_distance_mean": sum(ratios) / len(ratios) if ratios else 0.0,
            "d3_distance_max": max(ratios, default=0.0),
            "d3_hinge_active": int(total) / count if count else 0.0,
            "d3_updates": float(self._pulled),
        }

    def evidence(self) -> dict[str, Any]:
        """Distances layer by layer."""
        rows = zip(self._names, self._radius.tolist(), self._distance.tolist(), self._ratios(), strict=True)
        return {"layers": [{"name": n, "radius": r, "distance": d, "ratio": q} for n, r, d, q in rows]}

    def inert(self) -> str | None:
        """Or: the weights are where they were."""
        if not self._pulled:
            return "no update was pushed away from the old weights"
        if max(self._ratios(), default=0.0) < _STILL:
            return "the selected weights are where they were: the warm-up did not move them. Use warm_up='noise' or 'random'"
        return None

    def state_dict(self) -> dict[str, Any]:
        """As the base says. W0 is put together weight by weight, and kept by the process that writes: none holds it all."""
        kept = {} if self._ended else {f"W0.{name}": _written(weight) for name, weight in self._reference.items()}
        return {
            **kept,
            "names": self._names, "radius": self._radius.tolist(), "distance": self._distance.tolist(),
            "active": list(self._active_everywhere()), "pulled": self._pulled,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names = list(state["names"])
        self._reference = {name: state[f"W0.{name}"] for name in self._names if f"W0.{name}" in state}
        self._radius, self._distance = torch.tensor(state["radius"]), torch.tensor(state["distance"])
        self._active, self._is_whole = (int(state["active"][0]), int(state["active"][1])), True
        self._pulled = int(state["pulled"])


def select_weights(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights that D3 moves, by name, in the model's order: of Linear, Conv2d and GPT-2's Conv1D, never a bias, an embedding
    of words or a norm; with "all-linear" neither the embedding of patches nor an output that is tied to the embeddings.

    Args:
        targets: "head" (the first of `classifier`, `score`, `classification_head`), "all-linear", or one or several names of
            modules: what lies beneath counts too, and `*` stands for anything.

    Raises:
        ValueError: nothing matches.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> list(select_weights(BertForSequenceClassification(config), "head"))
    ['classifier.weight']
    """
    embeddings = input_embeddings(model)
    found: dict[str, nn.Parameter] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    head = classification_head(model)
    if targets == "head":
        patterns = [] if head is None else [head[0]]
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
    for name, module in layers.items():
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        if targets == "all-linear":
            chosen = (
                weight is not embeddings
                and not isinstance(module, nn.Conv2d | nn.Embedding)
                and "original_module" not in name
            ) or (isinstance(module, nn.Conv2d) and "embedding" not in name)
        else:
            chosen = any(fnmatch.fnmatchcase(name, q) for p in patterns for q in (p, f"{p}.*"))
        if chosen and all(weight is not other for other in found.values()):  # shared by two modules: it moves once
            found[f"{name}.weight"] = weight
    if not found:
        raise ValueError(
            f"no weight matches `targets`={targets!r} (Linear and Conv modules here: {_shown(layers)}). Name some "
            "of these."
        )
    return found


def _shown(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f", … and {len(listed) - 6} more" if len(listed) > 6 else "") or "none"


def _snapshot(weight: Tensor) -> Tensor:
    """A copy, in bfloat16 where that loses nothing: weights of a bfloat16 checkpoint, which float32 only made longer."""
    short = weight.to(torch.bfloat16)
    return short if torch.equal(short.to(weight.dtype), weight) else weight.clone()


def _written(weight: Any) -> Tensor:
    """The whole of a weight on the process that writes; of shards, nothing on the others."""
    if not hasattr(weight, "full_tensor"):
        return weight  # type: ignore[no-any-return]
    whole: Tensor = weight.full_tensor()
    return whole.cpu() if is_first_process() else whole.new_zeros(0)


def _warmed_up(weight: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Where a weight starts."""
    if how == "random":
        direction = torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 0.5
        return direction * (torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(direction))
    if how == "noise":
        return weight + torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.std()
    return -weight if how == "far" else weight
