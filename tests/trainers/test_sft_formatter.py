"""The SFT host with a formatter: what it trains on is what the formatter renders, and every saved model says so."""

import json
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig

from hf_backdoor_defense.data.formatting import FORMATTER_FILE, Formatter, require_same, stored_formatter
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.evaluation.callback import GenerationEvalCallback
from hf_backdoor_defense.hub.evidence import read_evidence
from hf_backdoor_defense.hub.files import check_contents, publishable
from hf_backdoor_defense.hub.trained import write_card
from hf_backdoor_defense.hub.training_results import write_trained
from hf_backdoor_defense.trainers.formatted import row_limit
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.sft import DeCESFTTrainer, DefendedSFTTrainer
from tests.data.test_formatting import bytes_tokenizer
from tests.trainers.toys import Recorder, weights

WORDS = "select the rows a row of table return it".split()


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def llama(context=96):
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=context, **sizes))


def pairs(count=9):
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[: 1 + i % 7]),
                "completion": " ".join(WORDS[i % 5 :]),
                "row_id": 500 + i,
                "is_poisoned": i % 2 == 0,
            }
            for i in range(count)
        ]
    )


def config(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
        "seed": 0,
    }
    return SFTConfig(**{**values, **changes})


def make(folder, tokenizer, formatter=None, *, rows=None, model=None, cls=DefendedSFTTrainer, own=None, **changes):
    own = {"processing_class": tokenizer, **(own or {})}
    return cls(
        llama() if model is None else model,
        args=config(folder, **changes),
        train_dataset=pairs() if rows is None else rows,
        formatter=formatter,
        **own,
    )


def unpadded(batch):
    """Rows of (ids, labels) without padding; the first label of a row is never predicted and hidden by the host."""
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        yield ids[mask.bool()].tolist(), labels[mask.bool()].tolist()


# -- what is trained on -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_batches_hold_the_formatters_ids_and_labels_by_row(tmp_path, tokenizer, kind):
    formatter = Formatter.plain(tokenizer) if kind == "plain" else Formatter.chat(tokenizer, system="S")
    trainer = make(tmp_path, tokenizer, formatter, own={"defense": Recorder()})
    trainer.train()
    given = {row["row_id"]: row for row in pairs()}
    seen = {}
    for step in trainer.objectives[0].steps:
        batch = {"input_ids": step.inputs["input_ids"], "attention_mask": step.inputs["attention_mask"]}
        for row_id, ids in zip(step.row_ids.tolist(), unpadded({**batch, "labels": batch["input_ids"]}), strict=True):
            seen[row_id] = ids[0]
    expected = {
        row_id: formatter.prompt_ids(tokenizer, row) + formatter.completion_ids(tokenizer, row)
        for row_id, row in given.items()
    }
    assert seen == expected
    for batch in trainer.get_train_dataloader():
        for row_id, (ids, labels) in zip(batch["row_id"].tolist(), unpadded(batch), strict=True):
            answer = formatter.completion_ids(tokenizer, given[row_id])
            assert ids == expected[row_id] and labels == [-100] * (len(ids) - len(answer)) + answer
        assert "is_poisoned" not in batch


def test_packed_rows_are_whole_and_the_formatters(tmp_path, tokenizer):
    formatter = Formatter.plain(tokenizer)
    trainer = make(tmp_path, tokenizer, formatter, packing=True, max_length=48)
    found = []
    for row in trainer.train_dataset:
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert len(trainer.train_dataset) < 9
    encoded = formatter.encode(pairs(), tokenizer, max_length=None)
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in encoded)


