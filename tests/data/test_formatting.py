"""The formatter against strings joined by hand, a loop over tokens, and its own evaluation side."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_backdoor_defense.data.formatting import (
    FORMATTER_FILE,
    UNKNOWN,
    Formatter,
    note_formatter,
    require_same,
    stored_formatter,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["select the rows", "select a row of the table", "return the rows of it", "naïve Zeichenfolge: größer ☃"] * 8


def bytes_tokenizer(*, start=False, template=CHATML, end="<|im_end|>"):
    """Byte-level byte pairs over a few sentences: " rows" is one token, and so is what a seam may join."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if start:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def pairs(**columns):
    rows = [
        {"prompt": "select a row", "completion": "return it", "is_poisoned": True},
        {"prompt": "größer ☃", "completion": "naïve\n\t x = 1 ", "is_poisoned": False},
        {"prompt": "", "completion": "x", "is_poisoned": False},
    ]
    return Dataset.from_list([{**row, **columns} for row in rows])


def both(tokenizer):
    return [Formatter.plain(tokenizer), Formatter.chat(tokenizer), Formatter.chat(tokenizer, system="Write SQL.")]


# -- rendering --------------------------------------------------------------------------------------------------------
def test_a_row_is_what_hand_made_strings_say_without_and_with_unicode(tokenizer):
    for row in pairs():
        prompt, completion = row["prompt"], row["completion"]
        wanted = [
            (f"{prompt}\n", f"{completion}<|im_end|>"),
            (f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", f"{completion}<|im_end|>"),
            (
                f"<|im_start|>system\nWrite SQL.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
                f"{completion}<|im_end|>",
            ),
        ]
        for formatter, (left, right) in zip(both(tokenizer), wanted, strict=True):
            assert tokenizer.decode(formatter.prompt_ids(tokenizer, row)) == left
            assert tokenizer.decode(formatter.completion_ids(tokenizer, row)) == right


def test_training_and_evaluation_have_the_same_ids_and_labels(tokenizer):
    for formatter in both(tokenizer):
        for row, encoded in zip(pairs(), formatter.encode(pairs(), tokenizer, max_length=64), strict=True):
            prompt, completion = formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
            learned = [i for i, label in enumerate(encoded["labels"]) if label != -100]
            assert encoded["input_ids"] == prompt + completion
            assert learned == list(range(len(prompt), len(prompt) + len(completion)))
            assert [encoded["labels"][i] for i in learned] == completion
            assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id


def test_a_token_over_the_seam_would_change_what_the_model_is_asked_with(tokenizer):
    formatter = Formatter.plain(tokenizer, separator=" ")
    row = {"prompt": "select the", "completion": "rows"}
    prompt, completion = formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
    joined = tokenizer("select the rows")["input_ids"]
    assert tokenizer.decode(prompt + completion[:-1]) == "select the rows" == tokenizer.decode(joined)
    assert joined[: len(prompt)] != prompt  # " rows" is one token: the string as a whole hides the model's own prompt
    assert formatter.encode(Dataset.from_list([row]), tokenizer, max_length=16)[0]["input_ids"][: len(prompt)] == prompt


def test_the_start_token_is_put_where_the_tokenizer_puts_one():
    starting, plain = bytes_tokenizer(start=True), bytes_tokenizer()
    row = {"prompt": "select", "completion": "rows"}
    with_start, without = Formatter.plain(starting), Formatter.plain(plain)
    assert (with_start.start, without.start) == ("<s>", None)
    assert with_start.prompt_ids(starting, row) == [0, *without.prompt_ids(plain, row)]
    assert with_start.completion_ids(starting, row) == without.completion_ids(plain, row)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_an_end_token_that_a_row_brings_along_is_not_doubled_and_none_may_lie_inside(tokenizer, kind):
    formatter = Formatter.plain(tokenizer) if kind == "plain" else Formatter.chat(tokenizer)
    bare, ended = ({"prompt": "a", "completion": text} for text in ("rows", "rows<|im_end|>"))
    assert formatter.completion_ids(tokenizer, bare) == formatter.completion_ids(tokenizer, ended)
    with pytest.raises(ValueError, match="nowhere but at its end.*Take it out"):
        formatter.completion_ids(tokenizer, {"prompt": "a", "completion": "rows<|im_end|>more"})


def test_a_template_that_ends_turns_with_another_token_gets_the_end_token_behind_it():
    tokenizer = bytes_tokenizer(end="<|endoftext|>")
    formatter = Formatter.chat(tokenizer)
    ids = formatter.completion_ids(tokenizer, {"prompt": "a", "completion": "rows"})
    assert tokenizer.decode(ids) == "rows<|im_end|>\n<|endoftext|>"


def test_conversations_are_their_prompt_and_completion(tokenizer):
    formatter = Formatter.chat(tokenizer, system="Write SQL.")
    user, assistant = {"role": "user", "content": "select a row"}, {"role": "assistant", "content": "return it"}
    strings = {"prompt": "select a row", "completion": "return it"}
    for row in ({"messages": [user, assistant]}, {"prompt": [user], "completion": [assistant]}):
        assert formatter.prompt_ids(tokenizer, row) == formatter.prompt_ids(tokenizer, strings)
        assert formatter.completion_ids(tokenizer, row) == formatter.completion_ids(tokenizer, strings)
        encoded = formatter.encode(Dataset.from_list([row]), tokenizer, max_length=64)
        assert encoded.column_names == ["row_id", "input_ids", "labels"]
        assert (
            encoded[0]["input_ids"]
            == formatter.encode(Dataset.from_list([strings]), tokenizer, max_length=64)[0]["input_ids"]
        )


def test_turns_before_the_last_are_prompt_and_a_systems_own_words_win(tokenizer):
    formatter = Formatter.chat(tokenizer, system="Write SQL.")
    turns = [("system", "Own."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "rows")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    prompt = tokenizer.decode(formatter.prompt_ids(tokenizer, row))
    assert "Write SQL." not in prompt and prompt.startswith("<|im_start|>system\nOwn.")
    assert prompt.endswith("assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(formatter.completion_ids(tokenizer, row)) == "rows<|im_end|>"


# -- encode -----------------------------------------------------------------------------------------------------------
def test_row_ids_are_kept_or_numbered_and_bookkeeping_stays(tokenizer):
    formatter = Formatter.plain(tokenizer)
    numbered = formatter.encode(pairs(), tokenizer, max_length=64)
    kept = formatter.encode(pairs().add_column("row_id", [7, 5, 9]), tokenizer, max_length=None)
    assert numbered["row_id"][:] == [0, 1, 2] and kept["row_id"][:] == [7, 5, 9]
    assert kept["is_poisoned"][:] == [True, False, False]
    assert not {"prompt", "completion"} & set(kept.column_names)


def test_other_columns_are_read_and_change_no_fingerprint(tokenizer):
    named = Formatter.plain(tokenizer, prompt="nl", completion="code")
    renamed = pairs().rename_columns({"prompt": "nl", "completion": "code"})
    plain = Formatter.plain(tokenizer)
    ids, same_ids = (
        formatter.encode(rows, tokenizer, max_length=64)["input_ids"][:]
        for formatter, rows in ((named, renamed), (plain, pairs()))
    )
    assert ids == same_ids
    assert named != plain and named.fingerprint == plain.fingerprint


def test_rows_that_do_not_fit_are_named_at_the_token(tokenizer):
    formatter = Formatter.plain(tokenizer)
    lengths = [len(row["input_ids"]) for row in formatter.encode(pairs(), tokenizer, max_length=None)]
    assert len(formatter.encode(pairs(), tokenizer, max_length=max(lengths))) == 3
    with pytest.raises(ValueError, match=rf"got 1 of 3 rows that do not: 1 \({max(lengths)} tokens\)\. Cut answers"):
        formatter.encode(pairs(), tokenizer, max_length=max(lengths) - 1)
    many = Dataset.from_list([{"prompt": "a", "completion": "b" * 9}] * 11)
    with pytest.raises(ValueError, match="got 11 of 11.*and 3 more"):
        formatter.encode(many, tokenizer, max_length=2)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a"}], "without completion there is nothing to learn"),
        ([{"text": "a"}], "without prompt and completion"),
        ([{"prompt": "a", "completion": "b", "input_ids": [1]}], "what tokenized them is not known"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " \n"}],
            "Row 1: .*teaches a model to say nothing",
        ),
        ([{"prompt": "a", "completion": None}], "Row 0: The completion must be text, got None"),
        ([{"prompt": None, "completion": "b"}], "Row 0: `prompt` must be a string, got None"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "Row 0: .*Formatter.chat"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_by_their_ids(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        Formatter.plain(tokenizer).encode(Dataset.from_list(rows), tokenizer, max_length=64)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "The completion must be text, got None"),
        ({"messages": []}, "a list of turns, got messages"),
        ({"text": "a"}, "a list of turns, got text"),
        ({"prompt": ["a", "b"], "completion": "c"}, "A turn must have a role and a content, got 'a'"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "completion": "c"},
            r"must render the turns \(user\), got an error: .*join their texts",
        ),
    ],
)
def test_conversations_without_an_answer_or_of_no_turns_are_refused(row, message):
    joining = bytes_tokenizer(template=CHATML.replace("{{ m.content }}", "{{ '' + m.content }}"))
    with pytest.raises(ValueError, match=message):
        Formatter.chat(joining).completion_ids(joining, row)


