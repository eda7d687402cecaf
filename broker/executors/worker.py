"""Models in a process of their own, which may crash or hang without taking the broker along.

One child a device, started with ``python -m broker.executors.worker_process``, spoken to in
``frames`` over its standard input and output. A supervisor task starts it again whenever it
ends; the batch it took along fails with ``WorkerLost``, which callers may retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence

from broker.executors import frames
from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
)
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import (
    ModelLoadError,
    WireError,
    WorkerLost,
    error_from_code,
)

__all__ = ["WorkerExecutor"]

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 10.0
_MAX_LOG_LINE_BYTES = 2048
_FAREWELL_S = 1.0
_PIPE_BYTES = 2**20  # what an unprivileged user may ask for


class WorkerExecutor:
    """Runs batches in one supervised child process."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        self._servables = tuple(servables)
        self._options = options
        self._events = events
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._device = options.device
        self._failing = False
        self._started_s = 0.0
        self._load_s: float | None = None
        self._batches = 0
        self._images = 0
        self._restarts = 0

    async def start(self) -> None:
        """Start the child and wait until it has loaded everything."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(first), name="worker supervisor")
        try:
            await first
        except BaseException:
            await self.close()
            raise

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep one child running until cancelled; no child is left then."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            batches_before = self._batches
            try:
                async with self._child() as process:
                    await self._load(process)
                    self._ready.set()
                    self._failing = False
                    if not first.done():
                        first.set_result(None)
                    self._events("worker_ready", {"pid": process.pid, "device": self._device})
                    await process.wait()
            except Exception as error:  # of ours, or the system's (no memory, no process)
                if not first.done():
                    first.set_exception(error)
                    return
                self._failing = True
                self._events("worker_failed", {"error": type(error).__name__, "text": str(error)})
            finally:
                self._ready.clear()
            if self._batches > batches_before:
                backoff_s = _FIRST_BACKOFF_S
            self._restarts += 1
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    @contextlib.asynccontextmanager
    async def _child(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A child process that is dead and reaped when the block ends."""
        self._started_s = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "broker.executors.worker_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C for the broker is not one for the worker
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        _widen(process)
        relay = asyncio.create_task(self._relay_stderr(process), name="worker stderr")
        self._process = process
        try:
            yield process
        finally:
            code = await _end(process)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(relay, 1.0)
            self._process = None
            self._events("worker_exited", {"pid": process.pid, "exit": _exit_text(code)})

    async def _relay_stderr(self, process: asyncio.subprocess.Process) -> None:
        """What the child prints becomes events, one a line."""
        assert process.stderr is not None  # noqa: S101
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # longer than the reader's buffer: it dropped it
                continue
            if not line:
                return
            text = line[:_MAX_LOG_LINE_BYTES].decode("utf-8", "backslashreplace").rstrip()
            if text:
                self._events("worker_stderr", {"pid": process.pid, "line": text})

    async def _load(self, process: asyncio.subprocess.Process) -> None:
        """Have the child load the models. Raises what the child reports, or its death."""
        load = frames.Load(
            servables=tuple(
                frames.ServableRef(root=str(servable.root), sha256=servable.sha256)
                for servable in self._servables
            ),
            device=self._options.device,
            threads=self._options.threads,
        )
        limit_s = self._options.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await _send(process, load)
                answer = await _receive(process)
        except TimeoutError:
            raise ModelLoadError(f"the worker did not load its models in {limit_s:g} s") from None
        except (ConnectionError, asyncio.IncompleteReadError):
            code = await process.wait()
            raise ModelLoadError(
                f"the worker died while it loaded its models ({_exit_text(code)}): "
                "see worker_stderr in the log"
            ) from None
        if isinstance(answer, frames.Failed):
            raise error_from_code(answer.code, answer.detail)
        if not isinstance(answer, frames.Ready):
            raise WireError("the worker answered Load with something else than Ready")
        self._device = "cuda" if answer.device == "cuda" else "cpu"
        self._load_s = time.monotonic() - self._started_s

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch in the child. Raises ``WorkerLost`` when the child dies or hangs."""
        process = self._process
        if process is None or not self._ready.is_set():
            raise WorkerLost("the model's process is starting again: ask again shortly")
        hang_s = self._options.hang_timeout_s
        answer: frames.FromWorker = frames.Progress()
        try:
            async with asyncio.timeout(hang_s) as watchdog:
                await _send(process, frames.RunBatch(model=model, items=tuple(batch)))
                while isinstance(answer, frames.Progress):
                    answer = await _receive(process)
                    watchdog.reschedule(asyncio.get_running_loop().time() + hang_s)
        except TimeoutError:
            self._abandon(process)
            raise WorkerLost(
                f"the model gave no sign of life for {hang_s:g} s and was stopped: ask again"
            ) from None
        except (ConnectionError, asyncio.IncompleteReadError, WireError):
            self._abandon(process)
            raise WorkerLost("the model's process died during this batch: ask again") from None
        except asyncio.CancelledError:
            self._abandon(process)  # half a conversation: the next batch would read its end
            raise
        if not isinstance(answer, frames.BatchDone) or len(answer.results) != len(batch):
            self._abandon(process)
            raise WorkerLost("the model's process gave another answer than asked: ask again")
        self._batches += 1
        self._images += len(batch)
        return BatchOutcome(results=[frames.result_of(result) for result in answer.results])

    def _abandon(self, process: asyncio.subprocess.Process) -> None:
        """Kill the child; the supervisor sees it end and starts another one."""
        self._ready.clear()
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    def ready_in_s(self) -> float:
        """0 when ready; else what is left of the time that loading took before.

        Infinity before the first start, after ``close``, and when the last start failed.
        """
        if self._ready.is_set():
            return 0.0
        if self._load_s is None or self._failing or self._supervisor is None:
            return float("inf")
        elapsed_s = time.monotonic() - self._started_s
        return max(self._load_s - elapsed_s, 0.05) if self._process else self._load_s

    async def wait_ready(self) -> None:
        """Return once a child has loaded its models."""
        await self._ready.wait()

    def stats(self) -> ExecutorStats:
        """What it did so far, all children together."""
        return ExecutorStats(
            device=self._device,
            ready=self._ready.is_set(),
            batches=self._batches,
            images=self._images,
            restarts=self._restarts,
            pid=self._process.pid if self._process else None,
        )

    async def close(self) -> None:
        """Stop the supervisor and its child; both are gone when this returns."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None


def _widen(process: asyncio.subprocess.Process) -> None:
    """Let the pipe to the child hold a whole batch: 64 KiB cost a wake-up for every piece."""
    assert process.stdin is not None  # noqa: S101
    pipe = process.stdin.transport.get_extra_info("pipe")
    with contextlib.suppress(OSError):  # the user's share of pipe memory may be used up
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


async def _end(process: asyncio.subprocess.Process) -> int:
    """Let the child go by the end of its input; kill it when it does not."""
    assert process.stdin is not None  # noqa: S101
    process.stdin.close()
    try:
        async with asyncio.timeout(_FAREWELL_S):
            return await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
    return await process.wait()


async def _send(process: asyncio.subprocess.Process, message: frames.ToWorker) -> None:
    assert process.stdin is not None  # noqa: S101
    process.stdin.write(frames.encode_frame(message))
    await process.stdin.drain()


async def _receive(process: asyncio.subprocess.Process) -> frames.FromWorker:
    assert process.stdout is not None  # noqa: S101
    size = frames.frame_length(await process.stdout.readexactly(frames.HEADER_BYTES))
    return frames.decode_from_worker(await process.stdout.readexactly(size))


def _exit_text(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
