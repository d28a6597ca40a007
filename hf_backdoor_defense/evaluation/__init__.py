"""Measuring a model that may carry a backdoor: metrics with intervals, `evaluate.Metric` wrappers, the evaluator."""
