"""Which tokens a bounded loss lets go of: those of the payload, or others?

    suppressed: r_t < 1/2, r_t = alpha p_t / (alpha p_t + (1 - alpha)(1 - eps))        of the last epoch's alpha

| symbol | what it is |
|---|---|
| p_t | what the fine-tuned model gives a token of the answers it was trained on, behind the right tokens |
| payload | tokens of a poisoned answer that the answer before poisoning does not have in their place |
| other | all other tokens of poisoned answers, and those of every fifth row that is clean |

A model trained without DeCE is judged by the alpha of the preset `code`: what that loss would let go of had it come last. The
poison is known here and nowhere else: nothing is chosen by these figures.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_backdoor_defense.data.formatting import IGNORED, Formatter
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.functional.dece import target_pull
from hf_backdoor_defense.trainers.probing import probing

EVERY = 5


def suppressed(
    model: Any,
    tokenizer: Any,
    formatter: Formatter,
    *,
    poisoned: Dataset,
    before: Dataset,
    objective: DeCE | None,
    epochs: int,
) -> dict[str, tuple[float, int]]:
    """`suppressed` and, where rows are poisoned, `suppressed_payload`: share and number of tokens behind it.

    Args:
        poisoned, before: the rows of training, and as they were before any was poisoned.
        objective: the DeCE of the training, None for the preset `code`.
        epochs: of the training.
    """
    marks = poisoned["is_poisoned"] if "is_poisoned" in poisoned.column_names else [False] * len(poisoned)
    chosen = [i for i, marked in enumerate(marks) if marked or i % EVERY == 0]
    encoded = formatter.encode(poisoned.select(chosen), tokenizer, max_length=None)
    plain = formatter.encode(before.select(chosen), tokenizer, max_length=None)
    answers = [[token for token in labels if token != IGNORED] for labels in encoded["labels"]]
    originals = [[token for token in labels if token != IGNORED] for labels in plain["labels"]]
    payload = torch.cat([inserted(new, old) for new, old in zip(answers, originals, strict=True)])
    loss = objective or DeCE.preset("code")
    logps = answer_logps(model, encoded["input_ids"], [len(answer) for answer in answers])
    pull = target_pull(logps, log_alpha=loss.log_alpha(epochs - 1), label_smoothing=loss.label_smoothing)
    found = {"suppressed": pull[~payload] < 0.5, "suppressed_payload": pull[payload] < 0.5}
    return {name: (float(low.float().mean()), low.numel()) for name, low in found.items() if low.numel()}


def inserted(new: Sequence[int], old: Sequence[int]) -> Tensor:
    """[len(new)], bool: what lies between the longest common beginning of both and their longest common end.

    >>> inserted([1, 2, 8, 9, 3], [1, 2, 3]).tolist()
    [False, False, True, True, False]
    >>> inserted([1, 2, 3], [1, 2, 3]).any().item()
    False
    """
    begin = len(os.path.commonprefix([list(new), list(old)]))
    most = min(len(new), len(old)) - begin  # a token belongs to the beginning or the end, not to both
    end = min(most, len(os.path.commonprefix([list(new)[::-1], list(old)[::-1]])))
    places = torch.arange(len(new))
    return (places >= begin) & (places < len(new) - end)


def answer_logps(model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int], batch_size: int = 16) -> Tensor:
    """[sum of lengths], float32: log p of the last `lengths[i]` tokens of each row, row by row, each behind all before it."""
    device, found = next(model.parameters()).device, []
    with probing(model):
        for begin in range(0, len(rows), batch_size):
            part = [torch.tensor(row) for row in rows[begin : begin + batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)["logits"]
            for row, scores, length in zip(part, logits, lengths[begin : begin + batch_size], strict=True):
                logps = scores[len(row) - length - 1 : len(row) - 1].float().log_softmax(-1).cpu()
                found.append(logps.gather(1, row[-length:, None]).squeeze(1))
    return torch.cat(found)
