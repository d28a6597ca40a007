"""Scores and curves against counting by hand."""

import numpy as np
import pytest
import torch

from hf_backdoor_defense.evaluation.callback import BackdoorEvalCallback, curve
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor
from hf_backdoor_defense.models import pooled_features, predict_logits
from hf_backdoor_defense.trainers.columns import ColumnCollator
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows

COLLATE = ColumnCollator(PadCollator(), keep={"input_ids", "attention_mask", "label"})


def by_hand(model, rows):
    model.eval()
    with torch.no_grad():
        return np.array([int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in rows])


def test_scores_equal_counting_row_by_row():
    model, clean, triggered = bert(seed=3), classification_rows(30), classification_rows(30, seed=5)
    scores = evaluate_backdoor(model, clean, triggered, target=1, collate=COLLATE, batch_size=7)
    labels = np.asarray(clean["label"])
    assert scores.ca.value == (by_hand(model, clean) == labels).mean() and scores.ca.n == 30
    true = np.asarray(triggered["label"])
    predicted = by_hand(model, triggered)
    others = true != 1
    assert scores.asr.value == (predicted[others] == 1).mean() and scores.asr.n == others.sum()
    assert scores.r_acc.value == (predicted == true)[others].mean()
    assert evaluate_backdoor(model, clean, collate=COLLATE).asr is None
    with pytest.raises(ValueError, match="without `target`"):
        evaluate_backdoor(model, clean, triggered, collate=COLLATE)
    with pytest.raises(ValueError, match="no rows"):
        predict_logits(model, clean.select([]), COLLATE)


def test_passes_keep_order_mode_and_random_state():
    model, rows = bert(dropout=0.5), classification_rows(20)
    model.train()
    state = torch.get_rng_state()
    one = predict_logits(model, rows, COLLATE, batch_size=3)
    assert model.training and torch.equal(state, torch.get_rng_state())
    some = predict_logits(model, rows, COLLATE, indices=[7, 2], batch_size=64)
    assert torch.allclose(some, one[[7, 2]], atol=1e-6)
    features = pooled_features(model, rows, COLLATE, indices=[4])
    model.eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([rows[4]["input_ids"]]), output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(features[0], hidden[0].mean(0), atol=1e-6)


def test_the_callback_records_a_point_per_epoch_and_the_last_one_is_the_end(tmp_path):
    rows = classification_rows(24)
    callback = BackdoorEvalCallback(rows, rows, target=0, collate=COLLATE)
    trainer = DefendedTrainer(
        bert(),
        args=arguments(tmp_path, num_train_epochs=3),
        train_dataset=rows,
        data_collator=PadCollator(),
        callbacks=[callback],
    )
    trainer.train()
    points = curve(trainer.state.log_history)
    assert [point["epoch"] for point in points] == [1.0, 2.0, 3.0]
    end = evaluate_backdoor(trainer.model, rows, rows, target=0, collate=COLLATE)
    assert points[-1]["ca"] == end.ca.value and points[-1]["asr"] == end.asr.value
