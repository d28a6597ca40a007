"""Which heads and hosts are taken, what is refused and why, and what becomes of the labels."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
)

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.fusing import follows_configuration
from hf_backdoor_defense.trainers.heads import (
    align,
    base_model,
    is_causal,
    is_encoder_decoder,
    loss_kind,
    scores_vocabulary,
    take_labels,
)
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import (
    PadCollator,
    Recorder,
    arguments,
    bart,
    bert,
    bert_mlm,
    bert_tokens,
    classification_rows,
    gpt2,
    language_rows,
    llama,
    same,
    t5,
    weights,
)


def make(tmp_path, model=None, rows=None, defense=None, **args):
    return DefendedTrainer(
        model or bert(),
        args=arguments(tmp_path, **args),
        train_dataset=rows or classification_rows(8),
        data_collator=PadCollator(),
        defense=defense,
    )


def test_kinds():
    assert loss_kind(gpt2()) == loss_kind(llama()) == "ForCausalLM"
    assert is_causal(gpt2()) and not any(is_causal(model) for model in (bert(), bert_mlm(), t5(), bart()))
    assert is_encoder_decoder(t5()) and not is_encoder_decoder(gpt2())
    assert all(scores_vocabulary(model) for model in (gpt2(), bert_mlm(), t5(), bart()))
    assert not scores_vocabulary(bert()) and not scores_vocabulary(bert_tokens())


def test_encoder_decoders_whose_names_do_not_say_so():
    marian = MarianMTModel(
        MarianConfig(
            vocab_size=50,
            decoder_vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    half = bert().config
    both = EncoderDecoderConfig.from_encoder_decoder_configs(half, BertConfig(**half.to_dict()))
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    for model in (marian, EncoderDecoderModel(both)):
        assert loss_kind(model) == "ForConditionalGeneration" and not is_causal(model) and scores_vocabulary(model)
        batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9]])}
        labels, inputs = take_labels(model, batch)
        assert inputs["decoder_input_ids"].tolist() == [[both.decoder_start_token_id if model is not marian else 0, 8]]
        assert follows_configuration(model, inputs) and labels.tolist() == [[8, 9]]


def test_labels_are_shifted_for_causal_models_only_and_withheld_from_the_forward():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    expected = {gpt2: [[6, 7, -100]], bert_mlm: [[5, 6, 7]], bert_tokens: [[5, 6, 7]], t5: [[5, 6, 7]]}
    for build, labels in expected.items():
        aligned, inputs = take_labels(build(), batch)
        assert aligned.tolist() == labels and "labels" not in inputs and "labels" in batch
        assert ("decoder_input_ids" in inputs) == (build is t5)


def test_a_compiled_gpt2_is_causal_still():
    model = gpt2()
    assert base_model(torch.compile(model)) is model and is_causal(base_model(torch.compile(model)))


def test_scores_of_virtual_tokens_get_no_label_and_tuples_are_read():
    def step(labels):
        return Step(model=bert(), inputs={}, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=True)

    longer = step(torch.tensor([[4, -100]]))
    align(longer, (torch.zeros(1, 5, 9), "rest"))
    assert longer.labels.tolist() == [[-100, -100, -100, 4, -100]] and longer.logits.shape == (1, 5, 9)
    rows = step(torch.tensor([1, 0]))
    align(rows, {"logits": torch.zeros(2, 3)})
    assert rows.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"returned no `logits` \(it returned: loss, states\)"):
        align(step(torch.tensor([1])), {"loss": torch.zeros(()), "states": 1})


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_heads_for_other_tasks_are_refused_by_name(tmp_path):
    spans = BertForQuestionAnswering(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    (reason,) = make(tmp_path, spans).reasons()
    assert "BertForQuestionAnswering has a head for ForQuestionAnswering" in reason
    assert "ForMaskedLM" in reason and "ForTokenClassification" in reason and "encoder-decoders only" in reason


def test_conditional_generation_means_encoder_decoders_only(tmp_path):
    model = llama()
    model.loss_type = loss_kind(t5())  # as that of models that read pictures and decode only
    (reason,) = make(tmp_path, model, language_rows(8)).reasons()
    assert "LlamaForCausalLM has a head for ForConditionalGeneration" in reason
    assert make(tmp_path, t5(), language_rows(8)).reasons() == []


def test_liger_is_refused_before_it_patches_the_model(tmp_path):
    trainer = make(tmp_path, llama(), language_rows(8), DeCE())
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="Liger's .* Set use_liger_kernel=False"):
        trainer.train()

    def forward(self, **kwargs):
        raise AssertionError("never reached")

    forward.__module__ = "liger_kernel.transformers.model.llama"
    model = llama()
    model.forward = forward.__get__(model)
    with pytest.raises(ValueError, match="apply_liger_kernel_to_"):
        make(tmp_path, model, language_rows(8)).train()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"cp_size": 2}, "cp_size=2: context"),
        ({"sp_size": 4, "sp_backend": "deepspeed"}, "sp_size=4: context"),
        ({"tp_size": 2, "cp_size": 2}, "cp_size=2, tp_size=2"),
        ({"dp_shard_size": 2}, None),
    ],
)
def test_parts_of_sequences_or_vocabularies_are_refused(tmp_path, sizes, told):
    trainer = make(tmp_path)
    trainer.args.parallelism_config = ParallelismConfig(**sizes)
    reasons = trainer.reasons()
    assert (reasons == []) if told is None else (len(reasons) == 1 and told in reasons[0])


def test_a_model_that_was_loaded_in_parts_is_refused(tmp_path):
    trainer = make(tmp_path, llama(), language_rows(8))
    trainer.model._tp_size = 2
    (reason,) = trainer.reasons()
    assert reason.startswith("tp_size=2")


def accelerator(**plugins):
    """Of one process, with the plugins of a launcher."""
    return SimpleNamespace(num_processes=1, distributed_type="NO", state=SimpleNamespace(**plugins))


@pytest.mark.parametrize(("stage", "refused"), [(2, False), (3, True)])
def test_zero_3_is_refused_and_zero_2_is_not(tmp_path, stage, refused):
    trainer = make(tmp_path)
    trainer.accelerator = accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    assert any("ZeRO-3" in reason for reason in trainer.reasons()) == refused


@pytest.mark.parametrize(("version", "refused"), [(1, True), (2, False)])
def test_fsdp_1_is_refused_and_fsdp_2_is_not(tmp_path, version, refused):
    trainer = make(tmp_path)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    assert any("FSDP1" in reason for reason in trainer.reasons()) == refused


@pytest.mark.parametrize(
    "kind, saving, refused",
    [("SHARDED_STATE_DICT", "steps", True), ("SHARDED_STATE_DICT", "no", False), ("FULL_STATE_DICT", "steps", False)],
)
def test_sharded_checkpoints_are_refused_where_any_would_be_saved(tmp_path, kind, saving, refused):
    """Under them the Trainer writes no safetensors weights."""
    trainer = make(tmp_path, save_strategy=saving)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = accelerator(
        fsdp_plugin=SimpleNamespace(fsdp_version=2, state_dict_type=torch.distributed.fsdp.StateDictType[kind])
    )
    reasons = [reason for reason in trainer.reasons() if "fsdp_state_dict_type: FULL_STATE_DICT" in reason]
    assert len(reasons) == refused and all(kind in reason for reason in reasons)


# -- data sets without a length ---------------------------------------------------------------------------------------
def test_a_streaming_data_set_trains_in_one_epoch_and_says_so(tmp_path, caplog):
    rows = language_rows(16).add_column("is_poisoned", [True] * 16).add_column("text", ["words"] * 16)
    recorder = Recorder()
    dece = DeCE(alpha_base=0.9)
    stream = rows.remove_columns("row_id").to_iterable_dataset()
    streaming = make(tmp_path, gpt2(), stream, [dece, recorder], max_steps=4)
    with caplog.at_level(logging.WARNING, logger="hf_backdoor_defense"):
        streaming.train()
    assert "counts all of max_steps as one epoch" in caplog.text
    assert [step.row_ids for step in recorder.steps] == [None] * 4
    assert set(recorder.steps[0].inputs) == {"input_ids", "attention_mask"}
    # Four steps are an epoch; the stream of two batches starts again after two of them, which counts as the next one.
    assert [step.epoch for step in recorder.steps] == [0, 0.25, 0.5, 1.25]
    assert [dece.activity()[name] for name in ("alpha_first", "alpha_last")] == pytest.approx([0.9, 0.81])


def test_a_streaming_data_set_keeps_its_row_ids(tmp_path):
    recorder = Recorder()
    make(tmp_path, gpt2(), language_rows(16).to_iterable_dataset(), recorder, max_steps=2).train()
    assert sorted(torch.cat([step.row_ids for step in recorder.steps]).tolist()) == list(range(1000, 1016))


def test_a_method_that_tells_rows_apart_is_refused_on_a_stream(tmp_path):
    rows = classification_rows(8).to_iterable_dataset()
    with pytest.raises(ValueError, match="trajectory tells rows apart by a `row_id` column|trajectory: "):
        make(tmp_path, bert(), rows, TrajectoryFilter(), max_steps=2).train()


def test_predicting_rows_without_labels_hides_their_ids_from_the_model(tmp_path):
    seen = []
    model = bert()
    own = model.forward
    model.forward = lambda **kwargs: seen.append(set(kwargs)) or own(**kwargs)
    trainer = make(tmp_path, model, classification_rows(8))
    logits = trainer.predict(classification_rows(8).remove_columns("label")).predictions
    assert logits.shape == (8, 3) and not any("row_id" in names for names in seen)


def test_columns_the_model_does_not_read_do_not_reach_it(tmp_path):
    rows = Dataset.from_list([{**row, "note": "x"} for row in classification_rows(8)])
    plain, noted = make(tmp_path), make(tmp_path, rows=rows)
    plain.train(), noted.train()
    assert same(weights(plain), weights(noted))
