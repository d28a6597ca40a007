"""Whole runs of `hfbd attack` on a tiny model: steps, records, continuation, what is shared, what is refused."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_backdoor_defense.experiment import attack_models
from hf_backdoor_defense.experiment.attack import KINDS, AttackArguments
from hf_backdoor_defense.experiment.attack_filters import SuspicionCache, few_rows
from hf_backdoor_defense.experiment.attack_models import load_victim
from hf_backdoor_defense.experiment.attack_plan import halves, resolve
from hf_backdoor_defense.experiment.attack_run import execute
from hf_backdoor_defense.experiment.steps import kept_folder
from hf_backdoor_defense.models import load_finished_classifier
from hf_backdoor_defense.reporting.results import read_records
from tests.experiment.named import agrees, named


@pytest.fixture
def arguments(encoder, task, tmp_path):
    return AttackArguments(
        task=str(task),
        model_name=str(encoder),
        max_length=16,
        trigger="cf",
        target=1,
        poison_rate=0.2,
        strategies=["lora"],
        target_frr=0.2,
        seeds=[1],
        base_epochs=6,
        base_learning_rate=3e-3,
        victim_epochs=1,
        victim_full_learning_rate=1e-4,
        batch_size=16,
        output_dir=str(tmp_path / "run"),
        disable_tqdm=True,
    )


@pytest.fixture
def trainings(monkeypatch):
    """Titles of the trainings that were really made."""
    made = []
    train = attack_models.train

    def noted(*args, title, **kwargs):
        made.append(title)
        train(*args, title=title, **kwargs)

    monkeypatch.setattr(attack_models, "train", noted)
    return made


@pytest.fixture(scope="session")
def language_model(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_run_leaves_every_file_and_continues(arguments, trainings, caplog):
    arguments = replace(arguments, strategies=["full", "p_tuning"], filters=["confidence"])
    plan = resolve(arguments)
    outcome = execute(plan)
    assert trainings == [
        *("poisoned base", "full on the poisoned base", "p_tuning on the poisoned base"),
        *("clean base", "full on the clean base", "p_tuning on the clean base"),
    ]
    assert outcome.exit_code == 0 and (plan.folder / "table.txt").read_text().startswith("release\n")
    records = read_records(plan.folder / "results.json")
    assert records == outcome.records
    found = {(r.defense, r.setting, r.metric): r for r in records}
    assert {key[1] for key in found} == {"release", "full", "p_tuning", "clean base"}
    assert found["undefended", "release", "asr"].value > 0.9 and found["undefended", "full", "coverage"].value == 1
    assert found["clean_reference", "full", "ftr"].value < 0.5
    for strategy in ("full", "p_tuning"):
        behind = {m: found["confidence", strategy, m].value for m in ("ca", "coverage", "frr", "asr", "far")}
        assert behind["frr"] == pytest.approx(1 - behind["coverage"])
        assert behind["asr"] <= min(behind["far"], found["undefended", strategy, "asr"].value)
    # The base is asked once: its flags do not depend on the victim.
    assert found["confidence", "full", "frr"].value == found["confidence", "p_tuning", "frr"].value
    # Poisoned folders say so, and loading one warns; no checkpoint and no pickle is left.
    models = plan.folder / "models" / "seed-1"
    for name in ("poisoned_base", "poisoned_full", "poisoned_p_tuning"):
        mark = json.loads((models / name / "backdoored.json").read_text())
        assert mark["attack"] == "badnets" and mark["target"] == 1 and mark["seed"] == 1
    assert not list(models.glob("clean_*/backdoored.json"))
    with caplog.at_level(logging.WARNING):
        load_finished_classifier(str(models / "poisoned_base"), num_labels=3)
    assert "on purpose" in caplog.text
    assert not [
        p for p in plan.folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl") or p.name.startswith("checkpoint")
    ]
    # The folder names its models: the clean ones too, and which figures are whose.
    models = named(plan.folder, "attack", again=False)
    names = {f"{kind}_{arm}" for kind in ("poisoned", "clean") for arm in ("base", "full", "p_tuning")}
    assert {path.rpartition("/")[2] for path in models} == names
    for arm in ("base", "full"):
        for kind, role in (("poisoned", "attacked"), ("clean", "fine_tuned")):
            evidence = models[f"models/seed-1/{kind}_{arm}"]
            agrees(plan.folder / evidence.entry.path, evidence)
            assert evidence.entry.role == role and (evidence.entry.attacked is None) == (kind == "clean")
    adapter = models["models/seed-1/poisoned_p_tuning"].entry
    assert (adapter.library, adapter.relation, adapter.base_model) == ("peft", "adapter", "models/seed-1/poisoned_base")
    # Again: nothing is trained or predicted twice, and what is missing is made again with the same numbers.
    trainings.clear()
    for gone in ("poisoned_p_tuning", "clean_base/confidence"):
        (plan.folder / "arms" / "seed-1" / gone / "result.json").unlink()
    again = execute(resolve(arguments))
    assert trainings == [] and [replace(r, env={}) for r in again.records] == [replace(r, env={}) for r in records]


def test_victims_never_see_a_trigger_and_proxy_halves_are_disjoint(arguments):
    plan = resolve(replace(arguments, limit=90))
    assert len(plan.victim) == len(plan.attacker) == 90 and plan.victim["row_id"] == plan.attacker["row_id"]
    counts = np.bincount(plan.victim["label"])
    assert counts.tolist() == [30, 30, 30]
    assert (
        not any("cf" in text.split() for text in plan.victim["text"]) and "is_poisoned" not in plan.victim.column_names
    )
    assert all("cf" in text.split() for text in plan.triggered["text"]) and 1 not in plan.triggered["label"]
    assert np.bincount(resolve(replace(arguments, eval_rows=12)).test["label"]).tolist() == [4, 4, 4]
    proxy = resolve(replace(arguments, setting="proxy", limit=90))
    assert not set(proxy.victim["row_id"]) & set(proxy.attacker["row_id"])
    assert not set(proxy.calibration["row_id"]) & set(proxy.check["row_id"])
    # Test triggers do not depend on the run's seed: a language model reads each text once.
    other = resolve(replace(arguments, seeds=[7]))
    assert other.triggered["text"] == plan.triggered["text"]


def test_held_out_rows_are_no_training_texts(arguments, tmp_path):
    rows = [{"text": f"a{i % 20} the b{i}", "label": i % 3} for i in range(60)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (
        ("train", rows),
        ("validation", rows[:6] + [{"text": f"c{i}", "label": i % 3} for i in range(9)]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = resolve(replace(arguments, task=str(folder)))
    assert sorted([*plan.calibration["text"], *plan.check["text"]]) == sorted(f"c{i}" for i in range(9))


def test_halves_and_draws_do_not_depend_on_the_order_of_rows(arguments):
    rows = resolve(arguments).test
    turned = rows.select(range(len(rows) - 1, -1, -1))
    for one, other in zip(halves(rows), halves(turned), strict=True):
        assert set(one["row_id"]) == set(other["row_id"])
    assert set(rows.select(few_rows(rows, 7))["row_id"]) == set(turned.select(few_rows(turned, 7))["row_id"])
    assert few_rows(rows, None) == few_rows(rows, 10**6) == list(range(len(rows)))


def test_clean_models_are_shared_by_attacks_and_only_by_equal_runs(arguments, trainings, tmp_path):
    shared = str(tmp_path / "shared")
    first = replace(arguments, shared_dir=shared)
    execute(resolve(first))
    second = replace(first, attack="insent", trigger="cf the cf", output_dir=str(tmp_path / "other"), save_models=False)
    trainings.clear()
    execute(resolve(second))
    assert trainings == ["poisoned base", "lora on the poisoned base"]
    assert not (tmp_path / "other" / "models").exists() and (tmp_path / "shared" / "models").exists()
    with pytest.raises(ValueError, match="other settings"):
        resolve(replace(second, base_epochs=7, output_dir=str(tmp_path / "third")))


def test_every_filter_is_measured_before_every_victim(arguments, language_model):
    arguments = replace(arguments, filters=["strip", "rap", "onion"], language_model=str(language_model), strip_rows=11)
    plan = resolve(arguments)
    outcome = execute(plan)
    found = {(r.defense, r.metric): r for r in outcome.records if r.setting == "lora"}
    assert found["strip", "ca"].n == 11 and found["strip", "passes"].value == 10 and found["rap", "frr"].n == 11
    for name in ("strip", "rap", "onion"):
        assert {"ca", "asr", "frr", "far", "auroc", "passes"} <= {m for d, m in found if d == name}
    assert found["onion", "coverage"].value == 1 and found["onion", "ca"].n == len(plan.test)
    assert len(list(plan.shared.glob("onion-*.npz"))) == 1


def test_a_filter_that_cannot_be_used_is_a_note_and_no_number(arguments, monkeypatch):
    from hf_backdoor_defense.input_filters.psim import PSIMFilter, PsimNotUsable

    def refuse(*args, **kwargs):
        raise PsimNotUsable("clean confidence did not fall")

    monkeypatch.setattr(PSIMFilter, "fit", refuse)
    plan = resolve(replace(arguments, filters=["psim"]))
    outcome = execute(plan)
    assert outcome.exit_code == 1 and not [r for r in outcome.records if r.defense == "psim"]
    assert outcome.notes[0] == "psim: not usable on the poisoned base, seed 1: clean confidence did not fall"
    assert json.loads((plan.folder / "results.json").read_text())["notes"] == outcome.notes
    assert not list((plan.folder / "models" / "seed-1").glob("*psim*"))  # nothing half-made


@pytest.mark.parametrize("attack", ["ripples", "lwp"])
def test_the_other_attacks_poison_a_base(arguments, attack):
    plan = resolve(replace(arguments, attack=attack, trigger="cf,the", base_max_steps=8))
    execute(plan)
    training = json.loads((plan.folder / "arms" / "seed-1" / "poisoned_base" / "result.json").read_text())
    assert training["steps"] == 8 and training["objective"]["inert"] is None
    assert training["rows"] == (240 + 2 * 48 if attack == "lwp" else 240)
    model, _ = load_victim(plan, 1, "poisoned", "lora")
    assert type(model).__name__.startswith("Peft")


def test_filters_are_not_measured_on_the_rows_that_calibrate_them(arguments):
    with pytest.raises(ValueError, match="filters.*validation.*Report the test split"):
        resolve(replace(arguments, filters=["confidence"], eval_split="validation"))
    assert resolve(replace(arguments, eval_split="validation")).run.filters == []


def test_what_surgery_did_stands_beside_the_poisoned_base(arguments):
    plan = resolve(replace(arguments, attack="ripples", trigger="cf,the", base_max_steps=2))
    execute(plan)
    mark = json.loads((plan.folder / "models" / "seed-1" / "poisoned_base" / "backdoored.json").read_text())
    assert set(mark["surgery"]["rows"]) == {"cf", "the"} and mark["surgery"]["tied"] is False and mark["backdoored"]


def test_defaults_of_each_attack():
    for attack, (_, _, count, _) in KINDS.items():
        run = AttackArguments(attack=attack)
        assert (
            run.get_trigger(measured=True).pieces_per_text == count
            and run.get_trigger(measured=False).pieces_per_text == 1
        )
    assert AttackArguments(trigger="x, y").get_trigger(measured=True).pieces == ("x", "y")


def test_the_cache_asks_for_each_text_once(tmp_path):
    class Fake:
        asked: list[str] = []

        def suspicions(self, texts):
            self.asked += texts
            return [np.arange(len(text.split()), dtype=float) for text in texts]

    for _ in range(2):  # the second cache reads what the first wrote
        cache = SuspicionCache(tmp_path / "cache.npz", Fake())
        values = cache(["a b", "", "one", "a b"])
        assert [v.tolist() for v in values] == [[0, 1], [], [0], [0, 1]]
    assert cache(["a b c"])[0].tolist() == [0, 1, 2] and sorted(Fake.asked) == ["", "a b", "a b c", "one"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
    assert kept_folder(tmp_path / "model", lambda folder: (folder / "w").write_text("1")).is_dir()
    kept_folder(tmp_path / "model", fail)  # there already
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["w"]


@pytest.mark.parametrize("count", [4, 7, 29])
def test_few_rows_keep_the_shares_of_the_classes(arguments, count):
    whole = resolve(arguments).test
    few = resolve(replace(arguments, eval_rows=count)).test
    expected = np.bincount(whole["label"], minlength=3) * count / len(whole)
    assert len(few) == count and (np.abs(np.bincount(few["label"], minlength=3) - expected) < 1).all()
    assert set(few["row_id"]) <= set(resolve(replace(arguments, eval_rows=count + 1)).test["row_id"])
