"""Measuring again: exactly the figures that whole runs recorded, on exactly their rows; what cannot be measured is refused."""

import pytest
from datasets import Dataset

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.experiment.remeasure import remeasure, rows_digest
from tests.experiment.named import named
from tests.hub.published import write_texts


def test_the_models_of_a_training_with_a_simulated_attack(encoder, task, tmp_path):
    folder = tmp_path / "run"
    command = (
        f"train --task {task} --model_name {encoder} --max_length 16 --disable_tqdm true --use_cpu true --limit 100"
    )
    command += f" --per_device_train_batch_size 16 --learning_rate 3e-3 --num_train_epochs 1 --output_dir {folder}"
    command += " --simulate badnets --poison_rate 0.1 --target 1 --seeds 3 --save_models true --eval_split validation"
    assert main(command.split()) == 0
    assert set(named(folder, "train")) == {"models/seed-3/clean_reference", "models/seed-3/undefended"}


@pytest.mark.parametrize("options", ["--held_out 0.3 --limit 60", "--test TEST --simulate badnets --target 2 --seed 4"])
def test_a_purified_model_on_held_out_rows_and_on_others(classifier, tmp_path, options):
    folder, clean = tmp_path / "run", write_texts(tmp_path / "clean.jsonl", 80)
    test = write_texts(tmp_path / "test.jsonl", 45, 100)
    command = (
        f"clean --method ft_sam --model_name {classifier} --clean {clean} --max_length 8 --epochs 1 --batch_size 16"
    )
    command += f" --disable_tqdm true --output_dir {folder} {options.replace('TEST', str(test))}"
    assert main(command.split()) in (0, 1)
    [evidence] = named(folder, "purify").values()
    assert ("asr" in evidence.figures) is ("simulate" in options)


def test_other_rows_are_told_from_the_recorded_ones(classifier, tmp_path):
    one, other = (write_texts(tmp_path / f"{start}.jsonl", 30, start) for start in (0, 30))
    how = {"kind": "text", "reader": "samples", "split": "test", "max_length": 8}
    first = remeasure(classifier, task=str(one), **how)
    assert first.same_rows is None and first.scores.asr is None and first.scores.ca.n == 30
    assert remeasure(classifier, task=str(one), rows_sha256=first.rows_sha256, **how).same_rows is True
    assert remeasure(classifier, task=str(other), rows_sha256=first.rows_sha256, **how).same_rows is False


def test_the_digest_is_of_contents_labels_and_order():
    rows = Dataset.from_dict({"text": ["a", "b", ""], "label": [0, 1, 1], "row_id": [5, 6, 7]})
    same = Dataset.from_dict({"text": ["a", "b", ""], "label": [0, 1, 1], "row_id": [0, 1, 2]})
    others = [
        rows.select([1, 0, 2]),
        rows.select([0, 1]),
        Dataset.from_dict({"text": ["a", "b", ""], "label": [0, 0, 1]}),
        Dataset.from_dict({"text": ["ab", "", ""], "label": [0, 1, 1]}),
    ]
    assert rows_digest(rows) == rows_digest(same) and rows_digest(rows) not in map(rows_digest, others)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "image"}, "classifier of texts"),
        ({"kind": "sound"}, "text or image"),
        ({"reader": "pickle"}, "splits or samples"),
        ({"task": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"reader": "splits", "split": "holdout"}, "holdout"),
        ({"reader": "splits", "task": "offline:docstrings"}, "classes"),
        ({"trigger": {"name": "badnets"}, "target": 3}, "0..2"),
        ({"trigger": {"name": "badnets"}, "target": None}, "0..2"),
        ({"trigger": {"name": "nothing"}, "target": 1}, "trigger"),
        ({"trigger": {"name": "patch"}, "target": 1}, "texts"),
        ({"trigger": {"name": "badnets", "colour": "red"}, "target": 1}, "colour"),
        ({"trigger": {"name": "insent", "sentence": "a " * 50}, "target": 1}, "50|tokens"),
        ({"max_length": 999}, "at most 24"),
    ],
)
def test_what_cannot_be_measured_is_refused(classifier, task, change, said):
    how = {"kind": "text", "task": str(task), "reader": "samples", "max_length": 12, **change}
    with pytest.raises(ValueError, match=said):
        remeasure(classifier, **how)
