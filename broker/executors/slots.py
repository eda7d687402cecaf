"""Bodies of a batch go to the worker through memory that both processes map.

A pipe would copy each of them into the kernel and out again, page by page. The memory has no
name in any file system (``memfd_create(2)``): nothing is left behind, however the processes
end. The pipe carries the rest of the frame, which is the doorbell.

A slot holds the bodies of one batch, one after the other, from the moment the batch is sent
until it is answered. A batch that is larger than a slot travels in its frame.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from typing import Final

import msgspec

from broker.executors import frames
from broker.executors.base import BatchItem
from edge_runtime.contract.errors import WireError

__all__ = ["SLOTS", "SLOT_BYTES", "FrontSlots", "WorkerSlots", "make_memory"]

SLOTS: Final = 3
"""A batch runs, one waits behind it, and one of a single request may be sent anew."""
SLOT_BYTES: Final = 16 * 2**20
"""Of address space; memory is taken as far as batches fill it."""
_BYTES: Final = SLOTS * SLOT_BYTES


def make_memory() -> int | None:
    """A descriptor of the memory; None where the system has none to give: frames carry all."""
    try:
        made = os.memfd_create("nearfar-slots", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        return None
    try:
        os.ftruncate(made, _BYTES)
    except OSError:
        os.close(made)
        return None
    return made


class FrontSlots:
    """The end that writes. Batches are answered in the order in which they were sent."""

    def __init__(self, memory: int) -> None:
        self._map = mmap.mmap(memory, _BYTES)
        self._free = list(range(SLOTS))
        self._sent: deque[int | None] = deque()
        """Slots of the batches that have no answer yet; None: it travels in its frame."""

    def place(self, batch: frames.RunBatch) -> frames.RunBatch:
        """Put the bodies of a batch into a slot, where one is free and large enough."""
        bodies = [item.body for item in batch.items]
        sizes = tuple(map(len, bodies))
        if not self._free or sum(sizes) > SLOT_BYTES:
            self._sent.append(None)
            return batch
        slot = self._free.pop()
        self._sent.append(slot)
        at = slot * SLOT_BYTES
        for body, size in zip(bodies, sizes, strict=True):
            self._map[at : at + size] = body
            at += size
        return frames.RunBatch(
            model=batch.model,
            items=tuple(msgspec.structs.replace(item, body=b"") for item in batch.items),
            slot=slot,
            sizes=sizes,
        )

    def answered(self) -> None:
        """The earliest batch without an answer has one."""
        slot = self._sent.popleft() if self._sent else None
        if slot is not None:
            self._free.append(slot)

    def close(self) -> None:
        """Unmap it."""
        self._map.close()


class WorkerSlots:
    """The end that reads."""

    def __init__(self, memory: int) -> None:
        self._map = mmap.mmap(memory, _BYTES, access=mmap.ACCESS_READ)

    def fetch(self, batch: frames.RunBatch) -> frames.RunBatch:
        """The batch with its bodies. Raises ``WireError`` where they are not in a slot."""
        if batch.slot is None:
            return batch
        sizes = batch.sizes
        if not 0 <= batch.slot < SLOTS or len(sizes) != len(batch.items):
            raise WireError(f"a batch of {len(batch.items)} in slot {batch.slot} makes no sense")
        if min(sizes, default=0) < 0 or sum(sizes) > SLOT_BYTES:
            raise WireError("the bodies of a batch lie outside of its slot")
        at = batch.slot * SLOT_BYTES
        items: list[BatchItem] = []
        for item, size in zip(batch.items, sizes, strict=True):
            items.append(msgspec.structs.replace(item, body=self._map[at : at + size]))
            at += size
        return frames.RunBatch(model=batch.model, items=tuple(items))
