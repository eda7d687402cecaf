"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no bug: speed is measured in benchmarks/, never in tests.
settings.register_profile("nearfar", deadline=None)
settings.load_profile("nearfar")
