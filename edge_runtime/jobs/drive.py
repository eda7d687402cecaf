"""One job in the cloud, from its submission to its answer, whatever the network does.

    submit (again, under the same key, until it is known) ──▶ follow ──▶ fetch

Following is an event stream, or polling with a growing pause where there is none. Nothing
here has a deadline: what may work later is tried again until the job has ended or is
canceled. A broker that has forgotten the job gets it anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import msgspec

from edge_runtime.contract.errors import (
    JobCanceled,
    JobNotFound,
    NearfarError,
    RemoteError,
    WireError,
)
from edge_runtime.contract.jobs import JobInfo, decode_job
from edge_runtime.contract.wire import ServerTiming, parse_server_timing
from edge_runtime.jobs.store import JobRecord, StoredAnswer
from edge_runtime.jobs.wire import (
    cancel_request,
    events_of,
    events_request,
    raise_refusal,
    result_request,
    status_request,
    submit_request,
)
from edge_runtime.offload.messages import CloudReply, read_answer
from edge_runtime.offload.uplink import Uplink

__all__ = ["CloudJob"]

_SMALL_S: Final = 10.0
_LARGE_S: Final = 120.0
"""Submitting a body, or fetching an answer, over a slow link."""
_SILENT_S: Final = 40.0
"""Without a byte on the event stream: two heartbeats were missed."""
_FIRST_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 15.0
_PAUSE_FACTOR: Final = 1.6
_MAX_RESUBMISSIONS: Final = 2
_MAX_SENSELESS: Final = 5
"""Answers in a row that made no sense: a captive portal goes away, a wrong URL does not."""
_CANCEL_TRIES: Final = 3


class CloudJob:
    """Runs in the network thread.

    ``body`` reads what is submitted. ``tell`` gets each state, or the trouble there is;
    ``keep`` each new record, before it is acted on; ``answered`` the answer, before it is
    given. ``obstacle``: why it may not be submitted now; a retryable one passes.
    """

    def __init__(
        self,
        uplink: Uplink,
        record: JobRecord,
        body: Callable[[], bytes],
        *,
        tell: Callable[[JobInfo | NearfarError], None],
        keep: Callable[[JobRecord], None],
        answered: Callable[[StoredAnswer], None],
        obstacle: Callable[[], NearfarError | None] = lambda: None,
    ) -> None:
        self._uplink = uplink
        self._record = record
        self._body = body
        self._tell = tell
        self._keep = keep
        self._answered = answered
        self._obstacle = obstacle
        self._model = ""
        self._pause_s = _FIRST_PAUSE_S
        self._last_event: str | None = None
        self._seen: JobInfo | None = None
        self._resubmissions = 0
        self._senseless = 0

    async def run(self) -> tuple[CloudReply, ServerTiming]:
        """Its answer. Raises what it failed with."""
        while True:
            try:
                return await self._once()
            except _Failed as failed:
                raise failed.error from None
            except JobNotFound as error:
                if self._record.broker_job is None or self._resubmissions >= _MAX_RESUBMISSIONS:
                    raise
                self._resubmissions += 1
                await self._remember(None)
                trouble: NearfarError = error
            except WireError as error:
                self._senseless += 1
                if self._senseless >= _MAX_SENSELESS:
                    raise
                trouble = error
            except RemoteError as error:
                if not error.retryable:
                    raise
                trouble = error
            self._tell(trouble)
            await self._pause()

    async def withdraw(self) -> None:
        """Tell the broker that nobody wants it, if it can be told within a few tries."""
        for _ in range(_CANCEL_TRIES):
            try:
                if self._record.broker_job is None:  # it may have arrived all the same
                    self._obstacle = lambda: None
                    await self._submit()
                assert self._record.broker_job is not None  # noqa: S101  # _submit set it
                request = cancel_request(self._record.broker_job, self._uplink.api_key)
                raise_refusal(await self._uplink.ask(request, _SMALL_S))
            except NearfarError as error:
                if isinstance(error, JobNotFound) or not error.retryable:
                    return
                await self._pause()
            else:
                return

    async def _once(self) -> tuple[CloudReply, ServerTiming]:
        self._model = await self._uplink.model_name()
        info = await (self._submit() if self._record.broker_job is None else self._status())
        while not info.ended:
            info = await self._follow()
        if info.state == "canceled":
            raise _Failed(JobCanceled("the job was canceled at the broker: submit it again"))
        if info.failure is not None:
            raise _Failed(info.failure.as_error())
        return await self._fetch()

    async def _submit(self) -> JobInfo:
        obstacle = self._obstacle()
        if obstacle is not None:
            raise obstacle
        model = self._model or await self._uplink.model_name()
        body = await asyncio.to_thread(self._body)
        request = submit_request(
            model,
            body,
            self._record.media_type,
            self._record.id,
            self._uplink.api_key,
            self._uplink.accept,
        )
        self._uplink.uploads += 1
        self._uplink.uploaded_bytes += len(body)
        response = await self._uplink.ask(request, _LARGE_S)
        raise_refusal(response)
        info = self._heard(decode_job(response.body))
        await self._remember(info.id)
        return info

    async def _status(self) -> JobInfo:
        request = status_request(self._known_id, self._uplink.api_key)
        response = await self._uplink.ask(request, _SMALL_S)
        raise_refusal(response)
        return self._heard(decode_job(response.body))

    async def _follow(self) -> JobInfo:
        """Until it has ended, the stream has, or a pause is over."""
        request = events_request(self._known_id, self._uplink.api_key, self._last_event)
        try:
            async with aclosing(self._uplink.stream(request)) as pieces:
                events = events_of(pieces)
                while True:
                    async with asyncio.timeout(_SILENT_S):
                        event_id, info = await anext(events)
                    self._last_event = event_id or self._last_event
                    if self._heard(info).ended:
                        return info
        except (StopAsyncIteration, TimeoutError, RemoteError, WireError):
            pass  # asking again tells what is wrong
        await self._pause()
        return await self._status()

    async def _fetch(self) -> tuple[CloudReply, ServerTiming]:
        request = result_request(self._known_id, self._uplink.api_key)
        response = await self._uplink.ask(request, _LARGE_S)
        raise_refusal(response)
        reply = read_answer(response, self._model, self._uplink.expected)
        await asyncio.to_thread(self._answered, StoredAnswer.of(self._model, response))
        return reply, parse_server_timing(response.headers.get("server-timing"))

    def _heard(self, info: JobInfo) -> JobInfo:
        if info != self._seen:
            self._seen, self._pause_s = info, _FIRST_PAUSE_S
        self._senseless = 0
        if not info.ended:  # its end is told with the answer
            self._tell(info)
        return info

    async def _pause(self) -> None:
        """A growing pause, jittered over its upper half; news make it short again."""
        await asyncio.sleep(self._pause_s * (0.5 + 0.5 * random.random()))  # noqa: S311
        self._pause_s = min(self._pause_s * _PAUSE_FACTOR, _MAX_PAUSE_S)

    async def _remember(self, broker_job: str | None) -> None:
        self._record = msgspec.structs.replace(self._record, broker_job=broker_job)
        self._last_event = None
        await asyncio.to_thread(self._keep, self._record)  # images do not wait for the disk

    @property
    def _known_id(self) -> str:
        known = self._record.broker_job
        assert known is not None  # noqa: S101  # it was submitted
        return known


class _Failed(Exception):
    """The job itself ended: nothing is tried again."""

    def __init__(self, error: NearfarError) -> None:
        self.error = error