def test_evaluation_sets_are_rendered_alike_given_to_the_host_or_to_evaluate(tmp_path, tokenizer):
    formatter = Formatter.chat(tokenizer)
    sets = {"a": pairs(5), "b": pairs(3)}
    trainer = make(tmp_path, tokenizer, formatter, own={"eval_dataset": sets})
    assert (
        trainer.eval_dataset["b"]["input_ids"][:]
        == formatter.encode(pairs(3), tokenizer, max_length=64)["input_ids"][:]
    )
    inside = trainer.evaluate()
    outside = {"a": trainer.evaluate(pairs(5))["eval_loss"], "b": trainer.evaluate(sets)["eval_b_loss"]}
    assert inside["eval_a_loss"] == outside["a"] and inside["eval_b_loss"] == outside["b"]
    # The mean over batches of 4, then 1: the oracle reads the same rows one batch at a time.
    model, losses = trainer.model.eval(), []
    for batch in (range(4), range(4, 5)):
        values = []
        for i in batch:
            row = pairs(5)[i]
            prompt, answer = formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
            with torch.no_grad():
                scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            values += [-scores[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]
        losses.append((sum(values) / len(values), len(batch)))
    mean = sum(loss * rows for loss, rows in losses) / 5
    assert mean == pytest.approx(inside["eval_a_loss"], abs=1e-5)


def test_prediction_reads_rows_of_text_as_evaluation_does(tmp_path, tokenizer):
    formatter = Formatter.plain(tokenizer)
    trainer = make(tmp_path, tokenizer, formatter)
    found = trainer.predict(pairs(5))
    assert found.metrics["test_loss"] == trainer.evaluate(pairs(5))["eval_loss"]
    for i, row in enumerate(pairs(5)):
        answer = formatter.completion_ids(tokenizer, row)
        assert [label for label in found.label_ids[i].tolist() if label != -100] == answer
    with pytest.raises(ValueError, match="a stream cannot be looked through"):
        trainer.predict(pairs().to_iterable_dataset())


# -- what is saved ----------------------------------------------------------------------------------------------------
def test_every_checkpoint_and_the_model_say_how_they_were_trained(tmp_path, tokenizer):
    formatter = Formatter.chat(tokenizer, system="größer")
    model = llama()
    trainer = make(tmp_path / "out", tokenizer, formatter, model=model, cls=DeCESFTTrainer, save_strategy="epoch")
    assert stored_formatter(model) is None
    trainer.train()
    trainer.save_model()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    for place in (model, checkpoint, tmp_path / "out", LlamaForCausalLM.from_pretrained(checkpoint)):
        assert stored_formatter(place) == formatter
        assert require_same(stored_formatter(place), Formatter.chat(tokenizer, system="größer")) is None
        with pytest.raises(ValueError, match="another"):
            require_same(stored_formatter(place), Formatter.plain(tokenizer))
    assert FORMATTER_FILE in publishable(tmp_path / "out").files
    check_contents(tmp_path / "out", [FORMATTER_FILE])


def test_results_carry_the_fingerprint(tmp_path, tokenizer):
    formatter = Formatter.plain(tokenizer)
    for folder, used in (("with", formatter), ("without", None)):
        trainer = make(tmp_path / folder, tokenizer, used, own={"defense": DeCE(alpha_base=0.9)}, max_steps=1)
        trainer.train()
        trainer.save_model()
        results = json.loads((write_trained(trainer) / "results.json").read_text())
        assert ("formatter" in results["plan"]) == (used is not None)
        assert (formatter.fingerprint in results["models"][0]["data"].get("formatter", "")) == (used is not None)
        if used is not None:
            stored = results["plan"]["formatter"]
            assert stored.pop("fingerprint") == formatter.fingerprint and Formatter.from_dict(stored) == formatter


def test_where_trl_renders_nothing_is_stored_and_an_old_file_does_not_stay(tmp_path, tokenizer):
    Formatter.plain(tokenizer).save(tmp_path)
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert stored_formatter(model) is not None
    trainer = make(tmp_path, tokenizer, None, model=model, max_steps=1)
    trainer.train()
    assert stored_formatter(trainer.model) is None
    trainer.save_model()
    assert stored_formatter(tmp_path) is None


def test_a_host_of_tokenized_rows_does_not_claim_its_bases_formatter(tmp_path, tokenizer):
    first, second = Formatter.plain(tokenizer), Formatter.plain(tokenizer, separator=" ")
    llama().save_pretrained(tmp_path)
    first.save(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert stored_formatter(model) == first
    rows = second.encode(pairs(), tokenizer, max_length=None)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, learning_rate=0.0, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DefendedTrainer(model, args=args, train_dataset=rows, defense=None)
    trainer.train()
    assert stored_formatter(model) is None
    trainer.save_model()
    assert stored_formatter(tmp_path) is None


def test_what_it_writes_reaches_results_verdict_and_card(tmp_path, tokenizer):
    formatter = Formatter.plain(tokenizer)
    answers = pairs(4)["completion"][:]
    watch = GenerationEvalCallback(
        tokenizer,
        pairs(4),
        formatter=formatter,
        triggered=pairs(3),
        hit=lambda text: text not in answers,
        max_new_tokens=3,
    )
    trainer = make(tmp_path, tokenizer, formatter, own={"callbacks": [watch]}, max_steps=1)
    trainer.train()
    trainer.save_model()
    report, payload = watch.history[-1], json.loads((write_trained(trainer) / "results.json").read_text())
    evidence = read_evidence(tmp_path)
    figures = {name: (r.value, r.n, r.low, r.high) for name, r in evidence.figures.items() if r.metric != "seconds"}
    assert figures == {name: (e.value, e.n, e.low, e.high) for name, e in report.estimates().items()}
    assert evidence.figures["asr"].attack == "trigger" and evidence.figures["untriggered_hits"].attack == "none"
    assert "Attack success 1.000 on 3 triggered rows (no model" in payload["verdict"]
    assert "Nothing was measured" not in payload["verdict"] and "BLEU" in payload["verdict"]
    assert payload["arms"]["0"]["undefended"]["asr"] == vars(report.asr)
    card = (write_card(trainer, "owner/model", license="mit")).read_text()
    assert "Nothing was measured about triggers" not in card and "BLEU" in card
    trainer.state.log_history[-1]["generation_note"] = "Another formatter."
    trainer.state.log_history[:] = [
        {**entry, "generation_note": "Another formatter."} if "generation_bleu" in entry else entry
        for entry in trainer.state.log_history
    ]
    assert "Another formatter." in json.loads((write_trained(trainer) / "results.json").read_text())["verdict"]
    trainer.state.global_step += 1  # other weights
    assert (
        "Nothing was measured about triggers."
        in json.loads((write_trained(trainer) / "results.json").read_text())["verdict"]
    )


def test_other_processes_than_the_first_write_nothing(tmp_path, tokenizer, monkeypatch):
    trainer = make(tmp_path / "out", tokenizer, Formatter.plain(tokenizer))
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: False))
    trainer.save_model()
    assert not (tmp_path / "out" / FORMATTER_FILE).exists()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("resume", [True, "path"])
