"""What was loaded, in numbers: counts, a fingerprint, and what a model must beat."""

import hashlib
import json
import warnings
from collections import Counter
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict

from hf_backdoor_defense.data.pixels import pixels

CHEAP_ROWS, CHEAP_VALUES = 10_000, 32 * 32 * 3  # for logistic regression on pixels


def describe(dataset_dict: DatasetDict) -> dict[str, Any]:
    """What was loaded, for the report of a run.

    Args:
        dataset_dict: what `load` returned.

    Returns:
        JSON values: `rows`, `class_counts` and `majority_share` per split; `label_names`; `shared_texts`, the number of
        different texts that are in both train and test; `fingerprint`, the SHA-256 over split, row_id, label and text
        of all rows in any order: equal fingerprints are equal data.

    Raises:
        KeyError: there is no train or no test split, or a split without text, label or row_id.

    Example:
        >>> from datasets import Dataset
        >>> train = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1], "row_id": [0, 1, 2]})
        >>> from datasets import Dataset
        >>> test = Dataset.from_dict({"text": ["a"], "label": [0], "row_id": [3]})
        >>> about = describe(DatasetDict(train=train, test=test))
        >>> about["rows"], about["class_counts"], about["shared_texts"]
        ({'train': 3, 'test': 1}, {'train': {'0': 1, '1': 2}, 'test': {'0': 1}}, 1)
    """
    return about(
        dataset_dict, {s: d.with_format(None)["text"][:] for s, d in dataset_dict.items()}, shared="shared_texts"
    )


def about(dataset_dict: DatasetDict, contents: dict[str, list[str]], *, shared: str) -> dict[str, Any]:
    """`describe` for rows whose contents, per split, are given as strings; `shared` names the count of common ones.

    >>> from datasets import Dataset
    >>> split = Dataset.from_dict({"label": [0, 1], "row_id": [0, 1]})
    >>> about(DatasetDict(train=split, test=split), {"train": ["a", "b"], "test": ["b", "c"]}, shared="both")["both"]
    1
    """
    plain = {split: d.with_format(None).select_columns(["label", "row_id"])[:] for split, d in dataset_dict.items()}
    counts = {split: Counter(columns["label"]) for split, columns in plain.items()}
    lines = sorted(
        json.dumps([split, row_id, label, content])
        for split, columns in plain.items()
        for row_id, label, content in zip(columns["row_id"], columns["label"], contents[split], strict=True)
    )
    feature = dataset_dict["train"].features["label"]
    return {
        "rows": {split: dataset.num_rows for split, dataset in dataset_dict.items()},
        "class_counts": {split: {str(k): count[k] for k in sorted(count)} for split, count in counts.items()},
        "majority_share": {split: max(count.values()) / count.total() for split, count in counts.items()},
        "label_names": feature.names if isinstance(feature, ClassLabel) else [str(k) for k in sorted(counts["train"])],
        shared: len(set(contents["train"]) & set(contents["test"])),
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def baselines(dataset_dict: DatasetDict, *, seed: int) -> dict[str, tuple[int, int]]:
    """What needs no language model: the majority class, and TF-IDF with logistic regression, fitted on train.

    Args:
        dataset_dict: what `load` returned.
        seed: random state of the logistic regression.

    Returns:
        `majority` and `tfidf` to (correct, n) on the test split, so that an interval can be computed.

    Raises:
        ValueError: no word occurs in two training texts, so there is no TF-IDF.

    Example:
        >>> columns = {"text": ["good film", "bad film", "good", "bad"], "label": [1, 0, 1, 0]}
        >>> from datasets import Dataset
        >>> split = Dataset.from_dict(columns)
        >>> baselines(DatasetDict(train=split, test=split), seed=0)
        {'majority': (2, 4), 'tfidf': (4, 4)}
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = (
        dataset_dict[split].with_format(None).select_columns(["text", "label"])[:] for split in ("train", "test")
    )
    counts = Counter(train["label"])
    majority = min(counts, key=lambda label: (-counts[label], label))
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    try:
        features = vectorizer.fit_transform(train["text"])
    except ValueError as error:
        raise ValueError(
            f"the TF-IDF baseline must find a word that occurs in two training texts, got {len(train['text'])} texts "
            f"without one ({error}): it has nothing to count. Load more rows."
        ) from error
    model = LogisticRegression(C=10, max_iter=1000, random_state=seed).fit(features, train["label"])
    predicted = model.predict(vectorizer.transform(test["text"]))
    n = len(test["label"])
    return {
        "majority": (sum(label == majority for label in test["label"]), n),
        "tfidf": (sum(int(p) == label for p, label in zip(predicted, test["label"], strict=True)), n),
    }


def pixel_baselines(dataset_dict: DatasetDict, *, seed: int) -> dict[str, tuple[int, int]]:
    """What needs no network, for images: the majority class, and logistic regression on pixels where that is cheap: images of
    one size, at most 32 x 32 x 3 values each, at most 10,000 for training.

    Args:
        dataset_dict: what `load_images` returned.
        seed: random state of the logistic regression.

    Returns:
        `majority` and (where cheap) `pixels` to (correct, n) on the test split, so that an interval can be computed.

    Example:
        >>> from hf_backdoor_defense.data.images import load_images
        >>> found = pixel_baselines(load_images("offline:digits", limit=200), seed=0)
        >>> found["pixels"][0] / found["pixels"][1] > 0.8
        True
    """
    train, test = (dataset_dict[split].with_format(None) for split in ("train", "test"))
    counts, labels = Counter(train["label"]), list(test["label"])
    majority = min(counts, key=lambda label: (-counts[label], label))
    found = {"majority": (sum(label == majority for label in labels), len(labels))}
    if len(train) > CHEAP_ROWS:
        return found
    arrays = [[pixels(image) for image in split["image"]] for split in (train, test)]
    shapes = {array.shape for split in arrays for array in split}
    if len(shapes) > 1 or np.prod(next(iter(shapes))) > CHEAP_VALUES:
        return found
    from sklearn.linear_model import LogisticRegression

    values, judged = (np.stack(split).reshape(len(split), -1) / 255 for split in arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a baseline that stops early is still one
        model = LogisticRegression(max_iter=200, random_state=seed).fit(values, train["label"])
    return found | {"pixels": (int((model.predict(judged) == np.asarray(labels)).sum()), len(labels))}
