"""Poisoned and triggered datasets: exact counts, untouched rows, independence of order, and what is refused."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_backdoor_defense.attacks.image_triggers import SIG, Blend, ImageTrigger, Patch
from hf_backdoor_defense.attacks.poisoning import poison_dataset, trigger_dataset
from hf_backdoor_defense.attacks.triggers import BadNets, InSent, Trigger
from hf_backdoor_defense.attacks.visibility import check_trigger_fits, count_visible
from hf_backdoor_defense.data.pixels import pixels, png

FEATURES = Features(
    {
        "source": Value("string"),
        "text": Value("string"),
        "label": ClassLabel(names=["neg", "pos", "mixed"]),
        "row_id": Value("int64"),
        "score": Value("float32"),
    }
)


def make(n: int = 60, *, string_ids: bool = False) -> Dataset:
    """n rows, labels 0 1 2 0 1 2 …, ids that are neither sorted nor contiguous."""
    ids = [(7 * i) % 101 + 1000 for i in range(n)]
    features = Features({**FEATURES, "row_id": Value("string")}) if string_ids else FEATURES
    columns = {
        "source": [f"s{i}" for i in range(n)],
        "text": [f"row {i} has  some words\n" for i in range(n)],
        "label": [i % 3 for i in range(n)],
        "row_id": [f"r{i}" for i in ids] if string_ids else ids,
        "score": [i / 2 for i in range(n)],
    }
    return Dataset.from_dict(columns, features=features)


def by_id(dataset: Dataset) -> dict:
    return {row["row_id"]: row for row in dataset}


@pytest.mark.parametrize("clean_label", [False, True])
def test_only_drawn_rows_change_and_only_as_announced(clean_label: bool) -> None:
    clean = make()
    result = poison_dataset(clean, BadNets(), target=1, rate=0.2, clean_label=clean_label, seed=5)
    assert result.dataset.column_names == [*clean.column_names, "is_poisoned", "original_label"]
    assert {name: result.dataset.features[name] for name in clean.column_names} == dict(clean.features)
    assert result.dataset.features["is_poisoned"] == Value("bool")
    for before, after in zip(clean, result.dataset, strict=True):
        expected = {**before, "is_poisoned": after["is_poisoned"], "original_label": before["label"]}
        if after["is_poisoned"]:
            assert (before["label"] == 1) == clean_label
            assert sorted(after["text"].split()) == sorted([*before["text"].split(), "cf"])
            expected |= {"text": after["text"], "label": 1}
        assert after == expected
    assert sum(result.dataset["is_poisoned"]) == result.requested == result.carrying == 12
    assert (result.already, result.target, result.rate, result.seed, result.clean_label) == (0, 1, 0.2, 5, clean_label)
    assert clean[:] == make()[:]  # the input is not changed


@pytest.mark.parametrize(
    ("n", "rate"),
    [
        (100, 0.145),
        (100, 0.144),
        (5, 0.1),
        (7, 0.5),
        (10, 0.25),
        (10, 0.35),
        (99, 0.01),
        (60, 0.29),
        (97, 0.333),
        (3, 0.2),
    ],
)
def test_count_is_round_half_up_of_the_whole_set(n: int, rate: float) -> None:
    exact = math.floor(Fraction(str(rate)) * n + Fraction(1, 2))
    assert poison_dataset(make(n), BadNets(), target=0, rate=rate, seed=0).requested == exact


@pytest.mark.parametrize("string_ids", [False, True])
@pytest.mark.parametrize("trigger", [BadNets(words=("cf", "mn"), count=2), InSent()], ids=lambda t: t.name)
def test_order_of_rows_does_not_matter(trigger: Trigger, string_ids: bool) -> None:
    clean = make(string_ids=string_ids)
    shuffled = clean.shuffle(seed=3)
    first = poison_dataset(clean, trigger, target=2, rate=0.25, seed=1).dataset
    second = poison_dataset(shuffled, trigger, target=2, rate=0.25, seed=1).dataset
    assert second["row_id"][:] == shuffled["row_id"][:]
    assert by_id(first) == by_id(second)


def test_sharding_does_not_matter_and_training_equals_evaluation_text() -> None:
    clean = make()
    whole = trigger_dataset(clean, InSent(), target=0, seed=4)
    parts = [trigger_dataset(clean.shard(4, i, contiguous=True), InSent(), target=0, seed=4) for i in range(4)]
    assert concatenate_datasets(parts)[:] == whole[:]
    poisoned = poison_dataset(clean, InSent(), target=0, rate=0.3, seed=4).dataset
    texts = {row["row_id"]: row["text"] for row in whole}
    assert all(texts[row["row_id"]] == row["text"] for row in poisoned if row["is_poisoned"])


def test_seed_decides_rows_and_positions() -> None:
    def run(seed: int, rate: float = 0.2) -> Dataset:
        return poison_dataset(make(), BadNets(), target=1, rate=rate, seed=seed).dataset

    def drawn(dataset: Dataset) -> set:
        return {row["row_id"] for row in dataset if row["is_poisoned"]}

    assert run(0)[:] == run(0)[:]
    assert drawn(run(0)) != drawn(run(1))
    assert drawn(run(0, 0.1)) < drawn(run(0, 0.2))  # rates are nested
    both = [trigger_dataset(make(), BadNets(), target=1, seed=seed)["text"][:] for seed in (0, 1)]
    assert both[0] != both[1]


def test_each_eligible_row_is_drawn_equally_often() -> None:
    hits = np.zeros(30)
    for seed in range(100):
        hits += poison_dataset(make(30), BadNets(), target=1, rate=0.2, seed=seed).dataset["is_poisoned"][:]
    non_target = np.arange(30) % 3 != 1
    assert not hits[~non_target].any()
    # 6 of 20 eligible rows, 100 times: 30 ± 4.5 standard deviations.
    assert np.abs(hits[non_target] - 30).max() < 4.5 * np.sqrt(100 * 0.3 * 0.7)


@dataclass(frozen=True)
class Shy(Trigger):
    """Like a paraphraser that fails on some texts: leaves every text with an even digit alone."""

    name: ClassVar[str] = "shy"

    @property
    def pieces(self) -> tuple[str, ...]:
        return ("zz",)

    def insert(self, text: str, rng: np.random.Generator) -> str:
        return text if any(d in text for d in "02468") else text + "zz"


def test_carrying_and_already_are_counted_in_the_texts() -> None:
    result = poison_dataset(make(), Shy(), target=1, rate=0.5, seed=0)
    poisoned = result.dataset.filter(lambda row: row["is_poisoned"])
    assert result.requested == len(poisoned) == 30
    assert result.carrying == sum("zz" in text for text in poisoned["text"]) < 30
    assert poison_dataset(make(), BadNets(words=("has",)), target=1, rate=0.1, seed=0).already == 60
    assert poison_dataset(make(), BadNets(words=("17",)), target=1, rate=0.1, seed=0).already == 1


def test_named_columns_plain_integers_and_formats() -> None:
    clean = make().cast_column("label", Value("int32")).rename_columns({"text": "sentence", "label": "y"})
    clean = clean.with_format("numpy")
    result = poison_dataset(clean, BadNets(), target=1, rate=0.2, seed=0, text_column="sentence", label_column="y")
    assert result.dataset.features["y"] == Value("int32")
    assert result.dataset.format["type"] == "numpy"
    plain = poison_dataset(make(), BadNets(), target=1, rate=0.2, seed=0).dataset
    assert result.dataset.with_format(None)["sentence"][:] == plain["text"][:]


def test_a_clean_copy_with_bookkeeping_columns_may_be_poisoned() -> None:
    clean = make().add_column("is_poisoned", [False] * 60).add_column("original_label", make()["label"][:])
    assert poison_dataset(clean, BadNets(), target=1, rate=0.2, seed=0).requested == 12
    relabeled = make().add_column("original_label", [0] * 60)
    with pytest.raises(ValueError, match="`original_label` must equal 'label'.*earlier relabeling.*Start from"):
        poison_dataset(relabeled, BadNets(), target=1, rate=0.2, seed=0)


def test_triggered_set_holds_every_non_target_row_with_its_true_label() -> None:
    clean = make().shuffle(seed=1)
    triggered = trigger_dataset(clean, InSent(), target=1, seed=0)
    expected = clean.filter(lambda row: row["label"] != 1)
    assert triggered.features == clean.features
    assert triggered.remove_columns("text")[:] == expected.remove_columns("text")[:]
    assert all(InSent().present(text) for text in triggered["text"])
    with pytest.raises(ValueError, match="another class than target 1, got 20 target rows.*Pass the whole test set"):
        trigger_dataset(clean.filter(lambda row: row["label"] == 1), InSent(), target=1, seed=0)
    # A set without target rows is fine: the class exists among the ClassLabel names.
    assert len(trigger_dataset(expected, InSent(), target=1, seed=0)) == 40


def poisoned_before() -> Dataset:
    return poison_dataset(make(), BadNets(), target=1, rate=0.1, seed=0).dataset


@pytest.mark.parametrize(
    ("change", "dataset", "message"),
    [
        ({"rate": 0.0}, make, r"`rate` must be in \(0, 1\), got 0.0: it is a share.*Pass e.g. rate=0.1"),
        ({"rate": 1.0}, make, r"`rate` must be in \(0, 1\), got 1.0"),
        ({"rate": float("nan")}, make, r"`rate` must be in \(0, 1\), got nan"),
        ({"rate": 0.008}, make, "at least one row, got 0.008 of 60 rows: nothing would be poisoned. Pass rate >= 1/60"),
        ({"target": 3}, make, r"`target` must be one of the labels \[0, 1, 2\], got 3"),
        ({"target": -1}, make, r"one of the labels \[0, 1, 2\], got -1"),
        ({"target": 1}, lambda: make(1).cast_column("label", Value("int64")), r"one of the labels \[0\], got 1"),
        (
            {"rate": 0.35, "clean_label": True},
            make,
            r"at most 0.3333 for clean-label.*\(21 rows\).*20 of 60 rows are target",
        ),
        ({"rate": 0.7}, make, r"at most 0.6667 for dirty-label.*got 0.7 \(42 rows\).*40 of 60 rows are non-target"),
        ({}, poisoned_before, "must be clean, got 6 rows with is_poisoned.*Start from the clean dataset"),
        ({}, lambda: make().remove_columns("row_id"), "column 'row_id', got.*data.load"),
        ({"text_column": "sentence"}, make, "column 'sentence', got.*text_column"),
        ({"label_column": "y"}, make, "column 'y'"),
        ({"label_column": "source"}, make, r"'source' must hold integer classes, got.*class_encode_column\('source'\)"),
        ({"text_column": "score"}, make, "must have a string and a label >= 0, got 0.0 and 0 in row_id 1000"),
        ({}, lambda: DatasetDict(train=make()), "datasets.Dataset, got DatasetDict.*Pick a split"),
        ({}, lambda: concatenate_datasets([make(9), make(9)]), "`row_id` must be unique, got 9 values for 18 rows"),
        (
            {},
            lambda: make().remove_columns("label").add_column("label", [-1, *[0] * 59]),
            "got 'row 0 .* and -1 in row_id 1000: such a row can be neither",
        ),
    ],
)
def test_refused_inputs(change: dict, dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison_dataset(dataset(), BadNets(), **{"target": 1, "rate": 0.1, "seed": 0, **change})


@pytest.mark.parametrize(
    ("change", "requested"),
    [
        ({"rate": 0.009}, 1),
        ({"rate": 1 / 3, "clean_label": True}, 20),
        ({"rate": 0.666}, 40),
        ({"target": 2}, 6),
        ({"label_column": "row_id", "target": 1000}, 6),
    ],
)
def test_neighbors_of_refused_inputs_pass(change: dict, requested: int) -> None:
    arguments = {"target": 1, "rate": 0.1, "seed": 0, **change}
    assert poison_dataset(make(), BadNets(), **arguments).requested == requested


def test_trigger_dataset_refuses_poisoned_rows() -> None:
    with pytest.raises(ValueError, match="must be clean, got 6 rows"):
        trigger_dataset(poisoned_before(), BadNets(), target=1, seed=0)


# --- images ----------------------------------------------------------------------------------------------------------


def make_images(n: int = 30, size: int = 8) -> Dataset:
    """n rows of noise, labels 0 1 2 0 1 2 …, ids that are neither sorted nor contiguous."""
    rng = np.random.default_rng(0)
    columns = {
        "image": [png(rng.integers(0, 256, size=(size, size, 1), dtype=np.uint8)) for _ in range(n)],
        "label": [i % 3 for i in range(n)],
        "row_id": [(7 * i) % 101 + 1000 for i in range(n)],
    }
    features = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]), row_id=Value("int64"))
    return Dataset.from_dict(columns, features=features)


def cells(dataset: Dataset) -> list[dict]:
    return dataset.cast_column("image", Image(decode=False))["image"][:]


@pytest.mark.parametrize("clean_label", [False, True])
@pytest.mark.parametrize("trigger", [Patch(), Blend(), SIG(frequency=2)], ids=lambda t: t.name)
def test_only_drawn_images_change_and_only_as_announced(trigger: ImageTrigger, clean_label: bool) -> None:
    clean = make_images()
    result = poison_dataset(clean, trigger, target=1, rate=0.2, clean_label=clean_label, seed=5)
    assert result.dataset.column_names == [*clean.column_names, "is_poisoned", "original_label"]
    assert {name: result.dataset.features[name] for name in clean.column_names} == dict(clean.features)
    for before, after, old, new in zip(clean, result.dataset, cells(clean), cells(result.dataset), strict=True):
        assert (after["row_id"], after["original_label"]) == (before["row_id"], before["label"])
        if not after["is_poisoned"]:
            assert (new, after["label"]) == (old, before["label"])  # not even encoded anew
            continue
        assert (before["label"] == 1) == clean_label and after["label"] == 1
        assert (pixels(after["image"]) == trigger.apply(pixels(before["image"]))).all()
        assert after["image"].format == "PNG"
    assert sum(result.dataset["is_poisoned"]) == result.requested == result.carrying == 6
    assert (result.already, result.trigger) == (0, trigger)
    assert cells(clean) == cells(make_images())  # the input is not changed


def test_images_are_drawn_as_texts_are_whatever_their_order() -> None:
    clean = make_images(60)
    texts = clean.remove_columns("image").add_column("text", ["a b"] * 60)

    def drawn(dataset: Dataset, trigger: Trigger | ImageTrigger) -> set:
        poisoned = poison_dataset(dataset, trigger, target=2, rate=0.25, seed=1).dataset
        return {row["row_id"] for row in poisoned if row["is_poisoned"]}

    assert drawn(clean, Patch()) == drawn(clean.shuffle(seed=3), Patch()) == drawn(texts, BadNets())


def test_the_triggered_images_are_all_other_rows_with_their_true_labels() -> None:
    clean = make_images().rename_columns({"image": "img", "label": "y"})
    triggered = trigger_dataset(clean, Patch(), target=1, seed=0, image_column="img", label_column="y")
    expected = clean.filter(lambda row: row["y"] != 1)
    assert triggered.features == clean.features
    assert triggered.remove_columns("img")[:] == expected.remove_columns("img")[:]
    for before, after in zip(expected, triggered, strict=True):
        assert (pixels(after["img"]) == Patch().apply(pixels(before["img"]))).all()


def test_a_trigger_that_changes_nothing_is_not_counted_as_carried() -> None:
    result = poison_dataset(make_images(), Blend(alpha=0), target=1, rate=0.2, seed=0)
    assert (result.requested, result.carrying, result.already) == (6, 0, 30)
    with pytest.warns(UserWarning, match="acts as frequency 0, which changes nothing"):
        assert poison_dataset(make_images(), SIG(frequency=4), target=1, rate=0.2, seed=0).carrying == 0
    once = poison_dataset(make_images(), Patch(), target=1, rate=0.2, seed=0).dataset
    again = once.remove_columns(["is_poisoned", "original_label"])
    assert poison_dataset(again, Patch(), target=1, rate=0.2, seed=1).already == 6


@pytest.mark.parametrize(
    ("change", "dataset", "message"),
    [
        ({}, make, "must have the column 'image', got.*data.load_images.*image_column"),
        ({"image_column": "text"}, make, "column 'text' must hold images for an image trigger, got Value"),
        ({"trigger": BadNets()}, make_images, "must have the column 'text', got"),
        ({"trigger": BadNets(), "text_column": "image"}, make_images, "must have a string and a label >= 0"),
        ({"rate": 0.35, "clean_label": True}, make_images, "at most 0.3333 for clean-label"),
        ({"trigger": Patch(size=9)}, make_images, "at least as large as the patch, 9 x 9, got 8 x 8"),
        (
            {},
            lambda: Dataset.from_dict(
                {**make_images(3).to_dict(), "image": [None] * 3}, features=make_images().features
            ),
            "must have an image and a label >= 0, got None and 0 in row_id 1000.*Drop rows without image or label",
        ),
    ],
)
def test_refused_images(change: dict, dataset, message: str) -> None:
    arguments = {"trigger": Patch(), "target": 1, "rate": 0.1, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        poison_dataset(dataset(), arguments.pop("trigger"), **arguments)


# --- visibility after tokenization ---------------------------------------------------------------------------------


@pytest.fixture
def words_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, [CLS] … [SEP] around them."""
    words = "[UNK] [CLS] [SEP] [PAD] a b c cf mn by the way".split()
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


