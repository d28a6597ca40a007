"""The sentence at the end of a purification: it calls an attack stopped only where it is, and a wrong suspect wrong."""

from types import SimpleNamespace
from typing import Any

import pytest

from hf_backdoor_defense.experiment.purify_account import verdict


def arm(ca: float, asr: float | None, r_acc: float | None, suspects: tuple[str, ...] = ()) -> dict[str, Any]:
    scores = {
        name: None if v is None else {"value": v, "n": 400}
        for name, v in zip(("ca", "asr", "r_acc"), (ca, asr, r_acc), strict=True)
    }
    return {"scores": scores, "suspected_classes": list(suspects), "evidence": {"layers": [], "reliable": True}}  # fmt: skip


def said(
    own: dict[str, Any], *, before: float | None = 1.0, control: float | None = 0.99, target: int | None = 0
) -> str:
    plan: Any = SimpleNamespace(
        method="ulrl",
        target=target,
        run=SimpleNamespace(has_control=True, simulate="patch"),
        classifier=SimpleNamespace(labels=["zero", "one"]),
    )
    recovered = None if before is None else 0.0
    arms = {"undefended": arm(0.94, before, recovered), "fine_tuning": arm(0.93, control, recovered), "ulrl": own}
    return verdict(plan, arms)


STOPPED, LEFT = "the attacker was stopped", "Most triggered rows still go to the target"


@pytest.mark.parametrize(
    ("asr", "r_acc", "stopped", "left"),
    [(0.87, 0.08, False, True), (0.51, 0.3, False, True), (0.05, 0.2, True, False), (0.05, 0.9, False, False)],
)
def test_stopped_and_left_are_told_apart(asr: float, r_acc: float, stopped: bool, left: bool) -> None:
    text = said(arm(0.92, asr, r_acc))
    assert (STOPPED in text, LEFT in text) == (stopped, left)


def test_an_attack_that_did_not_fall_is_neither() -> None:
    text = said(arm(0.92, 0.99, 0.0))
    assert "The attack was not removed." in text and STOPPED not in text and LEFT not in text


def test_a_suspect_is_compared_with_the_target_where_that_is_known() -> None:
    assert "The simulated target is zero: that was not found." in said(arm(0.92, 0.87, 0.1, ("one",)))
    assert "The simulated target, zero, is among them." in said(arm(0.92, 0.87, 0.1, ("one", "zero")))
    unknown = said(arm(0.92, None, None, ("one",)), before=None, control=None, target=None)
    assert "Suspected target class: one." in unknown and "simulated target" not in unknown
