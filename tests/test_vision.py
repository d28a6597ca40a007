"""Image classifiers: loading and its refusals, and batches that equal the image processor's bit for bit."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_backdoor_defense import DefendedTrainer
from hf_backdoor_defense.data.pixels import png
from hf_backdoor_defense.models import mark_backdoored, predict_logits
from hf_backdoor_defense.vision import ImageCollator, load_image_classifier, new_digits_vit


def noise(n=5, shape=(8, 8, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(n, *shape), dtype=np.uint8)


def pil(array):
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def tiny(folder, kind=ViTForImageClassification, channels=3, **options):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_channels=channels,
        **options,
    )
    kind(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return str(folder)


# --- the small ViT ---------------------------------------------------------------------------------------------------


def test_the_digits_vit_is_what_it_says_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    model, processor = new_digits_vit()
    assert torch.equal(torch.random.get_rng_state(), state)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert (config.patch_size, config.num_channels, config.num_labels) == (2, 1, 10)
    # by hand: per layer attention 4 (64² + 64), MLP 2 * 64 * 128 + 192, norms 256; 16 patches of 4 pixels and a class token
    layers = 3 * (4 * (64**2 + 64) + 2 * 64 * 128 + 192 + 256)
    assert model.num_parameters() == layers + 64 + 17 * 64 + (4 * 64 + 64) + 2 * 64 + (64 * 10 + 10)
    same, other = new_digits_vit(seed=0)[0].state_dict(), new_digits_vit(seed=1)[0].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(same["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (10, 2), (16, 2), (28, 4), (32, 4), (64, 8), (4, 2)])
def test_patches_grow_with_the_image(size: int, patch: int) -> None:
    model, processor = new_digits_vit(3, image_size=size, channels=3, label_names=["a", "b", "c"])
    assert model.config.patch_size == patch and model.config.id2label[2] == "c"
    batch = ImageCollator(processor, model.config)([{"image": pil(noise(1, (size, size, 3))[0])}])
    assert model(**batch).logits.shape == (1, 3)


def test_model_and_processor_survive_save_and_load(tmp_path, caplog) -> None:
    model, processor = new_digits_vit(label_names=[f"digit {i}" for i in range(10)])
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded, again = load_image_classifier(str(tmp_path), num_labels=10)
    assert "torchvision" not in caplog.text
    assert again.to_dict() == processor.to_dict()
    assert loaded.config.id2label == model.config.id2label
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    plain, auto = (
        AutoModelForImageClassification.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    inputs = auto([pil(image) for image in noise()], return_tensors="pt")
    assert torch.equal(plain.eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "multiple of a patch of at least 2 pixels, and hold 2 x 2 of them, got 7"),
        ({"image_size": 2}, "hold 2 x 2 of them, got 2"),
        ({"channels": 4}, r"`channels` must be 1 \(gray\) or 3 \(RGB\), got 4"),
        ({"num_labels": 1}, "`num_labels` must be at least 2, got 1"),
        ({"label_names": ["a"]}, "`label_names` must hold 10 names, got 1"),
    ],
)
def test_refused_small_models(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_digits_vit(**arguments)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_new_head_is_drawn_from_the_seed_and_named(tmp_path) -> None:
    folder = tiny(tmp_path, ViTModel)
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed + 100)
        model, _ = load_image_classifier(folder, num_labels=3, label_names=["x", "y", "z"], seed=seed)
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"} and model.config.label2id["z"] == 2


def test_a_finished_head_must_fit(tmp_path) -> None:
    folder = tiny(tmp_path, num_labels=4)
    with pytest.raises(ValueError, match="has a head for 4 classes, the task has 5"):
        load_image_classifier(folder, num_labels=5)
    assert load_image_classifier(folder, num_labels=4)[0].classifier.out_features == 4


@pytest.mark.parametrize(
    "options", [{"num_labels": 1}, {"num_labels": 4, "problem_type": "multi_label_classification"}]
)
def test_heads_that_are_no_classes_are_refused(tmp_path, options) -> None:
    folder = tiny(tmp_path, **options)
    with pytest.raises(ValueError, match="defenses need one class per row"):
        load_image_classifier(folder, num_labels=options["num_labels"])


def test_what_cannot_be_loaded_says_why(tmp_path) -> None:
    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            load_image_classifier(str(name), num_labels=4)

    refused("offline:minilm", "no embedded image model `offline:minilm`. There is one: offline:digits-vit")
    refused(tmp_path / "nothing", "neither a folder with a model nor reachable.*--model_name offline:digits-vit")
    BertConfig().save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "is a bert model, which classifies no images")
    folder = tmp_path / "vit"
    tiny(folder, num_labels=4)
    (folder / "preprocessor_config.json").rename(tmp_path / "kept.json")
    refused(folder, "cannot be loaded")
    (tmp_path / "kept.json").rename(folder / "preprocessor_config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has no safetensors weights: other formats can run code")


def test_attacked_weights_are_announced(tmp_path, caplog) -> None:
    folder = tiny(tmp_path, num_labels=4)
    mark_backdoored(folder, {"attack": "patch"})
    with caplog.at_level(logging.WARNING):
        load_image_classifier(folder, num_labels=4)
    assert "poisoned data on purpose" in caplog.text


# --- the collator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "resize"), [(1, False), (3, False), (1, True), (3, True)])
def test_batches_equal_the_processor_s_bit_for_bit(channels: int, resize: bool) -> None:
    model, processor = new_digits_vit(channels=channels)
    processor.do_resize = resize
    processor.image_mean, processor.image_std = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    images = [*noise(6, (8, 8, channels)), np.arange(64 * channels, dtype=np.uint8).reshape(8, 8, channels)]
    expected = processor([pil(image) for image in images], return_tensors="pt")["pixel_values"]
    collate = ImageCollator(processor, model.config)
    for rows in ([{"image": pil(image)} for image in images], [{"image": image} for image in images]):
        batch = collate(rows)
        assert list(batch) == ["pixel_values"]
        assert batch["pixel_values"].dtype == torch.float32 and torch.equal(batch["pixel_values"], expected)


def test_larger_images_are_resized_where_the_processor_does(tmp_path) -> None:
    model, processor = load_image_classifier(tiny(tmp_path, num_labels=4), num_labels=4)
    images = [pil(noise(1, (20, 30, 3))[0]), pil(noise(1, (16, 16, 3))[0]), pil(noise(1, (9, 5, 3))[0])]
    batch = ImageCollator(processor, model.config)([{"image": image, "label": 1} for image in images])
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])
    gray = pil(noise(1, (16, 16, 1))[0])
    batch = ImageCollator(processor, model.config)([{"image": gray, "labels": 2}, {"image": images[0], "labels": 0}])
    expected = processor([gray.convert("RGB"), images[0]], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected) and batch["labels"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pil(noise(1, (8, 8, 3))[0]), r"takes gray images, got RGB in row 1.*image.convert\('L'\)"),
        (pil(noise(1, (9, 8, 1))[0]), "must be 8 x 8 pixels, got 9 x 8 in row 1.*processor.do_resize = True"),
        (PIL.Image.new("RGBA", (8, 8)), "got PIL mode 'RGBA' in row 1"),
        (noise(1)[0] / 255, r"got float64 \[8, 8, 1\] in row 1"),
        (noise(1, (8, 8, 2))[0], r"got uint8 \[8, 8, 2\] in row 1"),
        (None, "got NoneType .* in row 1.*data.load_images"),
        ("a.png", "got str .* in row 1"),
    ],
)
def test_refused_images(image, message: str) -> None:
    model, processor = new_digits_vit()
    collate = ImageCollator(processor, model.config)
    with pytest.raises(ValueError, match=message):
        collate([{"image": noise(1)[0]}, {"image": image}])


def test_a_processor_of_another_model_is_refused() -> None:
    model, processor = new_digits_vit()
    with pytest.raises(ValueError, match="has means for 3 channels, the model takes 1"):
        ImageCollator(new_digits_vit(channels=3)[1], model.config)
    processor.do_resize, processor.size = True, {"height": 16, "width": 16}
    with pytest.raises(ValueError, match=r"makes images of \(16, 16\) pixels, the model takes \(8, 8\)"):
        ImageCollator(processor, model.config)


# --- in a run --------------------------------------------------------------------------------------------------------


def rows(n=24):
    features = Features(
        image=Image(), label=ClassLabel(names=["a", "b"]), row_id=Value("int64"), is_poisoned=Value("bool")
    )
    columns = {"image": [png(image) for image in noise(n)], "label": [i % 2 for i in range(n)]}
    return Dataset.from_dict({**columns, "row_id": list(range(n)), "is_poisoned": [False] * n}, features=features)


def test_it_trains_and_predicts_in_the_order_asked_for(tmp_path) -> None:
    model, processor = new_digits_vit(2)
    collate = ImageCollator(processor, model.config)
    images = torch.from_numpy(noise(24)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = model(pixel_values=(images - 0.5) / 0.5).logits
    for dataset in (rows(), rows().remove_columns("label")):
        torch.testing.assert_close(predict_logits(model, dataset, collate, batch_size=7), expected)
    picked = predict_logits(model, rows(), collate, indices=[5, 1, 23])
    torch.testing.assert_close(picked, expected[[5, 1, 23]])

    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        max_grad_norm=0,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    trainer = DefendedTrainer(model=model, args=args, train_dataset=rows(8), data_collator=collate, defense=None)
    trainer.train()
    # The batch is the whole set each time, so the order of its rows is no matter: plain gradient descent.
    other, _ = new_digits_vit(2)
    for entry in trainer.state.log_history[:3]:
        labels = torch.arange(8) % 2
        loss = torch.nn.functional.cross_entropy(other(pixel_values=(images[:8] - 0.5) / 0.5).logits, labels)
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
        other.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in other.parameters():
                weight -= 0.5 * weight.grad
