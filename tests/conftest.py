"""Fixtures that several floors share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from tests.experiment.tiny import classifier, encoder, task  # noqa: E402, F401
