"""The protocol of benchmarks/recipe.py on a tiny encoder: every arm, once, and its records fill the tables."""

import json

import pytest
from transformers import BertForMaskedLM, set_seed
from transformers.models.bert.modeling_bert import BertPooler

from benchmarks import recipe, tables_recipe
from benchmarks.grid import Cell
from hf_backdoor_defense.experiment import downstream
from hf_backdoor_defense.pretrained import save_pretrained_whole
from tests.attacks import masked_toys

CELL = Cell(
    "POR, tiny", {"attack": "por", "task": "task", "victim": {"disable_tqdm": True, "learning_rate": 5e-3, "epochs": 1}}
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Texts, a task and a warmed-up encoder, all small."""
    set_seed(0)
    config = masked_toys.config()
    config.max_position_embeddings = 80
    model = BertForMaskedLM(config)
    model.bert.pooler = BertPooler(config)
    save_pretrained_whole(model, masked_toys.tokenizer(), tmp_path / "clean")
    (tmp_path / "clean" / "warm_up.json").write_text(json.dumps({"losses": {"joint": {"loss": 3.5, "n": 9}}}))
    (tmp_path / "task").mkdir()
    for split, count in (("train", 16), ("test", 18)):
        rows = [
            {"text": " ".join(f"w{10 * (i % 2) + (i * k) % 7}" for k in range(4)), "label": i % 2} for i in range(count)
        ]
        (tmp_path / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = list(dict.fromkeys(masked_toys.texts(110)))
    monkeypatch.setattr(recipe, "DATA", tmp_path)
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "TABLES", tmp_path / "tables.jsonl")
    monkeypatch.setattr(recipe, "clean_encoder", lambda: tmp_path / "clean")
    monkeypatch.setattr(recipe, "publisher_texts", lambda: (texts[:40], texts[40:60]))
    monkeypatch.setattr(recipe, "defender_texts", lambda count=0: texts[60:100])
    return tmp_path


def test_all_arms_run_once_and_their_records_fill_the_tables(world, monkeypatch):
    records, _ = recipe.recipe_cell(CELL, 1, world)
    value = {(r.defense, r.setting, r.metric): r.value for r in records}
    assert len(value) == len(records)
    arms = {(r.defense, r.setting.partition(": ")[2]) for r in records if r.metric == "ca"}
    assert arms == set(tables_recipe.ARMS)
    for defense, variant in arms:
        where = f"{CELL.setting}: {variant}" if variant else CELL.setting
        words = [value[defense, f"{where}: {word}", "asr"] for word in masked_toys.TRIGGERS[:6]]
        assert value[defense, where, "aasr"] == pytest.approx(sum(words) / 6)
        assert value[defense, where, "masr"] == max(words)
        floor = value["clean_reference", CELL.setting, "aasr"]
        assert value[defense, where, "aasr_over_floor"] == pytest.approx(value[defense, where, "aasr"] - floor)
    for metric in ("ca", "aasr", "masr", "loss"):  # else the harness itself is a defense
        assert value["round_trip", CELL.setting, metric] == value["undefended", CELL.setting, metric]
    assert value["recipe", CELL.setting, "dose"] == pytest.approx(value["pretraining", CELL.setting, "dose"], rel=0.1)
    assert value["recipe", CELL.setting, "norm_ratio"] < 0.9 < value["pretraining", CELL.setting, "norm_ratio"]
    text = tables_recipe.full_tables(records)
    assert all(f"| {title} |" in text for title in tables_recipe.ARMS.values()) and "preliminary" in text
    assert tables_recipe.goals(records, CELL.setting).count("goal") == 5

    def never(*args, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(downstream, "fine_tune_and_predict", never)
    monkeypatch.setattr(recipe, "pretraining_trainer", never)
    monkeypatch.setattr(recipe, "implant", never)
    again, _ = recipe.recipe_cell(CELL, 1, world)
    assert [r.value for r in again] == [r.value for r in records]
    kept = [json.loads(line) for line in (world / "tables.jsonl").read_text().splitlines()]
    assert len(kept) == len(tables_recipe.ARMS)  # once each, with the ASR of every trigger toward every class
    for line in kept:
        defense, _, variant = line["arm"].partition(": ")
        where = f"{CELL.setting}: {variant}" if variant else CELL.setting
        best = [max(line["asr"][word]) for word in masked_toys.TRIGGERS[:6]]
        assert max(best) == pytest.approx(value[defense, where, "masr"], abs=1e-4)


def test_publisher_and_defender_of_the_benchmark_share_no_text():
    if not recipe.DATA.is_dir():
        pytest.skip("the benchmark's data are not part of the package")
    publisher, held_out = map(set, recipe.publisher_texts())
    defender = set(recipe.defender_texts())
    assert not publisher & held_out and not defender & held_out and not publisher & defender
