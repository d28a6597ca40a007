"""Fixtures that the tests of the verbs share."""

from tests.hub.published import made  # noqa: F401
