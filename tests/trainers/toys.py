"""Small models, rows and objectives for the trainer tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    CohereConfig,
    CohereForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    set_seed,
)

from hf_backdoor_defense.objectives import Objective, Step


def bert(labels: int = 3, seed: int = 0, dropout: float = 0.0) -> BertForSequenceClassification:
    set_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def llama(seed: int = 0) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def deep_llama(seed: int = 0, layers: int = 4, tied: bool = False) -> LlamaForCausalLM:
    """Enough layers to compare neighbors, and embeddings of norm 4: a step of 0.1 is small beside them."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
        model.get_input_embeddings().weight.mul_(5)
    return model


_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _lively(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights and other biases than a new model has, so that a soft-cap or a forgotten bias shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Tied head, logits capped softly."""
    set_seed(seed)
    special = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0}
    return _lively(Gemma2ForCausalLM(Gemma2Config(**_SMALL, **special)))


def cohere(seed: int = 0) -> CohereForCausalLM:
    """Logits multiplied by a scale."""
    set_seed(seed)
    return _lively(
        CohereForCausalLM(
            CohereConfig(**_SMALL, num_key_value_heads=1, logit_scale=0.25, bos_token_id=1, eos_token_id=1)
        )
    )


def granite(seed: int = 0) -> GraniteForCausalLM:
    """Logits divided by a scale."""
    set_seed(seed)
    return _lively(GraniteForCausalLM(GraniteConfig(**_SMALL, num_key_value_heads=1, logits_scaling=3.0)))


def bert_mlm(seed: int = 0) -> BertForMaskedLM:
    set_seed(seed)
    return _lively(BertForMaskedLM(BertConfig(**_SMALL, **_STILL)))


def roberta_mlm(seed: int = 0) -> RobertaForMaskedLM:
    set_seed(seed)
    return _lively(RobertaForMaskedLM(RobertaConfig(**_SMALL, **_STILL)))


def distilbert_mlm(seed: int = 0) -> DistilBertForMaskedLM:
    set_seed(seed)
    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40, dropout=0.0
    )
    config.attention_dropout = 0.0
    return _lively(DistilBertForMaskedLM(config))


def bert_tokens(labels: int = 4, seed: int = 0) -> BertForTokenClassification:
    set_seed(seed)
    return BertForTokenClassification(BertConfig(**_SMALL, **_STILL, num_labels=labels))


def t5(seed: int = 0, tied: bool = True) -> T5ForConditionalGeneration:
    """Hidden states scaled before the head where it is tied."""
    set_seed(seed)
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    return T5ForConditionalGeneration(config)


def bart(seed: int = 0) -> BartForConditionalGeneration:
    """With a `final_logits_bias` other than zero."""
    set_seed(seed)
    config = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=40,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    model = _lively(BartForConditionalGeneration(config))
    model.final_logits_bias.normal_()
    return model


def classification_rows(count: int = 24, labels: int = 3, seed: int = 0) -> Dataset:
    """Rows of unequal length whose label is the first token modulo `labels`, learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = torch.randint(2, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "label": ids[0] % labels, "row_id": 1000 + i})
    return Dataset.from_list(rows)


def language_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Sequences of unequal length with unequal numbers of labeled tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = torch.randint(2, 50, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length - 1, (1,), generator=generator))
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "row_id": 1000 + i})
    return Dataset.from_list(rows)


def masked_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Sequences of unequal length, one to four of whose tokens carry a label."""
    rows = []
    for i, row in enumerate(language_rows(count, seed)):
        length, labeled = len(row["input_ids"]), 1 + i % 4
        labels = [row["input_ids"][t] if t % 3 == 0 and t // 3 < labeled else -100 for t in range(length)]
        rows.append({**row, "labels": labels})
    return Dataset.from_list(rows)


def token_rows(count: int = 16, labels: int = 4, seed: int = 0) -> Dataset:
    """One label per token (its id modulo `labels`), every third token without."""
    rows = []
    for row in language_rows(count, seed):
        ids = row["input_ids"]
        rows.append({**row, "labels": [-100 if t % 3 == 2 else token % labels for t, token in enumerate(ids)]})
    return Dataset.from_list(rows)


def translation_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Sources and targets of unequal lengths, which differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        source, target = torch.randint(3, 12, (2,), generator=generator).tolist()
        ids = torch.randint(2, 50, (source,), generator=generator).tolist()
        labels = [*torch.randint(2, 50, (target,), generator=generator).tolist(), 1]
        rows.append({"input_ids": ids, "attention_mask": [1] * source, "labels": labels, "row_id": 1000 + i})
    return Dataset.from_list(rows)


class PadCollator:
    """Pads ids with 0, attention with 0 and labels with -100, to the longest row plus `extra`."""

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {}
        for key in rows[0]:
            if key == "label":
                batch["labels"] = torch.tensor([row[key] for row in rows])
            else:
                width = max(len(row[key]) for row in rows) + self.extra
                batch[key] = torch.tensor([row[key] + [fill[key]] * (width - len(row[key])) for row in rows])
        return batch


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**{**values, **changes})


def weights(trainer_or_model: Any) -> dict[str, Tensor]:
    # A Llama has a `model` too: that is not all of it.
    model = trainer_or_model if isinstance(trainer_or_model, torch.nn.Module) else trainer_or_model.model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=atol, rtol=0) for k in a)


@dataclass(kw_only=True, eq=False)
class Recorder(Objective):
    """Only records what the host hands out."""

    name = "recorder"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps: list[Step] = []
        self.values: list[Tensor] = []
        self.prepared: list[str | None] = []

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        self.prepared.append(checkpoint)

    def observe(self, step: Step, values: Tensor) -> None:
        self.steps.append(step)
        self.values.append(values)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": len(self.values), "losses": torch.cat(self.values) if self.values else torch.zeros(0)}

    def load_state_dict(self, state: Any) -> None:
        self.loaded = dict(state)


@dataclass(kw_only=True, eq=False)
class WeightPull(Objective):
    """Penalty: strength times half the squared norm of all weights."""

    name = "weight_pull"
    strength: float = 0.5

    def penalties(self, step: Step) -> dict[str, Tensor]:
        total = sum((p.square().sum() for p in step.model.parameters()), torch.zeros(()))
        return {"norm": self.strength * total / 2}


@dataclass(kw_only=True, eq=False)
class Halved(Objective):
    """Replaces the loss by half of cross-entropy."""

    name = "halved"

    def loss(self, step: Step) -> Tensor:
        return super().loss(step) / 2


@dataclass(kw_only=True, eq=False)
class FromHidden(Objective):
    """Cross-entropy computed behind the model's back, from hidden states and the projection."""

    name = "from_hidden"
    takes_hidden = True

    def loss(self, step: Step) -> Tensor:
        assert step.logits is None and step.outputs is None
        return super().loss(step)
