"""Plain text: every way in gives the same texts, tokens keep their row, and masks fall by chance, by row and once."""

import json
import logging
import math
import random

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_backdoor_defense.data import docstrings
from hf_backdoor_defense.data.plain_text import load_texts, mask_once, tokenize_texts

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(20)]
LONG = "w0 " * 60


def _tokenizer(**left_out):
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**names, **left_out})


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Texts of 2 to 40 words, some of them unknown or spelled as special tokens are."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices([*WORDS, "unheard", "[SEP]"], k=rng.randint(2, 40))) for _ in range(200)]
    return tokenize_texts([f"w0 w1 {text}" for text in texts], tokenizer)


def _by_id(masked):
    return {row["row_id"]: row for row in masked}


# --- load_texts ------------------------------------------------------------------------------------------------------

TEXTS = ["One text.", "été — два", "007", "NA", 'with "quotes", commas', "a\u2028line separator", "x"]


def _write_all(folder, texts):
    """The same texts in each format, beside a column that nobody asked for."""
    rows = [{"text": text, "other": i} for i, text in enumerate(texts)]
    (folder / "a.txt").write_bytes("\n".join(texts).encode())
    (folder / "windows.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\r\n")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_pandas().to_csv(folder / "a.csv", index=False)
    Dataset.from_list(rows).to_parquet(str(folder / "a.parquet"))
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_texts(tmp_path):
    files = _write_all(tmp_path, ["", f"  {TEXTS[0]}\t", " ", *TEXTS[1:], ""])
    assert len(files) == 6
    for path in files:
        assert load_texts(str(path)) == TEXTS, path.name


def test_the_dropped_rows_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_backdoor_defense")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", None, "", " \n", "c", "d")))
    assert load_texts(str(path)) == ["a b", "c", "d"]
    assert f"3 texts from {path}; 3 empty rows were dropped." in caplog.text


def test_limit_counts_texts_and_takes_the_first(tmp_path):
    for path in _write_all(tmp_path, ["", TEXTS[0], "", *TEXTS[1:]]):
        for limit in (2, len(TEXTS), 100):
            assert load_texts(str(path), limit=limit) == TEXTS[:limit]
    with pytest.raises(ValueError, match="`limit` must be at least 2 or None, got 1"):
        load_texts("no such file", limit=1)


def test_a_limit_stops_reading(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\nsecond\n\xff\n")
    assert load_texts(str(path), limit=2) == ["first", "second"]
    with pytest.raises(ValueError, match="byte 0xff. in line 3"):
        load_texts(str(path))


def test_a_folder_is_read_by_name_and_its_train_files_alone_where_it_has_any(tmp_path):
    (tmp_path / "b.txt").write_text("b\nb2\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "c.csv").write_text("other,text\n1,c\n")
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    (tmp_path / "notes.md").write_text("no text of ours\n")
    (tmp_path / "deeper.txt").mkdir()
    assert load_texts(str(tmp_path)) == ["a", "b", "b2", "c"]
    assert load_texts(str(tmp_path), limit=2) == ["a", "b"]
    (tmp_path / "test.txt").write_text("test\n")
    (tmp_path / "training.txt").write_text("no split\n")
    assert load_texts(str(tmp_path)) == ["a", "b", "b2", "c", "test", "no split"]
    (tmp_path / "train-00001-of-00002.txt").write_text("second\n")
    (tmp_path / "train-00000-of-00002.txt").write_text("first\n")
    assert load_texts(str(tmp_path)) == ["first", "second"]
    (tmp_path / "train.txt").write_text("third\n")
    assert load_texts(str(tmp_path)) == ["first", "second", "third"]


def test_another_column_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"sentence": "s{i}", "text": {i}}}\n' for i in range(3)))
    assert load_texts("~/a.jsonl", text_column="sentence") == ["s0", "s1", "s2"]


def test_offline_docstrings_are_those_of_the_train_split():
    texts = load_texts("offline:docstrings")
    splits = docstrings.build()
    assert texts == [row.text for row in splits["train"]] and len(texts) > 500
    assert not set(texts) & {row.text for row in splits["test"]}