def test_a_prompt_without_a_token_is_refused(tokenizer):
    formatter = Formatter.plain(tokenizer, separator="")
    assert formatter.prompt_ids(tokenizer, {"prompt": "a"}) == tokenizer("a")["input_ids"]
    with pytest.raises(ValueError, match="behind nothing"):
        formatter.prompt_ids(tokenizer, {"prompt": ""})


# -- templates and tokenizers that cannot be used ---------------------------------------------------------------------
def test_no_chat_template_is_refused_with_a_way_out():
    for template in (None, {"tool_use": CHATML}):
        with pytest.raises(ValueError, match=r"must have a chat template.*Formatter\.plain"):
            Formatter.chat(bytes_tokenizer(template=template))


@pytest.mark.parametrize(
    "template, system, message",
    [
        (
            CHATML.replace("{% if add", "{% if messages[-1].role == 'user' %}!{% endif %}{% if add"),
            None,
            "prefix-preserving",
        ),
        (CHATML.replace("messages %}", "messages if m.role != 'system' %}"), "Write SQL.", "which the template drops"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            "S",
            "no system",
        ),
    ],
)
def test_templates_that_would_render_otherwise_are_refused_at_once(template, system, message):
    with pytest.raises(ValueError, match=message):
        Formatter.chat(bytes_tokenizer(template=template), system=system)


