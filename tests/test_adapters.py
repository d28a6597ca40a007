"""The five strategies: how much they train, that they leave the base alone, how long a text may be, what they refuse."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

from hf_backdoor_defense.adapters import STRATEGIES, apply_strategy, has_adapter, refusals, room, virtual_tokens
from tests.trainers.toys import bert, bert_tokens

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=8)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**SMALL, embedding_size=8)),
    "deberta": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**SMALL)),
    "modernbert": lambda: ModernBertForSequenceClassification(ModernBertConfig(**SMALL, **MODERN)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=1)),
}
WITHOUT_CACHE = {"distilbert", "albert", "deberta", "mpnet", "modernbert"}  # no prefix-tuning
CASES = [(m, s) for m in MODELS for s in STRATEGIES if not (s == "prefix_tuning" and m in WITHOUT_CACHE)]


def build(name):
    set_seed(0)
    return MODELS[name]()


def trainable(model):
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def run(model, length, rows=1):
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "full": 109_483_778,
        "lora": 296_450,
        "prompt_tuning": 5_378,
        "p_tuning": 219_394,
        "prefix_tuning": 93_698,
    }.items(),
)
def test_how_much_of_bert_base_is_trained(name, count):
    with torch.device("meta"):  # sizes without the memory
        model = apply_strategy(BertForSequenceClassification(BertConfig()), name)
    assert sum(trainable(model).values()) == count
    assert name == "full" or not any("pooler" in part for part in trainable(model))


def test_the_same_counts_by_hand():
    d, k, layers, tokens, wide = 768, 2, 12, 5, 128
    head = d * k + k
    mlp = (d * wide + wide) + (wide * wide + wide) + (wide * d + d)
    by_hand = {
        "lora": layers * 2 * 8 * (d + d) + head,
        "prompt_tuning": tokens * d + head,
        "p_tuning": tokens * d + mlp + head,
        "prefix_tuning": tokens * layers * 2 * d + head,
    }
    assert by_hand == {"lora": 296_450, "prompt_tuning": 5_378, "p_tuning": 219_394, "prefix_tuning": 93_698}


@pytest.mark.parametrize(("model", "name"), CASES)
def test_training_moves_adapter_and_head_and_leaves_the_base_bitwise(model, name):
    base = build(model)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    wrapped = apply_strategy(base, name)
    head = {key for key in trainable(wrapped) if re.search(r"\b(classifier|score)\.", key)}
    start = {key: p.detach().clone() for key, p in wrapped.named_parameters() if p.requires_grad}
    assert head
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(run(wrapped, 7, rows=6), torch.arange(6) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(wrapped.named_parameters())
    moved = {key for key, value in start.items() if not torch.equal(value, after[key])}
    assert head <= moved and (name == "full" or moved - head or name == "lora")
    assert name != "lora" or any("lora_B" in key for key in moved)
    # What was there before peft came, under the names that it has now.
    prefix = {"full": "", "lora": "base_model.model."}.get(name, "base_model.")
    kept = {re.sub(r"\.base_layer|\.original_module", "", key): value for key, value in wrapped.state_dict().items()}
    changed = {key for key, value in before.items() if not torch.equal(value, kept[prefix + key])}
    assert bool(changed) == (name == "full")


@pytest.mark.parametrize(("model", "name"), [c for c in CASES if c[0] not in ("llama", "modernbert")])
def test_a_text_may_have_as_many_tokens_as_there_is_room(model, name):
    wrapped = apply_strategy(build(model), name).eval()
    offset = {"roberta": 1, "mpnet": 2}.get(model, 0)  # positions before the first word's
    assert room(wrapped) == 32 - offset - (0 if name in ("full", "lora") else 5)
    assert run(wrapped, room(wrapped)).shape == (1, 3)
    with pytest.raises((RuntimeError, IndexError)):
        run(wrapped, room(wrapped) + 1)
    assert run(wrapped, 1).shape == (1, 3)


def test_room_counts_the_tokens_asked_for():
    for tokens in (1, 9):
        wrapped = apply_strategy(bert(), "p_tuning", num_virtual_tokens=tokens)
        assert virtual_tokens(wrapped) == tokens and room(wrapped) == 32 - tokens
    assert virtual_tokens(bert()) == 0
    assert room(SimpleNamespace(config=SimpleNamespace())) is None  # relative positions


@pytest.mark.parametrize(("model", "name"), [c for c in CASES if c[1] != "full"])
def test_saved_and_loaded_it_answers_the_same(tmp_path, model, name):
    from peft import PeftModel

    wrapped = apply_strategy(build(model), name).eval()
    with torch.no_grad():
        for part in wrapped.parameters():
            if part.requires_grad:
                part.add_(0.1 * torch.randn_like(part))
    wrapped.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(build(model), tmp_path).eval()
    torch.testing.assert_close(run(again, 7, rows=2), run(wrapped, 7, rows=2))
    assert not torch.allclose(run(again, 7), run(build(model).eval(), 7), atol=1e-3)


def test_what_the_strategies_refuse():
    for model in WITHOUT_CACHE:
        assert "takes none (no past_key_values)" in refusals(build(model), "prefix_tuning")[0]
    assert "did you mean `prefix_tuning`?" in refusals(bert(), "prefx_tuning")[0]
    assert "BertForTokenClassification" in refusals(bert_tokens(), "lora")[0]
    bart = BartForSequenceClassification(
        BartConfig(
            vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            max_position_embeddings=32,
        )  # fmt: skip
    )
    assert "classification_head" in refusals(bart, "lora")[0] and refusals(bart, "full") == []
    for name in STRATEGIES:
        assert refusals(bert(), name) == []
        wrapped = apply_strategy(bert(), "lora")
        assert "carries an adapter already" in refusals(wrapped, name)[0]
        with pytest.raises(ValueError, match="carries an adapter"):
            apply_strategy(wrapped, name)
    for name, fields, message in (
        ("lora", {"rank": 4}, "no field `rank`"),
        ("p_tuning", {"num_virtual_token": 4}, "did you mean `num_virtual_tokens`"),
        ("full", {"r": 4}, "takes no fields"),
        ("lora", {"target_modules": ["nothing"]}, "peft cannot put `lora` on BertForSequenceClassification"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_strategy(bert(), name, **fields)


def test_an_adapter_is_noticed_until_it_is_merged():
    wrapped = apply_strategy(bert(), "lora")
    assert has_adapter(wrapped) and has_adapter(wrapped.get_base_model())
    assert not has_adapter(wrapped.merge_and_unload())
    injected = bert()
    from peft import LoraConfig

    injected.add_adapter(LoraConfig(target_modules=["query"]))
    assert has_adapter(injected) and not has_adapter(bert())
