"""`load_images`: the digits as they are, every way in without loss, every refusal beside a neighbor that passes."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_backdoor_defense.data.images import describe_images, load_images, read_images
from hf_backdoor_defense.data.pixels import pixels, png

SIGNS = Path(__file__).resolve().parents[3] / "shared" / "data" / "sign_digits" / "sign_digits_32.npz"
SPLITS = ["train", "validation", "test"]


def noise(n=40, shape=(8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(n, *shape), dtype=np.uint8)


def labels(n=40, classes=2):
    return np.arange(n) % classes


def by_id(loaded):
    return {
        row["row_id"]: (pixels(row["image"]).tolist(), row["label"]) for dataset in loaded.values() for row in dataset
    }


def write_folder(root, images, numbers, names):
    for i, (image, label) in enumerate(zip(images, numbers, strict=True)):
        path = root / names[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_sklearns_in_constant_stratified_splits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    loaded, other = load_images("offline:digits"), load_images("offline:digits", seed=7)
    assert loaded.num_rows == {"train": 1197, "validation": 150, "test": 450}
    for split, dataset in loaded.items():
        assert dataset.features == Features(
            image=Image(), label=ClassLabel(names=[str(i) for i in range(10)]), row_id=Value("int64")
        )
        assert dataset["row_id"][:] == other[split]["row_id"][:]
        share = len(dataset) / 1797
        for label, n in Counter(dataset["label"]).items():
            assert abs(n - share * (digits.target == label).sum()) <= 1.5
    rows = by_id(loaded)
    assert sorted(rows) == list(range(1797))
    for i in range(0, 1797, 50):
        got = np.array(rows[i][0])[..., 0]
        assert rows[i][1] == digits.target[i]
        # round(255 v / 16) in whole numbers; half-way only for v = 8, where 127.5 becomes 128 either way
        assert (got == (digits.images[i].astype(int) * 255 + 8) // 16).all()


def test_a_limit_of_digits_is_stratified_and_its_rows_are_the_source_s() -> None:
    limited = load_images("offline:digits", limit=50, seed=1)
    whole = by_id(load_images("offline:digits"))
    assert limited.num_rows == {"train": 50, "validation": 50, "test": 50}
    assert set(Counter(limited["train"]["label"]).values()) <= {4, 5, 6}
    assert all(whole[row_id] == row for row_id, row in by_id(limited).items())


# --- arrays and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (5, 7, 1), (6, 4, 3)], ids=str)
def test_an_npz_is_cut_as_a_file_is_and_keeps_each_pixel(tmp_path, shape) -> None:
    images = noise(60, shape)
    np.savez(tmp_path / "a.npz", image=images, label=labels(60))
    loaded = load_images(str(tmp_path / "a.npz"))
    assert loaded.num_rows == {"train": 48, "validation": 6, "test": 6}
    assert loaded["train"].features["label"].names == ["0", "1"]
    expected = {i: (image.reshape(*shape[:2], -1).tolist(), i % 2) for i, image in enumerate(images)}
    assert by_id(loaded) == expected
    assert load_images(str(tmp_path / "a.npz"), seed=1)["test"]["row_id"][:] != loaded["test"]["row_id"][:]


def test_an_npz_of_splits_and_other_names(tmp_path) -> None:
    arrays = {"train_x": noise(30), "train_y": labels(30), "test_x": noise(10, seed=1), "test_y": labels(10)}
    np.savez(tmp_path / "a.npz", **arrays)
    loaded = load_images(str(tmp_path / "a.npz"), image_column="x", label_column="y")
    assert loaded.num_rows == {"train": 27, "validation": 3, "test": 10}
    assert loaded["test"]["row_id"][:] == list(range(30, 40))
    np.savez(tmp_path / "b.npz", **arrays, dev_x=noise(6, seed=2), dev_y=labels(6).astype(float))
    loaded = load_images(str(tmp_path / "b.npz"), image_column="x", label_column="y")
    assert loaded.num_rows == {"train": 30, "validation": 6, "test": 10}


def test_a_folder_of_classes_equals_the_npz_it_was_made_from(tmp_path) -> None:
    images, numbers = noise(44, (6, 5, 3)), labels(44, 11)
    order = np.argsort(numbers, kind="stable")  # a folder's rows come class by class
    np.savez(tmp_path / "a.npz", image=images[order], label=numbers[order])
    write_folder(tmp_path / "folder", images, numbers, [str(i) for i in range(11)])  # "10" comes after "9"
    (tmp_path / "folder" / "README.md").write_text("not an image")
    (tmp_path / "folder" / "3" / "Thumbs.db").write_text("not an image")
    (tmp_path / "folder" / ".cache").mkdir()
    folder, npz = load_images(str(tmp_path / "folder")), load_images(str(tmp_path / "a.npz"))
    for split in SPLITS:
        assert folder[split].features == npz[split].features
        assert folder[split].to_dict() == npz[split].to_dict()
    assert describe_images(folder) == describe_images(npz)


def test_a_folder_of_splits_names_its_classes_and_photos_are_decoded_once(tmp_path) -> None:
    write_folder(tmp_path / "train", noise(20), labels(20), ["cat", "dog"])
    write_folder(tmp_path / "test", noise(4, seed=1), [1, 1, 1, 1], ["cat", "dog"])
    turned = PIL.Image.fromarray(noise(1, (6, 9, 3), seed=3)[0])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(tmp_path / "test" / "dog" / "999.jpg", exif=exif, quality=95)
    loaded = load_images(str(tmp_path))
    assert loaded.num_rows == {"train": 18, "validation": 2, "test": 5}
    assert loaded["test"].features["label"].names == ["cat", "dog"] and set(loaded["test"]["label"]) == {1}
    last = loaded["test"][4]["image"]
    assert last.format == "PNG" and last.size == (6, 9)
    decoded = np.asarray(PIL.Image.open(tmp_path / "test" / "dog" / "999.jpg"))
    assert (np.asarray(last) == np.rot90(decoded, -1)).all()


def test_a_class_may_be_called_test(tmp_path) -> None:
    write_folder(tmp_path, noise(20), labels(20), ["exam", "test"])
    assert load_images(str(tmp_path)).num_rows == {"train": 16, "validation": 2, "test": 2}


def test_columns_of_a_hub_dataset(monkeypatch) -> None:
    cells = [png(image[..., None]) for image in noise(30)]
    features = Features(img=Image(), y=ClassLabel(names=["a", "b"]))
    train = Dataset.from_dict({"img": cells, "y": labels(30).tolist()}, features=features)
    monkeypatch.setattr("hf_backdoor_defense.data.images.read_hub", lambda task, **_: {"train": train, "test": train})
    loaded = load_images("owner/name", image_column="img", label_column="y")
    assert loaded.num_rows == {"train": 27, "validation": 3, "test": 30}
    assert loaded["test"].features["label"].names == ["a", "b"]
    assert pixels(loaded["test"][3]["image"]).tolist() == noise(30)[3][..., None].tolist()
    assert describe_images(loaded)["shared_images"] == 27
    with pytest.raises(
        ValueError, match="`image_column` must be a column of owner/name .*got 'image'.*perhaps to 'img'"
    ):
        load_images("owner/name", label_column="y")
    with pytest.raises(ValueError, match="`image_column` must be a column of images.*got 'y', which holds ClassLabel"):
        load_images("owner/name", image_column="y", label_column="y")


def test_labels_of_samples_may_be_names_and_only_loading_insists_on_numbers(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", image=noise(4), label=np.array(["x", "y", "x", "y"]))
    assert read_images(str(tmp_path / "a.npz"))["train"]["label"][:] == ["x", "y", "x", "y"]
    with pytest.raises(ValueError, match="be integers, got 4 of 4 rows.*Map the names to 0..C-1"):
        load_images(str(tmp_path / "a.npz"))


# --- refusals --------------------------------------------------------------------------------------------------------


def save(**arrays):
    return lambda folder: np.savez(folder / "a.npz", **arrays)


NOT_A_NUMBER = np.full((40, 8, 8), np.nan)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save(image=noise() / np.float32(255), label=labels()), "must hold uint8 pixels.*got float32:.*numpy.round"),
        (save(image=NOT_A_NUMBER, label=labels()), "got float64 with NaN"),
        (save(image=noise().astype(np.int64), label=labels()), "got int64"),
        (save(image=noise(shape=(3, 8, 8)), label=labels()), r"got \[40, 3, 8, 8\].*image.transpose\(0, 2, 3, 1\)"),
        (save(image=noise(shape=(8, 8, 4)), label=labels()), r"got \[40, 8, 8, 4\].*Drop transparency"),
        (save(image=noise(shape=(64,)), label=labels()), r"\[n, H, W, C\] with C = 1 or 3.*got \[40, 64\]"),
        (save(image=noise(0), label=labels(0)), r"at least one row, got \[0, 8, 8\]"),
        (save(image=noise(), label=labels(39)), r"one label per image, got \[39\] for 40 images"),
        (save(image=noise(), label=np.eye(2)[labels()]), r"one label per image, got \[40, 2\]"),
        (save(image=noise(), label=labels() - 1), "be 0 or more, got 20 of 40 rows"),
        (save(image=noise(), label=np.where(labels(), np.nan, 1.0)), "be there in every row, got 20 of 40"),
        (save(image=noise(), label=2 * labels()), r"every class in 0..2 must have a training row, got none for \[1\]"),
        (save(image=noise(), label=0 * labels()), "at least two classes, got only label 0"),
        (save(images=noise(), label=labels()), r"must hold the arrays 'image' and 'label'.*got \['images', 'label'\]"),
        (save(image=noise()), r"got \['image'\] without \['label'\]"),
        (
            save(train_image=noise(), train_label=labels(), test_image=noise(shape=(9, 9)), test_label=labels()),
            r"must have one size, got \{'train': \(8, 8\), 'test': \(9, 9\)\}",
        ),
        (
            lambda folder: np.savez(folder / "a.npz", image=np.array([{}] * 4), label=labels(4)),
            "readable .npz of plain arrays.*Python objects are not read",
        ),
        (lambda folder: (folder / "a.npz").write_bytes(b"PK\x03\x04broken"), "readable .npz of plain arrays, got"),
        (lambda folder: (folder / "a.npz").write_bytes(b""), "readable .npz of plain arrays, got"),
        (lambda folder: None, "there is no such path"),
    ],
)
def test_refused_arrays(tmp_path, write, message) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "a.npz"))


def test_labels_beyond_the_known_classes_and_small_limits(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", image=noise(), label=labels(classes=3))
    with pytest.raises(ValueError, match="be below num_labels=2, got 13 of 40 rows"):
        load_images(str(tmp_path / "a.npz"), num_labels=2)
    with pytest.raises(ValueError, match="`limit` must be at least the number of classes, 3, got 2"):
        load_images(str(tmp_path / "a.npz"), limit=2)
    assert load_images(str(tmp_path / "a.npz"), limit=3, num_labels=4)["train"].num_rows == 3


@pytest.mark.parametrize(
    ("mode", "message"),
    [("RGBA", "got PIL mode 'RGBA'"), ("CMYK", "'CMYK'"), ("LA", "'LA'"), ("I;16", "'I;16'"), ("F", "'F'")],
)
def test_images_that_would_lose_something_are_refused_by_name(tmp_path, mode, message) -> None:
    write_folder(tmp_path, noise(6), labels(6), ["a", "b"])
    PIL.Image.new(mode, (8, 8)).save(tmp_path / "b" / "odd.tif")
    with pytest.raises(ValueError, match=rf"odd\.tif must be gray or RGB.*{message}.*Convert it first"):
        load_images(str(tmp_path))


def test_black_and_white_and_palettes_lose_nothing(tmp_path) -> None:
    write_folder(tmp_path, noise(20), labels(20), ["a", "b"])
    bits = PIL.Image.fromarray(noise(1)[0] > 127)
    colors = PIL.Image.fromarray(noise(1, (8, 8, 3))[0] // 200 * 200).quantize(8)
    bits.save(tmp_path / "a" / "bits.png"), colors.save(tmp_path / "a" / "colors.png")
    rows = read_images(str(tmp_path))["train"]
    found = {p.name: pixels(row["image"]) for p, row in zip(sorted((tmp_path / "a").iterdir()), rows, strict=False)}
    assert (found["bits.png"][..., 0] == 255 * np.asarray(bits)).all()
    assert (found["colors.png"] == np.asarray(colors.convert("RGB"))).all()
    colors.info["transparency"] = 0
    with pytest.raises(ValueError, match="got PIL mode 'P'"):
        pixels(colors)


def test_refused_folders_and_files(tmp_path) -> None:
    def refused(message, task=tmp_path):
        with pytest.raises(ValueError, match=message):
            load_images(str(task))

    refused("must hold one folder of images per class")
    write_folder(tmp_path, noise(20), labels(20), ["a", "b"])
    (tmp_path / "c").mkdir()
    refused(r"got no image in \['c'\]: the folder's name is the label")
    (tmp_path / "c" / "x.png").write_bytes((tmp_path / "a" / "000.png").read_bytes()[:-40])
    refused("x.png must be an image that can be read, got")
    (tmp_path / "c" / "x.png").unlink(), (tmp_path / "c").rmdir()
    assert load_images(str(tmp_path)).num_rows["train"] == 16
    refused("a/000.png", tmp_path / "a" / "000.png")
    refused("must name an .npz file, a folder or a Hub id that exists", tmp_path / "a" / "nothing.png")
    splits = tmp_path / "splits"
    write_folder(splits / "train", noise(20), labels(20), ["a", "b"])
    write_folder(splits / "test", noise(2), [0, 1], ["a", "c"])
    refused(r"must occur in train, got \['c'\] beside \['a', 'b'\]", splits)
    write_folder(splits / "valid", noise(2), [0, 1], ["a", "b"])
    write_folder(splits / "dev", noise(2), [0, 1], ["a", "b"])
    refused(r"one folder per split, got \['valid', 'dev'\]", splits)


@pytest.mark.parametrize("task", ["offline:digit", "digits", "offline:docstrings"])
def test_a_misspelled_name_is_corrected(task) -> None:
    with pytest.raises(ValueError, match="must be spelled 'offline:digits', got"):
        load_images(task)


def test_nothing_is_left_behind(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_folder(tmp_path / "folder", noise(20), labels(20), ["a", "b"])
    loaded = load_images(str(tmp_path / "folder"))
    assert not (tmp_path / "cache").exists() and all(not dataset.cache_files for dataset in loaded.values())


# --- what was loaded -------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_pixels_labels_and_ids(tmp_path) -> None:
    def fingerprint(images, numbers, name):
        np.savez(tmp_path / name, image=images, label=numbers)
        return describe_images(load_images(str(tmp_path / name)))

    images = noise()
    same = fingerprint(images, labels(), "a.npz")
    assert same == fingerprint(images[..., None], labels(), "b.npz")
    assert same["rows"] == {"train": 32, "validation": 4, "test": 4} and same["label_names"] == ["0", "1"]
    assert same["class_counts"]["train"] == {"0": 16, "1": 16} and same["majority_share"]["test"] == 0.5
    assert same["shared_images"] == 0
    changed = images.copy()
    changed[5, 0, 0] ^= 1
    others = [fingerprint(changed, labels(), "c.npz"), fingerprint(images, 1 - labels(), "d.npz")]
    others.append(fingerprint(images.reshape(40, 4, 16), labels(), "e.npz"))  # the same bytes in another shape
    assert len({same["fingerprint"], *(other["fingerprint"] for other in others)}) == 4
    assert fingerprint(np.repeat(images[:1], 40, axis=0), labels(), "f.npz")["shared_images"] == 1


@pytest.mark.skipif(
    not SIGNS.is_file(), reason="../shared/data/sign_digits is absent (benchmark data is no part of the package)"
)
def test_hand_signs_in_color() -> None:
    loaded = load_images(str(SIGNS))
    assert loaded.num_rows == {"train": 1484, "validation": 165, "test": 413}
    with np.load(SIGNS, allow_pickle=False) as arrays:
        assert pixels(loaded["test"][7]["image"]).tolist() == arrays["test_image"][7].tolist()
        assert loaded["test"]["label"][:] == arrays["test_label"].tolist()
    facts = describe_images(loaded)
    assert facts["class_counts"]["test"]["4"] == 36 and facts["shared_images"] == 0
