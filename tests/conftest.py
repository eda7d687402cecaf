"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A busy machine is no bug: speed is measured in benchmarks/, never in tests.
settings.register_profile("nearfar", deadline=None)
settings.load_profile("nearfar")

_LONGEST = (
    "test_finetune_qat.py", "test_readme.py", "test_shared_data.py", "test_zoo_training.py",
    "test_conversion_errors.py", "test_demo.py", "test_conversion.py", "test_edge_brokers.py",
)  # fmt: skip
"""Begun first, so that no core waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all others in their order."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_xdist_auto_num_workers() -> int:
    """Three for two cores: a test that talks over sockets waits for half of its time."""
    return max(2, (os.cpu_count() or 2) * 3 // 2)
