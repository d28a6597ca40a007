"""Clean samples: which label is which class, what is refused by name, how few are too few."""

import csv
import json

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_backdoor_defense.data.samples import check_enough, class_counts, class_lookup, load_samples

NAMES = ["world", "sports", "business"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path, labels, **options):
    source = jsonl(path / "clean.jsonl", [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])
    return load_samples(source, kind="text", labels=NAMES, **options)


@pytest.mark.parametrize(
    "labels",
    [
        [0, 2, 1, 2],
        ["world", "business", "sports", "business"],
        ["0", "2", "1", "2"],
        ["World", " Business", "SPORTS", "business"],
    ],
)
def test_ids_and_names_mean_the_same(tmp_path, labels):
    rows = texts(tmp_path, labels)
    assert rows["label"][:] == [0, 2, 1, 2] and rows["row_id"][:] == [0, 1, 2, 3]
    assert rows["text"][:] == [f"text {i}" for i in range(4)] and rows.column_names == ["text", "label", "row_id"]
    assert rows.features["label"].names == NAMES and class_counts(rows) == {"world": 1, "sports": 1, "business": 2}


def test_a_small_set_need_not_show_every_class(tmp_path):
    assert texts(tmp_path, [2, 2])["label"][:] == [2, 2]


def test_a_name_that_is_a_number_counts_as_a_name():
    lookup = class_lookup(["2", "1", "0"])
    assert [lookup(v) for v in ("2", "0", 0, 2, 2.0, "3", 1.5, True, None)] == [0, 2, 0, 2, 2, None, None, None, None]
    assert class_lookup(["a", "A"])("A") == 1 and class_lookup(["b", "a", "A"])("B") is None  # case decides here


def test_names_of_the_source_count_in_whatever_order_it_has_them(tmp_path):
    def parquet(names):
        features = Features(text=Value("string"), label=ClassLabel(names=names))
        path = tmp_path / f"{'-'.join(names)}.parquet"
        Dataset.from_dict({"text": list("abc"), "label": [0, 1, 2]}, features=features).to_parquet(path)
        return str(path)

    def load(source, labels=NAMES):
        return load_samples(source, kind="text", labels=labels)["label"][:]

    assert load(parquet(["business", "world", "sports"])) == [2, 0, 1]
    assert load(parquet(["0", "1", "2"])) == [0, 1, 2]
    assert load(parquet(["business", "world", "sports"]), ["LABEL_0", "LABEL_1", "LABEL_2"]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"classes of the model \(0 world, .*\), got 1 rows with weather"):
        load(parquet(["weather", "world", "sports"]))


def test_csv_and_other_columns(tmp_path):
    path = tmp_path / "clean.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["body", "topic"], ["007", "sports"], ["NA", "world"]])
    rows = load_samples(str(path), kind="text", labels=NAMES, text_column="body", label_column="topic")
    assert rows["text"][:] == ["007", "NA"] and rows["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "got 1 rows with 3: the model has no score"),
        ([0, -1], "got 1 rows with -1"),
        (["world", "sport", "sport"], "got 2 rows with sport:"),
        ([0.5, 1.0], "got 1 rows with 0.5"),
        ([0, None], "be there in every row, got 1 of 2"),
    ],
)
def test_labels_that_the_model_does_not_know_are_refused_by_name(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        texts(tmp_path, labels)


def test_bad_sources_are_refused_with_advice(tmp_path):
    def refused(message, source, **options):
        with pytest.raises(ValueError, match=message):
            load_samples(str(source), **{"kind": "text", "labels": NAMES, **options})

    good = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    refused(
        "not be empty or white space, got 1 of 2",
        jsonl(tmp_path / "b.jsonl", [{"text": " ", "label": 0}, {"text": "a", "label": 1}]),
    )
    refused("be strings", jsonl(tmp_path / "c.jsonl", [{"text": 3, "label": 0}]))
    refused("text_column", good, text_column="body")
    refused("label_column", good, label_column="topic")
    refused("no such path", tmp_path / "nowhere.jsonl")
    refused("must be one file, got the folder", tmp_path)
    refused("at least one row", jsonl(tmp_path / "d.jsonl", []))
    refused("`limit` must be at least 1", good, limit=0)
    refused(".npz file or a folder", good, kind="image")
    with pytest.raises(ValueError, match="image_column|arrays"):
        np.savez(tmp_path / "e.npz", picture=np.zeros((2, 8, 8), np.uint8), label=np.array([0, 1]))
        load_samples(str(tmp_path / "e.npz"), kind="image", labels=NAMES)


def test_images_from_arrays_folders_and_the_digits(tmp_path):
    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    np.savez(tmp_path / "a.npz", image=pixels, label=np.array([2, 0, 2]))
    rows = load_samples(str(tmp_path / "a.npz"), kind="image", labels=NAMES)
    assert rows["label"][:] == [2, 0, 2] and rows.column_names == ["image", "label", "row_id"]
    assert all(np.array_equal(np.asarray(image), array) for image, array in zip(rows["image"], pixels, strict=True))
    for name, array in zip(("sports", "world", "sports"), pixels, strict=True):
        (tmp_path / "f" / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(tmp_path / "f" / name / f"{array[0, 0]}.png")
    rows = load_samples(str(tmp_path / "f"), kind="image", labels=NAMES)
    assert sorted(rows["label"]) == [0, 1, 1]
    for row in rows:
        assert (row["label"] == 0) == (np.asarray(row["image"])[0, 0] == 64)
    digits = [str(i) for i in range(10)]
    train, test = (load_samples("offline:digits", kind="image", labels=digits, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1197, 450)


def test_a_limit_takes_from_every_class_in_turn(tmp_path):
    labels = [0] * 40 + [1] * 5 + [2] * 3
    rows = texts(tmp_path, labels, limit=12)
    assert class_counts(rows) == {"world": 5, "sports": 4, "business": 3} or class_counts(rows) == {
        "world": 4,
        "sports": 5,
        "business": 3,
    }
    assert rows["row_id"][:] == sorted(rows["row_id"]) and [labels[i] for i in rows["row_id"]] == rows["label"][:]
    smaller = texts(tmp_path, labels, limit=6)
    assert set(smaller["row_id"]) < set(rows["row_id"]) and set(class_counts(smaller).values()) == {2}
    assert len(texts(tmp_path, labels, limit=1000)) == 48


def test_how_few_are_too_few():
    assert check_enough({"a": 20, "b": 20}) == []
    (few,) = check_enough({"a": 19, "b": 20})
    assert "fewer than 20 clean rows of a (19)" in few
    absent, few = check_enough({"a": 30, "b": 0, "c": 1})
    assert "no clean rows of the class b" in absent and "c (1)" in few
    for counts in ({"a": 5, "b": 4}, {str(i): 1 for i in range(11)}, {"a": 0, "b": 0}):
        with pytest.raises(ValueError, match="must be at least .* by heart"):
            check_enough(counts)
    assert len(check_enough({"a": 5, "b": 5})) == 1 and len(check_enough({str(i): 2 for i in range(11)})) == 1