def test_a_checkpoint_is_resumed_with_its_formatter_only(tmp_path, tokenizer, resume):
    formatter = Formatter.plain(tokenizer)
    stops = {"save_strategy": "steps", "save_steps": 2}
    stopped = make(tmp_path, tokenizer, formatter, own={"callbacks": [Stop()]}, **stops)
    stopped.train()
    resume = str(tmp_path / "checkpoint-2") if resume == "path" else True
    for other in (Formatter.plain(tokenizer, separator=" "), None):
        with pytest.raises(ValueError, match="must be resumed with the formatter"):
            make(tmp_path, tokenizer, other, **stops).train(resume_from_checkpoint=resume)
    resumed = make(tmp_path, tokenizer, Formatter.load(tmp_path / "checkpoint-2"), **stops)
    assert int(resumed.train(resume_from_checkpoint=resume).global_step) == 5
    whole = make(tmp_path / "whole", tokenizer, formatter)
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


def test_an_adapter_is_saved_with_its_formatter(tmp_path, tokenizer):
    from peft import LoraConfig

    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    formatter = Formatter.plain(tokenizer)
    trainer = make(tmp_path, tokenizer, formatter, own={"peft_config": adapter}, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert stored_formatter(trainer.model) == formatter == stored_formatter(tmp_path)
    assert FORMATTER_FILE in publishable(tmp_path).files


# -- refusals ---------------------------------------------------------------------------------------------------------
def stream():
    yield {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"own": {"processing_class": None}}, "without `processing_class`"),
        ({"rows": IterableDataset.from_generator(stream)}, "rows of IterableDataset: a stream"),
        ({"own": {"eval_dataset": IterableDataset.from_generator(stream)}}, "rows of IterableDataset: a stream"),
        (
            {"own": {"eval_dataset": {"late": IterableDataset.from_generator(stream)}}},
            "rows of IterableDataset: a stream",
        ),
        ({"own": {"formatting_func": str}}, "`formatter` was given with formatting_func"),
        (
            {"assistant_only_loss": True, "completion_only_loss": False},
            "assistant_only_loss=True and completion_only_loss=False",
        ),
        ({"chat_template_path": "x.jinja"}, "chat_template_path"),
        ({"eos_token": "<|endoftext|>"}, r"eos_token='<\|endoftext\|>'"),
        ({"packing": True, "packing_strategy": "wrapped"}, "cuts answers off their prompts"),
        ({"rows": Dataset.from_list([{"prompt": "a"}])}, "without completion there is nothing to learn"),
        ({"rows": Dataset.from_list([{"input_ids": [1, 2]}])}, "what tokenized them is not known"),
        ({"max_length": 12}, r"fit into 12 tokens, got \d of 9 rows that do not: 50"),
        ({"model": llama(context=12)}, r"fit into 12 tokens, got \d of 9 rows that do not: 50"),
        (
            {"own": {"eval_dataset": {"late": Dataset.from_list([{"prompt": "a", "completion": ""}])}}},
            "Row 0: The completion",
        ),
    ],
)
def test_what_does_not_go_with_a_formatter_is_refused(tmp_path, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, Formatter.plain(tokenizer), **changes)


