"""Scores at labels only are those of the whole forward: values, gradients, rows, random numbers."""

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    set_seed,
)

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.labeled import LabeledOnly, at_labels, scores_by_position
from tests.trainers.text_toys import config
from tests.trainers.toys import (
    PadCollator,
    Recorder,
    arguments,
    bert,
    bert_mlm,
    classification_rows,
    distilbert_mlm,
    gpt2,
    language_rows,
    masked_rows,
    roberta_mlm,
    same,
    weights,
)

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def electra():
    set_seed(0)
    return ElectraForMaskedLM(ElectraConfig(embedding_size=8, **SMALL, **STILL))


def modern_bert():
    set_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**SMALL, **special, attn_implementation="eager"))


FAMILIES = {
    "bert": bert_mlm, "roberta": roberta_mlm, "distilbert": distilbert_mlm, "electra": electra, "modernbert": modern_bert,
}  # fmt: skip


def trained(folder, model, *, labeled_only, rows=None, defense=(), fuse_bytes=2**62, **changes):
    recorder = Recorder()
    trainer = DefendedTrainer(
        model,
        args=arguments(folder, **{"num_train_epochs": 2, **changes}),
        train_dataset=masked_rows() if rows is None else rows,
        data_collator=PadCollator(extra=1),
        defense=[*defense, recorder],
    )
    trainer.labeled_only, trainer.fuse_bytes = labeled_only, fuse_bytes
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_are_those_of_the_whole_forward(tmp_path, family):
    few, some = trained(tmp_path / "few", FAMILIES[family](), labeled_only=True)
    whole, all_of_it = trained(tmp_path / "whole", FAMILIES[family](), labeled_only=False)
    for a, b in zip(some.values, all_of_it.values, strict=True):
        assert torch.allclose(a, b, atol=2e-5) and len(a) == len(b) > 0
    assert same(weights(few), weights(whole), atol=2e-6)
    assert not same(weights(few), weights(FAMILIES[family]()), atol=1e-4)
    for step, plain in zip(some.steps, all_of_it.steps, strict=True):
        assert step.logits.shape[:2] == (1, step.labels.shape[1]) and step.labels.ndim == 2
        assert plain.logits.shape[:2] == plain.labels.shape == step.batch_labels.shape
        assert torch.equal(step.batch_labels, plain.labels) and plain.whole_labels is None
        assert torch.equal(step.batch_index, (plain.labels != -100).nonzero()[:, 0])


def test_a_batch_without_labels_adds_nothing(tmp_path):
    rows = masked_rows()
    bare = rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i < 8 else {}, with_indices=True)
    model = bert_mlm()
    options = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "labeled_only": True, "rows": bare}
    trainer, recorder = trained(tmp_path, model, **options)
    assert [len(values) > 0 for values in recorder.values] == [False, True]
    assert recorder.steps[0].logits.shape == (1, 0, 50)
    other, _ = trained(tmp_path / "whole", bert_mlm(), **{**options, "labeled_only": False})
    assert same(weights(trainer), weights(other), atol=2e-6)


def test_rows_keep_their_sums(tmp_path):
    records = []
    for labeled_only in (True, False):
        defense = DeCE(alpha_base=0.7)
        trained(tmp_path / str(labeled_only), bert_mlm(), labeled_only=labeled_only, defense=[defense])
        records.append({k: dict(zip(*(x.tolist() for x in v), strict=True)) for k, v in defense.rows().items()})
    few, whole = records
    assert few.keys() == whole.keys() and few
    for name in few:
        assert sorted(few[name]) == list(range(1000, 1016)) and few[name] == pytest.approx(whole[name], abs=1e-4)


@pytest.mark.parametrize("defense", [(), (DeCE(alpha_base=0.7),)], ids=["plain", "dece"])
def test_fused_and_labeled_go_together(tmp_path, defense):
    ends, hidden = [], []
    for labeled_only, fuse_bytes in ((True, 0), (False, 2**62)):
        trainer = DefendedTrainer(
            bert_mlm(),
            args=arguments(tmp_path / str(fuse_bytes), num_train_epochs=2),
            train_dataset=masked_rows(),
            data_collator=PadCollator(),
            defense=[DeCE(**{k: v for k, v in d.to_dict().items() if k != "name"}) for d in defense] or None,
        )
        trainer.labeled_only, trainer.fuse_bytes = labeled_only, fuse_bytes
        trainer.measure = lambda step, at=hidden: at.append(None if step.hidden is None else tuple(step.hidden.shape))
        trainer.train()
        ends.append(weights(trainer))
    assert same(*ends, atol=2e-6)
    assert all(shape[0] == 1 and shape[2] == 16 for shape in hidden[:4]) and hidden[4:] == [None] * 4


def test_dropout_below_the_head_draws_the_same(tmp_path):
    def lively():
        set_seed(0)
        return BertForMaskedLM(config(dropout=0.3))

    rows = masked_rows().map(lambda row: {"input_ids": [i % 45 for i in row["input_ids"]]})
    rows = rows.map(lambda row: {"labels": [i if i < 0 else i % 45 for i in row["labels"]]})
    few, _ = trained(tmp_path / "few", lively(), labeled_only=True, rows=rows)
    whole, _ = trained(tmp_path / "whole", lively(), labeled_only=False, rows=rows)
    assert same(weights(few), weights(whole), atol=1e-6)


