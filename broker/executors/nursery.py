"""Worker processes as the front process sees them, and the zygote that starts them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from broker.executors import frames
from broker.executors.slots import FrontSlots, make_memory
from broker.executors.zygote import MAX_MESSAGE_BYTES, Exited, FromZygote, Started

__all__ = ["Child", "Nursery", "exit_text"]

_PIPE_BYTES = 2**20  # what an unprivileged user may ask for
_STATUS_S = 1.0
_MAX_LOG_LINE_BYTES = 2048

_decoder = msgspec.msgpack.Decoder(FromZygote)

LineSink = Callable[[int, str], None]
"""Takes the pid of a process and a line that it printed."""


class Child:
    """A running worker: frames go in and out, and its end is seen."""

    def __init__(self, pid: int, handle: int) -> None:
        self.pid = pid
        self.exit_status: int | None = None
        """Negative: the signal that ended it; None while it runs, and when nobody knows."""
        self._handle = handle
        self._slots: FrontSlots | None = None
        self._ended = asyncio.Event()
        self._told = asyncio.Event()
        asyncio.get_running_loop().add_reader(handle, self._on_end)

    async def attach(self, to_child: int, from_child: int, slots: FrontSlots | None) -> None:
        """Make streams of the pipes' ends."""
        loop = asyncio.get_running_loop()
        self._slots = slots
        with contextlib.suppress(OSError):  # the user's share of pipe memory may be used up
            fcntl.fcntl(to_child, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self.reader)
        await loop.connect_read_pipe(lambda: protocol, os.fdopen(from_child, "rb", buffering=0))
        transport, flow = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(to_child, "wb", buffering=0)
        )
        self.writer = asyncio.StreamWriter(transport, flow, None, loop)

    async def send(self, message: frames.ToWorker) -> None:
        """Raises ``ConnectionError`` when it is gone."""
        self.put(message)
        await self.drain()

    def put(self, message: frames.ToWorker) -> None:
        """Send without waiting for the pipe to take it; see ``drain``."""
        if self._slots is not None and isinstance(message, frames.RunBatch):
            message = self._slots.place(message)
        self.writer.write(frames.encode_frame(message))

    async def drain(self) -> None:
        """Wait until the pipe took what was sent. Raises ``ConnectionError`` when it is gone."""
        await self.writer.drain()

    async def receive(self) -> frames.FromWorker:
        """The next frame. Raises ``IncompleteReadError`` when it is gone, and ``WireError``."""
        size = frames.frame_length(await self.reader.readexactly(frames.HEADER_BYTES))
        message = frames.decode_from_worker(await self.reader.readexactly(size))
        if self._slots is not None and isinstance(message, frames.BatchDone):
            self._slots.answered()
        return message

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        self._ended.set()

    def status_told(self, status: int) -> None:
        """The zygote saw how it ended."""
        self.exit_status = status
        self._told.set()

    async def wait(self) -> int | None:
        """Wait for its end; its exit status, where the zygote lived to see it."""
        await self._ended.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), _STATUS_S)
        return self.exit_status

    def kill(self) -> None:
        """End it at once. Its number may be another process's by now; its pidfd never is."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def end(self, farewell_s: float) -> int | None:
        """Let it go by the end of its input, kill it when it does not, free everything."""
        self.writer.close()
        try:
            async with asyncio.timeout(farewell_s):
                await self._ended.wait()
        except TimeoutError:
            pass
        finally:
            if not self._ended.is_set():
                self.kill()
        status = await self.wait()
        os.close(self._handle)
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        self.reader.feed_eof()
        return status


class Nursery:
    """One zygote, started again when it ends, and the workers that it forked."""

    def __init__(self, printed: LineSink) -> None:
        self._printed = printed
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._children: dict[int, Child] = {}
        self._expected: asyncio.Future[Child] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._preparing = asyncio.Lock()
        self._closed = False

    async def prepare(self) -> None:
        """Start the zygote where none runs; it imports while this returns."""
        async with self._preparing:
            if self._process is None or self._process.returncode is not None:
                await self._drop()
                await self._start_zygote()

    async def _start_zygote(self) -> None:
        if self._closed:
            raise ConnectionResetError("closed")
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "broker.executors.zygote", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a Ctrl-C for the broker is not one for workers
                    # OpenBLAS, in numpy, starts its threads when it is imported.
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            except BaseException:
                control.close()
                raise
        self._control = control
        asyncio.get_running_loop().add_reader(control, self._on_message, control)
        assert self._process.stderr is not None  # noqa: S101
        self._relay(self._process.pid, self._process.stderr)

    async def spawn(self) -> Child:
        """Fork a worker; waits for the zygote's imports where it was just started.

        Raises ``ConnectionError`` when the zygote ends before it does.
        """
        await self.prepare()
        assert self._control is not None  # noqa: S101
        loop = asyncio.get_running_loop()
        inward, outward, errors, memory = os.pipe(), os.pipe(), os.pipe(), make_memory()
        kept = [inward[1], outward[0], errors[0]]
        given = [inward[0], outward[1], errors[1]] + ([] if memory is None else [memory])
        expected = self._expected = loop.create_future()
        slots: FrontSlots | None = None
        try:
            try:
                if memory is not None:
                    slots = FrontSlots(memory)
                socket.send_fds(self._control, [b"fork"], given)
            finally:
                for end in given:
                    os.close(end)
            child = await expected
        except BaseException as error:
            if slots is not None:
                slots.close()
            for end in kept:
                os.close(end)
            self._stop_zygote()  # a worker that it may still fork would be nobody's
            if isinstance(error, BrokenPipeError):
                raise ConnectionResetError("the zygote ended") from None
            raise
        finally:
            self._expected = None
        await child.attach(kept[0], kept[1], slots)
        stderr = asyncio.StreamReader()
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stderr), os.fdopen(kept[2], "rb", buffering=0)
        )
        self._relay(child.pid, stderr)
        return child

    def _on_message(self, control: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(control)
            if self._expected is not None and not self._expected.done():
                self._expected.set_exception(ConnectionResetError("the zygote ended"))
            elif self._children:  # it was good for something: be ready for the next restart
                self._keep(asyncio.create_task(self._replace_zygote(), name="zygote"))
            return
        message = _decoder.decode(data)
        if isinstance(message, Exited):
            child = self._children.pop(message.pid, None)
            if child is not None:
                child.status_told(message.status)
        elif isinstance(message, Started) and descriptors:
            child = self._children[message.pid] = Child(message.pid, descriptors[0])
            if self._expected is None or self._expected.done():
                child.kill()  # whoever asked for it has gone
            else:
                self._expected.set_result(child)

    async def _replace_zygote(self) -> None:
        if self._process is not None:
            await self._process.wait()
        with contextlib.suppress(OSError):  # the next spawn tries again, and says so
            await self.prepare()

    def _relay(self, pid: int, stderr: asyncio.StreamReader) -> None:
        self._keep(asyncio.create_task(self._relay_lines(pid, stderr), name="worker stderr"))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay_lines(self, pid: int, stderr: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stderr.readline()
            except ValueError:  # longer than the reader's buffer: it dropped it
                continue
            if not line:
                return
            text = line[:_MAX_LOG_LINE_BYTES].decode("utf-8", "backslashreplace").rstrip()
            if text:
                self._printed(pid, text)

    def _stop_zygote(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _drop(self) -> None:
        """Forget the zygote that ended, or end the one that runs."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        self._stop_zygote()
        if self._process is not None:
            await self._process.wait()
            self._process = None
        self._children.clear()

    async def close(self) -> None:
        """End the zygote, after its workers were ended."""
        self._closed = True
        async with self._preparing:
            await self._drop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=1.0)
            for task in late:
                task.cancel()


def exit_text(status: int | None) -> str:
    """How a process ended, for people."""
    if status is None:
        return "exit status unknown"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
