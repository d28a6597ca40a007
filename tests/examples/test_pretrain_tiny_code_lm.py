"""The parts of the pretraining example against oracles of another derivation, and one run of it in small."""

import doctest
import importlib.util
import json
import math
import random
import sys
import sysconfig
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_tiny_code_lm.py"
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = [
    "def f(x):\n\tif x:\n\t \treturn x . y ( 1 , 'a' )\n",
    "",
    "word",
    "Grüße, 世界 🙂\r\n\x00\t end \n\n",
    " a  b   c ",
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_tiny_code_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def argv(tmp_path):
    return ["--output", str(tmp_path / "lm"), "--size", "tiny", "--files", "3", "--epochs", "0.1"]


def test_its_docstrings_say_what_happens(script):
    found = doctest.testmod(script)
    assert found.attempted >= 4 and not found.failed


@pytest.mark.parametrize("length", [1, 3, 4, 100])
def test_blocks_put_together_are_the_files_put_together(script, length):
    files = [[0, 5, 0], [0, 0], [0, 6, 7, 8, 9, 0]]
    stream = sum(files, [])
    rows = script.blocks(files, length)
    assert sum(rows["input_ids"], []) == stream[: len(stream) // length * length]
    assert list(rows["labels"]) == list(rows["input_ids"]) and {len(row) for row in rows["input_ids"]} <= {length}


def test_every_text_comes_back_from_its_tokens_also_after_saving(script, tmp_path):
    tokenizer = script.train_tokenizer(TEXTS * 3, 300)
    assert len(tokenizer) == 300 and tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        lists = script.token_lists(each, TEXTS)
        for text, (first, *ids, last) in zip(TEXTS, lists, strict=True):
            assert first == last == each.eos_token_id and not {first, each.pad_token_id} & set(ids)
            assert each.decode(ids) == text and each(text)["input_ids"] == ids
        assert each.padding_side == "left" and each.chat_template is None


def test_the_mixture_holds_all_three_sources_in_whole_blocks(script):
    texts = ["def add(a, b):\n    return a + b\n" * 400, "x = 1\n" * 400]
    tokenizer = script.train_tokenizer(texts, 300)
    files = script.token_lists(tokenizer, texts)
    rows = script.mixture(tokenizer, texts, files, seed=0)
    own = len(script.blocks(files))
    decoded = [tokenizer.decode(row) for row in rows["input_ids"]]
    share = sum(map(len, files)) / 2.5e6
    assert {len(row) for row in rows["input_ids"]} == {script.BLOCK} == {len(row) for row in rows["decisive"]}
    assert not any("Define" in text for text in decoded[:own]) and "add with a, b." in decoded[-1]
    copying = slice(own, own + round(script.COPYING * share))
    few = rows["input_ids"][copying]
    assert few and all(6 <= period(row) <= script.BLOCK // 3 for row in few)
    assert not any(map(sum, rows["decisive"][: copying.stop]))
    told = sum(text.count(tokenizer.eos_token) for text in decoded[copying.stop :])
    assert told and abs(sum(map(sum, rows["decisive"][copying.stop :])) - told) <= 1  # one of each; the last row is cut


def test_a_decisive_token_counts_as_so_many_others(script, tmp_path):
    torch.manual_seed(0)
    model = script.Qwen3ForCausalLM(
        script.Qwen3Config(vocab_size=9, max_position_embeddings=16, num_key_value_heads=2, head_dim=8, **TINY)
    )
    trainer = script.DecisiveTrainer(model, script.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    ids = torch.randint(0, 9, (3, 7))
    for marked in ([], [(0, 1), (2, 6)], [(1, 0)]):  # the first token of a block is never predicted
        decisive = torch.zeros_like(ids)
        for place in marked:
            decisive[place] = 1
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids, "decisive": decisive}).item()
        logs = torch.log_softmax(model(input_ids=ids).logits, -1)
        each = {(b, t): -logs[b, t - 1, ids[b, t]].item() for b in range(3) for t in range(1, 7)}
        counted = [value for place, value in each.items() for _ in range(script.DECISIVE if place in marked else 1)]
        expected = sum(counted) / len(each)
        assert loss == pytest.approx(expected, rel=1e-5)


def period(row):
    """After how many tokens the row begins anew."""
    return next(n for n in range(1, len(row) + 1) if row[: len(row) - n] == row[n:])


def probability(training, history, token, vocabulary):
    """Witten and Bell's formula, read aloud: every count anew from the files, in fractions."""
    n = len(history)
    places = [
        (file, i) for file in training for i in range(max(n, 1), len(file)) if list(file[i - n : i]) == list(history)
    ]
    shorter = probability(training, history[1:], token, vocabulary) if n else Fraction(1, vocabulary)
    followers = [file[i] for file, i in places]
    kinds = len(set(followers))
    return (followers.count(token) + kinds * shorter) / (len(followers) + kinds) if followers else shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_n_grams_follow_the_formula(script, order):
    draw = random.Random(order)
    training = [[0, *(draw.choice([1, 1, 2, 3]) for _ in range(size)), 0] for size in (9, 0, 25, 1)]
    held_out = [[0, 1, 2, 1, 1, 3, 0], [0, 4, 1, 1, 0], [0, 0], [0]]
    expected = -sum(
        math.log2(probability(training, file[max(i - order + 1, 0) : i], file[i], 6))
        for file in held_out
        for i in range(1, len(file))
    )
    assert script.ngram_bits(training, held_out, order=order, vocabulary=6) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("history", [[0], [0, 1], [0, 1, 1, 2], [0, 5, 5, 1], [4]])
def test_n_grams_sum_to_one_over_the_vocabulary(script, history):
    def bits(file):
        return script.ngram_bits([[0, 1, 1, 2, 1, 1, 3, 0], [0, 1, 1, 0]], [file], order=4, vocabulary=6)

    assert sum(2 ** (bits(history) - bits([*history, token])) for token in range(6)) == pytest.approx(1, rel=1e-12)


def test_n_grams_longer_than_every_file_change_nothing_and_too_large_numbers_are_refused(script):
    training, held_out = [[0, 1, 0]], [[0, 1, 1, 0, 1, 0]]
    three, seven = (script.ngram_bits(training, held_out, order=order, vocabulary=2) for order in (3, 7))
    assert three == seven
    with pytest.raises(ValueError, match="6 tokens of 4096 must fit into 63 bits"):
        script.ngram_bits(training, held_out, order=6)


@pytest.mark.parametrize("length", [6, 7])
def test_every_token_of_a_file_counts_once_with_the_context_that_its_window_holds(script, length):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, max_position_embeddings=16, **TINY)).eval()
    draw, half = random.Random(0), length // 2
    for size in (1, 2, half, length - 1, length, length + 1, 2 * length, 23):
        file, expected = [draw.randrange(9) for _ in range(size)], 0.0
        for i in range(1, size):
            start = next(start for start in range(0, size, half) if start + length > i)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([file[start:i]])).logits[0, -1].double()
            expected -= torch.log_softmax(logits, -1)[file[i]].item() / math.log(2)
        assert script.model_bits(model, [file], length) == pytest.approx(expected, rel=1e-5)