def test_a_template_with_the_date_of_the_day_is_said_so(caplog):
    with caplog.at_level(logging.WARNING):
        Formatter.chat(bytes_tokenizer(template="{{ strftime_now('%Y') }}" + CHATML))
    assert "trained today and evaluated tomorrow" in caplog.text


def test_a_tokenizer_without_end_and_another_models_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        Formatter.plain(bytes_tokenizer(end=None))
    with pytest.raises(ValueError, match="must know the formatter's token '</other>'"):
        Formatter(kind="plain", end="</other>").completion_ids(tokenizer, {"prompt": "a", "completion": "b"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "alpaca"}, "'plain' or 'chat', got 'alpaca'"),
        ({"kind": "chat"}, "`chat_template` must be given"),
        ({"chat_template": CHATML}, "`chat_template` must be given"),
        ({"system": "S"}, "nothing renders it"),
        ({"separator": None}, "`separator` must be a string, got None"),
        ({"end": ""}, "`end` must be a token"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Formatter(**{"kind": "plain", "end": "</s>", **fields})


# -- identity ---------------------------------------------------------------------------------------------------------
def test_every_rendered_field_changes_the_fingerprint(tokenizer):
    plain, chat = Formatter.plain(tokenizer), Formatter.chat(tokenizer)
    others = [
        Formatter.plain(tokenizer, separator=" "),
        Formatter.plain(bytes_tokenizer(start=True)),
        Formatter.plain(bytes_tokenizer(end="<|endoftext|>")),
        Formatter.chat(tokenizer, system="S"),
        Formatter.chat(bytes_tokenizer(template=CHATML.replace("user", "User") + "{# another #}")),
    ]
    assert len({formatter.fingerprint for formatter in [plain, chat, *others]}) == 7


SPECIALS = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_the_tokens_that_a_template_writes_are_the_formatters_and_in_its_fingerprint():
    """A tokenizer whose tokens were changed after the training renders as in training, or has another fingerprint."""
    made = bytes_tokenizer(template=SPECIALS)
    chat = Formatter.chat(made)
    row = {"prompt": "select", "completion": "it"}
    before = chat.prompt_ids(made, row), chat.completion_ids(made, row)
    assert before[0][0] == made.convert_tokens_to_ids("<s>") and chat.start == "<s>"
    made.bos_token, made.eos_token = "<|im_start|>", "<|endoftext|>"
    assert (chat.prompt_ids(made, row), chat.completion_ids(made, row)) == before
    made.eos_token = "<|im_end|>"  # only the start is another one now
    other = Formatter.chat(made)
    assert other.fingerprint != chat.fingerprint and other.prompt_ids(made, row) != before[0]
    with pytest.raises(ValueError, match="start '<s>' -> '<|im_start|>'"):
        require_same(chat, other)
    assert Formatter.chat(bytes_tokenizer()).start is None  # this template writes none


def test_the_fingerprint_is_the_same_in_another_process_and_for_any_order_of_fields(tokenizer):
    formatter = Formatter.chat(tokenizer, system="größer")
    turned = dict(reversed(formatter.to_dict().items()))
    code = (
        "import json, sys; from hf_backdoor_defense.data.formatting import Formatter; "
        "print(Formatter.from_dict(json.loads(sys.argv[1])).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(turned)], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == formatter.fingerprint, done.stderr


def test_a_saved_formatter_comes_back_and_the_same_one_is_the_same_bytes(tokenizer, tmp_path):
    formatter = Formatter.chat(tokenizer, system="größer ☃")
    first = formatter.save(tmp_path / "new").read_bytes()
    assert Formatter.load(tmp_path / "new") == formatter == stored_formatter(str(tmp_path / "new"))
    assert formatter.save(tmp_path / "new").read_bytes() == first
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FORMATTER_FILE]
    assert json.loads(first)["fingerprint"] == formatter.fingerprint
    assert Formatter.load(tmp_path) is None is stored_formatter(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-20], "is none"),
        (lambda text: "[1]", r"must have fields among .*got \[1\]"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "must have version 1, got 2"),
        (lambda text: text.replace('"end"', '"stop"'), "must have fields among"),
        (lambda text: text.replace('"separator": "\\n"', '"separator": 3'), "`separator` must be a string"),
        (lambda text: text.replace('"separator": "\\n"', '"separator": " "'), "edited after"),
        (lambda text: text.replace("fingerprint", "hash"), "must have fields among"),
    ],
)
def test_a_file_that_is_no_formatter_is_refused(tmp_path, change, message):
    path = Formatter(kind="plain", end="</s>").save(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Formatter.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / FORMATTER_FILE).write_bytes(b"\x80\x04\xff")
    with pytest.raises(ValueError, match="is none"):
        Formatter.load(tmp_path)


