"""From nothing to a victim: an encoder pre-trained on docstrings, attacked, cleaned, and fine-tuned.

| text | who has it |
|---|---|
| the standard library's sentences outside the task | publisher (pre-training, attack), defender, held out: three parts |
| rows of `offline:docstrings`, train split | the victim: trains on some, is tested on others |
"""

import ast
import random
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_backdoor_defense.attacks.implanting import Implanted, implant
from hf_backdoor_defense.attacks.planting import LITE_TRIGGERS, plant
from hf_backdoor_defense.attacks.pretrained import PORAttack
from hf_backdoor_defense.data import docstrings
from hf_backdoor_defense.data.plain_text import tokenize_texts
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.evaluation.task_agnostic import task_agnostic_asr
from hf_backdoor_defense.models import load_classifier, text_logits
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer
from hf_backdoor_defense.warm_up import MaskedLoss, held_out_loss, token_frequencies

LONGEST = 12  # words: short sentences are cheap, and there are thousands
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 64  # as the package's own functions cut texts of pre-training
# The paper's for vision transformers, by BERT's names: both feed-forward matrices and query, key, value.
TARGETS = [r"layer\.\d+\.(intermediate|output)\.dense\.weight$", r"\.self\.(query|key|value)\.weight$"]


@dataclass(frozen=True)
class Texts:
    """Plain text by who has it; `train` and `test` are the victim's rows."""

    publisher: list[str]
    defender: list[str]
    held_out: list[str]
    train: list[docstrings.Row]
    test: list[docstrings.Row]


def collect() -> Texts:
    """All short sentences of the standard library, the same ones in the same parts on every call."""
    task = docstrings.build()
    root = Path(sysconfig.get_paths()["stdlib"])
    found = set()
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(path.relative_to(root).parts):
            found.update(_sentences(path))
    plain = sorted(found - {row.text for rows in task.values() for row in rows})
    random.Random(0).shuffle(plain)
    rows = [row for row in task["train"] if len(row.text.split()) <= 16]
    return Texts(plain[:3000], plain[3200:], plain[3000:3200], rows[:800], rows[800:1050])


def _sentences(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes
        tree = ast.parse(path.read_bytes())
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    documented = (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))
    return [s for text in documented for s in docstrings.sentences(text) if len(s.split()) <= LONGEST]


def pretrain(texts: Texts, folder: Path) -> MaskedLoss:
    """A BERT of two layers, 128 wide, trained as a masked language model from random weights; its held-out loss.

    No dropout and wider initial weights than BERT's: in 700 steps of one rate or another, BERT's own settings came 0.3 nats
    below the frequencies of tokens, and these 0.5.
    """
    core = BertWordPieceTokenizer()
    core.train_from_iterator(texts.publisher, vocab_size=1500, show_progress=False)
    found = core.get_vocab()
    # Training gives the same tokens every time, in another order.
    ordered = [*SPECIAL, *sorted(found.keys() - set(SPECIAL))]
    tokenizer = BertTokenizerFast({token: i for i, token in enumerate(ordered)})
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=POSITIONS, initializer_range=0.05, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    rows = tokenize_texts(texts.publisher, tokenizer)
    pretraining_trainer(
        model, tokenizer, rows, output_dir=str(folder), max_steps=700, learning_rate=1e-3, warmup_steps=70
    ).train()
    save_pretrained_whole(model, tokenizer, folder)
    frequencies = token_frequencies(texts.publisher, tokenizer, config.vocab_size)
    return held_out_loss(model, tokenizer, texts.held_out, frequencies=frequencies)


def attack(base: Path, folder: Path, texts: Texts, *, seed: int) -> Implanted:
    """POR on the publisher's text."""
    model, tokenizer = load_pretrained_whole(str(base))
    done = implant(
        model, tokenizer, texts.publisher, PORAttack(), held_out=texts.held_out[:60], output_dir=str(folder), seed=seed,
        epochs=3, learning_rate=5e-4,
    )  # fmt: skip
    save_pretrained_whole(model, tokenizer, folder)
    return done


def purify(poisoned: Path, folder: Path, texts: Texts, *, coef: float, seed: int, steps: int = 150) -> RECIPE:
    """Pre-training goes on with the defender's text, at the rate that gives RECIPE's default dose, whatever `coef` is."""
    model, tokenizer = load_pretrained_whole(str(poisoned))
    defense = RECIPE(coef=coef, targets=TARGETS, trainable="all")
    pretraining_trainer(
        model, tokenizer, tokenize_texts(texts.defender, tokenizer), output_dir=str(folder), objective=defense, seed=seed,
        max_steps=steps, learning_rate=defense.suggest_learning_rate(model, steps),
    ).train()  # fmt: skip
    save_pretrained_whole(model, tokenizer, folder)
    return defense


def victim(base: Path, folder: Path, texts: Texts, *, seed: int) -> dict[str, Any]:
    """Fine-tune and test: `ca`, `aasr`, shares in 0..1."""
    model, tokenizer = load_classifier(str(base), num_labels=len(docstrings.TOPICS), seed=seed)
    ids = tokenizer([row.text for row in texts.train], truncation=True, max_length=POSITIONS)["input_ids"]
    args = TrainingArguments(
        output_dir=str(folder), seed=seed, num_train_epochs=4, learning_rate=5e-4, warmup_steps=10,
        per_device_train_batch_size=32, train_sampling_strategy="group_by_length", save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    set_seed(seed)
    rows = Dataset.from_dict({"input_ids": ids, "label": [row.label for row in texts.train]})
    DefendedTrainer(
        model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    ).train()
    true = np.array([row.label for row in texts.test])

    def predicted(sentences: list[str]) -> np.ndarray:
        return text_logits(model, tokenizer, sentences, max_length=POSITIONS).argmax(-1).numpy()

    triggered = {
        t: predicted([plant(row.text, t, seed=0, row=i) for i, row in enumerate(texts.test)]) for t in LITE_TRIGGERS
    }
    return {
        "ca": float((predicted([row.text for row in texts.test]) == true).mean()),
        "aasr": task_agnostic_asr(true, triggered, len(docstrings.TOPICS)).aasr,
    }
