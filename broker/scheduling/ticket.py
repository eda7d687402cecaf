"""One request inside the broker, from its headers to its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec

from broker.executors.base import BatchItem, TensorAnswer
from broker.models.servable import ModelKey
from broker.scheduling.queue import Place
from broker.scheduling.shares import Flow
from edge_runtime.contract.errors import BrokerFault, DeadlineExceeded, NearfarError
from edge_runtime.contract.wire import EncodedAnswer

__all__ = [
    "ANYBODY",
    "DEFAULT_PRIORITY",
    "LOWEST_PRIORITY",
    "TOO_LATE",
    "Answer",
    "Caller",
    "Ticket",
]

DEFAULT_PRIORITY: Final = 2
LOWEST_PRIORITY: Final = 3
"""1 is the highest: while one of a class waits, none of the classes below it starts."""

TOO_LATE: Final = "the deadline passed before the answer: answer on the device, or allow more time"

_NOTHING: Final = BatchItem(b"")


class Caller(msgspec.Struct, frozen=True):
    """On whose account a request runs."""

    tenant: str = ""
    weight: float = 1.0
    """Its share of the device beside other tenants."""
    priority: int = DEFAULT_PRIORITY


ANYBODY: Final = Caller()
"""Where nobody is asked for a key."""


class Answer(msgspec.Struct, frozen=True):
    """What a ticket became, and how long its parts took, in milliseconds."""

    given: EncodedAnswer | TensorAnswer
    queue_ms: float
    inference_ms: float

    @property
    def encoded(self) -> EncodedAnswer:
        """The task's answer. ``BrokerFault`` where it was not asked for."""
        given = self.given.answer if isinstance(self.given, TensorAnswer) else self.given
        if given is None:
            raise BrokerFault("the task's answer was not asked for")
        return given

    @property
    def tensors(self) -> tuple[bytes, ...]:
        """The outputs that were asked for, in that order; see ``TensorAnswer.tensors``."""
        return self.given.tensors if isinstance(self.given, TensorAnswer) else ()


@dataclass(slots=True, eq=False)
class Ticket:
    """Admitted: it holds one place, and the bytes its body may have, until released."""

    model: ModelKey
    deadline_s: float
    """On the scheduler's clock."""
    upload_bytes: int
    caller: Caller = ANYBODY
    flow: Flow | None = None
    """Whose backlog it is in, while it uploads or waits."""
    work_ms: float = 0.0
    """What it takes of the device, in a full batch."""
    left_at_admission_ms: float = 0.0
    predicted_start_s: float = 0.0
    predicted_finish_s: float = 0.0
    """When its batch and its answer were expected, on the same clock."""
    uploaded_late: bool = False
    """Its body came after its batch should have started: what follows is not our doing."""
    probe: bool = False
    """Let in to measure T(b) anew: it is not dropped for a prediction, only when late."""
    place: Place | None = None
    """Where it stands, while it uploads or waits."""
    item: BatchItem = _NOTHING
    """What to run, once the body has arrived."""
    queued_s: float = 0.0
    outcome: asyncio.Future[Answer | NearfarError] | None = None
    """Present from then on."""

    @property
    def admitted_s(self) -> float:
        """When it was let in, on the same clock."""
        return self.deadline_s - self.left_at_admission_ms / 1e3

    @property
    def still_wanted(self) -> bool:
        """Whether anyone waits for it: the client may have left meanwhile."""
        return self.outcome is not None and not self.outcome.done()

    def settle(self, outcome: Answer | NearfarError) -> None:
        """Wake the request that waits for this, if it still does.

        Errors travel as results: a future's exception that nobody collects would be logged.
        """
        if self.outcome is not None and not self.outcome.done():
            self.outcome.set_result(outcome)

    def expire(self) -> None:
        """Its deadline has come."""
        self.settle(DeadlineExceeded(TOO_LATE))

    def left_ms(self, now_s: float) -> float:
        """Milliseconds to the deadline; negative once it has passed."""
        return (self.deadline_s - now_s) * 1e3