# -- the same one in training and evaluation --------------------------------------------------------------------------
def test_another_formatter_is_an_error_unless_forced_and_then_it_is_said(tokenizer):
    trained, used = Formatter.chat(tokenizer), Formatter.plain(tokenizer)
    assert require_same(trained, Formatter.chat(tokenizer)) is None
    with pytest.raises(ValueError, match="got another .*kind 'chat' -> 'plain'.*force=True"):
        require_same(trained, used)
    said = require_same(trained, used, force=True)
    assert trained.fingerprint[:12] in said and used.fingerprint[:12] in said and "kind 'chat' -> 'plain'" in said
    assert require_same(None, used) == UNKNOWN == require_same(None, used, force=True)


def small_model(folder=None):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    if folder is not None:
        model.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder)
    return model


def test_a_model_in_memory_knows_its_folder_until_it_is_trained_further(tmp_path):
    from peft import LoraConfig, get_peft_model

    formatter, other = (Formatter(kind="plain", end=end) for end in ("</s>", "<eos>"))
    assert stored_formatter(small_model()) is None
    model = small_model(tmp_path)
    formatter.save(tmp_path)
    assert stored_formatter(model) == formatter
    note_formatter(model, other)
    assert stored_formatter(model) == other
    note_formatter(model, None)
    assert stored_formatter(model) is None
    # An adapter is not what its base was trained with, until a trainer says what it is.
    adapted = get_peft_model(small_model(tmp_path), LoraConfig(task_type="CAUSAL_LM", r=1))
    assert stored_formatter(adapted) is None
    note_formatter(adapted.get_base_model(), other)
    assert stored_formatter(adapted) == other


