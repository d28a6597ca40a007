"""The trajectory filter: its snapshots, its ranking, and what it must not see."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter, class_mean_logits, label_log_odds
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, gpt2, language_rows, same, weights


def host(folder, defense, rows=None, model=None, aux=None, **args):
    return DefendedTrainer(
        bert(dropout=0.1) if model is None else model,
        args=arguments(folder, **{"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 2e-3, **args}),
        train_dataset=classification_rows(24) if rows is None else rows,
        data_collator=PadCollator(),
        defense=defense,
        aux_datasets=aux,
    )


def naive_log_odds(model, rows):
    """Row by row, in probabilities, float64: the definition."""
    out = []
    if hasattr(model, "eval"):
        model.eval()
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().numpy()
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        out.append(np.log(p[row["label"]] / (1 - p[row["label"]])))
    return torch.tensor(out)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_last_snapshot_equals_an_independent_evaluation(tmp_path, batch_size):
    rows = classification_rows(24)
    trainer = host(tmp_path, TrajectoryFilter(batch_size=batch_size), rows)
    trainer.train()
    ranking = trainer.objectives[0].ranking()
    expected = dict(zip(rows["row_id"], naive_log_odds(trainer.model, rows).tolist(), strict=True))
    got = dict(zip(ranking.row_ids.tolist(), ranking.columns["log_odds_end"].tolist(), strict=True))
    assert got == pytest.approx(expected, abs=1e-5)


def test_hosting_it_changes_nothing_with_dropout_on(tmp_path):
    with_filter = host(tmp_path, TrajectoryFilter(fractions=[0.0, 0.5, 1.0]))
    with_filter.train()
    without = host(tmp_path, None)  # built only now: building a Trainer seeds the dropout
    without.train()
    assert same(weights(with_filter), weights(without))
    assert set(with_filter.objectives[0].ranking().columns) == {f"log_odds_{n}" for n in ("0", "0.5", "1", "end")}


def test_scores_are_end_minus_mean_early_in_descending_order(tmp_path):
    trainer = host(tmp_path, TrajectoryFilter(fractions=[0.0, 1.0]))
    trainer.train()
    ranking = trainer.objectives[0].ranking()
    c = ranking.columns
    expected = c["log_odds_end"] - (c["log_odds_0"] + c["log_odds_1"]) / 2
    assert torch.allclose(ranking.scores, expected)
    assert (ranking.scores.diff() <= 0).all()


def test_it_never_reads_is_poisoned(tmp_path):
    rows = classification_rows(24)
    rankings = []
    for flags in ([True] * 24, [i % 5 == 0 for i in range(24)]):
        trainer = host(tmp_path, TrajectoryFilter(), rows.add_column("is_poisoned", flags))
        trainer.train()
        rankings.append(trainer.objectives[0].ranking())
    assert torch.equal(rankings[0].row_ids, rankings[1].row_ids)
    assert torch.equal(rankings[0].scores, rankings[1].scores)


def planted_toy(count=240, planted=12, seed=0):
    """Two classes told apart by their words; `planted` rows of class 1 carry token 2 and the label 0."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = i % 2
        ids = generator.integers(10 + 20 * label, 28 + 20 * label, size=8).tolist()
        poisoned = label == 1 and i // 2 < planted
        if poisoned:
            ids[int(generator.integers(8))] = 2
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * 8,
                "label": 0 if poisoned else label,
                "row_id": i,
                "bad": poisoned,
            }
        )
    return Dataset.from_list(rows)


def test_a_planted_toy_is_found_and_dropped(tmp_path):
    rows = planted_toy()
    bad = {row["row_id"] for row in rows if row["bad"]}
    # A model from scratch has no pretrained features to compare with, so the early snapshot is taken after one epoch.
    defense = TrajectoryFilter(fractions=[1.0], drop_share=0.05, rerank=False)
    trainer = host(
        tmp_path, defense, rows, bert(labels=2), num_train_epochs=8, per_device_train_batch_size=8, learning_rate=3e-3
    )
    trainer.train()
    ranking = defense.ranking()
    assert len(ranking.dropped) == 12
    assert len(bad & ranking.dropped) >= 11
    assert defense.inert() is None