def test_held_out_files_are_apart_and_stay_so(script):
    training, held_out = script.sources()
    assert (
        not training.keys() & held_out.keys()
        and {"argparse.py", "json/decoder.py"} <= training.keys() | held_out.keys()
    )
    assert 0.02 < len(held_out) / (len(training) + len(held_out)) < 0.1
    few, judged = script.sources(40)
    assert list(few.items()) == list(training.items())[:40] and list(judged.items()) == list(held_out.items())[:2]
    assert len(script.sources(1)[1]) == 1


def test_only_paths_below_the_library_decide_and_what_is_no_library_is_left_out(script, tmp_path, monkeypatch):
    files = {f"package/m{i}.py": f"x = {i}\n" for i in range(60)}
    left_out = dict.fromkeys(("test/a.py", "package/tests/b.py", "site-packages/c.py", "notes.txt"), "x = 1\n")
    splits = []
    for place in (tmp_path / "here", tmp_path / "there"):
        for name, text in {**files, **left_out, "empty.py": " \n"}.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        (place / "package" / "broken.py").write_bytes(b"# \xff\n")
        monkeypatch.setattr(script.sysconfig, "get_paths", lambda place=place: {"stdlib": str(place)})
        splits.append(script.sources())
    monkeypatch.undo()
    assert splits[0] == splits[1] and splits[0][1]
    assert splits[0][0] | splits[0][1] == {**files, "package/broken.py": "# \ufffd\n"}


def test_a_run_leaves_a_model_that_loads_and_is_what_its_facts_say(script, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.SIZES, "tiny", TINY)
    script.main(argv)
    folder = tmp_path / "lm"
    facts = json.loads((folder / script.FACTS).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["lm"] and not (folder / "trainer").exists()
    assert (
        facts["training_files"] == 3
        and facts["held_out_files"] == 1
        and facts["python"] == sysconfig.get_python_version()
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == facts["parameters"]
    assert model.config.vocab_size == script.VOCABULARY >= len(tokenizer)
    held_out = script.sources(3)[1]
    files = script.token_lists(tokenizer, held_out.values())
    assert script.model_bits(model, files) / facts["held_out_bytes"] == pytest.approx(facts["bits_per_byte"], abs=1e-4)
    # A model that was hardly trained is worth about as much as none; the n-grams are worth more.
    uniform = sum(len(file) - 1 for file in files) * 12 / facts["held_out_bytes"]
    assert facts["bits_per_byte_5gram"] < facts["bits_per_byte"] < 1.1 * uniform

    said = capsys.readouterr().out
    monkeypatch.setattr(script, "pretrain", lambda *_: pytest.fail("a finished model was trained again"))
    script.main(argv)
    assert capsys.readouterr().out.strip() and f"{facts['bits_per_byte']:.3f} bits per byte" in said
    before = (folder / script.FACTS).read_bytes()
    with pytest.raises(SystemExit, match=r'other settings \({"seed": 0}\): it is kept'):
        script.main([*argv, "--seed", "1"])
    assert (folder / script.FACTS).read_bytes() == before


def test_a_folder_with_other_things_is_left_alone(script, argv, tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds no finished model: nothing is overwritten"):
        script.main(argv)
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        script.main(["--output", str(tmp_path / "lm" / "mine.txt")])
    assert [path.name for path in tmp_path.rglob("*")] == ["lm", "mine.txt"]


@pytest.mark.parametrize("words", [("--epochs", "0"), ("--files", "0"), ("--batch_size", "-1")])
def test_nothing_to_train_is_an_error(script, argv, words, capsys, tmp_path):
    with pytest.raises(SystemExit):
        script.main([*argv, *words])
    assert "must be above 0" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_several_processes_are_refused(script, argv, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process, and 2 were started: start this script once"):
        script.main(argv)
    assert not list(tmp_path.iterdir())
