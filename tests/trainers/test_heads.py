"""Hidden states and projection from one forward: the ground that fused losses will stand on."""

import pytest
import torch

from hf_backdoor_defense.trainers.heads import hidden_matches_logits, is_causal, keeps_labels, loss_kind
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import FromHidden, PadCollator, arguments, bert, gpt2, language_rows, llama, same, weights


@pytest.mark.parametrize("model", [gpt2, llama], ids=["tied", "untied"])
def test_training_from_hidden_states_equals_training_from_logits(tmp_path, model):
    trained = []
    for defense in (None, FromHidden()):
        trainer = DefendedTrainer(
            model(),
            args=arguments(tmp_path, num_train_epochs=2),
            train_dataset=language_rows(16),
            data_collator=PadCollator(),
            defense=defense,
        )
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained, atol=1e-7)
    assert not same(trained[0], weights(model()), atol=1e-4)


def test_the_head_is_whole_again_afterwards_even_after_an_error(tmp_path):
    class Breaks(FromHidden):
        def loss(self, step):
            raise RuntimeError("inside")

    model = gpt2()
    trainer = DefendedTrainer(
        model,
        args=arguments(tmp_path),
        train_dataset=language_rows(8),
        data_collator=PadCollator(),
        defense=Breaks(),
    )
    with pytest.raises(RuntimeError, match="inside"):
        trainer.train()
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 50)


def test_projection_is_checked_against_the_models_own_logits():
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert hidden_matches_logits(gpt2(), inputs) and hidden_matches_logits(llama(), inputs)
    scaled = llama()
    original = scaled.forward
    scaled.forward = lambda **kw: _scaled(original(**kw))  # a head that does something no configuration field tells
    assert not hidden_matches_logits(scaled, inputs)


def test_a_head_that_does_more_than_project_is_refused_by_name(tmp_path):
    model = llama()
    original = model.forward
    model.forward = lambda **kw: _scaled(original(**kw))
    trainer = DefendedTrainer(
        model,
        args=arguments(tmp_path),
        train_dataset=language_rows(8),
        data_collator=PadCollator(),
        defense=FromHidden(),
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM does something to its logits"):
        trainer.train()


def _scaled(outputs):
    outputs["logits"] = outputs["logits"] * 2
    return outputs


def test_kinds():
    assert loss_kind(gpt2()) == loss_kind(llama()) == "ForCausalLM"
    assert is_causal(gpt2()) and not is_causal(bert()) and not keeps_labels(bert())
