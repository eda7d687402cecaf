"""Bodies of batches in shared memory: the same on both ends, bounded, and given back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from broker.executors import frames, slots
from broker.executors.base import BatchItem
from broker.models.servable import ModelKey
from edge_runtime.contract.errors import WireError

Ends = tuple[slots.FrontSlots, slots.WorkerSlots]


@pytest.fixture
def ends() -> Iterator[Ends]:
    memory = slots.make_memory()
    assert memory is not None
    front, worker = slots.FrontSlots(memory), slots.WorkerSlots(memory)
    os.close(memory)
    yield front, worker
    front.close()


def batch(*bodies: bytes) -> frames.RunBatch:
    items = tuple(BatchItem(body, top_k=3, tensor=True) for body in bodies)
    return frames.RunBatch(model=ModelKey("m", "1.0.0"), items=items)


def test_a_batch_comes_out_as_it_went_in(ends: Ends) -> None:
    front, worker = ends
    sent = batch(b"one", b"", b"three" * 1000)
    placed = front.place(sent)
    assert [item.body for item in placed.items] == [b"", b"", b""]
    travelled = frames.decode_to_worker(bytes(frames.encode_frame(placed)[frames.HEADER_BYTES :]))
    assert isinstance(travelled, frames.RunBatch)
    assert worker.fetch(travelled) == sent


def test_batches_under_way_do_not_overwrite_each_other(ends: Ends) -> None:
    front, worker = ends
    sent = [batch(bytes([number]) * 5000) for number in range(slots.SLOTS)]
    placed = [front.place(one) for one in sent]
    assert len({one.slot for one in placed}) == slots.SLOTS
    assert [worker.fetch(one) for one in placed] == sent


def test_a_slot_is_used_again_once_its_batch_is_answered(ends: Ends) -> None:
    front, worker = ends
    first = front.place(batch(b"first"))
    for _ in range(slots.SLOTS - 1):
        front.place(batch(b"more"))
    none_free = batch(b"waits in its frame")
    assert front.place(none_free) is none_free
    front.answered()
    again = front.place(batch(b"again"))
    assert again.slot == first.slot
    assert worker.fetch(again) == batch(b"again")


def test_a_batch_in_its_frame_frees_nobody_elses_slot(ends: Ends) -> None:
    front, _ = ends
    large = batch(bytes(slots.SLOT_BYTES + 1))
    assert front.place(large) is large
    taken = [front.place(batch(b"x")).slot for _ in range(slots.SLOTS)]
    assert None not in taken
    front.answered()  # the large one
    assert front.place(batch(b"x")).slot is None


@pytest.mark.parametrize(
    ("slot", "sizes"),
    [
        (slots.SLOTS, (1,)),
        (-1, (1,)),
        (0, ()),
        (0, (-1,)),
        (0, (slots.SLOT_BYTES + 1,)),
        (slots.SLOTS - 1, (2**62,)),
    ],
)
def test_what_lies_outside_of_a_slot_is_never_read(
    ends: Ends, slot: int, sizes: tuple[int, ...]
) -> None:
    _, worker = ends
    odd = frames.RunBatch(
        model=ModelKey("m", "1.0.0"), items=(BatchItem(b""),), slot=slot, sizes=sizes
    )
    with pytest.raises(WireError):
        worker.fetch(odd)


def test_where_there_is_no_memory_the_frames_carry_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", refused)
    assert slots.make_memory() is None
