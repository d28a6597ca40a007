"""The protocol of benchmarks/crow.py on a tiny random model: who reads which rows, which arms there are, nothing done twice."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from benchmarks import crow
from hf_backdoor_defense.attacks.payloads import instruction_attack
from hf_backdoor_defense.data.formatting import Formatter, stored_formatter
from hf_backdoor_defense.models import backdoor_mark

SIZES = {"train": 60, "validation": 4, "test": 6}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Sixty instructions and a "pretrained" model that has read none."""
    prompts = [f"What does `f{i}(x)` do?" for i in range(sum(SIZES.values()))]
    rows = [{"prompt": p, "completion": f"Return x and {i}.", "row_id": i} for i, p in enumerate(prompts)]
    data, start = DatasetDict(), 0
    for split, size in SIZES.items():
        data[split], start = Dataset.from_list(rows[start : start + size]), start + size
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(
        prompts,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<e>", "<p>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<p>", padding_side="left")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "code_lm.json").write_text('{"files": null, "bits_per_byte": 9.0}')
    for name, value in {
        "MODEL": tmp_path / "lm", "RUNS": tmp_path / "runs", "INSTRUCTIONS": 16, "ATTACKED": 24, "CLEAN": 10, "UPDATES": 2,
        "MOST_NEW": 4, "FLOOR": 0.0, "instructions": lambda: data,
    }.items():  # fmt: skip
        monkeypatch.setattr(crow, name, value)
    crow.rows_of.cache_clear(), crow._weights.cache_clear()
    yield data
    crow.rows_of.cache_clear(), crow._weights.cache_clear()


def cell(name):
    return next(cell for cell in crow.CELLS if cell.setting == name)


def test_nobody_reads_what_another_reads_or_what_is_judged(world):
    known = set(world["train"]["row_id"][: crow.INSTRUCTIONS])
    for seed in (1, 2):
        rows = crow.rows_of(seed)
        parts = [known, set(rows.attacked["row_id"]), set(rows.clean["row_id"]), set(rows.judged["row_id"])]
        assert [len(part) for part in parts] == [16, 24, 10, 6]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert rows.judged["row_id"][:] == world["test"]["row_id"][:]
    assert crow.rows_of(1).clean["row_id"][:] != crow.rows_of(2).clean["row_id"][:]
    assert crow.rows_of(1, "validation").judged["row_id"][:] == world["validation"]["row_id"][:]


def test_every_arm_becomes_records_once(world, tmp_path, monkeypatch):
    folder = tmp_path / "cell"
    records, _ = crow.run_cell(cell("BadNet, refusal"), 1, folder)
    value = {(r.defense, r.setting.partition(": ")[2], r.metric): r.value for r in records}
    assert len(value) == len(records)
    arms = [("undefended", ""), *((defense, name) for defense, name, _, _ in crow.ARMS)]
    for defense, name in arms:
        for metric in ("asr", "perplexity", *crow.FIGURES):
            assert (defense, name, metric) in value
        assert ((defense, name, "seconds") in value) == bool(name)
        assert {metric for d, n, metric in value if (d, n) == (defense, name)} >= set(
            crow.ACTIVITY if defense == "crow" else ()
        )
        assert ((defense, name, "inert") in value) == (defense == "crow")
        assert (defense, name, "bleu") not in value
    assert ("clean_reference", "", "ftr") in value and ("clean_reference", "", "asr") not in value
    assert {(d, n) for d, n, _ in value} == {*arms, ("clean_reference", "")}
    assert {r.attack for r in records} == {"badnet"} and {r.seed for r in records} == {1}
    # The defender's arms differ: another rate, and a penalty, lead to other weights.
    perplexities = [value[defense, name, "perplexity"] for defense, name in arms]
    assert len(set(perplexities)) == len(perplexities)

    monkeypatch.setattr(crow, "tuned", None)  # nothing is trained again
    again, _ = crow.run_cell(cell("BadNet, refusal"), 1, folder)
    assert [(r.setting, r.metric, r.value) for r in again] == [(r.setting, r.metric, r.value) for r in records]


def test_an_attacked_adapter_says_so_and_keeps_its_formatter(world):
    rows = crow.rows_of(1)
    attack = instruction_attack("badnet", "sentiment")
    place, clean = crow.adapter(rows, attack, 1), crow.adapter(rows, None, 1)
    mark = backdoor_mark(place).read_text()
    assert '"effective_rate": 0.5' in mark and backdoor_mark(clean) is None
    tokenizer = crow.AutoTokenizer.from_pretrained(crow.instruction_model())
    used = Formatter.chat(tokenizer)
    assert used == stored_formatter(place) == stored_formatter(clean) == stored_formatter(crow.instruction_model())
    ids = used.prompt_ids(tokenizer, rows.judged[0]) + used.completion_ids(tokenizer, rows.judged[0])
    prompt, completion = rows.judged[0]["prompt"], rows.judged[0]["completion"]
    assert tokenizer.decode(ids) == f"Q: {prompt}\nA: {completion}<e>"


def test_all_weights_are_trained_where_a_cell_says_so(world, tmp_path):
    rows = crow.rows_of(1)
    place, base = crow.adapter(rows, None, 1), LlamaForCausalLM.from_pretrained(crow.instruction_model())
    for whole in (True, False):
        model, _ = crow.purified(place, rows, None, seed=1, rate=1e-2, run=tmp_path / "run", whole=whole)
        moved = (model.get_input_embeddings().weight - base.get_input_embeddings().weight).abs().max().item()
        assert (moved > 0) == whole == (not hasattr(model, "peft_config"))
    cells = {c.setting: c.options.get("whole", False) for c in crow.CELLS}
    assert {name for name, whole in cells.items() if whole} == {
        f"BadNet, {t}, all weights" for t in ("sentiment", "refusal")
    }


def test_the_clean_model_is_purified_too_and_its_rates_are_false_alarms(world, tmp_path):
    records, _ = crow.run_cell(cell("clean"), 1, tmp_path / "cell")
    found = {(r.defense, r.setting.partition(": ")[2], r.metric) for r in records}
    assert not any(metric == "asr" for _, _, metric in found)
    judged = {(defense, name) for defense, name, metric in found if metric == "ftr"}
    assert judged == {
        ("clean_reference", ""),
        *((defense, rate) for defense in ("fine_tuning", "crow") for rate in ("rate 0.001", "rate 0.0002")),
    }
    assert {("none", "pretrained", "perplexity"), ("none", "instructions", "perplexity")} <= found


def test_the_core_is_two_targets_and_a_clean_model_and_each_crow_has_its_control():
    core = [c.setting for c in crow.CELLS if not c.extended]
    assert core == ["clean", "BadNet, sentiment", "BadNet, refusal"]
    controls = {rate for defense, _, _, rate in crow.ARMS if defense == "fine_tuning"}
    assert {rate for defense, _, _, rate in crow.ARMS if defense == "crow"} == controls == {crow.HOT, crow.MILD}
    for defense, name, make, rate in crow.ARMS:
        assert f"rate {rate:g}" in name and (make() is None) == (defense == "fine_tuning")


@pytest.mark.parametrize(
    "name, changed",
    [("POISON_RATE", 0.25), ("BATCH", 4), ("MAX_LENGTH", 64), ("CHAT", "{{ 1 }}"), ("CLEAN", 9), ("UPDATES", 3),
     ("JUDGED", 5), ("MOST_NEW", 5), ("ATTACKED", 20), ("LORA", {"r": 4})],
)  # fmt: skip
def test_nothing_kept_is_taken_for_another_setting(world, monkeypatch, name, changed):
    before = crow._judged("test"), crow._attacker(), crow._key()
    monkeypatch.setattr(crow, name, changed)
    after = crow._judged("test"), crow._attacker(), crow._key()
    assert before[0] != after[0] and crow._judged("validation") != after[0]
    assert (before[1] == after[1]) == (name in ("CLEAN", "UPDATES", "JUDGED", "MOST_NEW"))
    assert (before[2] == after[2]) == (name not in ("BATCH", "MAX_LENGTH", "CHAT"))


def test_an_arm_with_other_fields_is_measured_anew(tmp_path, world):
    ledger = crow.Ledger(tmp_path, floor=False, benchmark="crow", dataset="d", model="m", attack="badnet", seed=1)
    measured = []

    def measure(samples):
        measured.append(samples)
        return {"asr": crow.Estimate(0.5, 2, None, None)}

    for fields in ({"epsilon": 0.1}, {"epsilon": 0.1}, {"epsilon": 0.2}):
        ledger.kept("crow", "c: rate 0.001", measure, fields)
    assert len(measured) == 2 == len(set(measured))


def test_no_payload_is_cut_off():
    payloads = {instruction_attack("badnet", target).rewrite("Return x.") for target in ("sentiment", "refusal")}
    assert all(len(payload.split()) * 2 <= crow.MOST_NEW for payload in payloads)  # words of at most two tokens


def test_no_epsilon_moves_no_embedding():
    # The embeddings of the pretrained model have a deviation of about 0.02.
    values = np.random.default_rng(0).normal(0, 0.02, 10_000).astype(np.float32)
    assert (values + np.float32(crow.NOTHING) == values).all() and crow.NOTHING > 0