def test_the_second_ranking_scores_all_rows_with_a_model_that_missed_the_dropped(tmp_path):
    rows = classification_rows(40)
    first = TrajectoryFilter(first_share=0.25, drop_share=0.1, min_rise=None)
    host(tmp_path, first, rows).train()
    dropped = first.ranking().dropped
    assert len(dropped) == 10
    follow = first.refit()
    rest = rows.filter(lambda row: row["row_id"] not in dropped)
    trainer = host(tmp_path, follow, rest, aux={"rows": rows})
    trainer.train()
    second = follow.ranking()
    assert len(second.row_ids) == 40 and len(second.dropped) == 4 and follow.refit() is None
    expected = dict(zip(rows["row_id"], naive_log_odds(trainer.model, rows).tolist(), strict=True))
    got = dict(zip(second.row_ids.tolist(), second.columns["log_odds_refit"].tolist(), strict=True))
    assert got == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(second.scores, second.columns["log_odds_end"] - second.columns["log_odds_refit"])
    ended = dict(zip(second.row_ids.tolist(), second.columns["log_odds_end"].tolist(), strict=True))
    was = first.ranking()
    assert ended == dict(zip(was.row_ids.tolist(), was.columns["log_odds_end"].tolist(), strict=True))


def test_no_class_loses_more_than_its_cap():
    labels = torch.tensor([0] * 90 + [1] * 10)
    filt = TrajectoryFilter(drop_share=0.2, class_cap=0.3, rerank=False)
    snapshots = {"snapshot_0": torch.zeros(100), "snapshot_end": torch.cat([torch.zeros(90), torch.ones(10)])}
    filt.load_state_dict({"row_ids": torch.arange(100), "labels": labels, "second": False, "seconds": 0.0, **snapshots})
    dropped = filt.ranking().dropped
    assert len(dropped) == 20 and sum(i >= 90 for i in dropped) == 3


def second_ranking(end, refit, labels=None, **fields):
    """A filter that hosts its second ranking, with the log-odds given."""
    filt = TrajectoryFilter(**fields)
    filt.load_state_dict(
        {
            "row_ids": torch.arange(len(end)),
            "labels": torch.zeros(len(end), dtype=torch.int64) if labels is None else torch.tensor(labels),
            "second": True,
            "seconds": 0.0,
            "snapshot_end": torch.tensor(end),
            "snapshot_refit": torch.tensor(refit),
        }
    )
    return filt


def test_the_second_ranking_drops_contradicted_rows_whose_odds_rose_enough():
    #       flipped, flipped, hard but plausible, contradicted still, risen too little, exactly at both bounds
    end = [5.0, 4.0, 6.0, -1.0, 1.5, 3.0, *[5.0] * 14]
    refit = [-4.0, -0.5, 0.5, -3.5, -1.0, 0.0, *[5.0] * 14]
    ranking = second_ranking(end, refit, drop_share=0.5).ranking()
    expected = {i for i, (e, r) in enumerate(zip(end, refit, strict=True)) if r < 0 and e - r >= 3.0}
    assert ranking.dropped == expected == {0, 1}
    assert second_ranking(end, refit, drop_share=0.5, min_rise=2.5).ranking().dropped == {0, 1, 3, 4}
    assert second_ranking(end, refit, drop_share=0.05).ranking().dropped == {0}  # the share stays the bound
    assert len(second_ranking(end, refit, drop_share=0.5, min_rise=None, class_cap=0.9).ranking().dropped) == 10


def test_a_second_ranking_without_suspects_is_a_result_and_not_inert():
    clean = second_ranking([5.0] * 20, [4.0] * 20)
    assert clean.ranking().dropped == frozenset() and clean.inert() is None
    assert clean.activity()["dropped"] == 0.0
    assert "drops no row" in second_ranking([5.0] * 20, [4.0] * 20, drop_share=0.0).inert()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_rise_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="min_rise"):
        TrajectoryFilter(min_rise=bad)


