"""Encoder-decoders: what the decoder reads, what it is trained on, and evaluation by generating."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.functional.dece import dece_loss_reference
from hf_backdoor_defense.trainers.heads import take_labels
from hf_backdoor_defense.trainers.hosts import DefendedSeq2SeqTrainer, DefendedTrainer
from hf_backdoor_defense.trainers.named import DeCESeq2SeqTrainer
from tests.trainers.toys import PadCollator, Recorder, arguments, bart, same, t5, translation_rows, weights

MODELS = {"t5": t5, "t5-untied": lambda: t5(tied=False), "bart": bart}
PATHS = {"hidden": 0, "logits": 2**62}


def make(tmp_path, model, rows, defense=None, cls=DefendedSeq2SeqTrainer, fuse_bytes=0, collator=None, **args):
    plain = arguments(tmp_path, **args) if cls is DefendedTrainer else None
    args = Seq2SeqTrainingArguments(**{**vars_of(tmp_path), **args}) if plain is None else plain
    kwargs = {} if cls is Seq2SeqTrainer else {"defense": defense}
    trainer = cls(model, args=args, train_dataset=rows, data_collator=collator or PadCollator(), **kwargs)
    trainer.fuse_bytes = fuse_bytes
    return trainer


def vars_of(tmp_path):
    """The toy arguments, for the class that also knows `predict_with_generate`."""
    names = (
        "per_device_train_batch_size per_device_eval_batch_size num_train_epochs learning_rate lr_scheduler_type "
        "optim max_grad_norm save_strategy logging_strategy logging_nan_inf_filter report_to disable_tqdm use_cpu seed"
    )
    args = arguments(tmp_path)
    return {"output_dir": str(tmp_path), **{name: getattr(args, name) for name in names.split()}}


def one_batch(rows):
    return PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])


def shifted(labels, start):
    """By hand: the start token, then every target but the last; what is not labeled is padding (0)."""
    rows = []
    for row in labels.tolist():
        rows.append([start] + [max(token, 0) for token in row[:-1]])
    return torch.tensor(rows)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("defended", [False, True], ids=["plain", "dece"])
def test_a_step_equals_a_manual_one_with_decoder_inputs_from_labels(tmp_path, name, path, defended):
    rows = translation_rows(8)
    defense = DeCE(alpha_base=0.7) if defended else None
    trainer = make(tmp_path, MODELS[name](), rows, defense, fuse_bytes=PATHS[path], learning_rate=0.1)
    trainer.train()
    assert trainer.state.global_step == 1
    oracle = MODELS[name]()
    batch = one_batch(rows)
    labels = batch.pop("labels")
    start = oracle.config.decoder_start_token_id
    logits = oracle(**batch, decoder_input_ids=shifted(labels, start)).logits
    if defended:
        log_alpha = DeCE(alpha_base=0.7).log_alpha(0.0)
        loss = dece_loss_reference(logits, labels, log_alpha=log_alpha, label_smoothing=0.05).mean()
    else:
        loss = F.cross_entropy(logits.reshape(-1, 50), labels.reshape(-1))
    loss.backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert same(weights(trainer), weights(oracle), atol=1e-6)
    assert not same(weights(trainer), weights(MODELS[name]()), atol=1e-4)


def test_it_is_not_trained_on_its_own_input(tmp_path):
    """BART without labels or decoder inputs reads a shifted copy of `input_ids`: the loss would be that of another task."""
    rows = translation_rows(8)
    recorder = Recorder()
    make(tmp_path, bart(), rows, recorder, fuse_bytes=2**62).train()
    (step,) = recorder.steps
    assert "labels" not in step.inputs and torch.equal(step.inputs["decoder_input_ids"], shifted(step.labels, 1))
    oracle, batch = bart(), one_batch([row for i in step.row_ids.tolist() for row in rows if row["row_id"] == i])
    assert recorder.values[0].mean() == pytest.approx(oracle(**batch).loss.item(), abs=1e-5)
    labels = batch.pop("labels")
    misled = oracle(**batch).logits  # [8, source length, 50]: what popping the labels alone would give
    assert misled.shape[:2] == batch["input_ids"].shape != labels.shape


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_without_accumulation_it_equals_the_stock_trainer(tmp_path, name):
    rows = translation_rows(16)
    stock = make(tmp_path, MODELS[name](), rows.remove_columns("row_id"), cls=Seq2SeqTrainer)
    ours = make(tmp_path, MODELS[name](), rows)
    plain = make(tmp_path, MODELS[name](), rows, cls=DefendedTrainer)
    stock.train(), ours.train(), plain.train()
    assert same(weights(stock), weights(ours), atol=1e-6) and same(weights(ours), weights(plain))


def test_the_drop_in_is_dece_with_its_defaults(tmp_path):
    rows = translation_rows(8)
    drop_in = make(tmp_path, t5(), rows, None, cls=DeCESeq2SeqTrainer)
    hosted = make(tmp_path, t5(), rows, DeCE())
    drop_in.train(), hosted.train()
    assert drop_in.objectives == [DeCE()] and same(weights(drop_in), weights(hosted))
    assert make(tmp_path, t5(), rows, DeCE(alpha_base=0.5), cls=DeCESeq2SeqTrainer).objectives[0].alpha_base == 0.5


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "</s>": 1, "<s>": 2, **{f"w{i}": i for i in range(3, 50)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_usual_collator_which_builds_decoder_inputs_itself_gives_the_same(tmp_path, name):
    model = MODELS[name]()
    usual = DataCollatorForSeq2Seq(tokenizer(), model=model)
    ours = make(tmp_path, model, translation_rows(16), DeCE(alpha_base=0.7), collator=usual)
    plain = make(tmp_path, MODELS[name](), translation_rows(16), DeCE(alpha_base=0.7))
    ours.train(), plain.train()
    assert same(weights(ours), weights(plain), atol=1e-7)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_evaluation_is_plain_cross_entropy_of_the_batch(tmp_path, name):
    rows = translation_rows(8)
    trainer = make(tmp_path, MODELS[name](), rows, DeCE(alpha_base=0.5))
    with torch.no_grad():
        expected = trainer.model.eval()(**one_batch(rows)).loss.item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    prediction = trainer.predict(rows)
    assert prediction.label_ids.shape == (8, one_batch(rows)["labels"].shape[1])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_predict_with_generate_generates_and_reports_the_models_own_loss(tmp_path, name):
    rows = translation_rows(8)  # with row ids, which neither `generate` nor the forward may see
    trainer = make(tmp_path, MODELS[name](), rows, DeCE(alpha_base=0.5), predict_with_generate=True)
    trainer.train()
    prediction = trainer.predict(rows, max_new_tokens=5)
    with torch.no_grad():
        trainer.model.eval()
        batch = one_batch(rows)
        expected = trainer.model(**batch).loss.item()
        batch.pop("labels")
        generated = trainer.model.generate(**batch, max_new_tokens=5)
    assert prediction.metrics["test_loss"] == pytest.approx(expected, abs=1e-5)
    length = generated.shape[1]
    assert torch.equal(torch.as_tensor(prediction.predictions)[:, :length], generated)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_adapters_of_an_encoder_decoder(tmp_path, name):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    for config in (LoraConfig, PromptTuningConfig):
        trained = []
        for fuse_bytes in PATHS.values():
            torch.manual_seed(0)
            more = {"num_virtual_tokens": 3} if config is PromptTuningConfig else {"init_lora_weights": False}
            model = get_peft_model(MODELS[name](), config(task_type="SEQ_2_SEQ_LM", **more))
            before = weights(model)
            trainer = make(tmp_path, model, translation_rows(8), DeCE(alpha_base=0.7), fuse_bytes=fuse_bytes)
            trainer.train()
            trained.append(weights(trainer))
            assert not same(before, trained[-1], atol=1e-9)
        assert same(*trained, atol=1e-7)


def test_a_model_that_cannot_derive_decoder_inputs_keeps_its_labels(tmp_path, caplog):
    trained = []
    for able in (True, False):
        model = t5()
        if not able:
            model.prepare_decoder_input_ids_from_labels = None
        trainer = make(tmp_path, model, translation_rows(8), DeCE(alpha_base=0.7))
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained, atol=1e-7)
    assert "derives its decoder inputs from labels inside its forward" in caplog.text


def test_the_trajectory_filter_refuses_an_encoder_decoder(tmp_path):
    with pytest.raises(ValueError, match="trajectory: "):
        make(tmp_path, t5(), translation_rows(8), TrajectoryFilter()).train()


def test_missing_labels_are_named(tmp_path):
    rows = translation_rows(8)
    ids = {"decoder_input_ids": [row["labels"] for row in rows]}
    without = Dataset.from_dict({name: rows[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(ValueError, match="neither `labels` nor decoder inputs"):
        make(tmp_path, t5(), without, collator=IdsOnly()).train()
    with pytest.raises(ValueError, match="decoder inputs but no `labels`"):
        make(
            tmp_path, bart(), without.add_column("decoder_input_ids", ids["decoder_input_ids"]), collator=IdsOnly()
        ).train()


class IdsOnly:
    """Pads whatever columns there are with 0."""

    def __call__(self, rows):
        batch = {}
        for key in rows[0]:
            width = max(len(row[key]) for row in rows)
            batch[key] = torch.tensor([row[key] + [0] * (width - len(row[key])) for row in rows])
        return batch


def test_given_decoder_inputs_are_left_alone():
    labels = torch.tensor([[5, 1]])
    given = {"input_ids": labels, "labels": labels, "decoder_input_ids": torch.tensor([[9, 9]])}
    aligned, inputs = take_labels(bart(), given)
    assert torch.equal(aligned, labels) and inputs["decoder_input_ids"].tolist() == [[9, 9]] and "labels" not in inputs
    assert "labels" in given  # the caller's batch is not changed
