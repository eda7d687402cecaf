"""Which of two versions of a model is the higher one."""

from __future__ import annotations

from functools import total_ordering
from typing import Final

__all__ = ["Precedence", "precedence"]

_RELEASE: Final = (1,)
"""Sorts behind every pre-release of the same numbers."""


def precedence(version: str) -> Precedence:
    """A sort key: the higher version sorts last.

    Semantic Versioning 2.0.0, section 11 (https://semver.org/#spec-item-11), for any number of
    dotted parts: numbers compare as numbers, missing ones are 0, text sorts behind numbers, and
    a pre-release (``1.2.0-rc.1``) before its release. What follows ``+`` says nothing there;
    here it decides last, so that no two different versions are equal.
    """
    return Precedence(version)


@total_ordering
class Precedence:
    """Compares as its version does."""

    __slots__ = ("_key", "version")

    def __init__(self, version: str) -> None:
        self.version = version
        text, _, _ = version.partition("+")
        core, dash, early = text.partition("-")
        numbers = [_part(one) for one in core.split(".")]
        while numbers and numbers[-1] == (0, 0, ""):
            numbers.pop()
        before: tuple[object, ...] = _RELEASE
        if dash:
            before = (0, tuple(_part(one) for one in early.split(".")))
        self._key = (tuple(numbers), before, version)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Precedence) and self.version == other.version

    def __lt__(self, other: Precedence) -> bool:
        return self._key < other._key

    def __hash__(self) -> int:
        return hash(self.version)


def _part(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isascii() and text.isdigit() else (1, 0, text)
