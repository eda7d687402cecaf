"""Relative paths that mean the same file on every system, and nothing outside."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from edge_runtime.contract import limits
from edge_runtime.contract.errors import UnsafePath

__all__ = ["check_paths", "check_relative_path"]

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]*\Z")
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))]
)


def check_relative_path(path: str) -> None:
    """Raise ``UnsafePath`` unless ``path`` is ``segment(/segment)*`` of plain names.

    Refused: absolute paths, drives, backslashes, ``..``, hidden names, NUL, trailing
    dots, Windows device names, and anything but ASCII letters, digits and ``_.+@-``.
    """
    if not 0 < len(path) <= limits.MAX_PATH_CHARS:
        raise UnsafePath(f"a path must have 1 to {limits.MAX_PATH_CHARS} characters")
    for segment in path.split("/"):
        stem = segment.split(".", 1)[0].lower()
        if not _SEGMENT.match(segment) or segment.endswith(".") or stem in _WINDOWS_DEVICES:
            raise UnsafePath(
                f"path {path!r} is not a plain relative path: "
                "use letters, digits and _.+@- in each part"
            )


def check_paths(paths: Iterable[str]) -> None:
    """Check each path, and that no two are one file on a case-blind system."""
    seen: set[str] = set()
    for path in paths:
        check_relative_path(path)
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            raise UnsafePath(f"path {path!r} is listed twice (letter case aside)")
        seen.add(folded)
    for path in seen:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in seen:
                raise UnsafePath(f"path {parent!r} is both a file and a folder")
            parent = parent.rpartition("/")[0]
