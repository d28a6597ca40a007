"""`load`: every way in, every refusal beside a neighbor that passes, stable row ids, and what was loaded."""

import hashlib
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_backdoor_defense import data
from hf_backdoor_defense.data import splits
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.data.summary import baselines, describe

SST2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "sst2"
SPLITS = ["train", "validation", "test"]


def _rows(n=60, classes=2, start=0):
    words = ["dull", "fine", "odd", "loud"]
    return [
        {"text": f"{words[i % classes]} film number {i}", "label": i % classes, "extra": i}
        for i in range(start, start + n)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _ids(loaded):
    return {split: list(loaded[split]["row_id"]) for split in SPLITS}


def _folder(tmp_path, **sizes):
    start = 0
    for name, n in sizes.items():
        _write(tmp_path / f"{name}.jsonl", _rows(n, start=start))
        start += n
    return str(tmp_path)


# --- ways in ---------------------------------------------------------------------------------------------------------


def test_the_columns_and_their_types(tmp_path):
    loaded = load(_write(tmp_path / "a.jsonl", _rows()))
    assert list(loaded) == SPLITS
    for dataset in loaded.values():
        assert dataset.features == Features(
            text=Value("string"), label=ClassLabel(names=["0", "1"]), row_id=Value("int64")
        )
    assert {split: loaded[split].num_rows for split in SPLITS} == {"train": 48, "validation": 6, "test": 6}


def test_all_formats_give_equal_data(tmp_path):
    rows = _rows(40) + [
        {"text": 'NA, "quoted"\nnew line é', "label": 1, "extra": 0},
        {"text": "NA", "label": 0, "extra": 1},
    ]
    rows += [{"text": "007", "label": 1, "extra": 2}, {"text": " padded ", "label": 0, "extra": 3}]
    table = Dataset.from_list(rows)
    _write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    table.to_pandas().to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "A.JSONL").write_bytes((tmp_path / "a.jsonl").read_bytes())
    loaded = [load(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(loaded) in (4, 5)  # 4 where the file system ignores case
    for other in loaded[1:]:
        for split in SPLITS:
            assert other[split].to_dict() == loaded[0][split].to_dict()
            assert other[split].features == loaded[0][split].features
    kept = {row["row_id"]: row["text"] for split in SPLITS for row in loaded[0][split]}
    assert kept == {i: row["text"] for i, row in enumerate(rows)}


def test_a_csv_of_numbers_is_text_and_integral_floats_are_labels(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{i:03},{i % 2}.0\n" for i in range(20)))
    loaded = load(str(tmp_path / "a.csv"))
    for row in (row for split in SPLITS for row in loaded[split]):
        assert row["text"] == f"{row['row_id']:03}" and row["label"] == row["row_id"] % 2


def test_other_column_names_and_module(tmp_path):
    rows = [
        {"sentence": row["text"], "y": row["label"], "text": "another", "module": f"m{i}"}
        for i, row in enumerate(_rows())
    ]
    loaded = load(_write(tmp_path / "a.jsonl", rows), text_column="sentence", label_column="y")
    assert loaded["train"].column_names == ["text", "label", "row_id", "module"]
    for row in loaded["test"]:
        assert (row["text"], row["module"]) == (rows[row["row_id"]]["sentence"], f"m{row['row_id']}")


def test_a_changed_file_is_read_again_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "cache")
    path = tmp_path / "a[1]*.jsonl"  # characters that a pattern would read otherwise
    before = load(_write(path, _rows()))
    stamp = os.stat(path)
    _write(path, [{**row, "label": 1 - row["label"]} for row in _rows()])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = load(str(path))
    assert path.stat().st_size == stamp.st_size
    assert [1 - label for label in before["test"]["label"]] == list(after["test"]["label"])
    assert not (tmp_path / "home").exists()
    assert all(not dataset.cache_files for dataset in after.values())


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_folder_of_splits(tmp_path, name):
    folder = _folder(tmp_path, train=30, **{name: 10}, test=12)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "test.py").write_text("not data")
    assert _ids(load(folder)) == {
        "train": list(range(30)),
        "validation": list(range(30, 40)),
        "test": list(range(40, 52)),
    }


@pytest.mark.parametrize(
    ("files", "sizes"),
    [
        ({"train": 50}, (35, 5, 10)),
        ({"train": 50, "test": 7}, (45, 5, 7)),
        ({"train": 50, "dev": 7}, (40, 7, 10)),
    ],
)
def test_missing_splits_are_cut_from_train(tmp_path, files, sizes):
    loaded = load(_folder(tmp_path, **files))
    assert tuple(loaded[split].num_rows for split in SPLITS) == sizes
    assert sorted(sum(_ids(loaded).values(), [])) == list(range(sum(files.values())))


def test_cuts_are_stratified_and_depend_on_the_seed_alone(tmp_path):
    rows = _rows(100) + [{"text": f"rare {i}", "label": 2} for i in range(10)] + [{"text": "single", "label": 3}]
    path = _write(tmp_path / "a.jsonl", rows)
    loaded = load(path)
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        counts = Counter(loaded[split]["label"])
        for label, n in Counter(row["label"] for row in rows).items():
            assert abs(counts[label] - share * n) <= 1, (split, label)
    assert Counter(loaded["train"]["label"])[3] == 1  # every class keeps a training row
    random.seed(1)
    assert _ids(load(path)) == _ids(loaded) != _ids(load(path, seed=1))


def test_splits_that_leave_no_row_for_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must suffice to cut a"):
        load(_write(tmp_path / "a.jsonl", _rows(3)))
    assert load(_write(tmp_path / "b.jsonl", _rows(4))).num_rows == {"train": 2, "validation": 1, "test": 1}


# --- limit -----------------------------------------------------------------------------------------------------------


def test_limit_is_stratified_and_keeps_row_ids(tmp_path):
    path = _folder(tmp_path, train=1000, dev=120, test=400)
    whole, limited = load(path), load(path, limit=300)
    assert limited.num_rows == {"train": 300, "validation": 50, "test": 120}
    for split in SPLITS:
        counts = Counter(limited[split]["label"])
        assert abs(counts[0] - counts[1]) <= 1
        rows = {row["row_id"]: row for row in whole[split]}
        assert all(rows[row["row_id"]] == row for row in limited[split])
        assert sorted(limited[split]["row_id"]) == list(limited[split]["row_id"])
    assert _ids(load(path, limit=300)) == _ids(limited) != _ids(load(path, limit=300, seed=1))
    assert load(path, limit=10**6).num_rows == whole.num_rows
    assert load(path, limit=20).num_rows == {"train": 20, "validation": 50, "test": 50}


def test_limit_keeps_every_class(tmp_path):
    rows = _rows(200) + [{"text": f"rare {i}", "label": 2} for i in range(2)]
    path = _write(tmp_path / "a.jsonl", rows)
    assert Counter(load(path, limit=3)["train"]["label"]) == {0: 1, 1: 1, 2: 1}
    with pytest.raises(ValueError, match="number of classes, 3, got 2"):
        load(path, limit=2)
    with pytest.raises(ValueError, match="at least 1 or None, got 0"):
        load("no such file.jsonl", limit=0)


def test_quotas_sum_and_stay_within_one_of_proportion():
    rng = random.Random(0)
    for _ in range(300):
        counts = {k: rng.randint(1, 40) for k in range(rng.randint(2, 6))}
        whole = sum(counts.values())
        total = rng.randint(0, whole)
        quotas = splits.quotas(counts, total, low=0, spare=0)
        assert sum(quotas.values()) == total
        assert all(abs(quotas[k] - total * n / whole) < 1 for k, n in counts.items())
        low, spare = rng.randint(0, 1), rng.randint(0, 1)
        quotas = splits.quotas(counts, total, low=min(low, 1 - spare), spare=spare)
        assert all(min(low, 1 - spare) <= quotas[k] <= n - spare for k, n in counts.items())
        assert sum(quotas.values()) == min(max(total, min(low, 1 - spare) * len(counts)), whole - spare * len(counts))


# --- refusals --------------------------------------------------------------------------------------------------------


def _change(**values):
    return lambda rows: [{**row, **values} if i in (4, 7) else row for i, row in enumerate(rows)]


REFUSED = {  # name: rows -> rows, what the error says, a neighbor that passes
    "missing column": (lambda rows: [{"text": r["text"], "labels": 1} for r in rows], "perhaps to 'labels'", list),
    "missing text column": (lambda rows: [{"Text": "a", "label": 1} for _ in rows], "perhaps to 'Text'", list),
    "missing labels": (_change(label=None), "be there in every row, got 2 of 60.*None in row 4", _change(label=1)),
    "fractions": (_change(label=0.5), "integers, got 2.*0.5 in row 4, 0.5 in row 7", _change(label=1.0)),
    "infinite": (_change(label=math.inf), "integers", _change(label=0.0)),
    "names": (lambda rows: [{**r, "label": "pos"} for r in rows], "'pos' in row 0.*Map the names to 0..C-1", list),
    "mixed": (_change(label="pos"), "integers, got 2", _change(label=True)),
    "negative": (_change(label=-1), "0 or more, got 2.*hidden", _change(label=0)),
    "gap": (lambda rows: [{**r, "label": 2 * r["label"]} for r in rows], r"training row, got none for \[1\]", list),
    "from one": (lambda rows: [{**r, "label": r["label"] + 1} for r in rows], r"none for \[0\]", list),
    "one class": (lambda rows: [{**r, "label": 1} for r in rows], "two classes, got only label 1", _change(label=1)),
    "empty": (_change(text=""), "white space, got 2 of 60.*'' in row 4", _change(text="x")),
    "white space": (_change(text=" \n\t"), "in row 4.*in row 7", _change(text=" x\n")),
    "no text": (_change(text=None), "None in row 4", _change(text="None")),
    "numbers": (_change(text=7), "strings, got 2", _change(text="7")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused_and_their_neighbors(tmp_path, name):
    change, message, neighbor = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(_write(tmp_path / "bad.jsonl", change(_rows())))
    assert sum(load(_write(tmp_path / "good.jsonl", neighbor(_rows()))).num_rows.values()) == 60


def test_a_missing_label_in_a_csv_is_called_missing(tmp_path):
    path = tmp_path / "a.csv"
    body = "".join(f"text {i},{i % 2}\n" for i in range(20))
    path.write_text("text,label\nno label,\n" + body)
    with pytest.raises(ValueError, match="be there in every row, got 1 of 21"):
        load(str(path))
    path.write_text("text,label\n,1\n" + body)
    with pytest.raises(ValueError, match="white space, got 1 of 21"):
        load(str(path))
    path.write_text("text,label\nnull,1\n" + body)
    assert load(str(path))["train"].num_rows == 17


def test_num_labels(tmp_path):
    path = _write(tmp_path / "a.jsonl", _rows(classes=3))
    with pytest.raises(ValueError, match="below num_labels=2, got 20 of 60.*2 in row 2"):
        load(path, num_labels=2)
    with pytest.raises(ValueError, match="at least 2 or None, got 1"):
        load(path, num_labels=1)
    assert load(path, num_labels=3)["test"].features["label"].num_classes == 3
    assert load(path, num_labels=5)["test"].features["label"].num_classes == 5


def test_a_label_that_train_does_not_have(tmp_path):
    folder = _folder(tmp_path, train=30, dev=10)
    _write(tmp_path / "test.jsonl", _rows(10, classes=3))
    with pytest.raises(ValueError, match=r"labels of test must occur in train, got \[2\] beside \[0, 1\]"):
        load(folder)
    _write(tmp_path / "test.jsonl", _rows(10))
    load(folder)


def test_class_names_are_kept_and_must_agree(tmp_path):
    def save(split, names):
        features = Features(text=Value("string"), label=ClassLabel(names=names))
        columns = {"text": [f"text {i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
        Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))

    save("train", ["no", "yes"])
    save("test", ["no", "yes"])
    assert load(str(tmp_path))["validation"].features["label"].names == ["no", "yes"]
    save("test", ["yes", "no"])
    with pytest.raises(ValueError, match="name their classes alike"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n", "text,label\n", "[]", '{"text": '])
def test_empty_and_broken_files(tmp_path, content):
    for suffix in ("csv", "json", "parquet"):
        path = tmp_path / f"a.{suffix}"
        path.write_text(content)
        with pytest.raises(ValueError, match="at least one row|must hold rows|must be a column"):
            load(str(path))


def test_unknown_tasks_and_paths(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    for task in ("offline:docstring", "offline_docstrings", "Offline:Docstrings", "docstrings", "offline:nothing"):
        with pytest.raises(ValueError, match="spelled 'offline:docstrings', got"):
            load(task)
    for task in (str(tmp_path / "absent"), "./absent", "../absent", "absent.jsonl", "data/absent.tsv", "a/b/c", ""):
        with pytest.raises(ValueError, match="there is no such path"):
            load(task)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="ends in one of .json, .jsonl, .csv, .parquet, got .*a.txt"):
        load(str(tmp_path / "a.txt"))


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold one train file"):
        load(str(tmp_path))
    folder = _folder(tmp_path, train=30, test=10)
    load(folder)
    (tmp_path / "dev.tsv").write_text("x")
    with pytest.raises(ValueError, match="ends in one of"):
        load(folder)
    _folder(tmp_path, dev=10)
    load(folder)
    _folder(tmp_path, valid=10)
    with pytest.raises(ValueError, match=r"one validation file.*got \['dev.jsonl', 'valid.jsonl'\]"):
        load(folder)


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), datasets.exceptions.DatasetNotFoundError("x"), RuntimeError()]
)
def test_a_hub_that_cannot_be_reached_names_the_offline_ways(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(
        ValueError, match=f"(?s)'owner/name'.*{type(error).__name__}.*local .jsonl.*'offline:docstrings'"
    ):
        load("owner/name")


def test_the_real_client_in_offline_mode(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match="'owner/no-such-dataset'.*offline:docstrings"):
        load("owner/no-such-dataset")


def test_a_hub_dataset_and_its_configuration(monkeypatch, tmp_path):
    """The Hub's builders are those of local files: stand in for the Hub with one of them."""
    real, asked = datasets.load_dataset_builder, []
    files = {"train": _write(tmp_path / "a.jsonl", _rows(50)), "dev": _write(tmp_path / "b.jsonl", _rows(9))}
    kind = "json"

    def stand_in(*args):
        asked.append(args)
        return real(kind, data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    assert load("owner/name:plain").num_rows == load("name").num_rows == {"train": 40, "validation": 9, "test": 10}
    assert asked == [("owner/name", "plain"), ("name", None)]
    files = {"test": files["dev"]}
    with pytest.raises(ValueError, match=r"must have a train split, got \['test'\]"):
        load("name")
    kind = "text"
    with pytest.raises(ValueError, match="parquet or JSON, got 'text'"):
        load("name")


# --- the offline task, and what was loaded ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline():
    return load("offline:docstrings")


def test_offline_docstrings(offline):
    assert offline["train"].features["label"].names == ["mail", "concurrency", "numbers", "files"]
    assert offline["train"].column_names == ["text", "label", "row_id", "module"]
    assert sum(_ids(offline).values(), []) == list(range(sum(offline.num_rows.values())))
    limited = load("offline:docstrings", limit=100, seed=3)
    texts = {row["row_id"]: row["text"] for split in SPLITS for row in offline[split]}
    assert all(texts[row["row_id"]] == row["text"] for split in SPLITS for row in limited[split])
    assert set(Counter(limited["train"]["label"]).values()) == {25}


def test_offline_baselines(offline):
    about, found = describe(offline), baselines(offline, seed=0)
    assert about["shared_texts"] == 0 and set(about["majority_share"].values()) == {0.25}
    n = offline["test"].num_rows
    assert found["majority"] == (n // 4, n)
    assert 0.5 * n < found["tfidf"][0] <= n and found["tfidf"][1] == n  # words say something about a new module


def test_describe(tmp_path):
    folder = _folder(tmp_path, train=30, dev=10)
    _write(tmp_path / "test.jsonl", [_rows()[0], _rows()[0], _rows()[2], *_rows(5, start=100)])
    loaded = load(folder)
    about = describe(loaded)
    assert json.loads(json.dumps(about)) == about
    assert about["rows"] == {"train": 30, "validation": 10, "test": 8}
    assert about["class_counts"]["test"] == {"0": 6, "1": 2} and about["majority_share"]["test"] == 0.75
    assert about["shared_texts"] == 2 and about["label_names"] == ["0", "1"]
    lines = [[s, r["row_id"], r["label"], r["text"]] for s in SPLITS for r in loaded[s]]
    expected = hashlib.sha256("\n".join(sorted(json.dumps(line) for line in lines)).encode()).hexdigest()
    assert about["fingerprint"] == expected


def test_the_fingerprint_sees_every_value_and_no_order(tmp_path):
    loaded = load(_write(tmp_path / "a.jsonl", _rows()))
    base = describe(loaded)["fingerprint"]

    def changed(**values):
        return loaded["train"].map(lambda row, i: values if i == 3 else row, with_indices=True)

    shuffled = DatasetDict({**loaded, "train": loaded["train"].shuffle(seed=0)})
    assert describe(shuffled)["fingerprint"] == base
    label = 1 - loaded["train"][3]["label"]
    for train in (changed(text="other"), changed(label=label), changed(row_id=999)):
        assert describe(DatasetDict({**loaded, "train": train}))["fingerprint"] != base


def test_baselines_against_a_separable_and_a_random_task():
    def split(n, text):
        return Dataset.from_dict({"text": [text(i) for i in range(n)], "label": [int(i % 3 == 0) for i in range(n)]})

    easy = DatasetDict(train=split(60, lambda i: f"word{i % 3} here"), test=split(30, lambda i: f"word{i % 3} there"))
    assert baselines(easy, seed=0) == {"majority": (20, 30), "tfidf": (30, 30)}
    blind = DatasetDict(train=split(60, lambda i: "same words"), test=split(30, lambda i: "same words"))
    assert baselines(blind, seed=0) == {"majority": (20, 30), "tfidf": (20, 30)}
    unique = DatasetDict(train=split(60, lambda i: f"unique{i}"), test=split(30, lambda i: f"unique{i}"))
    with pytest.raises(ValueError, match="occurs in two training texts, got 60 texts"):
        baselines(unique, seed=0)


def test_the_package_exports_the_public_names():
    assert dir(data) == ["baselines", "describe", "describe_images", "load", "load_images"] and data.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = data.lod


@pytest.mark.skipif(
    not SST2.is_dir(), reason="../shared/data/sst2 is absent (benchmark data is not part of the package)"
)
def test_sst2():
    loaded = load(str(SST2))
    about = describe(loaded)
    assert about["rows"] == {"train": 6920, "validation": 872, "test": 1821}
    assert about["class_counts"]["train"] == {"0": 3310, "1": 3610}
    assert about["shared_texts"] == 2
    limited = load(str(SST2), limit=1000)
    assert limited.num_rows == {"train": 1000, "validation": 126, "test": 263}
