"""The SFT host against trl's own trainer, a loss written by hand, and itself on another path."""

import logging
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.functional.dece import dece_loss_reference
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.trainers.sft import DeCESFTTrainer, DefendedSFTTrainer, Ratios
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.toys import Recorder, same, weights

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a> {% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}<u> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<u>", "<a>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama(seed=0, **changes):
    set_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=45, max_position_embeddings=64, **{**sizes, **changes})
    return LlamaForCausalLM(config)


def gpt2(seed=0):
    set_seed(seed)
    none = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=45, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1, **none
        )
    )


def sentences(count, seed=0, low=2, high=9):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        length = int(torch.randint(low, high, (1,), generator=generator))
        yield " ".join(WORDS[i] for i in torch.randint(0, 40, (length,), generator=generator))


def text(count=16):
    return Dataset.from_list([{"text": words + " </s>", "row_id": 500 + i} for i, words in enumerate(sentences(count))])


def pairs(count=16):
    prompts, completions = sentences(count, 1), sentences(count, 2)
    return Dataset.from_list(
        [{"prompt": p + " ", "completion": c + " </s>"} for p, c in zip(prompts, completions, strict=True)]
    )


def chats(count=16):
    turns = zip(sentences(count, 1), sentences(count, 2), strict=True)
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)]} for turn in turns]
    )


def config(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 32,
        "seed": 0,
    }
    return SFTConfig(**{**values, **changes})


def make(folder, tokenizer, data=None, defense=None, model=None, cls=DefendedSFTTrainer, fuse=None, **changes):
    own = {name: changes.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in changes}
    if issubclass(cls, DefendedSFTTrainer):
        own["defense"] = defense
    trainer = cls(
        llama() if model is None else model,
        args=config(folder, **changes),
        train_dataset=text() if data is None else data,
        processing_class=tokenizer,
        **own,
    )
    if fuse is not None:
        trainer.fuse_bytes = 0 if fuse else 2**60
    return trainer


