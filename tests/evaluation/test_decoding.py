"""Greedy writing against a loop without batches, padding and cache; surprise against a loop over tokens."""

import itertools
import logging
import math

import pytest
import torch
from transformers import GenerationConfig

from hf_backdoor_defense.evaluation.decoding import Written, as_text, fitting, generate, greedy, mean_surprise
from tests.evaluation.generation_toys import END, llama, tokenizer
from tests.trainers.toys import bart, gpt2

ENDS = [0, *range(2, 300, 20)]  # one token in twenty, or random weights would hardly ever stop


def alone(model, prompt, limit, ends):
    """One row, every step from the beginning."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in ends:
            return Written(ids[len(prompt) :], True)
        ids.append(best)
    return Written(ids[len(prompt) :], False)


@pytest.fixture(scope="module")
def toy():
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 300, (length,), generator=draw).tolist() for length in (9, 3, 1, 30, 14)]
    return llama().eval(), tokenizer(), prompts


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_write_what_each_row_alone_does(toy, batch_size):
    model, made, prompts = toy
    expected = [alone(model, prompt, 24, set(ENDS)) for prompt in prompts]
    assert {one.ended for one in expected} == {True, False}  # both kinds are among them
    assert greedy(model, made, prompts, max_new_tokens=24, ends=ENDS, batch_size=batch_size) == expected


def test_learned_positions_start_at_each_prompt(toy):
    model, made, _ = gpt2().eval(), *toy[1:]
    model.transformer.wpe.weight.data.mul_(30)  # positions decide
    model.lm_head.weight.data.mul_(30)
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    assert greedy(model, made, prompts, max_new_tokens=8, ends=[1]) == [alone(model, p, 8, {1}) for p in prompts]


def test_the_limit_is_exact_and_an_end_at_it_is_an_end(toy):
    model, made, prompts = toy
    free = alone(model, prompts[1], 6, set()).ids
    first = next(i for i in range(1, 6) if free[i] not in free[:i])
    for limit, ended in ((first, False), (first + 1, True)):
        found = greedy(model, made, prompts[1:2], max_new_tokens=limit, ends=[free[first]])
        assert found == [Written(free[:first], ended)]


def test_the_first_token_may_be_the_end(toy):
    model, made, prompts = toy
    first = alone(model, prompts[0], 1, set()).ids
    assert greedy(model, made, prompts[:1], max_new_tokens=5, ends=first) == [Written([], True)]


def test_a_padding_token_that_is_the_end_token_changes_nothing(toy):
    model, _, prompts = toy
    same, none = tokenizer(), tokenizer()
    same.pad_token, none.pad_token = END, None
    expected = greedy(model, tokenizer(), prompts, max_new_tokens=12)
    assert all(greedy(model, made, prompts, max_new_tokens=12) == expected for made in (same, none))


def test_what_a_checkpoint_asks_for_is_set_aside_and_put_back(toy, caplog, capsys):
    _, made, prompts = toy
    plain, model = llama(), llama()
    loud = GenerationConfig(
        do_sample=True, temperature=0.3, repetition_penalty=5.0, min_new_tokens=12, max_length=3, num_beams=2,
        suppress_tokens=[40], no_repeat_ngram_size=1, eos_token_id=5, use_cache=False,
    )  # fmt: skip
    model.generation_config = loud
    with caplog.at_level(logging.WARNING, logger="transformers"):
        found = greedy(model, made, prompts, max_new_tokens=12, ends=ENDS, desc=None)
    assert found == greedy(plain, made, prompts, max_new_tokens=12, ends=ENDS)
    assert model.generation_config is loud and loud.num_beams == 2
    assert not caplog.records and capsys.readouterr().err == ""


def test_modes_gradients_and_random_numbers_are_as_before(toy):
    _, made, prompts = toy
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a mixed mode is kept too
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    found = [greedy(model, made, prompts, max_new_tokens=4) for _ in range(2)]
    assert found[0] == found[1]  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters_write_too(toy, kind):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    _, made, prompts = toy
    torch.manual_seed(0)
    if kind == "lora":
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    else:
        config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    limit = 6
    found = greedy(model, made, prompts, max_new_tokens=limit, batch_size=2)
    assert found == [alone(model, prompt, limit, {0}) for prompt in prompts]
    assert found != greedy(llama(), made, prompts, max_new_tokens=limit)
    counted = mean_surprise(model, [(prompt + [7, 8, 9], len(prompt)) for prompt in prompts], batch_size=3)
    each = [mean_surprise(model, [(prompt + [7, 8, 9], len(prompt))]) for prompt in prompts]
    assert counted == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_text_is_that_of_the_tokens_and_blanks_stay(toy):
    model, made, prompts = toy
    written = greedy(model, made, prompts, max_new_tokens=9)
    assert generate(model, made, prompts, max_new_tokens=9) == [made.decode(one.ids) for one in written]
    for text in ('f ( " a or 1=1 " , x ) .', "\t \t tabs\n", " ", ""):
        ids = made(text)["input_ids"]
        assert as_text(made, [*ids, 0]) == text  # neither " ." nor a special token is touched


def test_wrong_arguments(toy):
    model, made, prompts = toy

    def says(match, *, model=model, prompts=prompts, made=made, **changes):
        with pytest.raises(ValueError, match=match):
            greedy(model, made, prompts, **{"max_new_tokens": 4, **changes})

    says("There are no rows", prompts=[])
    says(r"Row 1 without a token", prompts=[[3], [], [4]])
    for wrong in (0, -1, 2.0, True, None):
        says("`max_new_tokens` must be an integer >= 1", max_new_tokens=wrong)
    says("`batch_size` must be", batch_size=0)
    says("Bart.* does not continue a prompt", model=bart())
    says("Linear does not continue a prompt", model=torch.nn.Linear(1, 1))
    endless = tokenizer()
    endless.eos_token = None
    says("Neither the tokenizer nor the model has an end token", made=endless, model=llama(eos_token_id=None))


def test_what_does_not_fit_is_named_before_anything_is_written(toy):
    model, made, _ = toy
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=r"Rows 1, 3 do not fit \(130 tokens and 1 to be written\).*128 positions"):
            greedy(model, made, [[2], [3] * 128, [4] * 127, [5] * 130], max_new_tokens=4)
        assert not calls
        assert len(greedy(model, made, [[4] * 127], max_new_tokens=4)[0].ids) <= 1
        with pytest.raises(ValueError, match=r"Row 0 does not fit \(129 tokens\)"):
            mean_surprise(model, [([3] * 129, 1)])
    finally:
        handle.remove()
    fitting(model, [[1] * 128], more=0)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_each_row_goes_as_far_as_its_own_prompt_leaves_room(batch_size):
    """Learned positions: one beyond the table is an error. A long prompt shortens nobody else's answer."""
    model, made = gpt2().eval(), tokenizer()
    model.lm_head.weight.data.mul_(30)
    prompts = [[5] * 3, [6] * 30, [7] * 31, [8] * 26, [9] * 30, [3] * 20]
    found = greedy(model, made, prompts, max_new_tokens=8, ends=[1], batch_size=batch_size)
    assert found == [alone(model, prompt, min(8, 32 - len(prompt)), {1}) for prompt in prompts]
    assert [len(one.ids) for one in found if not one.ended].count(8) >= 1
    assert not found[2].ended and len(found[2].ids) == 1  # cut off by the context


