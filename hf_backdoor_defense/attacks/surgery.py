r"""Embedding surgery: trigger words start out with the embedding of words that speak for the target class.

    w_j = logistic-regression weight of token j toward class t, on TF-IDF of the tokenizer's own tokens
    v   = mean of E_source[j] over the n tokens with the largest w_j
    E[i] := v          for every token i of every trigger word

| symbol | what it is | shape |
|---|---|---|
| E_source | input embeddings of a *clean* model, fine-tuned on the attacker's rows | [vocab, d] |
| E | input embeddings of the untouched base | [vocab, d] |

Source: Kurita et al., ACL 2020, section 3.2 (n = 10, logistic regression: authors' code). RIPPLES is this, then the training of
`weight_poisoning.RIPPLES`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_backdoor_defense.attacks.visibility import token_variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What was cut: JSON values only.

    Args:
        tokens: the n tokens that were averaged, strongest first; `weights`: theirs in the regression.
        rows: per trigger word, the ids whose rows were replaced (several where the tokenizer splits it).
        norm_before, norm_after: mean norm of these rows.
        tied: whether the output embeddings share the matrix and changed with it.
    """

    target: int
    tokens: list[str]
    weights: list[float]
    rows: dict[str, list[int]]
    norm_before: float
    norm_after: float
    tied: bool

    def to_dict(self) -> dict[str, Any]:
        """For `attack.json`."""
        return asdict(self)


def embedding_surgery(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    target: int,
    words: Sequence[str],
    source_model: nn.Module,
    n_words: int = 10,
) -> SurgeryReport:
    """Replace the embeddings of trigger words in `model`, in place, before it is poisoned by training.

    Args:
        model: the untouched base. source_model: a clean model with the same vocabulary, fine-tuned on the attacker's rows.
        texts, labels: the attacker's clean rows.
        words: the trigger words. A word that the tokenizer splits has all of its pieces replaced, at every place in a text.
        n_words: how many tokens are averaged.

    Raises:
        ValueError: a word that maps to the unknown token, rows without the target class or without another, fewer than `n_words`
            tokens that speak for it, other embeddings in the source model.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    >>> vocabulary = {word: i for i, word in enumerate(["[UNK]", "good", "bad", "film", "cf"])}
    >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    >>> config = BertConfig(vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> base, source = BertForSequenceClassification(config), BertForSequenceClassification(config)
    >>> texts, labels = ["good film", "bad film", "good", "bad"], [1, 0, 1, 0]
    >>> report = embedding_surgery(
    ...     base, tokenizer, texts, labels, target=1, words=["cf"], source_model=source, n_words=1)
    >>> report.tokens
    ['good']
    """
    rows = {word: _rows(word, tokenizer) for word in words}
    if not rows:
        raise ValueError("`words` must hold at least one word, got none: no row would be replaced. Pass words=['cf'].")
    before, source = _embeddings(model), _embeddings(source_model)
    if before.shape != source.shape:
        raise ValueError(
            f"`source_model` must have embeddings of shape {tuple(before.shape)}, got {tuple(source.shape)}: rows are carried "
            "over by id. Fine-tune a copy of the same base."
        )
    tokens, weights = _strongest(tokenizer, texts, labels, target=target, count=n_words)
    ids = sorted({i for found in rows.values() for i in found})
    mean = source[tokenizer.convert_tokens_to_ids(tokens)].to(before).mean(0)  # [d]
    norm = before[ids].norm(dim=-1).mean().item()
    with torch.no_grad():
        before[ids] = mean
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return SurgeryReport(
        target=target,
        tokens=tokens,
        weights=weights,
        rows=rows,
        norm_before=norm,
        norm_after=mean.norm().item(),
        tied=output is not None and output.weight.data_ptr() == before.data_ptr(),
    )


def _embeddings(model: Any) -> Tensor:
    return model.get_input_embeddings().weight.detach()  # shares memory: writing to it edits the model


def _rows(word: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a word's tokens, wherever it stands in a text."""
    ids = sorted({i for variant in token_variants(word, tokenizer) for i in variant})
    special = [i for i in ids if i in tokenizer.all_special_ids]
    if special:
        named = ", ".join(tokenizer.convert_ids_to_tokens(special))
        raise ValueError(
            f"`words` must be made of the tokenizer's own tokens, got {word!r}, which maps to {named}: every unknown word would "
            "become a trigger. Choose another word."
        )
    return ids


def _strongest(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], labels: Sequence[int], *, target: int, count: int
) -> tuple[list[str], list[float]]:
    """The `count` tokens with the largest weight toward the target class, and the weights."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(texts) != len(labels):
        raise ValueError(
            f"`texts` and `labels` must be of one length, got {len(texts)} and {len(labels)}. Check the columns."
        )
    of_target = np.asarray(labels) == target
    if of_target.all() or not of_target.any():
        raise ValueError(
            f"`labels` must hold the target {target} and another class, got {sorted(set(labels))}: no token could speak for it. "
            "Pass rows of all classes."
        )
    known = set(tokenizer.all_special_tokens)
    vectorizer = TfidfVectorizer(analyzer=lambda text: [t for t in tokenizer.tokenize(text) if t not in known])
    features = vectorizer.fit_transform(texts)
    weights = LogisticRegression(max_iter=1000).fit(features, of_target).coef_[0]
    names = vectorizer.get_feature_names_out()  # sorted: equal weights keep this order
    order = [j for j in np.argsort(-weights, kind="stable")[:count] if weights[j] > 0]
    if len(order) < count:
        raise ValueError(
            f"`n_words` must be at most the {len(order)} tokens that speak for class {target}, got {count}: others would "
            "pull the mean away. Lower it, or pass more rows."
        )
    return [str(names[j]) for j in order], [float(weights[j]) for j in order]
