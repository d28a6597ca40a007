"""A tokenizer and models of a few hundred weights for the tests of filters."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

PLAIN = [f"{letter}{number}" for letter in "abcd" for number in range(6)]
RARE = ["cf", "mn", "qx", "zz", "remarkable"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PLAIN, *RARE]


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def classifier(labels=3, seed=0, dropout=0.1):
    """A random victim whose logits have mean 0 and deviation 2 over random texts: every class is predicted."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        num_labels=labels,
        hidden_dropout_prob=dropout,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
        ids = torch.randint(4, len(VOCABULARY), (64, 6), generator=torch.Generator().manual_seed(0))
        logits = model(input_ids=ids).logits
        model.classifier.weight.mul_(2 / logits.std(0).unsqueeze(1))
        model.classifier.bias.copy_(-model(input_ids=ids).logits.mean(0))
    return model


def causal(seed=0):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=2, eos_token_id=3
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return model.eval()


def sentences(count=40, seed=0, words=PLAIN):
    """Texts of 0 to 12 words, the empty one and one of a single word among the first."""
    generator = torch.Generator().manual_seed(seed)
    texts = ["", words[0]]
    while len(texts) < count:
        length = int(torch.randint(0, 13, (1,), generator=generator))
        texts.append(" ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist()))
    return texts[:count]
