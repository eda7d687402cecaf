"""Requests that end the process which runs them, known again by their digest."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from broker.executors.base import BatchItem
from broker.models.servable import ModelKey
from edge_runtime.contract.errors import RequestRejected

__all__ = ["QUARANTINE_S", "Quarantine"]

QUARANTINE_S: Final = 3600.0
_MOST: Final = 1024


class Quarantine:
    """Remembers up to 1024 of them for an hour each; the oldest is forgotten first.

    Bodies are known by their SHA-256 alone, which is computed only while anything is held.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: OrderedDict[tuple[ModelKey, bytes], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, model: ModelKey, item: BatchItem) -> RequestRejected:
        """Hold it from now on; the error to answer it with."""
        self._until_s[model, _digest(item)] = self._clock() + QUARANTINE_S
        if len(self._until_s) > _MOST:
            self._until_s.popitem(last=False)
        return _refusal()

    def refusal(self, model: ModelKey, item: BatchItem) -> RequestRejected | None:
        """The error to answer a request with that is held; None for any other."""
        if not self._until_s:
            return None
        key = (model, _digest(item))
        until_s = self._until_s.get(key)
        if until_s is None:
            return None
        if self._clock() >= until_s:
            del self._until_s[key]
            return None
        return _refusal()


def _digest(item: BatchItem) -> bytes:
    return hashlib.sha256(item.body).digest()


def _refusal() -> RequestRejected:
    return RequestRejected(
        "this input ended the process that ran it, more than once: it is not taken again; "
        "answer on the device"
    )
