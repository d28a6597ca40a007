"""Whether a configuration describes what the weight files hold, judged before time or memory is taken for it.

| key, at any depth of config.json | at most the larger of |
|---|---|
| …layers, …blocks, …stages, depths: of lists of blocks their sum | the number of tensors, 64 |
| …experts | the number of tensors, 1024: they may lie in one |
| num_labels, id2label, num_… | the longest side of any tensor, 1000 |
| …hidden_size, d_model, … | the longest side of any tensor, 4096 |
| …vocab_size | the longest side of any tensor, 262144: an image's half of a model keeps its text's settings |

Layers are built one by one in Python, also where they take no memory, and each class gets its name: so these numbers come first.
Then the model is built without memory (device "meta"), and must have no more weights than are stored.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LARGEST_CONFIG = 2**23
"""Bytes of a config.json; one that names 21,000 classes has 2 MB."""
_OF_STAGES = re.compile(r"(depths?|blocks?|stages?|repeats?)$", re.IGNORECASE)
# Keys -> whether tensors are counted, or their sides measured; and what is allowed although the files do not show it.
_RULES = [
    (re.compile(r"(.*_)?(layers?|blocks?|stages?|depths?|repeats?)|num_.*_per_(block|stage)"), True, 64),
    (re.compile(r"(.*_)?experts"), True, 1024),
    (re.compile(r"(.*_)?vocab_?(size|dim)"), False, 2**18),
    (re.compile(r"num_(labels|classes)|id2label|label2id|(n|num)_(?!.*position).*"), False, 1000),
    (
        re.compile(
            r"(.*_)?(hidden|intermediate|embedding|inner|ffn)_?(size|dim)|d_(model|ff|inner)|n_(embd|inner)|embed_dim|dim"
        ),
        False,
        4096,
    ),
]


def check_size(folder: str | Path) -> None:
    """Refuse a configuration that describes more than the weight files hold.

    Raises:
        ValueError: that, or no configuration of a model of transformers.
    """
    import transformers

    folder = Path(folder)
    path = folder / "config.json"
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"config.json has {path.stat().st_size:,} bytes: no model is described by that many")
    values = json.loads(path.read_bytes())
    shapes = list(_shapes(folder))
    check_numbers(values, tensors=len(shapes), longest=max((side for shape in shapes for side in shape), default=0))
    named = values.get("architectures") or [None]
    kind: Any = getattr(transformers, str(named[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.json names {named[0]!r}, which is no model of transformers: code of others is not run"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in kind(config).parameters())
    stored = sum(math.prod(shape) for shape in shapes)
    if described > stored:
        raise ValueError(
            f"config.json describes {described:,} weights, and the files hold {stored:,}: some would be random"
        )


def check_numbers(values: Any, *, tensors: int, longest: int) -> None:
    """Refuse numbers of a configuration that no tensor of its files speaks for.

    Args:
        values: what config.json holds. tensors: how many the files hold. longest: the longest side of any of them.

    Raises:
        ValueError: the first that is too large.

    >>> check_numbers({"text_config": {"encoder_layers": 12}, "id2label": {"0": "bad", "1": "good"}}, tensors=200, longest=768)
    >>> check_numbers({"text_config": {"encoder_layers": 10**6}}, tensors=200, longest=768)
    Traceback (most recent call last):
    ...
    ValueError: config.json has encoder_layers = 1000000, and its files show at most 200: no such model would be whole
    """
    if isinstance(values, list):
        for value in values:
            check_numbers(value, tensors=tensors, longest=longest)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        check_numbers(value, tensors=tensors, longest=longest)
        rule = next((rule for rule in _RULES if rule[0].fullmatch(key.lower())), None)
        if rule is None:
            continue
        _, counts, floor = rule
        most = max(tensors if counts else longest, floor)
        if not (number := _magnitude(key, value)) <= most:  # NaN, too
            raise ValueError(
                f"config.json has {key} = {number}, and its files show at most {most}: no such model would be whole"
            )


def _magnitude(key: str, value: Any) -> int | float:
    """How large a number is, how many names there are, how many blocks in all; 0 for what is no number."""
    if isinstance(value, dict):
        return len(value)
    if isinstance(value, list):
        each = [_magnitude(key, item) for item in value]
        # Stages list how many blocks each has; other lists say which layers are special, or a size for each.
        return sum(each) if _OF_STAGES.search(key) else max([len(value), *each])
    return abs(value) if isinstance(value, int | float) else 0


def _shapes(folder: Path) -> Iterator[list[int]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                yield file.get_slice(name).get_shape()
