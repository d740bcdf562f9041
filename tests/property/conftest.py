"""`pytest tests/property --hypothesis-profile thorough`: 20 times the examples, by hand and before a release."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("thorough", max_examples=2000, deadline=None)