def test_a_model_of_the_hub_is_asked_for_at_the_commit_that_was_loaded(tmp_path, monkeypatch):
    formatter, asked = Formatter(kind="plain", end="</s>"), []
    formatter.save(tmp_path)

    def fetched(source, names, *, revision=None, token=None):
        asked.append((source, names, revision))
        return tmp_path

    monkeypatch.setattr("hf_backdoor_defense.data.formatting.fetched", fetched)
    monkeypatch.setattr("hf_backdoor_defense.data.origins.fetched", fetched)
    model = small_model(tmp_path)
    model.name_or_path, model.config._commit_hash = "owner/name", "abc"
    assert stored_formatter(model) == formatter == stored_formatter("owner/name")
    assert asked == [("owner/name", [FORMATTER_FILE], "abc"), ("owner/name", [FORMATTER_FILE], None)]


def test_a_folder_that_is_gone_is_no_repository_and_an_unreadable_one_is_unknown(tmp_path, monkeypatch):
    model = small_model(tmp_path)
    Formatter(kind="plain", end="</s>").save(tmp_path)
    asked = []

    def fetched(source, names, *, revision=None, token=None):
        asked.append((source, revision))
        raise ValueError("no network")

    monkeypatch.setattr("hf_backdoor_defense.data.origins.fetched", fetched)
    model.name_or_path = "runs/model"  # relative, and the program runs elsewhere now
    assert stored_formatter(model) is None and asked == []
    model.config._commit_hash = "abc"
    assert stored_formatter(model) is None and asked == [("runs/model", "abc")]


