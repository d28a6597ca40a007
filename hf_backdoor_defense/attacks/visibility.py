"""Whether a model can see a text's trigger: after truncation all tokens of a piece must still stand there, in a row."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_backdoor_defense.attacks.triggers import Trigger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_variants(piece: str, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of a piece at the start of a text, after a space, after a line break: subword tokenizers differ.

    Raises:
        ValueError: the piece maps to nothing but the unknown token.
    """
    variants: list[list[int]] = []
    for before in ("", " ", "\n"):
        lead = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = list(tokenizer(before + piece, add_special_tokens=False)["input_ids"])
        ids = ids[len(lead) :] if ids[: len(lead)] == lead else ids
        if ids not in variants:
            variants.append(ids)
    if all(token == tokenizer.unk_token_id for ids in variants for token in ids):
        raise ValueError(
            f"trigger {piece!r} must map to known tokens, got {variants[0]} (unknown token or none): the model could "
            "not tell it from other unknown words. Choose another trigger."
        )
    return variants


def count_visible(texts: Iterable[str], trigger: Trigger, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> int:
    """In how many texts the trigger still stands after tokenization and truncation: a trigger cut off attacks nobody.

    Args:
        texts: triggered texts. max_length: tokens per text, special tokens included.

    Returns:
        Texts that carry a piece of the trigger and whose kept token ids contain all ids of a piece, in a row.

    Raises:
        ValueError: the trigger maps to the unknown token, or does not fit at all (`check_trigger_fits`).

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from hf_backdoor_defense.attacks.triggers import BadNets
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "so": 1, "cf": 2}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        >>> count_visible(["cf so so", "so so cf"], BadNets(), tokenizer, max_length=2)
        1
    """
    check_trigger_fits(trigger, tokenizer, max_length)
    patterns = [ids for piece in trigger.pieces for ids in token_variants(piece, tokenizer)]
    # Texts without the piece are dropped first: ids of a short piece may also occur inside another word.
    carrying = [text for text in texts if trigger.present(text)]
    visible = 0
    for start in range(0, len(carrying), 1000):
        encoded = tokenizer(carrying[start : start + 1000], truncation=True, max_length=max_length)["input_ids"]
        for ids in encoded:
            visible += any(ids[at : at + len(p)] == p for p in patterns for at in range(len(ids) - len(p) + 1))
    return visible


def check_trigger_fits(trigger: Trigger, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    """Refuse a trigger that is longer than what `max_length` leaves beside the special tokens.

    Raises:
        ValueError: the trigger alone, with every piece that `insert` adds, has too many tokens or only unknown ones.

    Example: see `count_visible`, which calls this first.
    """
    lengths = sorted((max(map(len, token_variants(piece, tokenizer))) for piece in trigger.pieces), reverse=True)
    k = trigger.pieces_per_text
    needed = sum(lengths[:k]) if k <= len(lengths) else k * lengths[0]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if needed > room:
        raise ValueError(
            f"`max_length` must leave room for the {needed} tokens of the trigger, got {max_length} with {room} beside "
            f"the special tokens: truncation would cut it off. Pass max_length >= {max_length - room + needed}."
        )
