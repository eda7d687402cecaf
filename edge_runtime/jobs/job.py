"""What an app holds of a job: its state, its result, its events."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

import msgspec

from edge_runtime.contract.errors import DeadlineExceeded, JobCanceled
from edge_runtime.contract.jobs import ENDED_STATES, JobState
from edge_runtime.results import InferenceSource, Result

__all__ = ["AsyncJob", "Job", "JobCore", "JobStatus", "Owner"]


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One job at one moment."""

    id: str
    state: JobState
    progress: float = 0.0
    """0 to 1; while it runs in the cloud, the broker's estimate."""
    place: int | None = None
    """In the broker's line: how many jobs go first."""
    runs: InferenceSource
    """Where it runs, or ran."""
    trouble: str | None = None
    """Code of the error that keeps it from going on just now; it is tried again."""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ENDED_STATES


class Owner(Protocol):
    """Who does what a job asks for."""

    def cancel(self, core: JobCore) -> None:
        """End it, here or at the broker."""

    def forget(self, core: JobCore) -> None:
        """Remove what is kept of it."""


class JobCore:
    """The state behind a ``Job`` or ``AsyncJob``; any thread may read and change it."""

    def __init__(self, owner: Owner, status: JobStatus) -> None:
        self.owner = owner
        self.done: Future[Result] = Future()
        self.done.set_running_or_notify_cancel()  # only tell() and the two below end it
        self._lock = threading.Lock()
        self._status = status
        self._changes = 0
        self._watchers: set[Callable[[], None]] = set()

    @property
    def status(self) -> JobStatus:
        """As last heard."""
        return self._status

    def snapshot(self) -> tuple[int, JobStatus]:
        """The number of changes so far, and the state after them."""
        with self._lock:
            return self._changes, self._status

    def tell(self, status: JobStatus) -> None:
        """It changed; nothing changes after its end."""
        with self._lock:
            if self._status.ended or status == self._status:
                return
            self._status = status
            self._changes += 1
            watchers = tuple(self._watchers)
        for wake in watchers:
            wake()

    def succeed(self, result: Result) -> None:
        """It has its result."""
        if not self.done.done():
            with contextlib.suppress(Exception):  # another thread was first
                self.done.set_result(result)
        self._end("done", result.inference_source)

    def fail(self, error: BaseException) -> None:
        """It will have none."""
        if not self.done.done():
            with contextlib.suppress(Exception):  # another thread was first
                self.done.set_exception(error)
        self._end("canceled" if isinstance(error, JobCanceled) else "failed", self.status.runs)

    def _end(self, state: JobState, runs: InferenceSource) -> None:
        progress = 1.0 if state == "done" else self.status.progress
        self.tell(JobStatus(id=self.status.id, state=state, progress=progress, runs=runs))

    @contextlib.contextmanager
    def watched(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have ``wake`` called at each change, in any thread."""
        with self._lock:
            self._watchers.add(wake)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.discard(wake)


class _Handle:
    def __init__(self, core: JobCore) -> None:
        self._core = core

    @property
    def id(self) -> str:
        """The same after a restart of the app."""
        return self._core.status.id

    @property
    def progress(self) -> float:
        """0 to 1, as last heard."""
        return self._core.status.progress

    def status(self) -> JobStatus:
        """As last heard; asks nobody."""
        return self._core.status

    def cancel(self) -> None:
        """It is not wanted any more: the broker is told in the background. Harmless twice."""
        self._core.owner.cancel(self._core)

    def forget(self) -> None:
        """Remove what the device and the broker keep of it; a job that goes on is canceled."""
        self._core.owner.forget(self._core)


class Job(_Handle):
    """A job for code that blocks; ``AsyncJob`` is for event loops."""

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for its result; asking again gives it again.

        Raises:
            DeadlineExceeded: not within ``timeout_s``; the job goes on.
            JobCanceled: it was canceled.
            NearfarError: what it failed with; ``NetworkUnreachable`` when the runtime was
                closed before (the job goes on if the runtime has a state folder).
        """
        try:
            return self._core.done.result(timeout_s)
        except FutureTimeout:
            raise _not_yet(timeout_s) from None

    def events(self) -> Iterator[JobStatus]:
        """Its state now, and after each change, until it has ended. Changes may be merged."""
        woken = threading.Event()
        seen = -1
        with self._core.watched(woken.set):
            while True:
                woken.clear()
                number, status = self._core.snapshot()
                if number != seen:
                    seen = number
                    yield status
                if status.ended:
                    return
                woken.wait()


class AsyncJob(_Handle):
    """A job for event loops."""

    async def result(self, timeout_s: float | None = None) -> Result:
        """``Job.result``; cancelling the wait leaves the job alone."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(asyncio.wrap_future(self._core.done))
        except TimeoutError:
            raise _not_yet(timeout_s) from None

    async def events(self) -> AsyncIterator[JobStatus]:
        """``Job.events``."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(woken.set)

        seen = -1
        with self._core.watched(wake):
            while True:
                woken.clear()
                number, status = self._core.snapshot()
                if number != seen:
                    seen = number
                    yield status
                if status.ended:
                    return
                await woken.wait()


def _not_yet(timeout_s: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(f"the job has not ended within {timeout_s or 0:g} s: it goes on")