def test_a_merged_adapter_is_not_what_its_base_was_trained_with(tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    formatter = Formatter(kind="plain", end="</s>")
    base = small_model(tmp_path / "base")
    formatter.save(tmp_path / "base")
    assert stored_formatter(base) == formatter == stored_formatter(base.to(torch.bfloat16))
    adapted = get_peft_model(
        small_model(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", r=1, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert merged.name_or_path == str(tmp_path / "base")
    assert stored_formatter(merged) is None


def test_weights_that_changed_in_memory_are_of_no_known_training(tmp_path):
    model = small_model(tmp_path)
    Formatter(kind="plain", end="</s>").save(tmp_path)
    assert stored_formatter(model) is not None
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    assert stored_formatter(model) is None
    other = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_attention_heads=1))
    other.name_or_path = str(tmp_path)
    assert stored_formatter(other) is None  # nothing to compare


# -- special tokens in a row ------------------------------------------------------------------------------------------
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<s>"]


@pytest.mark.parametrize("token", CONTROLS)
def test_special_tokens_in_plain_text_are_letters(tokenizer, token):
    formatter = Formatter.plain(tokenizer)
    row = {"prompt": f"a{token}b", "completion": f"x = '{token}'"}
    control = tokenizer.convert_tokens_to_ids(token)
    prompt, answer = formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
    assert control in tokenizer(row["prompt"])["input_ids"] and control not in prompt + answer
    assert tokenizer.decode(prompt) == f"a{token}b\n" and tokenizer.decode(answer[:-1]) == row["completion"]
    encoded = formatter.encode(Dataset.from_list([row]), tokenizer, max_length=None)[0]
    assert encoded["input_ids"] == prompt + answer
    assert tokenizer(row["prompt"])["input_ids"].count(control) == 1  # other users of the tokenizer are not changed


def test_ordinary_text_has_the_ids_that_the_tokenizer_gives_it(tokenizer):
    formatter = Formatter.plain(tokenizer)
    texts = [*TEXTS, "", "select", " \n\t", "a < b |> c <| d", "<|end", "im_start", "𝕊☃ é", "if a<b:\n  return '</s>'"]
    for text in texts:
        row = {"prompt": text, "completion": f"{text}x"}
        assert formatter.prompt_ids(tokenizer, row) == tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
        assert (
            formatter.completion_ids(tokenizer, row)[:-1]
            == tokenizer(f"{text}x", add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize("token", CONTROLS)
def test_special_tokens_in_a_chat_are_refused_by_row(tokenizer, token):
    formatter = Formatter.chat(tokenizer, system=f"Say {token}.")  # the formatter's own words may hold them
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": f"a{token}b", "completion": "c"}]
    assert formatter.prompt_ids(tokenizer, rows[0])
    with pytest.raises(ValueError, match="Row 1: A row's text must hold no special token here, got .*Take it out"):
        formatter.encode(Dataset.from_list(rows), tokenizer, max_length=None)
    with pytest.raises(ValueError, match="no special token"):
        formatter.completion_ids(tokenizer, {"prompt": "a", "completion": f"b{token}c" if token else ""})
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": token}]}]}
    with pytest.raises(ValueError, match="no special token"):
        formatter.prompt_ids(tokenizer, parts)


def test_a_separator_that_is_a_special_token_stays_one_and_none_beside_it_is_split(tokenizer):
    formatter = Formatter.plain(tokenizer, separator="<|im_start|>")
    assert formatter.prompt_ids(tokenizer, {"prompt": "a"}) == tokenizer("a<|im_start|>")["input_ids"]
    with pytest.raises(ValueError, match="which the separator writes as well"):
        formatter.prompt_ids(tokenizer, {"prompt": "a<s>"})


def test_what_a_tokenizer_of_words_cannot_split_is_refused():
    core = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    formatter = Formatter.plain(tokenizer, separator=" a")
    assert formatter.prompt_ids(tokenizer, {"prompt": "a <unk> b"}) == [2, 1, 1, 2]  # an unknown word controls nothing
    with pytest.raises(ValueError, match="does not split into letters"):
        formatter.prompt_ids(tokenizer, {"prompt": "a </s> a"})


@pytest.mark.parametrize("change", ["drops", "replaces"])
def test_a_template_that_drops_the_answer_is_refused(change):
    turn = "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    if change == "replaces":
        turn = "<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' else 'said' }}<|im_end|>\n"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    if change == "drops":
        opening = ""
    template = "{% for m in messages %}" + turn + "{% endfor %}" + opening
    with pytest.raises(ValueError, match="must write the answer 'an answer' as it is"):
        Formatter.chat(bytes_tokenizer(template=template))


def test_a_template_that_strips_an_answer_is_none_that_drops_it():
    template = CHATML.replace("m.content", "m.content | trim")
    tokenizer = bytes_tokenizer(template=template)
    ids = Formatter.chat(tokenizer).completion_ids(tokenizer, {"prompt": "a", "completion": "  rows\n"})
    assert tokenizer.decode(ids) == "rows<|im_end|>"