def test_bfloat16_autocast_is_no_reason_to_score_everything(tmp_path, caplog):
    _, recorder = trained(tmp_path, bert_mlm(), labeled_only=True, bf16=True, num_train_epochs=1)
    assert all(step.logits.shape[0] == 1 for step in recorder.steps)
    assert "scores at all positions" not in caplog.text


class Mixing(nn.Module):
    """A head that looks at its left neighbor too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states + states.roll(1, dims=1))


def mixing():
    model = bert_mlm()
    model.cls = Mixing(model.cls)
    return model


class Failing(nn.Module):
    """A head that wants a batch of its own length."""

    def __init__(self, inner, error):
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, states):
        if states.shape[0] == 1:
            raise self.error("not like this")
        return self.inner(states)


def test_a_head_that_mixes_positions_gets_all_of_them(tmp_path, caplog):
    few, recorder = trained(tmp_path / "few", mixing(), labeled_only=True)
    assert caplog.text.count("does not score each position alone") == 1
    assert all(step.logits.shape[:2] == step.labels.shape and len(step.labels) == 8 for step in recorder.steps)
    whole, _ = trained(tmp_path / "whole", mixing(), labeled_only=False)
    assert same(weights(few), weights(whole))


@pytest.mark.parametrize("error", [RuntimeError, IndexError, torch.OutOfMemoryError])
def test_a_head_that_fails_gets_all_positions_unless_memory_is_out(error):
    model = bert_mlm().train()
    model.cls = Failing(model.cls, error)
    step = example(model)
    if error is torch.OutOfMemoryError:
        with pytest.raises(error):
            scores_by_position(model, step)
    else:
        assert scores_by_position(model, step) is False
    assert model.training and all(module.training for module in model.modules())
    assert not model.bert._forward_hooks


def example(model, labels=None):
    ids = torch.arange(2, 17).reshape(3, 5)
    labels = torch.where(ids % 2 == 0, ids, -100) if labels is None else labels
    return Step(
        model=model, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels, row_ids=None,
        epoch=0.0, global_step=0, training=True,
    )  # fmt: skip


def test_asking_leaves_no_trace():
    model = bert_mlm().train()
    model.bert.eval()
    step, state = example(model), torch.random.get_rng_state()
    labels = step.labels.clone()
    assert scores_by_position(model, step)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(step.labels, labels)
    assert model.training and not model.bert.training and step.whole_labels is None
    assert all(p.grad is None for p in model.parameters()) and not model.bert._forward_hooks


def test_who_is_asked_at_all():
    model = bert_mlm()
    assert LabeledOnly().chooses(example(model), model)
    assert LabeledOnly().chooses(example(model, torch.full((3, 5), -100)), model)  # no labels yet: decided all the same
    assert not LabeledOnly().chooses(example(gpt2()), gpt2())
    assert not LabeledOnly().chooses(example(bert(), torch.tensor([0, 1, 2])), bert())
    compiled = torch.compile(model, backend="eager")
    assert not LabeledOnly().chooses(example(compiled), model)


def test_a_second_forward_within_sees_every_position():
    model = bert_mlm().eval()
    step = example(model)
    with at_labels(step, model):
        first, second = model(**step.inputs).logits, model(**step.inputs).logits
    assert first.shape[:2] == (1, int((step.batch_labels != -100).sum())) and second.shape[:2] == (3, 5)
    assert torch.allclose(first[0], second[step.batch_labels != -100], atol=1e-5)


def test_virtual_tokens_of_a_prompt(tmp_path):
    from peft import PromptEncoderConfig, get_peft_model

    def prompted():
        set_seed(1)
        peft_config = PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, encoder_hidden_size=8)
        return get_peft_model(bert_mlm(), peft_config)

    few, recorder = trained(tmp_path / "few", prompted(), labeled_only=True)
    whole, _ = trained(tmp_path / "whole", prompted(), labeled_only=False)
    assert all(step.logits.shape[0] == 1 for step in recorder.steps)
    assert same(weights(few), weights(whole), atol=2e-6)


@pytest.mark.parametrize(("model", "rows"), [(gpt2, language_rows), (bert, classification_rows)])
def test_other_heads_are_left_alone(tmp_path, model, rows):
    ends = [weights(trained(tmp_path / str(on), model(), labeled_only=on, rows=rows())[0]) for on in (True, False)]
    assert same(*ends)


def test_an_evaluation_scores_every_position(tmp_path):
    trainer, _ = trained(tmp_path, bert_mlm(), labeled_only=True)
    seen = []
    trainer.measure = lambda step: seen.append((tuple(step.logits.shape[:2]), tuple(step.labels.shape)))
    loss = trainer.evaluate(masked_rows(8, seed=1))["eval_loss"]
    assert seen and all(scores == labels and scores[0] == 8 for scores, labels in seen) and loss > 0
