"""Clean rows that a defender has beside a run: to fit a filter and to calibrate it, never trained or reported on."""

import hashlib
import math

from datasets import Dataset, DatasetDict, concatenate_datasets

from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.filters import fit_rows_needed
from hf_backdoor_defense.functional.thresholds import rows_needed
from hf_backdoor_defense.registry import filter_class


def own_rows(run: RunArguments, data: DatasetDict) -> Dataset:
    """The defender's own clean rows: of train and validation, whatever `limit` left out, without texts that are trained or
    reported on."""
    whole = load(str(run.task), text_column=run.text_column, label_column=run.label_column)
    splits = [split for split in ("train", "validation") if split != run.eval_split]
    rows = concatenate_datasets([whole[split].select_columns(["text", "label", "row_id"]) for split in splits])
    used = {text for split in ("train", run.eval_split) for text in data[split]["text"]}
    used |= set(whole[run.eval_split]["text"])
    return rows.filter(
        lambda text: text not in used, input_columns="text", keep_in_memory=True, load_from_cache_file=False
    )


def split(rows: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """A third of the rows to fit on and the others to calibrate with, by a hash of seed and text: equal texts lie together.

    A threshold with half a percent on either side needs more rows than a module that only has to forget.
    """
    texts = rows["text"]
    keys = [hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest() for text in texts]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    cut = len(order) // 3
    while cut and cut < len(order) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    return rows.select(sorted(order[:cut])), rows.select(sorted(order[cut:]))


def check_enough(run: RunArguments, rows: Dataset) -> None:
    """Raise ValueError where the defender has too few rows for a filter; known before anything is trained."""
    for name in run.filters:
        calibrated = rows_needed(run.target_frr, tail=filter_class(name).tail)
        needed = max(math.ceil(calibrated * 3 / 2), 3 * fit_rows_needed(name))
        if len(rows) < needed:
            raise ValueError(
                f"the filter `{name}` needs {needed} clean rows that no model is trained on (a third to fit, the others to "
                f"calibrate for a false rejection rate of {run.target_frr:g}), got {len(rows)}: the validation rows and what "
                "--limit leaves out. Give a larger validation file, lower --limit, raise --target_frr, or leave --filters out."
            )
