"""Child processes: started, read line by line, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Child", "RelayControl", "nearfar"]

_GRACE_S = 8.0


class Child:
    """``PREFIX python ARGUMENTS`` in a session of its own; stderr goes to a log file."""

    def __init__(
        self, name: str, arguments: Sequence[str], *, logs: Path, prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._log_path = logs / f"{name}.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def read(self, timeout_s: float) -> Any:
        """The next line of stdout, as JSON. Raises ``RuntimeError`` with the end of its log."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout_s, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            tail = self._log_path.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended or took over {timeout_s:.0f} s:\n{tail}")
        return json.loads(line)

    def write(self, value: object) -> None:
        """One line of JSON to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()


class RelayControl:
    """The control port of a relay."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._file = self._socket.makefile("rwb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, word: str) -> dict[str, Any]:
        """``stats`` or ``restart``."""
        self._file.write(word.encode() + b"\n")
        self._file.flush()
        found = json.loads(self._file.readline())
        assert isinstance(found, dict)
        return found


def nearfar(*arguments: str) -> str:
    """Run a command of ours to its end; what it printed. Raises ``RuntimeError``."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nearfar {arguments[0]} failed: {done.stderr[-2000:]}")
    return done.stdout
