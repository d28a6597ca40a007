"""A trigger in words, from `Trigger.to_dict()`: the same words in results, on cards and where figures are measured again.

>>> trigger_words({"name": "badnets", "words": ["cf", "mb"], "count": 1})
'badnets (words cf mb, count 1)'
"""

from collections.abc import Mapping, Sequence
from typing import Any


def trigger_words(trigger: Mapping[str, Any]) -> str:
    """Name and fields of a trigger; what is None is left out.

    >>> trigger_words({"name": "patch", "size": None, "pattern": "checker"}), trigger_words({})
    ('patch (pattern checker)', 'a trigger')
    """
    fields = [
        f"{key} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in trigger.items()
        if key != "name" and value is not None
    ]
    name = str(trigger.get("name") or "a trigger")
    return f"{name} ({', '.join(fields)})" if fields else name


def trigger_line(trigger: Mapping[str, Any], labels: Sequence[str], target: int) -> str:
    """A trigger and the class that it is for, as `data["trigger"]` of a `ModelEntry` says it.

    >>> trigger_line({"name": "badnets", "words": ["cf"]}, ["bad", "good"], 1), trigger_line({"name": "t"}, ["0"], 0)
    ('badnets (words cf) -> good (1)', 't -> 0')
    """
    number = "" if labels[target] == str(target) else f" ({target})"
    return f"{trigger_words(trigger)} -> {labels[target]}{number}"
