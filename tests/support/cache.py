"""Folders that all test processes of a checkout share: written once, whole, and kept."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

from edge_runtime.contract.files import atomic_directory

_CACHE = Path(__file__).parents[2] / "build" / "test-cache"


def cached(name: str, marker: str, write: Callable[[Path], None]) -> Path:
    """The folder ``name``, filled by ``write`` unless it holds ``marker``.

    Two processes that need it at once would each replace the other's, and a third find
    none meanwhile: one writes, the others wait.
    """
    target = _CACHE / name
    if (target / marker).is_file():
        return target
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / marker).is_file():
            with atomic_directory(target, replace=True) as root:
                write(root)
    return target
