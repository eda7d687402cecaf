"""Which requests run together, decided when the executor frees and never at arrival.

A batch formed at arrival is formed too small while the executor is busy; a batch formed
when it frees holds everything that waits by then, and an idle executor waits for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.scheduling.latency import LatencyModel
from broker.scheduling.queue import EdfQueue
from broker.scheduling.ticket import Ticket

__all__ = ["FormedBatch", "form_batch"]


@dataclass(frozen=True, slots=True)
class FormedBatch:
    """What to run now, and what to tell that it will be late."""

    tickets: list[Ticket]
    hopeless: list[Ticket]


def form_batch(
    waiting: EdfQueue[Ticket],
    latency: LatencyModel,
    *,
    now_s: float,
    max_batch: int,
    max_bytes: int,
) -> FormedBatch:
    """Take the next batch of one model out of its queue.

    Expired requests leave first, and those at the head that would be late even alone: they
    would cost the executor time that others still can use. Of the rest the largest batch
    runs whose time, in 95 of 100 runs, keeps the earliest deadline in it; at least one
    request does, whatever its bytes. Neither the bodies of a batch nor the tensors that it is
    asked for take more than ``max_bytes``.
    """
    hopeless = waiting.pop_expired(now_s)
    while (head := waiting.earliest()) is not None:
        ticket = head[1]
        if ticket.probe or latency.mean_ms(1) <= ticket.left_ms(now_s):
            break
        hopeless.append(waiting.pop())
    tickets: list[Ticket] = []
    if head is not None:
        size = _largest_in_time(latency, head[1].left_ms(now_s), min(max_batch, len(waiting)))
        total_bytes = output_bytes = 0
        while len(tickets) < size:
            following = waiting.earliest()
            assert following is not None  # noqa: S101  # size <= len(waiting)
            total_bytes += len(following[1].item.body)
            output_bytes += following[1].item.output_bytes
            if tickets and max(total_bytes, output_bytes) > max_bytes:
                break
            tickets.append(waiting.pop())
    return FormedBatch(tickets=tickets, hopeless=hopeless)


def _largest_in_time(latency: LatencyModel, left_ms: float, most: int) -> int:
    """The largest batch up to ``most`` that takes at most ``left_ms``; at least 1."""
    for size in range(most, 1, -1):
        if latency.high_ms(size) <= left_ms:
            return size
    return 1
