"""Whole runs of the command line on images: which kind a model is, what is planted, what is measured, what is refused."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image
from transformers import CLIPConfig, PerceiverConfig, TrainingArguments, ViTConfig

from hf_backdoor_defense.attacks.image_triggers import Patch
from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.data.images import load_images
from hf_backdoor_defense.data.pixels import pixels, png
from hf_backdoor_defense.data.summary import pixel_baselines
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.arms import optimizer
from hf_backdoor_defense.experiment.clean_rows import own_rows
from hf_backdoor_defense.experiment.kinds import IMAGE, TEXT, find_kind
from hf_backdoor_defense.reporting.results import read_records
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.vision import ImageCollator, load_image_classifier
from tests.experiment.named import agrees, named
from tests.trainers.image_toys import image_rows, stack, vit

ATTACK = ["--simulate", "patch", "--poison_rate", "0.2", "--target", "3"]
LIMIT = 200


@pytest.fixture
def hfbd(tmp_path, capsys):
    def call(*options, folder="run"):
        base = [
            "train",
            "--task",
            "offline:digits",
            "--model_name",
            "offline:digits-vit",
            "--limit",
            LIMIT,
            "--num_layers",
            1,
        ]
        base += ["--per_device_train_batch_size", "32", "--learning_rate", "3e-3", "--num_train_epochs", "2"]
        base += ["--disable_tqdm", "true", "--use_cpu", "true", "--output_dir", tmp_path / folder]
        code = main([*map(str, base), *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


def test_a_run_on_images_leaves_every_file_and_eval_agrees(hfbd, capsys, tmp_path):
    code, out, err = hfbd(*ATTACK, "--defense", "trajectory", "dece", "--save_models", "true", "--num_train_epochs", 4)
    assert code == 0, out + err
    assert "gray images of 8 x 8 pixels" in out and "40 rows, 40 of them changed by it" in out
    results = json.loads((hfbd.folder / "results.json").read_text())
    assert (
        results["planted"] == {"requested": 40, "carrying": 40} and results["trigger"] == "pattern checker, value 255"
    )
    records = {(r.defense, r.metric): r.value for r in read_records(hfbd.folder / "results.json")}
    arms = ["clean_reference", "undefended", "dece", "matched_decay", "trajectory"]
    assert {defense for defense, _ in records} == {"majority", "pixels", *arms}
    suspects = [json.loads(line) for line in (hfbd.folder / "suspects.jsonl").read_text().splitlines()]
    assert suspects and all("text" not in row and {"row_id", "label", "score"} <= set(row) for row in suspects)
    page = (hfbd.folder / "report.html").read_text()
    assert "Most suspicious rows" in page and "characters of each" not in page and "texts cut" not in page
    found = {evidence.entry.arm: evidence for evidence in named(hfbd.folder, "train", again=False).values()}
    controls = ["undefended", "clean_reference", "matched_decay"]
    assert set(found) == set(arms) and found["dece"].entry.controls == controls
    assert found["trajectory"].entry.method["name"] == "trajectory" and found["undefended"].entry.method == {}
    agrees(hfbd.folder / found["dece"].entry.path, found["dece"])
    # Oracle: the saved model, asked one image at a time.
    place = hfbd.folder / "models" / "seed-0" / "undefended"
    model, processor = load_image_classifier(str(place), num_labels=10)
    triggered = trigger_dataset(load_images("offline:digits", limit=LIMIT)["test"], Patch(), target=3, seed=0)
    collate = ImageCollator(processor, model.config)
    hits = [model(pixel_values=collate([row])["pixel_values"]).logits.argmax().item() == 3 for row in triggered]
    assert records["undefended", "asr"] == pytest.approx(np.mean(hits))
    output = tmp_path / "eval.json"
    options = ["--task", "offline:digits", "--limit", str(LIMIT), "--simulate", "patch", "--target", "3"]
    assert main(["eval", "--model", str(place), *options, "--output", str(output)]) == 0
    measured = {r.metric: r.value for r in read_records(output)}
    assert measured == {metric: records["undefended", metric] for metric in ("ca", "asr", "r_acc")}


def test_the_same_command_continues_and_an_arm_has_the_momentum_it_asks_for(hfbd):
    options = [*ATTACK, "--momentum", 0.9, "--weight_decay", 0.1]
    assert hfbd(*options)[0] == 0
    plan = json.loads((hfbd.folder / "plan.json").read_text())
    assert plan["run"]["momentum"] == 0.9 and plan["training"]["optim"] == "sgd"
    page = (hfbd.folder / "report.html").read_text()
    assert "optimizer sgd, momentum 0.9" in page and "--momentum 0.9" in page
    code, out, _ = hfbd(*options)
    assert code == 0 and out.count("finished before, kept") == 2
    code, _, err = hfbd(*ATTACK, "--momentum", 0.5, "--weight_decay", 0.1)
    assert code == 2 and "run.momentum" in err


def test_momentum_is_sgd_whose_matrices_decay(tmp_path):
    args = TrainingArguments(str(tmp_path), learning_rate=0.1, weight_decay=0.2, report_to="none", use_cpu=True)
    sgd = optimizer(RunArguments(momentum=0.7), args)
    trainer = DefendedTrainer(
        vit(), args=args, train_dataset=image_rows(), data_collator=stack, optimizer_cls_and_kwargs=sgd
    )
    found = trainer.create_optimizer()
    assert type(found).__name__ == "SGD" and [g["momentum"] for g in found.param_groups] == [0.7, 0.7]
    assert [g["weight_decay"] for g in found.param_groups] == [0.2, 0.0]
    assert optimizer(RunArguments(), args) is None


def test_the_defenders_images_are_nobodys():
    run = RunArguments(task="offline:digits", limit=900)
    data, whole = load_images("offline:digits", limit=900), load_images("offline:digits")

    def shown(rows):
        return {pixels(image).tobytes() for image in rows["image"]}

    own = own_rows(run, data, IMAGE)
    assert not shown(own) & (shown(data["train"]) | shown(whole["test"]))
    left = {*whole["train"]["row_id"], *whole["validation"]["row_id"]} - {*data["train"]["row_id"]}
    assert set(own["row_id"]) <= left and len(left) - len(own) < 5  # equal scans are few


def test_the_model_says_what_it_is(encoder, classifier, tmp_path):
    assert find_kind(str(encoder)) is TEXT and find_kind(str(classifier)) is TEXT
    ViTConfig().save_pretrained(tmp_path / "vit")
    assert find_kind(str(tmp_path / "vit")) is IMAGE and find_kind("anything", chosen="image") is IMAGE
    CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path / "clip")
    assert find_kind(str(tmp_path / "clip")) is IMAGE
    PerceiverConfig().save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="perceiver model, which can classify texts and images: .*--kind image"):
        find_kind(str(tmp_path / "both"))


def test_color_images_of_another_size_get_a_vit_of_their_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.integers(0, 60, (60, 16, 16, 3), dtype=np.uint8) + (70 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "task.npz", image=images, label=labels)
    options = ["--task", str(tmp_path / "task.npz"), "--model_name", "offline:digits-vit", "--num_train_epochs", "1"]
    options += [
        "--output_dir",
        str(tmp_path / "run"),
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
        "--num_layers",
        "1",
    ]
    assert main(["train", *options, "--simulate", "blend", "--clean_label", "true", "--poison_rate", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "color images of 16 x 16 pixels" in out and "clean-label blend (alpha 0.2, seed 0)" in out


def dataset(images, labels):
    rows = Dataset.from_dict({"image": [png(image) for image in images], "label": labels})
    return rows.cast_column("image", Image())


def test_baselines_of_images_count_the_majority_and_leave_out_what_is_dear():
    dark, light = np.full((3, 2, 1), 10, np.uint8), np.full((3, 2, 1), 200, np.uint8)
    easy = DatasetDict(
        train=dataset([dark, dark, dark, light], [1, 1, 1, 0]), test=dataset([dark, light, light], [1, 0, 0])
    )
    assert pixel_baselines(easy, seed=0) == {"majority": (1, 3), "pixels": (3, 3)}
    mixed = DatasetDict(train=dataset([dark, light[:2]], [0, 1]), test=dataset([dark], [1]))
    assert pixel_baselines(mixed, seed=0) == {"majority": (0, 1)}  # of equal counts the first class
    large = np.zeros((64, 64, 3), np.uint8)
    assert set(
        pixel_baselines(DatasetDict(train=dataset([large] * 2, [0, 1]), test=dataset([large], [0])), seed=0)
    ) == {"majority"}


WRONG = {
    "filters": ([*ATTACK, "--filters", "confidence"], "look at texts"),
    "a trigger of texts": (["--simulate", "badnets"], "Triggers of images: patch, blend, sig, wanet"),
    "a trigger of images": ([*ATTACK, "--model_name", "offline:minilm"], "--model_name offline:digits-vit"),
    "a trigger's text": ([*ATTACK, "--trigger", "cf"], "changes pixels"),
    "by length": (["--train_sampling_strategy", "group_by_length"], "images have no length"),
    "momentum": (["--momentum", 1.0], "`momentum` must be in [0, 1), got 1.0"),
    "momentum of another optimizer": (["--momentum", 0.9, "--optim", "adafactor"], "`optim` is adafactor"),
    "kind": (["--kind", "video"], "`kind` must be text or image, got 'video'"),
    "target": ([*ATTACK, "--target", 10], "classes 0..9"),
    "nothing there": (["--task", "nowhere.npz"], "nowhere.npz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_exits_2_with_advice_before_anything_is_written(hfbd, name):
    options, says = WRONG[name]
    code, _, err = hfbd(*options)
    assert code == 2 and says in err, err
    assert "Traceback" not in err and not hfbd.folder.exists()


def test_an_image_trigger_on_a_model_of_texts_is_refused(encoder, task, capsys, tmp_path):
    options = [
        "--task",
        str(task),
        "--model_name",
        str(encoder),
        "--max_length",
        "16",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *options, "--simulate", "patch"]) == 2
    assert "Triggers of texts: badnets, insent" in capsys.readouterr().err


def test_images_of_several_sizes_are_refused(tmp_path, capsys):
    import PIL.Image

    for label in "ab":
        for i in range(20):
            place = tmp_path / "task" / label / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (8, 8 if i % 10 else 10), color=i).save(place)
    options = [
        "--task",
        str(tmp_path / "task"),
        "--model_name",
        "offline:digits-vit",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *options]) == 2
    assert "pixels" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_eval_refuses_a_vit_that_was_never_trained(capsys):
    assert main(["eval", "--model", "offline:digits-vit", "--task", "offline:digits"]) == 2
    assert "no classification head" in capsys.readouterr().err
