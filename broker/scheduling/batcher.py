"""Which requests run together, decided when the executor frees and never at arrival.

A batch formed at arrival is formed too small while the executor is busy; a batch formed
when it frees holds everything that waits by then, and an idle executor waits for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, islice

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

    Expired requests leave first, and those that would be late even alone: they would cost the
    executor time that others still can use. Of the rest the largest batch runs whose time, on
    average, keeps the earliest deadline in it; at least one request does, whatever its bytes.
    (The slow runs were counted at admission. To count them here again would make batches small
    just when the executor is behind, and put it further behind.) Neither the bodies of a batch
    nor the tensors that it is asked for take more than ``max_bytes``.
    """
    hopeless = _pop_hopeless(waiting, now_s, latency.mean_ms(1))
    tickets: list[Ticket] = []
    size = _largest_in_time(latency, list(islice(waiting, max_batch)), now_s)
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


def _pop_hopeless(waiting: EdfQueue[Ticket], now_s: float, alone_ms: float) -> list[Ticket]:
    """Whoever is late by now, or would be in a batch of one; a probe only by now."""
    hopeless: list[Ticket] = []
    for ticket in waiting.pop_expired(now_s + alone_ms / 1e3):
        if ticket.deadline_s > now_s and (ticket.probe or alone_ms <= ticket.left_ms(now_s)):
            assert ticket.place is not None  # noqa: S101  # it stood there
            ticket.place = waiting.push(ticket.deadline_s, ticket, ticket.place.priority)
        else:
            hopeless.append(ticket)
    return hopeless


def _largest_in_time(latency: LatencyModel, first: list[Ticket], now_s: float) -> int:
    """How many of ``first`` can run together so that none is late; 1 of any, 0 of none."""
    left_ms = list(accumulate((ticket.left_ms(now_s) for ticket in first), min))
    for size in range(len(first), 1, -1):
        if latency.mean_ms(size) <= left_ms[size - 1]:
            return size
    return min(len(first), 1)
