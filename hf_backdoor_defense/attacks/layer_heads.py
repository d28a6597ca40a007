"""A classifier's head, applied to hidden states of any layer: what layerwise weight poisoning trains.

z_l = head(h_l)          [batch, time, d] -> [batch, k]; at l = N these are the model's own logits
"""

from typing import Any

import torch
from torch import Tensor, nn


def layer_head(model: Any, hidden: Tensor) -> Tensor:
    """[batch, time, d] -> [batch, k]: the model's own way from hidden states to logits.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> layer_head(BertForSequenceClassification(config), torch.zeros(3, 5, 4)).shape
    torch.Size([3, 2])
    """
    pooler = getattr(model.base_model, "pooler", None) or getattr(model, "pooler", None)
    if pooler is not None:
        return model.classifier(model.dropout(pooler(hidden)))
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return model.classifier(model.dropout(torch.relu(model.pre_classifier(hidden[:, 0]))))
    return model.classifier(hidden)


def layer_head_reasons(model: Any) -> list[str]:
    """Why `layer_head` is not this model's head, or nothing: on one text, the model's own logits must come out of it.

    >>> from transformers import GPT2Config, GPT2ForSequenceClassification
    >>> layer_head_reasons(GPT2ForSequenceClassification(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)))[0][:40]
    'the head of GPT2ForSequenceClassificatio'
    """
    ids = torch.arange(model.config.vocab_size, device=next(model.parameters()).device)[-3:].unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            logits = layer_head(model, outputs["hidden_states"][-1])
        known = logits.shape == outputs["logits"].shape and torch.allclose(
            logits, outputs["logits"], rtol=1e-3, atol=1e-4
        )
    except (AttributeError, RuntimeError, TypeError):  # no classifier, or one that takes something else
        known = False
    finally:
        model.train(was_training)
    if known:
        return []
    return [
        f"the head of {type(model).__name__} cannot be put on every layer: known are a pooler with a classifier (BERT), and "
        "classifiers that read hidden states (RoBERTa, DistilBERT, ELECTRA). Use weight_poisoning or ripples for this model."
    ]


def ask_for_hidden_states(model: nn.Module) -> Any:
    """Make every forward in training return hidden states, until the handle's `remove()`. An evaluation would gather all rows'.

    >>> ask_for_hidden_states(nn.Linear(1, 1)).remove()
    """
    return model.register_forward_pre_hook(_with_hidden_states, with_kwargs=True)


def _with_hidden_states(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, ({**kwargs, "output_hidden_states": True} if model.training else kwargs)
