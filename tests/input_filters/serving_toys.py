"""A word-level tokenizer, a three-class BERT and adapters with random weights: enough to serve."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.functional.thresholds import Calibration
from hf_backdoor_defense.input_filters.psim import PSIMFilter
from hf_backdoor_defense.models import weights_sha256

WORDS = [f"w{i}" for i in range(40)]


def tokenizer(words=WORDS, lowercase=True, side="right"):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, padding_side=side, **special)


def base(seed=0, labels=3, words=WORDS, dropout=0.1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        num_labels=labels,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        id2label={i: f"label {i}" for i in range(labels)},
    )
    return BertForSequenceClassification(config)


def adapted(model, strategy, seed=1, **fields):
    """A base with an adapter whose weights are no zeros: as if it had been trained."""
    torch.manual_seed(seed)
    wrapped = apply_strategy(model, strategy, **fields)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def psim(strategy="lora", flagged=0.3, max_length=12, model=None, seed=2):
    """A filter that flags about this share of the texts below: thresholds in between their scores."""
    model = base() if model is None else model
    sha256 = weights_sha256(model)
    found = PSIMFilter(adapted(model, strategy, seed), tokenizer(), base_sha256=sha256, max_length=12)
    scores = sorted(set(found.score(texts(200, seed=9))))
    upper, lower = (scores[round(q * (len(scores) - 1))] for q in (1 - flagged / 2, flagged / 2))
    found.calibration = Calibration(tail="both", upper=upper, lower=lower)
    found.max_length = max_length
    return found


def texts(count, seed=0, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]
