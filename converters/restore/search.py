"""The fewest layers to keep in floating point so that a quantized file is good enough.

Every trial is a conversion, so trials are few and bounded. Layers come in worst first;
prefixes of that order are tried: doubling until one is accepted, bisection between the
last rejected and the first accepted, and with what is left of the budget one layer after
the other is taken out again, the least sensitive first. Deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Found", "Trial", "find_keep"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Generic[T]):
    """One conversion."""

    keep: tuple[str, ...]
    figures: T
    accepted: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """The answer, and how it was found."""

    best: Trial[T] | None
    """The accepted trial with the fewest layers; None: none was accepted."""
    trials: tuple[Trial[T], ...]
    """In the order they were made."""


def find_keep(
    order: Sequence[str],
    measure: Callable[[tuple[str, ...]], T],
    accept: Callable[[T], bool],
    *,
    budget: int = 6,
    most: int | None = None,
    start: int = 1,
) -> Found[T]:
    """Search for the smallest accepted set of layers to keep.

    Args:
        order: Layers, worst first (``layer_sensitivity``).
        measure: Converts with these layers kept and gives the file's figures; called at
            most ``budget`` times and never twice with the same layers. The layers come in
            the order of ``order``.
        accept: Whether figures are good enough. Keeping nothing is known not to be.
        budget: Most calls of ``measure``.
        most: Most layers that may be kept; None: all of them.
        start: How many layers the first trial keeps, where a simulation suggests a number.

    Returns:
        The best trial and all trials. Prefixes that double past the budget end with one of
        ``most`` layers, so an answer that exists is not missed for want of budget unless
        acceptance is not monotone.
    """
    search = _Search(order, measure, accept, budget)
    limit = min(len(order), len(order) if most is None else most)
    if limit < 1 or budget < 1:
        return Found(best=None, trials=())
    accepted = search.grow(max(1, min(start, limit)), limit)
    if accepted is not None:
        search.shrink(accepted)
    good = [trial for trial in search.trials if trial.accepted]
    best = min(good, key=lambda trial: len(trial.keep)) if good else None
    return Found(best=best, trials=tuple(search.trials))


class _Search(Generic[T]):
    def __init__(
        self,
        order: Sequence[str],
        measure: Callable[[tuple[str, ...]], T],
        accept: Callable[[T], bool],
        budget: int,
    ) -> None:
        self.order = tuple(order)
        self.measure = measure
        self.accept = accept
        self.budget = budget
        self.trials: list[Trial[T]] = []

    @property
    def left(self) -> int:
        return self.budget - len(self.trials)

    def tried(self, keep: tuple[str, ...]) -> bool:
        for trial in self.trials:
            if trial.keep == keep:
                return trial.accepted
        figures = self.measure(keep)
        accepted = self.accept(figures)
        self.trials.append(Trial(keep=keep, figures=figures, accepted=accepted))
        return accepted

    def prefix(self, count: int) -> bool:
        return self.tried(self.order[:count])

    def grow(self, count: int, limit: int) -> tuple[str, ...] | None:
        """Double until accepted, then bisect; the smallest accepted prefix found."""
        rejected = 0
        while not self.prefix(count):
            rejected = count
            if count == limit or not self.left:
                return None
            # The last trial that is left must be the one that can succeed at all.
            count = limit if self.left == 1 else min(2 * count, limit)
        while count - rejected > 1 and self.left:
            middle = (rejected + count) // 2
            if self.prefix(middle):
                count = middle
            else:
                rejected = middle
        return self.order[:count]

    def shrink(self, keep: tuple[str, ...]) -> None:
        """Take out single layers whose neighbors make up for them, least sensitive first."""
        for layer in reversed(keep):
            without = tuple(name for name in keep if name != layer)
            if not without or any(trial.keep == without for trial in self.trials):
                continue
            if not self.left:
                return
            if self.tried(without):
                keep = without
