"""Fixtures that several floors share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.experiment.tiny import classifier, encoder, task  # noqa: E402, F401


@pytest.fixture(autouse=True)
def as_many_threads():
    """A benchmark that a test runs in this process may set its own number; sums of others then round differently."""
    count = torch.get_num_threads()
    yield
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
