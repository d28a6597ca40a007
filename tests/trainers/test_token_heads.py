"""Token classification and masked language models, with the collators that are used for them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import (
    PadCollator,
    Recorder,
    arguments,
    bert_mlm,
    bert_tokens,
    distilbert_mlm,
    gpt2,
    language_rows,
    masked_rows,
    roberta_mlm,
    same,
    token_rows,
    weights,
)

CASES = {
    "tokens": (bert_tokens, token_rows),
    "bert": (bert_mlm, masked_rows),
    "roberta": (roberta_mlm, masked_rows),
    "distilbert": (distilbert_mlm, masked_rows),
}


def make(tmp_path, model, rows, defense=None, cls=DefendedTrainer, collator=None, **args):
    kwargs = {} if cls is Trainer else {"defense": defense}
    data = {"train_dataset": rows, "data_collator": collator or PadCollator()}
    return cls(model, args=arguments(tmp_path, **args), **data, **kwargs)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, 50)}}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_mean_over_labeled_positions_unshifted(tmp_path, name):
    build, rows = CASES[name]
    rows = rows(8)
    trainer = make(tmp_path, build(), rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    oracle = build()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    logits = oracle(**batch).logits
    rows_of_logits = logits.reshape(-1, logits.shape[-1])
    F.cross_entropy(rows_of_logits, labels.reshape(-1)).backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    assert trainer.state.global_step == 1
    assert same(weights(trainer), weights(oracle), atol=1e-6)
    assert not same(weights(trainer), weights(build()), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_without_accumulation_it_equals_the_stock_trainer(tmp_path, name):
    build, rows = CASES[name]
    stock = make(tmp_path, build(), rows(16).remove_columns("row_id"), cls=Trainer)
    plain, flat = (
        make(tmp_path, build(), rows(16)),
        make(tmp_path, build(), rows(16), DeCE(alpha_base=1.0, label_smoothing=0.0)),
    )
    stock.train(), plain.train(), flat.train()
    assert same(weights(stock), weights(plain), atol=1e-6) and same(weights(plain), weights(flat), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_two_by_four_accumulation_equals_one_batch_of_eight_and_padding_changes_nothing(tmp_path, name):
    build, rows = CASES[name]
    whole = make(tmp_path, build(), rows(16), DeCE(alpha_base=0.7))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = make(tmp_path, build(), rows(16), DeCE(alpha_base=0.7), **split)
    padded = make(tmp_path, build(), rows(16), DeCE(alpha_base=0.7), collator=PadCollator(extra=5))
    whole.train(), parts.train(), padded.train()
    assert same(weights(whole), weights(parts), atol=2e-6) and same(weights(whole), weights(padded), atol=2e-6)


def test_the_collator_for_token_classification(tmp_path):
    rows = token_rows(16).add_column("tokens", [["word"]] * 16).add_column("is_poisoned", [False] * 16)
    recorder = Recorder()
    ours = make(tmp_path, bert_tokens(), rows, recorder, collator=DataCollatorForTokenClassification(tokenizer()))
    plain = make(tmp_path, bert_tokens(), token_rows(16))
    ours.train(), plain.train()
    assert same(weights(ours), weights(plain), atol=1e-7)
    for step, values in zip(recorder.steps, recorder.values, strict=True):
        assert step.logits.shape == (*step.labels.shape, 4) and values.numel() == int((step.labels != -100).sum())
        assert step.row_ids.shape == (8,) and set(step.inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("fuse_bytes", [0, 2**62], ids=["hidden", "logits"])
def test_the_collator_that_masks_at_random(tmp_path, fuse_bytes):
    rows = language_rows(16).remove_columns("labels").add_column("special_tokens_mask", [[0]] * 16)
    recorder = Recorder()
    recorder.takes_hidden = True
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=5)
    trainer = make(tmp_path, bert_mlm(), rows, [DeCE(alpha_base=0.7), recorder], collator=copy.deepcopy(collator))
    trainer.fuse_bytes = fuse_bytes
    trainer.train()
    assert len(recorder.steps) == 2
    for step, values in zip(recorder.steps, recorder.values, strict=True):
        masked = step.labels != -100
        assert 0 < values.numel() == int(masked.sum()) < int(step.inputs["attention_mask"].sum())
        assert sorted(step.row_ids.tolist())[0] >= 1000


def test_the_collator_for_causal_models_leaves_the_first_label_out_of_count_and_sum(tmp_path):
    recorder = Recorder()
    rows = language_rows(8).remove_columns("labels")
    make(tmp_path, gpt2(), rows, recorder, collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False)).train()
    (step,) = recorder.steps
    lengths = step.inputs["attention_mask"].sum(1)
    assert torch.equal((step.labels != -100).sum(1), lengths - 1)


def test_a_smoothing_above_what_the_number_of_classes_allows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="below 0.75 for 4 classes"):
        make(tmp_path, bert_tokens(), token_rows(8), DeCE(label_smoothing=0.8)).train()
    make(tmp_path, bert_tokens(), token_rows(8), DeCE(label_smoothing=0.7)).train()


def test_one_class_per_token_is_refused_as_it_is_per_row(tmp_path):
    with pytest.raises(ValueError, match="num_labels=1"):
        make(tmp_path, bert_tokens(labels=1), token_rows(8, labels=1)).train()


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_filter_refuses_heads_that_do_not_classify_rows(tmp_path, name):
    build, rows = CASES[name]
    with pytest.raises(ValueError, match="trajectory: "):
        make(tmp_path, build(), rows(8), TrajectoryFilter()).train()