def test_a_hub_dataset_gives_its_train_split(monkeypatch, tmp_path):
    """The Hub's builders are those of local files: stand in for the Hub with one of them."""
    real, asked = datasets.load_dataset_builder, []
    files = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(f'{{"text": "{split} {i}"}}\n' for i in range(1500)))
        files[split] = str(path)

    def stand_in(*args):
        asked.append(args)
        return real("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    assert load_texts("owner/name:plain") == [f"train {i}" for i in range(1500)]
    assert load_texts("owner/name", limit=3) == ["train 0", "train 1", "train 2"]
    assert asked == [("owner/name", "plain"), ("owner/name", None)]
    with pytest.raises(ValueError, match=r"`text_column` must be a column of owner/name.*\['text'\]"):
        load_texts("owner/name", text_column="sentence")


def test_what_is_no_source(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the Hub was asked"))
    for source in ("absent.txt", "./absent", str(tmp_path / "absent"), "a/b/c", ""):
        with pytest.raises(ValueError, match="`source` must be a file or folder that exists.*there is no such path"):
            load_texts(source)
    with pytest.raises(ValueError, match="`source` must be spelled 'offline:docstrings', got 'offline:docs'"):
        load_texts("offline:docs")
    (tmp_path / "a.pdf").write_text("x")
    for source in (tmp_path / "a.pdf", tmp_path):
        with pytest.raises(ValueError, match=r"ends in one of .txt, .json.*a.pdf.*Save the texts in a .txt file"):
            load_texts(str(source))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must hold text, got an empty file"),
        ("a.jsonl", b"", "must hold text, got an empty file"),
        ("a.txt", b" \n\n\t\n", "at least 2 texts, got 0 beside 3 empty rows"),
        ("a.txt", b"only one\n\n", "at least 2 texts, got 1 beside 1 empty rows.*one per line"),
        ("a.csv", b"text\none\n", "at least 2 texts, got 1"),
        ("a.txt", b"fine\ncaf\xe9 au lait\n", r"UTF-8, got invalid continuation byte \(byte 0xe9\) in line 2"),
        ("a.txt", "one\ntwo\n".encode("utf-16"), r"UTF-8, got invalid start byte \(byte 0xff\) in line 1"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "got a NUL byte, as in binary data in line 1"),
        ("a.txt", b"MZ\x00\x01\n", "got a NUL byte, as in binary data in line 1"),
        ("a.jsonl", b"\x00\x01\x02\xff", "must be a readable json file"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n{"text": "b"}\n', "must be a readable json file"),
        ("a.csv", b"text\ncaf\xe9\nb\n", "must be a readable csv file"),
        ("a.parquet", b"PAR1 but no more", "must be a readable parquet file"),
        ("a.jsonl", b'{"Text": "a", "n": 1}\n{"Text": "b", "n": 1}\n', r"column of .*\['Text', 'n'\].*perhaps to 'Text'"),
        ("a.csv", b"a,b\n1,2\n", r"`text_column` must be a column of .*\['a', 'b'\]"),
        ("a.jsonl", b'{"text": 1}\n{"text": 2}\n', r"column 'text' of .*must hold strings, got 1 \(int\)"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n{"text": []}\n', r"must hold strings, got \['a', 'b'\] \(list\)"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            load_texts(str(source))
        assert str(tmp_path) in str(caught.value)


# --- tokenize_texts --------------------------------------------------------------------------------------------------


def test_tokens_are_cut_not_padded_and_numbered(tokenizer, caplog):
    texts = ["w0 w1 w2", "", "w3", "w4 unheard", "unheard unheard", "w5 [SEP] w6", LONG]
    rows = tokenize_texts(texts, tokenizer, max_length=8)
    assert rows.column_names == ["input_ids", "special_tokens_mask", "row_id"] and not rows.cache_files
    # [CLS] = 2, [SEP] = 3, w0 = 5
    assert rows["input_ids"][:] == [[2, 5, 6, 7, 3], [2, 10, 3, 11, 3], [2, *[5] * 6, 3]]
    assert rows["special_tokens_mask"][:] == [[1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, *[0] * 6, 1]]
    assert rows["row_id"][:] == [0, 5, 6]
    assert "4 of 7 texts have fewer than 2 ordinary tokens and are dropped, the first of them ''." in caplog.text


def test_many_texts_keep_their_places_and_say_nothing(tokenizer, caplog):
    texts = [f"w{i % 20} w{i // 20 % 20} w{i // 400}" for i in range(2300)]
    rows = tokenize_texts(texts, tokenizer)
    assert rows["row_id"][:] == list(range(2300))
    assert tokenizer.batch_decode(rows["input_ids"][:], skip_special_tokens=True) == texts
    assert not caplog.records


def test_a_tokenizer_that_adds_nothing_has_ordinary_tokens_only():
    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    causal = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="</s>")
    rows = tokenize_texts(["a b a", "b b"], causal)
    assert rows["input_ids"][:] == [[1, 2, 1], [2, 2]] and rows["special_tokens_mask"][:] == [[0, 0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("texts", "max_length", "message"),
    [
        ("w0 w1", 64, "`texts` must be a list of strings, got one string"),
        (["w0 w1", 7], 64, "`texts` must be a list of strings, got 7 among them"),
        ([], 64, "must hold a text with 2 ordinary tokens, got 0 texts with fewer:"),
        (["", "w0", "unheard of"], 64, "got 3 texts with fewer, the first of them '': .*knows their language"),
        (["w0 w1 w2"], 3, "got 1 texts with fewer, the first of them 'w0 w1 w2'.*`max_length`=3"),
    ],
)
def test_texts_that_are_refused(tokenizer, texts, max_length, message):
    with pytest.raises(ValueError, match=message):
        tokenize_texts(texts, tokenizer, max_length=max_length)


def test_a_collator_that_masks_anew_takes_the_rows_and_heeds_their_mask(rows, tokenizer):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
    batch = collate([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    masked = batch["labels"] != -100
    assert masked.any() and (batch["labels"][masked] >= len(SPECIAL)).all()


# --- mask_once -------------------------------------------------------------------------------------------------------


def test_only_ordinary_tokens_are_masked_and_everything_else_stays(rows, tokenizer):
    masked = mask_once(rows, tokenizer, seed=3, max_length=50)
    assert masked.column_names == ["input_ids", "attention_mask", "labels", "row_id"] and not masked.cache_files
    assert masked["row_id"][:] == rows["row_id"][:]
    for before, after in zip(rows, masked, strict=True):
        ids, n = before["input_ids"], len(before["input_ids"])
        assert after["attention_mask"] == [1] * n + [0] * (50 - n)
        assert after["input_ids"][n:] == [tokenizer.pad_token_id] * (50 - n) and set(after["labels"][n:]) <= {-100}
        hidden = [t for t in range(n) if after["labels"][t] != -100]
        assert hidden and all(after["labels"][t] == ids[t] >= len(SPECIAL) for t in hidden)
        assert all(after["input_ids"][t] == ids[t] for t in range(n) if t not in hidden)
        assert all(after["input_ids"][t] >= len(SPECIAL) - 1 for t in hidden)  # the mask token or a word


def test_the_shares_are_those_of_bert(tokenizer):
    """Counts within 4 standard deviations of their binomial expectation, and replacements uniform over the words."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(2000)]
    rows = tokenize_texts(texts, tokenizer)
    masked = mask_once(rows, tokenizer, seed=0)
    ids = np.array([row + [0] * (64 - len(row)) for row in rows["input_ids"]])
    shown, labels = np.array(masked["input_ids"][:]), np.array(masked["labels"][:])
    hidden = labels != -100

    def near(count, n, p):
        return abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))

    n = int(hidden.sum())
    assert near(n, 60 * 2000, 0.15)
    assert near(np.sum(shown[hidden] == tokenizer.mask_token_id), n, 0.8)
    by_chance = 0.1 / len(WORDS)  # a random word is now and then the word itself
    assert near(np.sum(shown[hidden] == ids[hidden]), n, 0.1 + by_chance)
    changed = hidden & (shown != ids) & (shown != tokenizer.mask_token_id)
    assert near(changed.sum(), n, 0.1 - by_chance)
    for word in range(len(SPECIAL), len(SPECIAL) + len(WORDS)):
        assert near(np.sum(shown[changed] == word), changed.sum(), 1 / len(WORDS))
    for t in range(1, 61):  # no place is preferred
        assert near(hidden[:, t].sum(), 2000, 0.15)
    neighbors = hidden[:, 1:60] & hidden[:, 2:61]  # nor do masks come in runs
    assert near(neighbors.sum(), neighbors.size, 0.15**2)


def test_a_row_without_a_mask_gets_one_anywhere(tokenizer):
    rows = tokenize_texts(["w1 w2 [SEP] w3"] * 900, tokenizer)
    labels = np.array(mask_once(rows, tokenizer, seed=0, max_length=6, probability=1e-9)["labels"][:])
    assert ((labels != -100).sum(1) == 1).all()
    counts = (labels != -100).sum(0)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert all(abs(counts[t] - 300) < 4 * math.sqrt(900 * 2 / 9) for t in (1, 2, 4))


def test_all_ordinary_tokens_can_be_masked(rows, tokenizer):
    for before, after in zip(rows, mask_once(rows, tokenizer, seed=0, probability=1), strict=True):
        ordinary = [i for i in before["input_ids"] if i >= len(SPECIAL)]
        assert [label for label in after["labels"] if label != -100] == ordinary


def test_masks_belong_to_seed_and_row_whatever_stands_around(rows, tokenizer):
    whole = mask_once(rows, tokenizer, seed=5)
    reference = _by_id(whole)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for part in (rows.shuffle(seed=1), rows.select(range(150, 20, -3)), rows.filter(lambda row: row["row_id"] % 2)):
        masked = _by_id(mask_once(part, tokenizer, seed=5))
        assert len(masked) == len(part) and all(reference[i] == row for i, row in masked.items())
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert all(row["labels"] != reference[i]["labels"] for i, row in _by_id(mask_once(rows, tokenizer, seed=6)).items()
               if len(rows[i]["input_ids"]) > 30)  # fmt: skip
    longer = mask_once(rows, tokenizer, seed=5, max_length=80)
    assert [row[:64] for row in longer["labels"]] == whole["labels"][:]


def test_equal_texts_are_masked_apart(tokenizer):
    masked = mask_once(tokenize_texts([LONG] * 5, tokenizer), tokenizer, seed=0)
    assert len({tuple(labels) for labels in masked["labels"]}) == 5


def test_the_tokenizers_own_special_tokens_are_known_without_the_column(rows, tokenizer):
    bare = mask_once(rows.remove_columns("special_tokens_mask"), tokenizer, seed=2)
    assert bare.to_dict() == mask_once(rows, tokenizer, seed=2).to_dict()
    tensors = rows.select(range(9)).with_format("torch")
    assert mask_once(tensors, tokenizer, seed=2).to_dict() == {k: v[:9] for k, v in bare.to_dict().items()}


def test_what_cannot_be_masked(rows, tokenizer):
    def refused(message, dataset=rows, by=tokenizer, **options):
        with pytest.raises(ValueError, match=message):
            mask_once(dataset, by, **{"seed": 0, **options})

    refused("must have a mask token, got a .* without one.*Use the tokenizer of a masked language model; a causal model",
            by=_tokenizer(mask_token=None))  # fmt: skip
    refused("must have a padding token", by=_tokenizer(pad_token=None))
    for probability in (0, -0.1, 1.5, math.nan):
        refused(rf"`probability` must be in \(0, 1\], got {probability}", probability=probability)
    refused("`seed` must be 0 or more, got -1", seed=-1)
    refused(r"columns input_ids and row_id, got .* without \['row_id'\]", rows.remove_columns("row_id"))
    refused("`max_length` must hold every row, got 20 for a row of 4. tokens", max_length=20)
    no_word = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 1, 3]], "row_id": [7, 8]})
    refused("must have an ordinary token, got none in the row with row_id 8", no_word)
    mask_once(no_word.select([0]), tokenizer, seed=0)