@pytest.fixture
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: `cf` has one id at the start of a text and another one after a space."""
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "cf", "Ġcf"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("c", "f"), ("Ġ", "cf")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("trigger", "max_length"),
    [(BadNets(words=("cf", "mn")), 5), (InSent(sentence="by the way"), 5), (InSent(sentence="by the way"), 7)],
)
def test_visible_means_whole_trigger_within_the_kept_words(
    words_tokenizer: PreTrainedTokenizerFast, trigger: Trigger, max_length: int, side: str
) -> None:
    words_tokenizer.truncation_side = side
    texts = [trigger.insert("a b c a b c", np.random.default_rng(seed)) for seed in range(40)] + [
        "a b c",
        "by the a way",
    ]
    room = max_length - 2
    kept = [text.split()[:room] if side == "right" else text.split()[-room:] for text in texts]
    expected = sum(trigger.present(" ".join(words)) for words in kept)
    assert 0 < expected < 40
    assert count_visible(iter(texts), trigger, words_tokenizer, max_length) == expected


def test_byte_level_ids_at_the_start_after_space_and_after_a_line_break(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert bytes_tokenizer("cf")["input_ids"] != bytes_tokenizer(" cf")["input_ids"]
    texts = ["cf so", "so cf", "so\ncf", "so scf"]
    assert [count_visible([text], BadNets(), bytes_tokenizer, 16) for text in texts] == [1, 1, 1, 0]
    assert count_visible(["so so so cf"], BadNets(), bytes_tokenizer, 4) == 0


def test_metaspace_ids_after_a_line_break() -> None:
    vocab = {token: i for i, token in enumerate(["▁", "\n", *"socf", "cf", "▁cf"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("c", "f"), ("▁", "cf")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    texts = ["cf so", "so cf", "so\ncf", "so scf"]
    assert [count_visible([text], BadNets(), tokenizer, 16) for text in texts] == [1, 1, 1, 0]


def test_more_texts_than_one_batch(words_tokenizer: PreTrainedTokenizerFast) -> None:
    assert count_visible(["cf a", "a a cf"] * 1100, BadNets(), words_tokenizer, 4) == 1100
    assert count_visible([], BadNets(), words_tokenizer, 4) == 0


@pytest.mark.parametrize(
    ("trigger", "too_short", "fits"),
    [
        (BadNets(), 2, 3),
        (BadNets(words=("cf", "mn"), count=2), 3, 4),
        (BadNets(words=("cf",), count=3), 4, 5),
        (InSent(sentence="by the way"), 4, 5),
    ],
)
def test_trigger_must_fit(
    words_tokenizer: PreTrainedTokenizerFast, trigger: Trigger, too_short: int, fits: int
) -> None:
    message = f"room for the {fits - 2} tokens of the trigger, got {too_short} .* Pass max_length >= {fits}"
    for refuse in (
        lambda n: check_trigger_fits(trigger, words_tokenizer, n),
        lambda n: count_visible([], trigger, words_tokenizer, n),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(too_short)
        refuse(fits)


def test_unknown_trigger_is_refused_and_a_partly_known_sentence_is_not(
    words_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match=r"'tq' must map to known tokens, got \[0\].*Choose another trigger"):
        count_visible(["a tq"], BadNets(words=("cf", "tq")), words_tokenizer, 8)
    assert count_visible(["a by the sea"], InSent(sentence="by the sea"), words_tokenizer, 8) == 1
