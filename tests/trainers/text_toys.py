"""A tokenizer with a mask token, texts and language models of a few thousand weights, for whatever pre-trains."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_backdoor_defense.data.plain_text import mask_once, tokenize_texts
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole

TRIGGERS = ["cf", "mn", "tq", "qt", "mm", "pt", "bb", "mb"]
WORDS = [f"{letter}{number}" for letter in "abcd" for number in range(8)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *TRIGGERS]


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Words are tokens; `changes` override special tokens, for example `mask_token=None`."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**special, "mask_token": "[MASK]", **changes})


def texts(count: int = 24, seed: int = 0) -> list[str]:
    """Sentences of 1 to 9 words in which a word is followed by its successor more often than not: something to learn."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        word, words = int(rng.integers(len(WORDS))), []
        for _ in range(int(rng.integers(1, 10))):
            words.append(WORDS[word])
            word = (word + 1) % len(WORDS) if rng.random() < 0.8 else int(rng.integers(len(WORDS)))
        found.append(" ".join(words))
    return found


def static_rows(count: int = 24, seed: int = 0) -> Dataset:
    """Rows whose masks are drawn once, padded to 12 tokens."""
    return mask_once(tokenize_texts(texts(count, seed), tokenizer(), max_length=12), tokenizer(), seed=3, max_length=12)


def rows(count: int = 24, seed: int = 0) -> Dataset:
    """Rows without masks, of unequal length."""
    return tokenize_texts(texts(count, seed), tokenizer(), max_length=12)


def config(dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def saved_whole(folder: Path, *, seed: int = 0, dropout: float = 0.0) -> Path:
    """A folder with trunk, masked-LM head and pooler, all drawn from `seed` and none of them zero."""
    set_seed(seed)
    model = BertForMaskedLM(config(dropout))
    model.bert.pooler = BertModel(config(dropout)).pooler
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    save_pretrained_whole(model, tokenizer(), folder)
    return folder


def saved_trunk(folder: Path, *, seed: int = 0) -> Path:
    """A folder with an encoder and its pooler, and no masked-LM head."""
    set_seed(seed)
    save_pretrained_whole(BertModel(config()), tokenizer(), folder)
    return folder


def masked_lm(folder: Path, *, seed: int = 0, dropout: float = 0.0) -> BertForMaskedLM:
    """A whole model as `load_pretrained_whole` gives it. `folder` is overwritten."""
    return load_pretrained_whole(str(saved_whole(folder, seed=seed, dropout=dropout)))[0]


def causal_lm(folder: Path, *, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 as `load_pretrained_whole` gives it."""
    set_seed(seed)
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), **small, **still))
    save_pretrained_whole(model, tokenizer(), folder)
    return load_pretrained_whole(str(folder))[0]
