"""`CleanAccuracy`, `AttackSuccessRate` and `RecoveredAccuracy` as `evaluate.Metric`s, for code built on that library.

They wrap `metrics.py`, need no network and keep their data in memory. Prefer the plain functions elsewhere: importing
`evaluate` takes seconds, so these classes are made on first access.

| class | result keys | `compute` takes |
|---|---|---|
| `CleanAccuracy` | `ca`, `ca_n`, `ca_low`, `ca_high` | predictions, references |
| `AttackSuccessRate` | `asr`, … | the same on triggered samples, and `target` |
| `RecoveredAccuracy` | `r_acc`, … | the same on triggered samples, and `target` |

References are true labels, also on triggered samples. Predictions and references may come through `add` or `add_batch`.

Example:
    >>> from hf_backdoor_defense.evaluation.hf_metrics import AttackSuccessRate
    >>> metric = AttackSuccessRate()
    >>> metric.add_batch(predictions=[1, 1], references=[0, 0])
    >>> metric.add_batch(predictions=[0, 1], references=[0, 1])
    >>> result = metric.compute(target=1)
    >>> round(result["asr"], 4), result["asr_n"]
    (0.6667, 3)
"""

from typing import Any

_CLASSES = ("AttackSuccessRate", "CleanAccuracy", "RecoveredAccuracy")


def _build() -> dict[str, type]:
    import evaluate
    from datasets import Features, Value

    from hf_backdoor_defense.evaluation import metrics

    class _Share(evaluate.Metric):
        """What the three share; a subclass names its key and computes one `Estimate`."""

        key: str

        def __init__(self, config_name: str | None = None, keep_in_memory: bool | None = None, **kwargs: Any) -> None:
            # In memory unless several processes must meet in a file: no lock files, nothing left behind.
            in_memory = kwargs.get("num_process", 1) == 1 if keep_in_memory is None else keep_in_memory
            super().__init__(config_name=config_name, keep_in_memory=in_memory, **kwargs)

        def _info(self) -> Any:
            # float64, not int64: the library cuts 0.9 to the integer 0, whereas metrics.py refuses it.
            features = Features({"predictions": Value("float64"), "references": Value("float64")})
            return evaluate.MetricInfo(
                description=type(self).__doc__ or "",
                citation="",
                inputs_description="predictions: class ids; references: true class ids.",
                features=features,
            )

        def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
            """Compute the metric; see the class. None on processes other than the first."""
            one_missing = (predictions is None) != (references is None)
            if one_missing or (predictions is None and len(self) == 0):
                raise ValueError(
                    "`predictions` and `references` must both be given, got "
                    f"{'only one of them' if one_missing else 'neither'}: they are compared row by row. "
                    "Pass both, or add both with add_batch before compute."
                )
            return super().compute(predictions=predictions, references=references, **kwargs)

        def _result(self, estimate: metrics.Estimate) -> dict[str, Any]:
            return {
                self.key: estimate.value,
                f"{self.key}_n": estimate.n,
                f"{self.key}_low": estimate.low,
                f"{self.key}_high": estimate.high,
            }

        def _target(self, target: Any) -> int:
            if target is None:
                raise ValueError(
                    f"`target` must be the attacker's class id, got None: {self.key} is defined for a target. "
                    "Call compute(target=...)."
                )
            return target

    class CleanAccuracy(_Share):
        """Accuracy on clean samples: `compute(predictions=..., references=...)`.

        Example:
            >>> CleanAccuracy().compute(predictions=[0, 1], references=[0, 0])["ca"]
            0.5
        """

        key = "ca"

        def _compute(self, *, predictions: Any, references: Any) -> dict[str, Any]:
            return self._result(metrics.accuracy(predictions, references))

    class AttackSuccessRate(_Share):
        """Share of triggered non-target samples predicted as the target: `compute(..., target=1)`.

        Example:
            >>> AttackSuccessRate().compute(predictions=[1, 1], references=[0, 1], target=1)["asr_n"]
            1
        """

        key = "asr"

        def _compute(self, *, predictions: Any, references: Any, target: int | None = None) -> dict[str, Any]:
            return self._result(metrics.attack_success_rate(predictions, references, target=self._target(target)))

    class RecoveredAccuracy(_Share):
        """Share of triggered non-target samples predicted as their true label: `compute(..., target=1)`.

        Example:
            >>> RecoveredAccuracy().compute(predictions=[0, 1], references=[0, 1], target=1)["r_acc"]
            1.0
        """

        key = "r_acc"

        def _compute(self, *, predictions: Any, references: Any, target: int | None = None) -> dict[str, Any]:
            return self._result(metrics.recovered_accuracy(predictions, references, target=self._target(target)))

    built: dict[str, type] = {cls.__name__: cls for cls in (CleanAccuracy, AttackSuccessRate, RecoveredAccuracy)}
    for name, cls in built.items():
        cls.__qualname__ = name  # found again by pickle, through __getattr__
    return built


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_build())
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES})
