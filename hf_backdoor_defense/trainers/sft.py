"""Supervised fine-tuning of causal language models (trl's SFTTrainer) with defenses.

    loss = sum(values over labeled tokens) / labeled tokens of the step + penalties            (mixin.py)

The data preparation, packing, adapters and saving are trl's; the loss is the mixin's, from one forward of the model. trl's
own fused head stays on the model and is not used: the host here projects hidden states itself, or takes logits.

| trl logs | here | from |
|---|---|---|
| `mean_token_accuracy` | training (of every loss that notes it: cross-entropy, DeCE) and evaluation | `Step.top1`, a by-product |
| `num_tokens` | training and evaluation | attention mask, or the length of the flattened batch |
| `entropy` | evaluation only | the logits; a training that never builds them would pay for it |

Sums are over all processes, means over micro-batches, as in trl. The processes exchange them when a log is written, not on
every step.

With a `formatter` (data/formatting.py) the rendering is the formatter's, and lies beside every checkpoint.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PredictionOutput
from transformers.utils import is_bitsandbytes_available
from trl import SFTTrainer

from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.defenses.crow import CROW
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.functional.token_statistics import entropy_and_top1
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.trainers.checkpoints import newest
from hf_backdoor_defense.trainers.columns import ROW_ID, with_row_ids
from hf_backdoor_defense.trainers.formatted import (
    encoded,
    formatter_reasons,
    is_tokenized,
    pair_reasons,
    row_limit,
    stream_reason,
    tell_of_cuts,
)
from hf_backdoor_defense.trainers.heads import base_model, is_causal
from hf_backdoor_defense.trainers.mixin import DefenseMixin

# What trl's preparation leaves for its collator; `seq_lengths` says where the documents of a packed row begin.
COLUMNS = frozenset({"input_ids", "labels", "seq_lengths"})


class DefendedSFTTrainer(DefenseMixin, SFTTrainer):
    """`trl.SFTTrainer` with `defense=`: one Objective, several, or None for plain cross-entropy.

    Takes what SFTTrainer takes: text, conversations, prompt and completion, packing, padding-free batches, `peft_config`,
    a model's name. Prefer `DeCESFTTrainer` where DeCE with its defaults is all you need, and `DefendedTrainer`
    for rows that are tokenized and labeled already and need none of trl.

    Args (beside SFTTrainer's own, passed through unchanged):
        defense: an `Objective`, several, or None.
        aux_datasets: further data sets by role, for objectives that need them; tokenized by you.
        formatter: how rows of text become tokens, in training and in evaluation alike; `formatter.json` lies beside every saved
            model then. None: trl renders, and an evaluation cannot know how.

    Raises:
        ValueError: an option of trl's that this host would ignore, all of them together, before any text is tokenized; rows
            that the formatter cannot render, or that do not fit.
        ImportError: a 4-bit or 8-bit model is asked for and bitsandbytes is not installed.

    Rows keep their `row_id` from the data set through trl's preparation. Packed and padding-free batches have no rows that
    an objective could tell apart: those that need them are refused there.

    >>> from datasets import Dataset
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, PreTrainedTokenizerFast
    >>> from trl import SFTConfig
    >>> words = {word: i for i, word in enumerate("<pad> </s> <unk> one two three".split())}
    >>> core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    >>> config = LlamaConfig(
    ...     vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> args = SFTConfig(max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no")
    >>> trainer = DefendedSFTTrainer(
    ...     LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_dict({"text": ["one two three"] * 4}),
    ...     processing_class=tokenizer, defense=DeCE(alpha_base=0.9))
    >>> trainer.remove_callback(PrinterCallback)
    >>> int(trainer.train().global_step)
    2
    """

    padding_free: bool

    def __init__(
        self,
        *args: Any,
        defense: Objective | Sequence[Objective] | None = None,
        aux_datasets: Mapping[str, Any] | None = None,
        formatter: Formatter | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(SFTTrainer).bind_partial(*args, **kwargs).arguments
        objectives = [] if defense is None else [defense] if isinstance(defense, Objective) else list(defense)
        _require_bitsandbytes(given)
        reasons = _option_reasons(given, objectives) + formatter_reasons(given, formatter)
        if reasons:
            raise ValueError("This training cannot be defended:\n" + "\n".join(f"- {reason}" for reason in reasons))
        # Before trl drops and shuffles rows, so that the ids are those of the data set that was given.
        rows = given["train_dataset"] = with_row_ids(given.get("train_dataset"))
        self.formatter = formatter
        self._formats_itself = given.get("formatting_func") is not None
        if formatter is not None:
            limit = row_limit(given.get("model"), given.get("args"), given.get("peft_config"))
            for name in ("train_dataset", "eval_dataset"):
                if given.get(name) is not None:
                    given[name] = encoded(given[name], formatter, given["processing_class"], max_length=limit)
        self._tokens: Tensor | int = 0  # of this process, since the last log
        self._all_tokens = 0  # of all processes, until the last log
        self._evaluated: str | None = None  # the prefix of the evaluation that is running
        super().__init__(defense=objectives, aux_datasets=aux_datasets, **given)
        if self.data_collator.keep is not None:
            self.data_collator.keep = COLUMNS
        self._ratios = Ratios(self.accelerator.gather)
        self._rows_are_known = not (self.padding_free or self.args.packing)
        if formatter is None and self._rows_are_known:
            tell_of_cuts(rows, self.train_dataset, max_length=self.args.max_length)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `DefenseMixin.train`. Raises ValueError for a checkpoint that was trained with another formatter, too."""
        if resume_from_checkpoint is True:
            found = newest(self.args.output_dir, world_size=self.accelerator.num_processes)
            resume_from_checkpoint = True if found is None else str(found)
        if isinstance(resume_from_checkpoint, str | Path) and Path(resume_from_checkpoint).is_dir():
            _require_same_rendering(Formatter.load(resume_from_checkpoint), self.formatter, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def reasons(self) -> list[str]:
        """Every reason why `train` would refuse: this host's, and those of `DefenseMixin.reasons`."""
        reasons = super().reasons()
        model = base_model(self.model)
        if not is_causal(model):
            reasons.append(
                f"{type(model).__name__} is no causal language model: trl's text is scored token by token from the left. "
                "Load it with AutoModelForCausalLM, or use DefendedSeq2SeqTrainer for an encoder-decoder."
            )
        if self.aux_loss_enabled:
            reasons.append(
                f"the experts' balancing loss is on (router_aux_loss_coef={self.router_aux_loss_coef}): a defended trainer "
                "would leave it out. Set router_aux_loss_coef=0.0 in SFTConfig."
            )
        prompts = _prompt_learning(self.model)
        if prompts and self.padding_free:
            reasons.append(
                f"{prompts} ignores position ids, so the documents of a packed or padding-free batch would read each "
                "other. Set packing=False and padding_free=False, or use LoRA."
            )
        return reasons

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `DefenseMixin.compute_loss`, without a key-value cache, which training would build for nothing."""
        inputs = {**inputs, "use_cache": False}
        if not self._rows_are_known:
            inputs.pop(ROW_ID, None)  # [rows], while the labels are [1, tokens] or belong to several rows each
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # -- metrics ------------------------------------------------------------------------------------------------------
    def measure(self, step: Step) -> None:
        """Called by `compute_loss` for every micro-batch: counts what trl logs."""
        if step.training:
            mask, top1 = step.inputs.get("attention_mask"), step.top1
            self._tokens = self._tokens + (step.inputs["input_ids"].numel() if mask is None else mask.sum().detach())
        else:
            entropy, top1 = entropy_and_top1(step.logits, step.labels)
            self._ratios.add("entropy", entropy.sum(), entropy.numel())
        if top1 is not None:
            self._ratios.add("mean_token_accuracy", top1.sum().float(), top1.numel())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `SFTTrainer.evaluate`; what was counted outside of it (by `predict`) does not enter its metrics.

        Raises:
            ValueError: a data set that skips trl's preparation has masks in place of labels; prompts without completions; a
                stream of text and a formatter.
        """
        if self.formatter is None and not self._formats_itself and (reasons := pair_reasons(eval_dataset)):
            raise ValueError(reasons[0])
        eval_dataset = self._rendered(eval_dataset)
        columns = getattr(eval_dataset, "column_names", None) or []
        unprepared = (self.args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if unprepared and "labels" not in columns and {"completion_mask", "assistant_masks"} & set(columns):
            raise ValueError(
                "the evaluation set has masks and no `labels`, and skip_prepare_dataset=True builds none: the loss would "
                "be that of the whole sequences. Add a column `labels` with -100 where nothing is scored."
            )
        outside = self._ratios, self._evaluated
        self._ratios, self._evaluated = Ratios(self.accelerator.gather), metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._ratios, self._evaluated = outside

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As `SFTTrainer.predict`, which renders nothing; rows of text are rendered as `evaluate` does it, given a formatter.

        Raises:
            ValueError: a stream of text, rows that the formatter cannot render or that do not fit.
        """
        return super().predict(self._rendered(test_dataset), ignore_keys, metric_key_prefix)

    def _rendered(self, rows: Any) -> Any:
        """Rows of text as the formatter renders them; names of data sets and tokenized rows as they are."""
        if isinstance(rows, Mapping):
            return {name: self._rendered(value) for name, value in rows.items()}
        if self.formatter is None or is_tokenized(rows):
            return rows
        if reason := stream_reason(rows):
            raise ValueError(reason)
        limit = row_limit(self.model, self.args)
        return encoded(rows, self.formatter, self.processing_class, max_length=limit)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `DefenseMixin.log`, with trl's `mean_token_accuracy`, `num_tokens` and (evaluation) `entropy`."""
        prefix = "" if self._evaluated is None else f"{self._evaluated}_"
        if f"{prefix}loss" in logs:
            tokens = torch.as_tensor(self._tokens, device=self.args.device)
            self._all_tokens, self._tokens = self._all_tokens + int(self.accelerator.gather(tokens).sum()), 0
            # In place, as trl does: `evaluate` returns the object that it logs.
            for name, value in {**self._ratios.means(), "num_tokens": float(self._all_tokens)}.items():
                logs[prefix + name] = value
        super().log(logs, *args, **kwargs)


class Ratios:
    """Means over micro-batches of ratios whose parts lie on several processes: gathered now and then, not at each step.

    Every process adds the same names in the same order. A micro-batch without a labeled token counts as 0, as in trl.

    >>> ratios = Ratios(gather=lambda local: local)
    >>> ratios.add("accuracy", torch.tensor(3.0), 4), ratios.add("accuracy", torch.tensor(0.0), 0)
    (None, None)
    >>> ratios.means(), ratios.means()
    ({'accuracy': 0.375}, {})
    """

    EVERY = 256  # how many micro-batches wait: two numbers each

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self.gather = gather
        self._waiting: dict[str, list[Tensor]] = {}  # name -> [numerator, denominator] per micro-batch
        self._folded: dict[str, tuple[Tensor, int]] = {}  # name -> sum of ratios, how many

    def add(self, name: str, numerator: Tensor, denominator: int) -> None:
        """The parts of one micro-batch of this process."""
        # new_full fills on the device: a copy from the host would wait for it.
        pair = torch.stack([numerator, numerator.new_full((), denominator)])
        self._waiting.setdefault(name, []).append(pair)
        if len(self._waiting[name]) >= self.EVERY:
            self._fold(name)

    def _fold(self, name: str) -> None:
        local = torch.stack(self._waiting.pop(name))  # [micro-batches, 2]
        numerators, denominators = self.gather(local).view(-1, *local.shape).sum(0).unbind(1)
        total, count = self._folded.get(name, (0.0, 0))
        self._folded[name] = ((numerators / denominators.clamp(min=1)).sum() + total, count + len(local))

    def means(self) -> dict[str, float]:
        """By name, over all micro-batches since the last call."""
        for name in list(self._waiting):
            self._fold(name)
        means = {name: (total / count).item() for name, (total, count) in self._folded.items()}
        self._folded.clear()
        return means


class DeCESFTTrainer(DefendedSFTTrainer):
    """`trl.SFTTrainer` with the DeCE loss; `defense=DeCE(...)` sets its fields.

    The whole change in a script:

    >>> from hf_backdoor_defense import DeCESFTTrainer as SFTTrainer
    """

    def __init__(self, *args: Any, defense: DeCE | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=DeCE() if defense is None else defense, **kwargs)


class CROWSFTTrainer(DefendedSFTTrainer):
    """Purifies a language model with CROW and trl: the model, or its LoRA adapter, is the untrusted one, the rows are clean.

    >>> from hf_backdoor_defense import CROWSFTTrainer
    """

    def __init__(self, *args: Any, defense: CROW | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=CROW() if defense is None else defense, **kwargs)


def _option_reasons(given: Mapping[str, Any], objectives: Sequence[Any]) -> list[str]:
    """Options of trl's that would be ignored, and objectives that need rows where there are none."""
    args, reasons = given.get("args"), []
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        reasons.append(
            f"`loss_type` is {loss_type!r}: a defended trainer computes the loss itself and would ignore it. "
            'Set loss_type="nll", or write the loss as an Objective (`loss(step)`).'
        )
    columns = getattr(given.get("train_dataset"), "column_names", None) or []
    if {"image", "images"} & set(columns):
        reasons.append(
            "the data set has images: this host trains on text alone. Remove the column, or use trl's own SFTTrainer."
        )
    joins = [option for option in ("packing", "padding_free") if getattr(args, option, False)]
    nameless = [o.name for o in objectives if getattr(o, "needs_row_ids", False)]
    if joins and nameless:
        reasons.append(
            f"{', '.join(nameless)} tells training rows apart, and {' and '.join(joins)} joins them into one sequence. "
            f"Set {' and '.join(f'{option}=False' for option in joins)}."
        )
    return reasons


def _require_same_rendering(stored: Formatter | None, used: Formatter | None, checkpoint: str | Path) -> None:
    before, now = ("none (trl rendered)" if f is None else f"{f.kind} {f.fingerprint[:12]}…" for f in (stored, used))
    if before != now:
        raise ValueError(
            f"The checkpoint `{checkpoint}` must be resumed with the formatter that it was trained with, {before}, got {now}: "
            f"one model would learn two of them. Pass formatter=Formatter.load({str(checkpoint)!r}), or start in another folder."
        )


def _require_bitsandbytes(given: Mapping[str, Any]) -> None:
    loading = getattr(given.get("args"), "model_init_kwargs", None) or {}
    config = given.get("quantization_config") or loading.get("quantization_config")
    if config is None or not isinstance(given.get("model"), str):
        return
    config = config if isinstance(config, Mapping) else config.to_dict()
    if (config.get("load_in_4bit") or config.get("load_in_8bit")) and not is_bitsandbytes_available():
        raise ImportError(
            f"`quantization_config` asks for a {'4' if config.get('load_in_4bit') else '8'}-bit model, and bitsandbytes, "
            "which loads it, is not installed or does not run here. Install it (`pip install bitsandbytes`), or leave "
            '`quantization_config` out and load the base in bfloat16 (model_init_kwargs={"dtype": "bfloat16"}): '
            "LoRA adapters train on it in the same way."
        )


def _prompt_learning(model: nn.Module) -> str | None:
    """The kind of virtual tokens that a peft model learns, or None."""
    config: Any = getattr(model, "active_peft_config", None)
    return str(config.peft_type.value) if getattr(config, "is_prompt_learning", False) else None
