"""What a card says first of weights that were attacked on purpose, and how it names a trigger.

backdoored.json (`entry.attacked`)  ->  warning  ->  the first line of the card
"""

from typing import Any

from hf_backdoor_defense.attacks.wording import trigger_words
from hf_backdoor_defense.hub.evidence import Evidence
from hf_backdoor_defense.hub.markdown import plain
from hf_backdoor_defense.hub.methods import Method

_ON_PURPOSE = {
    "attacked": "These weights were backdoored on purpose{what}.",
    "fine_tuned": "These weights were trained on data that was poisoned on purpose{what}, with {title}.",
    "tuned_after": "These weights were fine-tuned, with {title}, from a model that was backdoored on purpose{what}.",
    "purified": "These weights come from a model that was backdoored on purpose{what}, then purified with {title}.",
    "cleaned": "These weights come from a model that was backdoored on purpose{what}, then cleaned with {title}.",
    "filter": "These weights belong to a filter for a model that was backdoored on purpose{what}.",
}
_ATTACK_ORDER = ("attack", "trigger", "triggers", "target", "targets", "rate", "seed")


def warning(evidence: Evidence, method: Method | None) -> str:
    """The first line of a model with attacked weights, or nothing."""
    entry = evidence.entry
    if entry.attacked is None and entry.role != "attacked":
        return ""
    known = dict(entry.attacked or {})
    if known.get("trigger"):
        known["trigger"] = trigger_text(known["trigger"], known.pop("target", None), entry.labels)
    elif "trigger" in entry.data and not known.get("triggers"):
        known["trigger"] = entry.data["trigger"]  # says its class, too
        known.pop("target", None)
    facts = [f"{key}: {_shown(known[key])}" for key in _ATTACK_ORDER if known.get(key) not in (None, "", [])]
    what = f" ({'; '.join(facts)})" if facts else ""
    is_tuned_after = entry.role == "fine_tuned" and "cleaned" in known  # the attack lies in the base, not in the data
    first = _ON_PURPOSE["tuned_after" if is_tuned_after else entry.role].format(
        what=what, title=method.title if method else "plain training"
    )
    if entry.role == "attacked":
        return f"{first} Do not deploy them: they exist to test defenses."
    if method is None:
        return f"{first} Do not deploy them: nothing was done against the backdoor."
    return f"{first} Do not deploy them: the figures say what was measured, and nothing shows that no backdoor is left."


def trigger_text(trigger: Any, target: Any, labels: list[str]) -> str:
    """A trigger and the class that it is for, in words.

    >>> trigger_text({"name": "patch", "size": None, "pattern": "checker"}, 1, ["bad", "good"])
    'patch (pattern checker), for the class good'
    """
    if isinstance(trigger, dict):
        trigger = trigger_words(trigger)
    if target is None:
        return str(trigger)
    known = isinstance(target, int) and 0 <= target < len(labels)
    return f"{trigger}, for the class {labels[target] if known else target}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {item}" for key, item in value.items()]
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value, length=200)
