"""What one runtime remembers from request to request, beside the path to the broker."""

from __future__ import annotations

import threading

import msgspec

from edge_runtime.conditions import Conditions
from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.baselines import BaselineMemory
from edge_runtime.policies.base import Budgets

__all__ = ["History"]


class History:
    """The rhythm of requests, what learning policies learned, and bytes spent. Thread-safe."""

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._lock = threading.Lock()
        self._arrivals = ArrivalEstimator()
        self._memory = BaselineMemory()
        self._metered_bytes = 0
        self._saver_bytes = 0

    def arrived(self, now_s: float) -> None:
        """One more request."""
        with self._lock:
            self._arrivals = self._arrivals.observe(now_s)

    def decided(self) -> None:
        """One more first decision."""
        with self._lock:
            self._memory = self._memory.decided()

    def uploading(self, size_bytes: int, conditions: Conditions) -> None:
        """An upload begins: the whole body counts, although it may be cut off."""
        with self._lock:
            self._metered_bytes += size_bytes if conditions.metered is True else 0
            self._saver_bytes += size_bytes if conditions.data_saver is True else 0

    def uploaded(
        self,
        size_bytes: int,
        total_ms: float,
        predicted_ms: float | None,
        features: tuple[float, ...],
        *,
        in_time: bool,
    ) -> None:
        """An upload ended with an answer, or was cut off."""
        with self._lock:
            self._memory = self._memory.uploaded(
                size_bytes, total_ms, predicted_ms, features, in_time=in_time
            )

    def failed(self) -> None:
        """An upload ended without an answer, and not for want of time."""
        with self._lock:
            self._memory = self._memory.failed()

    def snapshot(self) -> tuple[ArrivalEstimator, BaselineMemory, Budgets]:
        """All of it now; budgets are what is left."""
        with self._lock:
            budgets = msgspec.structs.replace(
                self._budgets,
                metered_bytes_left=_left(self._budgets.metered_bytes_left, self._metered_bytes),
                saver_bytes_left=_left(self._budgets.saver_bytes_left, self._saver_bytes),
            )
            return self._arrivals, self._memory, budgets


def _left(budget_bytes: float | None, spent_bytes: int) -> float | None:
    return None if budget_bytes is None else max(0.0, budget_bytes - spent_bytes)