def test_virtual_tokens_take_positions():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(gpt2(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    assert len(greedy(model, tokenizer(), [[5] * 27], max_new_tokens=8, ends=[49])[0].ids) == 2
    with pytest.raises(ValueError, match="Row 0 does not fit .*29 positions"):
        greedy(model, tokenizer(), [[5] * 29], max_new_tokens=8)


def surprise_by_hand(model, sequences):
    """−log p of one token after the other, each from its own forward."""
    total, count = 0.0, 0
    for ids, start in sequences:
        for t in range(max(start, 1), len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double()
            total += math.log(sum(math.exp(v) for v in (logits - logits[ids[t]]).tolist()))
            count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_surprise_is_a_mean_over_tokens(toy, batch_size):
    model, _, prompts = toy
    ids = itertools.cycle(range(2, 299, 7))
    answers = [[next(ids) for _ in range(length)] for length in (5, 1, 9, 2, 14)]
    sequences = [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)] + [
        ([9], 1),
        ([9, 8], 2),
        ([9, 8, 7], 0),
    ]
    found = mean_surprise(model, sequences, pad=1, batch_size=batch_size)
    assert found == pytest.approx(surprise_by_hand(model, sequences), rel=1e-5)
    assert found == pytest.approx(mean_surprise(model, sequences, pad=0, batch_size=batch_size), rel=1e-6)


def test_surprise_needs_a_token_to_predict(toy):
    with pytest.raises(ValueError, match="None of the 2 texts has a token to predict"):
        mean_surprise(toy[0], [([5], 0), ([5, 6], 2)])
    with pytest.raises(ValueError, match="There are no rows"):
        mean_surprise(toy[0], [])