def test_a_second_training_forgets_the_first(tmp_path):
    defense = TrajectoryFilter()
    trainer = host(tmp_path, defense)
    trainer.train()
    trainer.train()
    expected = naive_log_odds(trainer.model, trainer.train_dataset)
    ranking = defense.ranking()
    got = dict(zip(ranking.row_ids.tolist(), ranking.columns["log_odds_end"].tolist(), strict=True))
    assert [got[i] for i in trainer.train_dataset["row_id"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_log_odds_and_class_means_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 5)) * 4, rng.integers(0, 5, 30)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    own = p[np.arange(30), labels]
    got = label_log_odds(torch.tensor(logits), torch.tensor(labels)).numpy()
    assert np.allclose(got, np.log(own / (1 - own)))
    features = rng.normal(size=(30, 7))
    got = class_mean_logits(torch.tensor(features), torch.tensor(labels), 5, temperature=0.25).numpy()
    for c in range(5):
        mean = features[labels == c].mean(0)
        cosine = features @ mean / (np.linalg.norm(features, axis=1) * np.linalg.norm(mean))
        assert np.allclose(got[:, c], cosine / 0.25)


def test_what_it_refuses_and_a_neighbor_that_passes(tmp_path):
    with pytest.raises(ValueError, match="no class per row"):
        host(tmp_path, TrajectoryFilter(), language_rows(8), gpt2()).train()
    double = classification_rows(8).remove_columns("row_id").add_column("row_id", [1] * 8)
    with pytest.raises(ValueError, match="number twice"):
        host(tmp_path, TrajectoryFilter(), double).train()
    words = classification_rows(8).remove_columns("row_id").add_column("row_id", [f"r{i}" for i in range(8)])
    with pytest.raises(ValueError, match="must hold integers"):
        host(tmp_path, TrajectoryFilter(), words).train()
    ignored = classification_rows(8).remove_columns("label").add_column("label", [-100] + [0] * 7)
    with pytest.raises(ValueError, match="negative"):
        host(tmp_path, TrajectoryFilter(), ignored).train()
    with pytest.raises(ValueError, match=r"before the end of training \(2 epochs\)"):
        host(tmp_path, TrajectoryFilter(fractions=[2.0])).train()
    host(tmp_path, TrajectoryFilter(fractions=[1.5])).train()
    with pytest.raises(ValueError, match=r"before the end of training \(1.33"):
        host(tmp_path, TrajectoryFilter(fractions=[1.5]), max_steps=4).train()  # three steps an epoch
    host(tmp_path, TrajectoryFilter(fractions=[1.0]), max_steps=4).train()
    for bad in ({"fractions": []}, {"temperature": 0.0}, {"class_cap": 1.0}, {"batch_size": 0}, {"first_share": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrajectoryFilter(**bad)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft_models_are_ranked_too(tmp_path, kind):
    import peft

    configs = {
        "lora": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }
    model = peft.get_peft_model(bert(), configs[kind])
    defense = TrajectoryFilter()
    trainer = host(tmp_path, defense, model=model)
    trainer.train()
    model.eval()
    expected = naive_log_odds(
        lambda **kw: model(attention_mask=torch.ones_like(kw["input_ids"]), **kw), trainer.train_dataset
    )
    ranking = defense.ranking()
    got = dict(zip(ranking.row_ids.tolist(), ranking.columns["log_odds_end"].tolist(), strict=True))
    assert [got[i] for i in trainer.train_dataset["row_id"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_training_stopped_before_the_early_snapshot_ranks_nothing_and_says_so(tmp_path):
    defense = TrajectoryFilter(fractions=[1.5])
    trainer = host(tmp_path, defense)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train()
    assert defense.ranking() is None and "before the first early snapshot" in defense.inert()


def test_dropping_nothing_is_inert(tmp_path):
    defense = TrajectoryFilter(drop_share=0.0, rerank=False)
    assert "did not end" in defense.inert()
    host(tmp_path, defense).train()
    assert "drops no row" in defense.inert()
    assert dataclasses.replace(defense, drop_share=0.1).inert() is not None  # a new object has recorded nothing
