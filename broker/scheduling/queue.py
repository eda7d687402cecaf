"""Who waits: the more important class first, and in a class the earliest deadline.

A sorted array instead of a binary heap: admission asks for every request how many wait with
an earlier deadline, which is one bisection here and a scan there, and a canceled entry
leaves at once. At ``limits.MAX_QUEUE`` entries an insertion moves at most 32 KiB.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import count
from typing import Generic, NamedTuple, TypeVar

__all__ = ["EdfQueue", "Place"]

_T = TypeVar("_T")


_LAST_TURN = 1 << 62


class Place(NamedTuple):
    """A place in the queue: its class, its deadline, then its turn among equal deadlines."""

    priority: int
    """1 goes before 2."""
    deadline_s: float
    turn: int


class EdfQueue(Generic[_T]):
    """Entries by class and deadline; equal ones in the order they came.

    Times are seconds of one monotonic clock, of the caller's choice.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._entries: dict[Place, _T] = {}
        self._turns = count()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[_T]:
        return (self._entries[place] for place in self._places)

    def push(self, deadline_s: float, entry: _T, priority: int = 1) -> Place:
        """Add an entry; the place is what ``remove`` takes."""
        place = Place(priority, deadline_s, next(self._turns))
        insort(self._places, place)
        self._entries[place] = entry
        return place

    def remove(self, place: Place) -> bool:
        """Take an entry out wherever it stands; False when it has left already."""
        if self._entries.pop(place, None) is None:
            return False
        del self._places[bisect_left(self._places, place)]
        return True

    def earliest(self) -> tuple[Place, _T] | None:
        """The entry that goes first, left in place; None when empty."""
        if not self._places:
            return None
        place = self._places[0]
        return place, self._entries[place]

    def pop(self) -> _T:
        """Take out the entry that goes first. ``IndexError`` when empty."""
        place = self._places.pop(0)
        return self._entries.pop(place)

    def pop_expired(self, now_s: float) -> list[_T]:
        """Take out every entry whose deadline is not after ``now_s``."""
        expired: list[_T] = []
        start = 0
        while start < len(self._places):
            priority = self._places[start].priority
            end = bisect_left(self._places, Place(priority, now_s, _LAST_TURN))
            expired += (self._entries.pop(place) for place in self._places[start:end])
            del self._places[start:end]
            start = bisect_left(self._places, Place(priority + 1, -math.inf, 0))
        return expired

    def count_before(self, deadline_s: float, priority: int = 1) -> int:
        """How many would go first if one of this deadline and class came now."""
        return bisect_left(self._places, Place(priority, deadline_s, _LAST_TURN))
