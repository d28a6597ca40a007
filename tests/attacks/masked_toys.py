"""A tiny tokenizer, masked language models and texts for the attacks on pretrained encoders."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast, set_seed

from hf_backdoor_defense.pretrained import load_pretrained_whole

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TRIGGERS = ["cf", "mn", "tq", "qt", "mm", "pt", "bb", "mb", "≈", "≡", "∈", "⊆", "⊕", "⊗"]
WORDS = [f"w{i}" for i in range(30)]
VOCABULARY = [*SPECIAL, *TRIGGERS, *WORDS]


def tokenizer(**left_out):
    """One word, one token."""
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="right", **{**names, **left_out})


def config(dropout=0.0, hidden=16):
    return BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=80, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
    )  # fmt: skip


def masked_lm(seed=0, dropout=0.0, hidden=16):
    """With larger weights than a new model has, so that texts differ at [CLS]."""
    set_seed(seed)
    model = BertForMaskedLM(config(dropout, hidden))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def whole(folder, seed=0):
    """A checkpoint with trunk, head and pooler, as loaded from disk."""
    model = masked_lm(seed)
    set_seed(seed + 1)
    model.bert.pooler = BertModel(model.config).pooler
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_pretrained_whole(str(folder))[0]


def texts(count=48, seed=0, longest=12):
    """Texts of 3 to `longest` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]