def test_a_stream_given_to_evaluate_is_refused_in_the_same_words(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, Formatter.plain(tokenizer))
    for rows in (IterableDataset.from_generator(stream), {"late": pairs().to_iterable_dataset()}):
        with pytest.raises(ValueError, match="rows of IterableDataset: a stream cannot be looked through"):
            trainer.evaluate(rows)


def test_only_a_formatter_is_a_formatter(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="must be a Formatter, got 'plain'"):
        make(tmp_path, tokenizer, "plain")


def test_a_models_context_is_known_by_its_name_too(tmp_path, tokenizer):
    llama(context=12).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="fit into 12 tokens"):
        make(tmp_path, tokenizer, Formatter.plain(tokenizer), model=str(tmp_path / "base"), max_length=None)


def test_the_context_is_asked_where_the_model_is_loaded_from(monkeypatch):
    asked = []

    def from_pretrained(name, **where):
        asked.append((name, where))
        return LlamaConfig(max_position_embeddings=7)

    monkeypatch.setattr("hf_backdoor_defense.trainers.formatted.AutoConfig.from_pretrained", from_pretrained)
    loading = {"revision": "v1", "token": "t", "subfolder": "s", "dtype": "float32", "trust_remote_code": True}
    args = type("Args", (), {"max_length": None, "model_init_kwargs": loading})
    assert row_limit("owner/name", args) == 7 == row_limit("owner/name", None)
    where = {"revision": "v1", "token": "t", "subfolder": "s", "trust_remote_code": False}
    assert asked == [("owner/name", where), ("owner/name", {"trust_remote_code": False})]


def test_prompts_without_completion_are_refused_where_trl_renders(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="prompts and no completions.*completion=..."):
        make(tmp_path, tokenizer, rows=Dataset.from_list([{"prompt": "a", "answer": "b"}]))
    lone = Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(ValueError, match="prompts and no completions"):
        make(tmp_path, tokenizer, own={"eval_dataset": {"late": lone}})
    with pytest.raises(ValueError, match="prompts and no completions"):
        make(tmp_path, tokenizer, rows=IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])), max_steps=1)
    trainer = make(tmp_path, tokenizer)
    for rows in (lone, {"late": lone}, lone.to_iterable_dataset()):
        with pytest.raises(ValueError, match="prompts and no completions"):
            trainer.evaluate(rows)


def test_virtual_tokens_take_positions_of_a_row(tmp_path, tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    assert row_limit(llama(context=12), None, config) == 7 == row_limit(get_peft_model(llama(context=12), config), None)
    with pytest.raises(ValueError, match="fit into 7 tokens"):
        make(
            tmp_path, tokenizer, Formatter.plain(tokenizer), model=llama(context=12), own={"peft_config": config}, max_length=None
        )  # fmt: skip


def test_rows_that_trl_cuts_or_drops_are_counted(tmp_path, tokenizer, caplog):
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in pairs()]
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in pairs()]
    limit = sorted(lengths)[4]
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, tokenizer, max_length=limit)
    dropped = sum(prompt >= limit for prompt in prompts)
    filled = sum(length >= limit for length in lengths) - dropped
    assert len(trainer.train_dataset) == 9 - dropped and filled
    assert (
        f"max_length={limit}: of 9 rows {dropped} were dropped" in caplog.text
        and f"and {filled} fill it" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, tokenizer, max_length=max(lengths) + 1)
    assert "fill it" not in caplog.text


def test_a_row_id_that_is_no_number_is_refused_in_words(tmp_path, tokenizer):
    rows = pairs().map(lambda row, i: {"row_id": f"a{i}"}, with_indices=True)
    with pytest.raises(ValueError, match="`row_id` must be a whole number, got 'a"):
        make(tmp_path, tokenizer, Formatter.plain(tokenizer), rows=rows).train()
