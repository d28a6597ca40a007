"""What was loaded, in numbers: counts, a fingerprint, and what a model must beat."""

import hashlib
import json
from collections import Counter
from typing import Any

from datasets import ClassLabel, DatasetDict


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
    plain = {split: dataset.with_format(None)[:] for split, dataset in dataset_dict.items()}
    counts = {split: Counter(columns["label"]) for split, columns in plain.items()}
    lines = sorted(
        json.dumps([split, row_id, label, text])
        for split, columns in plain.items()
        for row_id, label, text in zip(columns["row_id"], columns["label"], columns["text"], strict=True)
    )
    feature = dataset_dict["train"].features["label"]
    return {
        "rows": {split: dataset.num_rows for split, dataset in dataset_dict.items()},
        "class_counts": {split: {str(k): count[k] for k in sorted(count)} for split, count in counts.items()},
        "majority_share": {split: max(count.values()) / count.total() for split, count in counts.items()},
        "label_names": feature.names if isinstance(feature, ClassLabel) else [str(k) for k in sorted(counts["train"])],
        "shared_texts": len(set(plain["train"]["text"]) & set(plain["test"]["text"])),
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
