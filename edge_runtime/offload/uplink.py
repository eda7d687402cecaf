"""One broker as this device sees it: asks it, learns from it, and leaves it alone in time.

The coroutines run in the event loop of one background thread, which alone changes the
state. Other threads read it through ``outlook`` and ``status``: every estimator is an
immutable value, so a reader sees a whole one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from edge_runtime.contract.errors import (
    DeadlineExceeded,
    LabelsMismatch,
    ModelNotFound,
    NetworkUnreachable,
    WireError,
)
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import ModelRef, PictureType, ServerTiming
from edge_runtime.memory import Memory
from edge_runtime.offload.contact import Contact
from edge_runtime.offload.discovery import Expected, ServedModel
from edge_runtime.offload.loop import LoopThread
from edge_runtime.offload.measurements import Measurements
from edge_runtime.offload.messages import (
    CloudReply,
    accept_header,
    predict_request,
    read_answer,
)
from edge_runtime.offload.transport import (
    HttpResponse,
    ReportsPath,
    Transport,
    UploadReceipt,
)
from edge_runtime.policies.base import CloudOutlook, LinkOutlook
from edge_runtime.results import BrokerStatus

__all__ = ["CloudAnswer", "Uplink"]

_T = TypeVar("_T")

_WARM_PAUSE_S = 1.0
_HOLD_S = 10.0


class CloudAnswer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What came back for one request."""

    answer: Answer
    model: ModelRef
    timing: ServerTiming
    total_ms: float


