"""Child processes that never outlive their parent's block.

Each child leads a process group of its own, so that stopping it also stops what it
started, and a Ctrl-C reaches the parent alone, which then stops all in order. Everything a
child prints goes to a log file; the last line is what its failure is reported with.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from edge_runtime.contract.errors import NearfarError, error_from_code

__all__ = ["Child", "Children"]

_MAX_LINE_BYTES: Final = 1 << 20
_GRACE_S: Final = 8.0
_LAST_WORDS_S: Final = 2.0
_POLL_S: Final = 0.02
_ERROR_LINE: Final = re.compile(r"error \[([a-z_]+)\]: (.*)")


class Child:
    """One running child. Its stdout is read here when it was started with ``lines``."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        log_path: Path,
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.process = process
        self.log_path = log_path
        self._say = say
        self._last_line = ""
        self._error_line = ""
        stream = process.stderr or process.stdout
        assert stream is not None  # noqa: S101  # always piped
        self._logging = asyncio.create_task(self._log(stream))

    async def _log(self, stream: asyncio.StreamReader) -> None:
        with self.log_path.open("ab") as log:
            while line := await _read_line(stream):
                log.write(line)
                log.flush()
                text = line.decode("utf-8", "replace").strip()
                if text:
                    self._last_line = text
                    self._say(text)
                if _ERROR_LINE.fullmatch(text):
                    self._error_line = text

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of its stdout, to the end."""
        assert self.process.stdout is not None  # noqa: S101  # started with lines=True
        while line := await _read_line(self.process.stdout):
            yield line

    async def first_line(self, timeout_s: float) -> bytes:
        """The line that says it is ready. ``NearfarError`` when it ends or takes too long."""
        assert self.process.stdout is not None  # noqa: S101  # started with lines=True
        try:
            async with asyncio.timeout(timeout_s):
                line = await _read_line(self.process.stdout)
        except TimeoutError:
            raise NearfarError(
                f"{self.name} was not ready within {timeout_s:.0f} s; log: {self.log_path}"
            ) from None
        if not line:
            await self.wait()
            raise self.failure()
        return line

    async def wait(self) -> int:
        """Its exit status, once what it printed is in the log."""
        code = await self._exited()
        # What it started may hold its pipes open: wait for the end of them, but not long.
        await asyncio.wait((self._logging,), timeout=_LAST_WORDS_S)
        return code

    async def _exited(self) -> int:
        """Its exit status as soon as there is one.

        ``Process.wait`` would also wait for its pipes, which a grandchild may keep open.
        """
        while (code := self.process.returncode) is None:  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(_POLL_S)
        return code

    async def finish(self, accept: Sequence[int] = (0,)) -> int:
        """Wait for its end; raises its failure unless the exit status is accepted."""
        code = await self.wait()
        if code not in accept:
            raise self.failure()
        return code

    def failure(self) -> NearfarError:
        """What went wrong, in one line, with the log's path."""
        found = _ERROR_LINE.fullmatch(self._error_line)
        code, detail = found.groups() if found else ("nearfar", self._last_line or "no message")
        status = self.process.returncode
        how = f"was killed by signal {-status}" if status and status < 0 else f"failed ({status})"
        return error_from_code(code, f"{self.name} {how}: {detail}; log: {self.log_path}")

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self.process.kill()

    async def stop(self) -> None:
        """SIGTERM to its process group, SIGKILL after a grace time; waits for the end."""
        if self.process.returncode is None:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await self._exited()
        self._signal_group(signal.SIGKILL)  # also what outlived its leader
        await self._exited()
        self._logging.cancel()
        await asyncio.gather(self._logging, return_exceptions=True)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or what is left; over-long lines come in pieces."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(max(1, error.consumed))


class Children:
    """Starts children and stops all of them when the block is left, however it is left."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._children: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Shielded: a second Ctrl-C must not leave half of them running.
        stopping = asyncio.gather(*(child.stop() for child in self._children))
        while not stopping.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(stopping)

    async def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        lines: bool = False,
        say: Callable[[str], None] = lambda _text: None,
    ) -> Child:
        """Start ``python ARGUMENTS``. With ``lines``, stdout is left to ``Child.lines``."""
        log_path = self._log_folder / f"{name}.log"
        log_path.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if lines else asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_MAX_LINE_BYTES,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        child = Child(name, process, log_path, say)
        self._children.append(child)
        return child
