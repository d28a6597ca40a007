"""Fixtures that the tests of the Hub share."""

from tests.hub.published import made  # noqa: F401