class Uplink(Contact):
    """The broker behind ``transport``, asked on behalf of one bundle.

    ``image_type``: how answers that are images shall come. ``url`` tells several apart.
    ``thread``: shared with others, whose owner closes it; None: its own. ``memory``: of
    networks met before; None: none is kept.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        expected: Expected,
        image_type: PictureType,
        cloud_model: str | None,
        api_key: str | None,
        link_type: str,
        random: Callable[[], float],
        url: str | None = None,
        thread: LoopThread | None = None,
        network_id: str | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(
            transport,
            expected=expected,
            cloud_model=cloud_model,
            api_key=api_key,
            measured=Measurements(link_type, network_id, memory=memory, broker=url or ""),
            random=random,
        )
        self.accept = accept_header(expected.task, image_type)
        self.uploads = 0
        self.uploaded_bytes = 0
        self._in_flight_bytes = 0
        self.url = url
        self._memory = memory
        self._thread = thread or LoopThread("nearfar-network")

    # From any thread ---------------------------------------------------------------

    def outlook(
        self, link_type: str, own_bytes: int = 0, network_id: str | None = None
    ) -> tuple[LinkOutlook, CloudOutlook]:
        """What a policy may know now; ``own_bytes``: of the asking request's own upload."""
        now = time.monotonic()
        moved = self._measured.on_link(link_type, network_id)
        if moved and isinstance(self._transport, ReportsPath):
            with suppress(RuntimeError):  # being closed
                self._thread.submit(self._transport.path_changed())
        link = self._measured.outlook(
            now,
            warm=self._connection_idle(),
            setup_round_trips=self._setup_round_trips() + (self._model is None),
            in_flight_bytes=max(0, self._in_flight_bytes - own_bytes),
        )
        held = self._health.held_error()
        cloud = msgspec.structs.replace(
            self._measured.cloud_outlook(now),
            breaker=self._health.breaker.state,
            obstacle=None if held is None else held.code,
        )
        return link, cloud

    @property
    def model_sha256(self) -> str | None:
        """Digest of the cloud model that answers for this bundle; None: not known yet."""
        model = self._model
        return None if model is None else model.sha256

    def status(self) -> BrokerStatus:
        """The same for people."""
        link, cloud = self.outlook("unknown")
        model = self._model
        return BrokerStatus(
            url=self.url,
            model=None if model is None else f"{model.name}@{model.version}",
            breaker=cloud.breaker,
            obstacle=cloud.obstacle,
            last_error=self._health.last_error,
            connection_open=self._transport.open_connections > 0,
            rate_bytes_per_s=self._measured.path.link.at(time.monotonic()).median_rate,
            rate_log_deviation=link.log_rate_deviation,
            rate_samples=link.samples,
            rtt_ms=link.rtt_ms,
            rtt_samples=self._measured.path.rtt.samples,
            queue_ms=cloud.queue_ms + cloud.tail_ms,
            inference_ms=cloud.inference_ms,
        )

    def submit(
        self,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt | None = None,
    ) -> Future[CloudAnswer]:
        """Upload one image or seed; the future ends by ``deadline_s`` (``time.monotonic``).

        It raises ``RemoteError``, ``WireError``, ``LabelsMismatch``, ``ImageError`` (the
        broker's verdict) or ``ConfigError`` (several models fit). Cancelling it withdraws the
        request; without a session, it closes the connection that it uses. ``receipt`` is
        filled in while it goes on.
        """
        receipt = receipt or UploadReceipt()
        try:
            return self._thread.submit(self.offload(body, media_type, deadline_s, receipt))
        except RuntimeError:
            refused: Future[CloudAnswer] = Future()
            refused.set_exception(NetworkUnreachable("this EdgeRuntime is being closed"))
            return refused

    def spawn(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine in the network thread; ``close`` cancels it.

        Raises ``NetworkUnreachable`` once that was called.
        """
        try:
            return self._thread.submit(work)
        except RuntimeError:
            raise NetworkUnreachable("this EdgeRuntime is being closed") from None

    def prewarm(self, *, forced: bool = False) -> Future[bool]:
        """Open a connection, measure the round trip and find the model, in the background.

        The future tells whether an upload could start now. While the breaker is open, this
        is the health request that may close it, once its back-off is over. A path that is
        ready is asked as well: that keeps the radio awake, or wakes it. Without ``forced``
        nothing happens within a second of the last time.
        """
        now = time.monotonic()
        closed = self._health.breaker.state == "CLOSED"
        # An open connection does not make a broken broker ready: it may answer errors on it.
        ready = closed and self._connection_idle() and self._model is not None
        barred = not closed and not self._health.breaker.probe_due(now)
        recent = self._warming is not None or now - self._warmed_s < _WARM_PAUSE_S
        if not barred and (forced or not recent):
            with suppress(RuntimeError):  # being closed
                return self._thread.submit(self._warm())
        answer: Future[bool] = Future()
        answer.set_result(ready and not barred)
        return answer

    def close(self) -> None:
        """Cancel what runs, close every connection, end the thread. Twice is harmless."""
        self._closing = True
        self._thread.close(self._transport.aclose)

    def keep(self) -> None:
        """Put what was learned of this network into the memory."""
        self._measured.keep()

    async def aclose(self) -> None:
        """Close every connection; the thread is somebody else's."""
        self._closing = True
        await self._transport.aclose()

    def pick(self, url: str | None) -> Uplink:  # there is only this one
        """Itself: as ``Fleet.pick``."""
        return self

    def statuses(self) -> tuple[BrokerStatus, ...]:
        """Itself alone: as ``Fleet.statuses``."""
        return (self.status(),)

    # In the event loop: one image ---------------------------------------------------

    async def offload(
        self, body: bytes, media_type: str, deadline_s: float, receipt: UploadReceipt
    ) -> CloudAnswer:
        """``submit`` as a coroutine of the network thread."""
        started = time.monotonic()
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._require_open()
                model = await self._find()
                reply, timing = await self._upload(model, body, media_type, deadline_s, receipt)
        except TimeoutError:
            waited_ms = (time.monotonic() - started) * 1e3
            late = DeadlineExceeded(f"no answer of the broker within {waited_ms:.0f} ms")
            self._health.missed(late)
            raise late from None
        return CloudAnswer(
            answer=reply.answer,
            model=reply.model,
            timing=timing,
            total_ms=(time.monotonic() - started) * 1e3,
        )

    async def _upload(
        self,
        model: ServedModel,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt,
    ) -> tuple[CloudReply, ServerTiming]:
        sent = time.monotonic()
        left_ms = int((deadline_s - sent) * 1e3)
        if left_ms < 1:
            raise TimeoutError
        window_bytes = self._measured.window_bytes(sent)
        set_up = self._setup_round_trips()
        request = predict_request(
            model.name, body, media_type, left_ms, self.api_key, self.accept, receipt
        )
        self._in_flight_bytes += len(body)
        self.uploads += 1
        self.uploaded_bytes += len(body)
        try:
            response = await self._send(request)
        except asyncio.CancelledError:  # the deadline, or the caller has its answer
            now = time.monotonic()
            self._measured.cut_off(
                len(body),
                (now - sent) * 1e3,
                round_trips=1 + set_up,
                window_bytes=window_bytes,
                now_s=now,
                receipt=receipt,
            )
            if not receipt.multiplexed and not self._closing:
                self._start_warming()  # the cut connection is closed: have another one ready
            raise
        finally:
            self._in_flight_bytes -= len(body)
            if receipt.multiplexed:  # refused or cancelled: the rest was never sent
                self.uploaded_bytes -= len(body) - receipt.sent_bytes
        timing = self._measured.learn(
            response, len(body), window_bytes, time.monotonic(), receipt=receipt
        )
        self.keep()
        if self._memory is not None:
            self._memory.save_soon()
        return self._judge(response, model), timing

    def _judge(self, response: HttpResponse, model: ServedModel) -> CloudReply:
        """The answer in ``response``, or what is wrong with it, raised and remembered."""
        try:
            self._health.check_status(response)
        except ModelNotFound:
            self._model = None
            raise
        try:
            reply = read_answer(response, model.name, self.expected)
        except LabelsMismatch as error:
            self._model = None
            self._health.refused(error, hold_s=_HOLD_S)
            raise
        except WireError as error:
            self._health.failed(error)
            raise
        self._health.answered()
        if reply.model.sha256 != model.sha256:  # updated since, and found to fit as well
            self._model = msgspec.structs.replace(
                model, version=reply.model.version, sha256=reply.model.sha256
            )
        return reply