def trained(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


@dataclass(kw_only=True, eq=False)
class Sees(Recorder):
    """A recorder that is content with hidden states, so that it does not change what the host chooses."""

    takes_hidden = True


# `max_length=None`: trl refuses to promise a length that padding-free batches do not have.
KINDS = {
    "text": (text, {}),
    "completion": (pairs, {}),
    "whole": (pairs, {"completion_only_loss": False}),
    "chat": (chats, {}),
    "assistant": (chats, {"assistant_only_loss": True}),
    "bfd": (text, {"packing": True}),
    "bfd_split": (text, {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
    "wrapped": (text, {"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": (pairs, {"padding_free": True, "max_length": None}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_defense_the_weights_are_those_of_trl(tmp_path, tokenizer, kind):
    data, options = KINDS[kind]
    stock = trained(tmp_path, tokenizer, data(), cls=SFTTrainer, **options)
    start = llama().state_dict()
    for fuse in (False, True):
        ours = trained(tmp_path, tokenizer, data(), fuse=fuse, **options)
        assert ours.state.global_step == stock.state.global_step >= 1
        assert same(weights(ours), weights(stock), atol=2e-6)
    assert not same(weights(stock), start, atol=1e-4)


def test_without_a_defense_accumulation_is_that_of_trl(tmp_path, tokenizer):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    stock = trained(tmp_path, tokenizer, pairs(), cls=SFTTrainer, **options)
    ours = trained(tmp_path, tokenizer, pairs(), **options)
    assert same(weights(ours), weights(stock), atol=2e-6)


@pytest.mark.parametrize("fuse", [False, True])
def test_accumulation_does_not_change_the_step(tmp_path, tokenizer, fuse):
    at_once = trained(tmp_path, tokenizer, pairs(), DeCE(alpha_base=0.8), fuse=fuse, per_device_train_batch_size=8)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    in_parts = trained(tmp_path, tokenizer, pairs(), DeCE(alpha_base=0.8), fuse=fuse, **options)
    assert at_once.state.global_step == in_parts.state.global_step == 2
    assert same(weights(at_once), weights(in_parts), atol=1e-6)


# -- packing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("defense", [None, 0.8], ids=["plain", "dece"])
def test_packed_is_unpadded_is_padded(tmp_path, tokenizer, model, defense):
    """One step over the same documents: no document reads another, and no border is a label."""
    seen = []
    for options in (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 16, "padding_free": True, "max_length": None},
        {"packing": True, "max_length": 24, "per_device_train_batch_size": 16},
    ):
        recorder = Recorder()
        defenses = [recorder] if defense is None else [recorder, DeCE(alpha_base=defense)]
        trainer = trained(tmp_path, tokenizer, pairs(), defenses, model=model(), **options)
        assert trainer.state.global_step == 1
        values = torch.cat(recorder.values)
        assert values.numel() == sum(len(c.split()) for c in pairs()["completion"])
        seen.append((values.sort().values, weights(trainer)))
    for values, state in seen[1:]:
        assert torch.allclose(values, seen[0][0], atol=1e-5)
        assert same(state, seen[0][1], atol=1e-5)


def test_packed_batches_reach_the_model_with_their_borders(tmp_path, tokenizer):
    recorder = Recorder()
    trained(tmp_path, tokenizer, text(), recorder, packing=True, max_length=24)
    step = recorder.steps[0]
    starts = (step.inputs["position_ids"][0] == 0).nonzero().flatten()
    assert len(starts) > 4 and step.row_ids is None
    # The label of the position before a start would be the next document's first token.
    assert (step.labels[0, starts[1:] - 1] == -100).all()


@dataclass(kw_only=True, eq=False)
class NeedsRows(Recorder):
    needs_row_ids = True
    name = "needs_rows"


def test_objectives_that_tell_rows_apart_are_refused_where_rows_are_joined(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="needs_rows tells training rows apart, and packing joins"):
        make(tmp_path, tokenizer, text(), NeedsRows(), packing=True)
    with pytest.raises(ValueError, match="padding_free=False"):
        make(tmp_path, tokenizer, text(), NeedsRows(), padding_free=True, max_length=None)
    trained(tmp_path, tokenizer, text(), NeedsRows())


def test_row_ids_reach_the_objective_through_trls_preparation(tmp_path, tokenizer):
    data = pairs().add_column("is_poisoned", [i % 2 for i in range(16)])
    # The third prompt alone fills the length: trl drops the row, and the others keep their numbers.
    long = data[2]["prompt"] * 20
    data = data.map(lambda row, i: {"prompt": long} if i == 2 else {}, with_indices=True)
    recorder = Recorder()
    trainer = trained(tmp_path, tokenizer, data, recorder, shuffle_dataset=True)
    assert "is_poisoned" not in trainer.train_dataset.column_names
    completion = dict(enumerate(data["completion"]))
    seen = []
    for step in recorder.steps:
        assert not {"row_id", "is_poisoned"} & set(step.inputs)
        for row, labels in zip(step.row_ids.tolist(), step.labels, strict=True):
            assert tokenizer.decode(labels[labels != -100]) == completion[row].strip()
            seen.append(row)
    assert sorted(seen) == [i for i in range(16) if i != 2]


def test_given_row_ids_are_kept_and_streams_need_none(tmp_path, tokenizer):
    recorder = Recorder()
    trained(tmp_path, tokenizer, text(), recorder)
    assert sorted(torch.cat([s.row_ids for s in recorder.steps]).tolist()) == list(range(500, 516))
    rows = [{"text": words} for words in sentences(16)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    recorder = Recorder()
    trained(tmp_path, tokenizer, stream, [DeCE(), recorder], max_steps=2)
    assert len(recorder.steps) == 2 and recorder.steps[0].row_ids is None


# -- DeCE -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fuse", [False, True])
def test_one_step_is_the_gradient_of_the_direct_formula(tmp_path, tokenizer, fuse):
    ours = trained(tmp_path, tokenizer, pairs(4), DeCE(alpha_base=0.7), fuse=fuse, max_steps=1)
    oracle = llama()
    for row in pairs(4):
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        logits = oracle(ids).logits[0, :-1].double()
        start = len(tokenizer(row["prompt"])["input_ids"])
        labels = ids[0, 1:].clone()
        labels[: start - 1] = -100
        count = sum(len(c.split()) for c in pairs(4)["completion"])
        values = dece_loss_reference(logits, labels, log_alpha=math.log(0.7), label_smoothing=0.05)
        (values.sum() / count).backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter -= 1e-2 * parameter.grad
    assert same(weights(ours), oracle.state_dict(), atol=1e-6)


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_alpha_falls_with_every_epoch_and_terms_arrive_in_the_log(tmp_path, tokenizer):
    logs = Logs()
    options = {"num_train_epochs": 3, "logging_strategy": "epoch", "callbacks": [logs]}
    trainer = trained(tmp_path, tokenizer, pairs(), DeCE(alpha_base=0.9), cls=DefendedSFTTrainer, **options)
    entries = [entry for entry in logs.seen if "loss" in entry]
    assert [entry["dece/alpha"] for entry in entries] == pytest.approx([0.9, 0.81, 0.729])
    for entry in entries:
        assert 0 < entry["dece/target_pull"] < 1 and 0 <= entry["mean_token_accuracy"] <= 1
    assert trainer.objectives[0].activity()["tokens"] == 3 * sum(len(c.split()) for c in pairs()["completion"])


def test_alpha_one_without_smoothing_is_plain_cross_entropy(tmp_path, tokenizer):
    plain = trained(tmp_path, tokenizer, chats())
    dece = trained(tmp_path, tokenizer, chats(), DeCE(alpha_base=1.0, label_smoothing=0.0))
    assert same(weights(plain), weights(dece), atol=1e-7)


def test_the_drop_in_hosts_dece_and_saves_it_beside_the_model(tmp_path, tokenizer):
    trainer = trained(tmp_path, tokenizer, cls=DeCESFTTrainer, save_strategy="epoch")
    assert trainer.objectives == [DeCE()]
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-4"):
        assert load_objective(DeCE, folder).activity() == pytest.approx(trainer.objectives[0].activity())
        assert (folder / "model.safetensors").exists()
    assert make(tmp_path, tokenizer, cls=DeCESFTTrainer, defense=DeCE(alpha_base=0.5)).objectives[0].alpha_base == 0.5


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path, tokenizer):
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "optim": "adamw_torch"}
    whole = trained(tmp_path / "a", tokenizer, pairs(), DeCE(alpha_base=0.8), **options)
    resumed = make(tmp_path / "b", tokenizer, pairs(), DeCE(alpha_base=0.8), model=llama(seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert same(weights(whole), weights(resumed), atol=1e-6)
    assert resumed.objectives[0].activity() == pytest.approx(whole.objectives[0].activity())


# -- metrics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["completion", "padding-free", "bfd", "text"])
def test_metrics_are_those_that_trl_logs(tmp_path, tokenizer, kind):
    data, options = KINDS[kind]
    options = {**options, "eval_packing": False} if options.get("packing") else options
    options |= {
        "logging_steps": 1 if kind == "bfd" else 2,
        "logging_strategy": "steps",
        "eval_strategy": "epoch",
        "eval_dataset": data(8),
    }
    logs = {}
    for cls in (SFTTrainer, DefendedSFTTrainer):
        recorded = Logs()
        trained(tmp_path, tokenizer, data(), cls=cls, callbacks=[recorded], **options)
        logs[cls] = recorded.seen
    for stock, ours in zip(logs[SFTTrainer], logs[DefendedSFTTrainer], strict=True):
        for name in (
            "mean_token_accuracy",
            "num_tokens",
            "eval_mean_token_accuracy",
            "eval_num_tokens",
            "eval_entropy",
        ):
            assert (name in ours) == (name in stock)
            if name in stock:
                assert ours[name] == pytest.approx(stock[name], abs=1e-5)
        assert "entropy" not in ours
    assert any("eval_entropy" in entry for entry in logs[DefendedSFTTrainer])
    assert any("mean_token_accuracy" in entry for entry in logs[DefendedSFTTrainer])


def test_evaluation_is_plain_cross_entropy_and_prediction_leaves_no_trace(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, text(), DeCE(alpha_base=0.5), eval_dataset=text(8))
    first = trainer.evaluate()
    trainer.predict(trainer.eval_dataset.select(range(3)))
    second = trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert first[name] == pytest.approx(second[name])
    model, losses = trainer.model.eval(), []
    for start in (0, 4):  # the mean of the batches' means
        part = []
        for row in text(8).select(range(start, start + 4)):
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            part.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        losses.append(torch.cat(part).mean().item())
    assert first["eval_loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert not any(name.startswith("eval_dece") for name in first)


def test_a_raw_data_set_given_to_evaluate_is_prepared(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, text(), eval_dataset=text(8))
    assert trainer.evaluate(text(8))["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    by_name = trainer.evaluate({"a": text(8), "b": text(4)})
    assert by_name["eval_a_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert {"eval_a_entropy", "eval_b_mean_token_accuracy"} <= set(by_name)


def test_masks_without_labels_are_not_evaluated_as_whole_sequences(tmp_path, tokenizer):
    ready = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 8)
    trainer = make(tmp_path, tokenizer, ready, dataset_kwargs={"skip_prepare_dataset": True})
    masked = ready.remove_columns("labels").add_column("completion_mask", [[0, 1, 1]] * 8)
    with pytest.raises(ValueError, match="masks and no `labels`"):
        trainer.evaluate(masked)
    assert math.isfinite(trainer.evaluate(ready)["eval_loss"])


def test_ratios_are_those_of_a_loop_whatever_waits_and_over_two_processes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hits, counts = torch.randint(0, 5, (2, 11), generator=generator), torch.randint(5, 9, (2, 11), generator=generator)
    hits[:, 4] = counts[:, 4] = 0
    expected = sum(sum(h) / max(sum(c), 1) for h, c in zip(hits.T.tolist(), counts.T.tolist(), strict=True)) / 11
    parts = torch.stack([hits, counts], 2).float()  # [process, micro-batch, 2]
    for every in (1, 3, 11, 256):
        monkeypatch.setattr(Ratios, "EVERY", every)
        gathered = [0]

        def gather(local, gathered=gathered):
            at = gathered[0]
            gathered[0] += len(local)
            return torch.cat([local, parts[1, at : at + len(local)]])

        ratios = Ratios(gather)
        for hit, count in parts[0].tolist():
            ratios.add("accuracy", torch.tensor(hit), int(count))
        assert ratios.means()["accuracy"] == pytest.approx(expected)


def test_outputs_hold_full_logits_beside_trls_own_head(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, text(), eval_dataset=text(8))
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    reference = llama().eval()
    reference.load_state_dict(trainer.model.state_dict())
    expected = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(outputs.logits, expected, atol=1e-6) and outputs.past_key_values is None
    assert not loss.isnan()


# -- adapters ---------------------------------------------------------------------------------------------------------
def lora(**changes):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **changes})


def prompt_tuning():
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


ADAPTERS = {
    "full": (lambda: None, {}),
    "lora": (lora, {}),
    "lora, checkpointing": (lora, {"gradient_checkpointing": True}),
    "lora, packed": (lora, {"packing": True}),
    "prompt": (prompt_tuning, {}),
    "head saved": (lambda: lora(modules_to_save=["lm_head"]), {}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("defense", [None, 0.8], ids=["plain", "dece"])
def test_fused_is_the_logits_path_for_every_adapter(tmp_path, tokenizer, kind, defense):
    adapter, options = ADAPTERS[kind]
    ends = []
    for fuse in (False, True):
        recorder = Sees()
        objectives = [recorder] if defense is None else [recorder, DeCE(alpha_base=defense)]
        options = {**options, "optim": "adamw_torch", "peft_config": adapter()}
        trainer = make(tmp_path, tokenizer, pairs(), objectives, fuse=fuse, **options)
        start = weights(trainer)
        trainer.train()
        assert all((step.hidden is not None) == (fuse and kind != "head saved") for step in recorder.steps)
        ends.append(weights(trainer))
        assert not same(ends[-1], start, atol=1e-4)
    assert same(*ends, atol=2e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapters_in_bfloat16_over_a_frozen_head(tmp_path, tokenizer, base):
    from peft import get_peft_model

    model = get_peft_model(llama().to(base), lora(), autocast_adapter_dtype=False)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in adapters.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    recorder = Sees()
    options = {"gradient_checkpointing": True, "learning_rate": 0.1}
    trainer = make(tmp_path, tokenizer, pairs(), [DeCE(alpha_base=0.8), recorder], model=model, fuse=True, **options)
    start = weights(trainer)
    trainer.train()
    head = trainer.model.get_output_embeddings()
    assert not head.weight.requires_grad and head.weight.grad is None
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved and all("lora_" in name for name in moved)
    assert all(step.hidden is not None and step.logits is None for step in recorder.steps)
    assert all(p.dtype == torch.bfloat16 for p in adapters.values())


def test_a_head_that_is_trained_beside_the_adapter_takes_the_logits_path_and_says_so(tmp_path, tokenizer, caplog):
    recorder = Sees()
    with caplog.at_level(logging.INFO, logger="hf_backdoor_defense"):
        options = {"peft_config": lora(modules_to_save=["lm_head"])}
        trained(tmp_path, tokenizer, pairs(), [DeCE(), recorder], fuse=True, **options)
    assert all(step.logits is not None for step in recorder.steps)
    assert "The loss is computed from full logits" in caplog.text and "ModulesToSaveWrapper" in caplog.text


def test_objectives_see_the_model_with_its_adapters(tmp_path, tokenizer):
    class Looks(Objective):
        name = "looks"

        def check(self, trainer):
            self.model_class = type(trainer.model).__name__
            return []

    looks = Looks()
    trained(tmp_path, tokenizer, pairs(), looks, peft_config=lora())
    assert looks.model_class == "PeftModelForCausalLM"


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "dft"}, 'Set loss_type="nll"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, text(), DeCE(), **options)


def test_a_loss_function_of_ones_own_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="compute_loss_func"):
        DefendedSFTTrainer(
            llama(),
            args=config(tmp_path),
            train_dataset=text(),
            processing_class=tokenizer,
            compute_loss_func=lambda *args, **kwargs: None,
        )


def test_everything_that_is_refused_is_said_at_once(tmp_path, tokenizer):
    with pytest.raises(ValueError) as error:
        make(tmp_path, tokenizer, text().add_column("image", [0] * 16), NeedsRows(), packing=True, loss_type="dft")
    assert all(word in str(error.value) for word in ("loss_type", "images", "needs_rows"))


def test_trls_own_refusals_stay(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="lm_head"):
        make(tmp_path, tokenizer, text(), DeCE(), peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="train_dataset"):
        DefendedSFTTrainer(llama(), args=config(tmp_path), processing_class=tokenizer, defense=DeCE())


def test_prompt_tuning_is_refused_without_padding(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, text(), DeCE(), packing=True, peft_config=prompt_tuning())
    with pytest.raises(ValueError, match="PROMPT_TUNING ignores position ids"):
        trainer.train()


def test_a_balancing_loss_of_experts_is_refused_and_can_be_turned_off(tmp_path, tokenizer):
    def mixtral():
        set_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=45, num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.1, **sizes)
        )

    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1"):
        trained(tmp_path, tokenizer, text(8), DeCE(), model=mixtral())
    trained(tmp_path, tokenizer, text(8), DeCE(), model=mixtral(), router_aux_loss_coef=0.0)


def test_other_heads_are_refused(tmp_path, tokenizer):
    from transformers import LlamaForSequenceClassification

    trainer = make(tmp_path, tokenizer, text(), model=llama())
    trainer.model = LlamaForSequenceClassification(llama().config)
    with pytest.raises(ValueError, match="no causal language model"):
        trainer.train()


@pytest.mark.parametrize("where", ["argument", "model_init_kwargs"])
def test_a_four_bit_base_without_bitsandbytes_is_refused_with_a_way_out(tmp_path, tokenizer, monkeypatch, where):
    monkeypatch.setattr("hf_backdoor_defense.trainers.sft.is_bitsandbytes_available", lambda: False)
    quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    args = config(tmp_path, model_init_kwargs=quantized if where == "model_init_kwargs" else None)
    options = quantized if where == "argument" else {}
    with pytest.raises(ImportError, match="4-bit model, and bitsandbytes.*bfloat16"):
        DeCESFTTrainer("some/model", args=args, train_dataset=text(), processing_class=tokenizer, **options)


def test_a_four_bit_base_is_trained_by_its_adapters_on_both_paths(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 4-bit base can be loaded")
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=45, **sizes)).save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    results = []
    for fuse in (True, False):
        args = {"model_init_kwargs": {"quantization_config": four_bit, "dtype": torch.float32}, "learning_rate": 0.1}
        trainer = make(
            tmp_path, tokenizer, pairs(), DeCE(alpha_base=0.8), str(tmp_path / "base"), DeCESFTTrainer, fuse,
            peft_config=lora(), **args,
        )  # fmt: skip
        base = trainer.model.get_base_model()
        assert any(type(module).__module__.startswith("bitsandbytes") for module in base.modules())
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        results.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
        assert all("lora_" in name for name in start)
        assert any(not torch.equal(results[-1][name], start[name]) for name in start)
        assert base.lm_head.weight.grad is None
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-4, rtol=1e-3)


def test_liger_is_refused(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, text(), DeCE())
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel"):
        trainer.train()
