"""Clean rows that a defender has beside a run: to fit and calibrate a filter, or to purify with; no arm ever sees them."""

import hashlib
import math

from datasets import Dataset, DatasetDict, concatenate_datasets

from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.filters import fit_rows_needed
from hf_backdoor_defense.experiment.kinds import TEXT, Kind
from hf_backdoor_defense.functional.thresholds import rows_needed
from hf_backdoor_defense.registry import filter_class


def own_rows(run: RunArguments, data: DatasetDict, kind: Kind = TEXT) -> Dataset:
    """The defender's own clean rows: of train and validation, whatever `limit` left out, without any that equal one that is
    trained or reported on."""
    whole = kind.load(run)
    splits = [split for split in ("train", "validation") if split != run.eval_split]
    rows = concatenate_datasets([whole[split].select_columns([kind.name, "label", "row_id"]) for split in splits])
    used = {content for split in ("train", run.eval_split) for content in kind.contents(data[split])}
    used |= set(kind.contents(whole[run.eval_split]))
    return rows.select([i for i, content in enumerate(kind.contents(rows)) if content not in used])


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
