"""How long a batch may show no sign of life."""

from __future__ import annotations

from collections import deque
from typing import Final

from broker.models.servable import ModelKey

__all__ = ["Watchdog"]

_FACTOR: Final = 10.0
_LEAST_S: Final = 1.0
_ENOUGH: Final = 8
_KEPT: Final = 64
_SLOW_SHARE: Final = 0.1
"""Of the batches known: they may have waited for a busy machine, and do not count."""


class Watchdog:
    """Ten times what nine of ten such batches take, once enough of them are known.

    A model's first batches, and any batch larger than those it has run, may compile and
    allocate: they get the whole ``longest_s``. Never less than a second: a machine may be
    busy with other things that long. A false alarm costs a new worker, and no request.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._seen: dict[ModelKey, deque[tuple[int, float]]] = {}

    def observe(self, model: ModelKey, images: int, duration_s: float) -> None:
        """A batch came back."""
        self._seen.setdefault(model, deque(maxlen=_KEPT)).append((images, duration_s))

    def forget(self, model: ModelKey) -> None:
        """It will be loaded anew."""
        self._seen.pop(model, None)

    def limit_s(self, model: ModelKey, images: int) -> float:
        """Seconds between two signs of life after which the worker counts as hung."""
        like_it = sorted(s for known, s in self._seen.get(model, ()) if known >= images)
        if len(like_it) < _ENOUGH:
            return self._longest_s
        usual_s = like_it[-1 - int(_SLOW_SHARE * len(like_it))]
        return min(self._longest_s, max(_LEAST_S, _FACTOR * usual_s))
