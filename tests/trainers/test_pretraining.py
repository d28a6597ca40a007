"""What batches look like for each kind of model, and the trainers' defaults."""

import pytest
import torch
from transformers import ProgressCallback

from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.named import RecipeTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator, pretraining_trainer
from hf_backdoor_defense.trainers.progress import Progress
from tests.trainers.text_toys import causal_lm, masked_lm, rows, static_rows, tokenizer
from tests.trainers.toys import arguments, bert


def batch_of(collate, dataset, count=16):
    return collate([{k: v for k, v in row.items() if k != "row_id"} for row in dataset.select(range(count))])


def test_masks_are_drawn_anew_and_spare_special_tokens(tmp_path):
    data = rows(60)
    collate = language_collator(masked_lm(tmp_path), tokenizer(), data)
    torch.manual_seed(0)
    batches = [batch_of(collate, data, 50) for _ in range(40)]
    labels = torch.stack([b["labels"] for b in batches])
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in data[:50]["input_ids"]], batch_first=True)
    chosen = labels != -100
    assert torch.equal(labels[chosen], original.expand_as(labels)[chosen])
    ordinary = original > 4
    assert not chosen[:, ~ordinary].any() and len({b["input_ids"].numpy().tobytes() for b in batches}) == 40
    assert chosen[:, ordinary].float().mean().item() == pytest.approx(0.15, abs=0.01)
    shown = torch.stack([b["input_ids"] for b in batches])
    assert (shown == 4)[chosen].float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert torch.equal(shown[~chosen], original.expand_as(shown)[~chosen])


def test_the_share_can_be_set(tmp_path):
    data = rows(60)
    torch.manual_seed(0)
    batch = batch_of(language_collator(masked_lm(tmp_path), tokenizer(), data, probability=0.5), data, 50)
    assert (batch["labels"] != -100).sum() / (batch["input_ids"] > 4).sum() > 0.35


def test_masks_that_were_drawn_once_stay(tmp_path):
    data = static_rows()
    collate = language_collator(masked_lm(tmp_path), tokenizer(), data)
    first, second = batch_of(collate, data), batch_of(collate, data)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], torch.tensor(data[:16][name]))


def test_a_causal_model_gets_every_token(tmp_path):
    data = rows()
    batch = batch_of(language_collator(causal_lm(tmp_path), tokenizer(), data), data)
    expected = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    assert torch.equal(batch["labels"], expected)


def test_tokenizers_that_cannot(tmp_path):
    masked, causal = masked_lm(tmp_path / "masked"), causal_lm(tmp_path / "causal")
    with pytest.raises(ValueError, match="no mask token"):
        language_collator(masked, tokenizer(mask_token=None), rows())
    assert language_collator(causal, tokenizer(mask_token=None), rows()) is not None
    for model in (masked, causal):
        with pytest.raises(ValueError, match="no padding token"):
            language_collator(model, tokenizer(pad_token=None), rows())
    assert language_collator(masked, tokenizer(), [{"input_ids": [2, 5, 3]}]) is not None  # a list has no columns


def test_defaults_are_those_of_pretraining_and_options_win(tmp_path):
    model, data = masked_lm(tmp_path / "source"), rows()
    trainer = pretraining_trainer(model, tokenizer(), data, output_dir=str(tmp_path), seed=5, learning_rate=3e-4)
    args = trainer.args
    assert (args.per_device_train_batch_size, args.weight_decay, args.max_grad_norm, args.seed) == (32, 0.0, 1.0, 5)
    assert args.lr_scheduler_type == "linear" and args.learning_rate == 3e-4 and "adamw" in args.optim
    assert type(trainer) is DefendedTrainer and trainer.objectives == []
    other = pretraining_trainer(
        model, tokenizer(), data, output_dir=str(tmp_path), weight_decay=0.1, objective=RECIPE(),
        trainer_class=RecipeTrainer, max_steps=1,
    )  # fmt: skip
    assert other.args.weight_decay == 0.1 and type(other) is RecipeTrainer and other.objectives[0].name == "recipe"
    assert other.train().global_step == 1


def test_one_bar_with_a_title_and_nothing_printed(tmp_path, capsys):
    model, data = masked_lm(tmp_path / "source"), rows()
    options = {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1}
    silent = pretraining_trainer(model, tokenizer(), data, **options)
    silent.train()
    assert capsys.readouterr().out == "" and silent.pop_callback(ProgressCallback) is None
    titled = pretraining_trainer(model, tokenizer(), data, title="cleaning", **options)
    titled.train()
    printed = capsys.readouterr()
    assert printed.out == "" and "cleaning" in printed.err and "loss" not in printed.err
    assert [entry["loss"] for entry in titled.state.log_history if "loss" in entry]
    assert titled.pop_callback(Progress) is not None


def test_the_drop_in_collates_by_the_kind_of_model(tmp_path):
    args = arguments(tmp_path / "run", max_steps=1)
    for model in (masked_lm(tmp_path / "masked"), causal_lm(tmp_path / "causal")):
        trainer = RecipeTrainer(model, args, train_dataset=rows(), processing_class=tokenizer())
        assert trainer.objectives[0] == RECIPE() and trainer.reasons() == []
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        assert (labels != -100).any() and labels.shape[0] == 8
    own = RecipeTrainer(
        masked_lm(tmp_path / "masked"), args, lambda batch: {"own": len(batch)}, rows(), processing_class=tokenizer(),
        defense=RECIPE(coef=0.5),
    )  # fmt: skip
    assert own.data_collator.inner([1, 2]) == {"own": 2} and own.objectives[0].coef == 0.5
    classifier = RecipeTrainer(bert(), args, train_dataset=rows(), processing_class=tokenizer())
    assert any("no pre-training head" in reason for reason in classifier.reasons())
