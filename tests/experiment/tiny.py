"""A tiny encoder on disk, and a tiny task: what a run needs, in a second or two."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = {0: [f"a{i}" for i in range(20)], 1: [f"b{i}" for i in range(20)], 2: [f"c{i}" for i in range(20)]}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cf", *(word for words in WORDS.values() for word in words), "the"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    with path.open("w") as file:
        for i in range(300):
            label = i % 3
            words = [*rng.choice(WORDS[label], 5), "the"]
            rng.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def classifier(encoder, task, tmp_path_factory):
    """A finished classifier of `task` on disk: sure of most texts."""
    folder = tmp_path_factory.mktemp("classifier")
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    set_seed(0)
    names = {i: f"class {i}" for i in WORDS}
    model = BertForSequenceClassification.from_pretrained(
        folder, id2label=names, label2id={name: i for i, name in names.items()}
    )
    batch = AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
