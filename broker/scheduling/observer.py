"""Who is told what the scheduler does."""

from __future__ import annotations

from typing import Protocol

from broker.models.servable import ModelKey

__all__ = ["Observer", "Observers"]


class Observer(Protocol):
    """Told what happens, for metrics. Quick, and raises nothing."""

    def batch_ran(self, model: ModelKey, images: int, duration_ms: float) -> None:
        """A batch came back."""

    def batch_interrupted(
        self, model: ModelKey, images: int, duration_ms: float, *, at_fault: bool
    ) -> None:
        """A batch came back that was lost on the way and run again: see ``BatchOutcome``."""

    def batch_lost(self, model: ModelKey, images: int) -> None:
        """A batch failed as a whole."""

    def dropped(self, model: ModelKey) -> None:
        """A request left the queue because it would be late."""


class Observers:
    """Several as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def batch_ran(self, model: ModelKey, images: int, duration_ms: float) -> None:
        """A batch came back."""
        for observer in self._observers:
            observer.batch_ran(model, images, duration_ms)

    def batch_interrupted(
        self, model: ModelKey, images: int, duration_ms: float, *, at_fault: bool
    ) -> None:
        """A batch came back that was lost on the way and run again."""
        for observer in self._observers:
            observer.batch_interrupted(model, images, duration_ms, at_fault=at_fault)

    def batch_lost(self, model: ModelKey, images: int) -> None:
        """A batch failed as a whole."""
        for observer in self._observers:
            observer.batch_lost(model, images)

    def dropped(self, model: ModelKey) -> None:
        """A request left the queue because it would be late."""
        for observer in self._observers:
            observer.dropped(model)
