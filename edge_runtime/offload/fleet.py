"""Several brokers: each request goes to the better of two that are drawn at random.

Power of two choices (Mitzenmacher, IEEE TPDS 12(10), 2001): a device that always took the
best one would, with all others, flood it until the next news of its queue. What is compared
is the queue delay that the brokers publish (HINT frames, ``X-Queue-Delay-Ms``, ``GET
/v1/load``) plus the measured round trip. Each broker has its own session, breaker and
estimates; one that is broken, draining or refuses is not drawn. A request whose broker fails
is sent to another one while there is time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from edge_runtime.contract.errors import (
    BrokerFault,
    CircuitOpen,
    LabelsMismatch,
    ModelNotFound,
    NetworkUnreachable,
    Overloaded,
    Unauthorized,
    WireError,
    WorkerLost,
)
from edge_runtime.offload.loop import LoopThread
from edge_runtime.offload.transport import UploadReceipt
from edge_runtime.offload.uplink import CloudAnswer, Uplink
from edge_runtime.policies.base import CloudOutlook, LinkOutlook
from edge_runtime.results import BrokerStatus

__all__ = ["Chosen", "Fleet"]

_OTHERS_MAY_DO: Final = (
    BrokerFault,
    CircuitOpen,
    LabelsMismatch,
    ModelNotFound,
    NetworkUnreachable,
    Overloaded,
    Unauthorized,
    WireError,
    WorkerLost,
)
_CHOICES: Final = 2
_T = TypeVar("_T")


class Fleet:
    """Owns ``uplinks`` and their ``thread``. ``random`` gives floats in [0, 1)."""

    def __init__(
        self, uplinks: Sequence[Uplink], thread: LoopThread, random: Callable[[], float]
    ) -> None:
        self._uplinks = tuple(uplinks)
        self._thread = thread
        self._random = random
        self._refreshing: set[asyncio.Task[None]] = set()

    # As an Uplink -------------------------------------------------------------------------

    @property
    def uploads(self) -> int:
        """Begun, to any of them."""
        return sum(uplink.uploads for uplink in self._uplinks)

    @property
    def uploaded_bytes(self) -> int:
        """Sent, to any of them."""
        return sum(uplink.uploaded_bytes for uplink in self._uplinks)

    @property
    def model_sha256(self) -> str | None:
        """Of the broker that looks best now."""
        return self._best().model_sha256

    def outlook(
        self, link_type: str, own_bytes: int = 0, network_id: str | None = None
    ) -> tuple[LinkOutlook, CloudOutlook]:
        """To the broker that looks best now."""
        return self._best().outlook(link_type, own_bytes, network_id)

    def status(self) -> BrokerStatus:
        """Of the broker that looks best now."""
        return self._best().status()

    def statuses(self) -> tuple[BrokerStatus, ...]:
        """Of all of them."""
        return tuple(uplink.status() for uplink in self._uplinks)

    def submit(
        self,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt | None = None,
    ) -> Future[CloudAnswer]:
        """By a broker that is chosen now: see ``Uplink.submit``."""
        return self.choose().submit(body, media_type, deadline_s, receipt)

    def prewarm(self, *, forced: bool = False) -> Future[bool]:
        """Connect to all of them; the future tells whether an upload could start now."""
        try:
            return self.spawn(self._prewarm_all(forced))
        except NetworkUnreachable:  # being closed
            answer: Future[bool] = Future()
            answer.set_result(False)
            return answer

    def pick(self, url: str | None) -> Uplink:
        """The broker of this URL, or a chosen one when it is not there."""
        return next((uplink for uplink in self._uplinks if uplink.url == url), self.draw())

    def spawn(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """As ``Uplink.spawn``."""
        return self._uplinks[0].spawn(work)

    def close(self) -> None:
        """Cancel what runs, close every connection, end the thread. Twice is harmless."""
        self._thread.close(self._aclose)

    # Choices ------------------------------------------------------------------------------

    def choose(self) -> Chosen:
        """The way of one request."""
        return Chosen(self, self.draw())

    def draw(self, without: Collection[Uplink] = ()) -> Uplink:
        """The better of two, of those that can be used; of all the others when none can.

        ``without`` may not hold all of them.
        """
        left = [uplink for uplink in self._uplinks if uplink not in without]
        usable = [uplink for uplink in left if uplink.usable] or left
        drawn = []
        for _ in range(min(_CHOICES, len(usable))):
            drawn.append(usable.pop(int(self._random() * len(usable))))
        return min(drawn, key=lambda uplink: uplink.expected_ms())

    def _best(self) -> Uplink:
        return min(self._uplinks, key=lambda uplink: (not uplink.usable, uplink.expected_ms()))

    # In the event loop --------------------------------------------------------------------

    async def offload(
        self,
        chosen: Chosen,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt,
    ) -> CloudAnswer:
        """By the chosen broker, or by the next one when it fails and there is time."""
        self._refresh()
        tried: list[Uplink] = []
        while True:
            tried.append(chosen.uplink)
            try:
                return await chosen.uplink.offload(body, media_type, deadline_s, receipt)
            except _OTHERS_MAY_DO:
                left = [uplink for uplink in self._uplinks if uplink not in tried]
                late = time.monotonic() >= deadline_s
                if late or not any(uplink.usable for uplink in left):
                    raise
                receipt.reset()
                chosen.uplink = self.draw(tried)

    def _refresh(self) -> None:
        """News of all of them, in the background: only while images are uploaded."""
        for uplink in self._uplinks:
            task = asyncio.create_task(uplink.refresh())
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _prewarm_all(self, forced: bool) -> bool:
        warming = [uplink.prewarm(forced=forced) for uplink in self._uplinks]
        found = await asyncio.gather(*map(asyncio.wrap_future, warming), return_exceptions=True)
        return any(ready is True for ready in found)

    def keep(self) -> None:
        """As ``Uplink.keep``."""
        for uplink in self._uplinks:
            uplink.keep()

    async def _aclose(self) -> None:
        await asyncio.gather(*(uplink.aclose() for uplink in self._uplinks))


class Chosen:
    """One request's broker: another one once the first has failed."""

    def __init__(self, fleet: Fleet, uplink: Uplink) -> None:
        self._fleet = fleet
        self.uplink = uplink

    @property
    def model_sha256(self) -> str | None:
        """As ``Uplink``."""
        return self.uplink.model_sha256

    def outlook(
        self, link_type: str, own_bytes: int = 0, network_id: str | None = None
    ) -> tuple[LinkOutlook, CloudOutlook]:
        """As ``Uplink``."""
        return self.uplink.outlook(link_type, own_bytes, network_id)

    def submit(
        self,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt | None = None,
    ) -> Future[CloudAnswer]:
        """As ``Uplink``, and on to another broker when this one fails."""
        work = self._fleet.offload(self, body, media_type, deadline_s, receipt or UploadReceipt())
        try:
            return self._fleet.spawn(work)
        except NetworkUnreachable as error:
            refused: Future[CloudAnswer] = Future()
            refused.set_exception(error)
            return refused

    def prewarm(self, *, forced: bool = False) -> Future[bool]:
        """As ``Uplink``."""
        return self.uplink.prewarm(forced=forced)

    def pick(self, url: str | None) -> Uplink:
        """As ``Fleet``."""
        return self._fleet.pick(url)
