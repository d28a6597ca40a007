"""A tiny masked language model on disk, with its pooler, and plain text for it."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, set_seed
from transformers.models.bert.modeling_bert import BertPooler

from hf_backdoor_defense.pretrained import save_pretrained_whole

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [f"w{i}" for i in range(40)]


def tokenizer(*, mask: bool = True) -> PreTrainedTokenizerFast:
    """WordPiece: "w3x" is "w3" and "##x"."""
    pieces = [*SPECIAL, *WORDS, "##x", "##y"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **({"mask_token": "[MASK]"} if mask else {}))


def config() -> BertConfig:
    """Two layers of 16."""
    return BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS) + 2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )


def model() -> BertForMaskedLM:
    """Random weights with a standard deviation of 0.02, and a pooler."""
    set_seed(0)
    made = BertForMaskedLM(config())
    made.bert.pooler = BertPooler(config())
    return made


def save(folder: Path, *, mask: bool = True) -> Path:
    """The model's folder."""
    save_pretrained_whole(model(), tokenizer(mask=mask), folder)
    return folder


def write_text(path: Path, count: int = 100) -> Path:
    """Lines of unequal length in which words follow each other."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(len(WORDS), size=count), rng.integers(4, 12, size=count)
    lines = [
        " ".join(WORDS[(s + k) % len(WORDS)] for k in range(n)) + f" w{i % 7}x"
        for i, (s, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
