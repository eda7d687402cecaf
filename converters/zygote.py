"""Start jobs without importing their libraries anew: one process imports, and forks.

::

    supervisor ── job, log, progress ──▶ zygote (libraries imported, still one thread)
                                           └─ fork ─▶ child: runs the job and ends

A converter's imports take seconds, a fork takes milliseconds, and a bundle takes dozens of
jobs. Each job still has a process of its own: what it does to its memory, its working
directory or its environment dies with it. Only a process with a single thread may fork
safely (POSIX ``fork``); a zygote whose libraries started one says so and is not used.

Zygotes end with their supervisor's process, whose end of the control socket then closes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from converters.stacks import PRELOADED

__all__ = ["Forked", "Zygote", "ZygoteLost", "find_zygote"]

_MAX_MESSAGE_BYTES: Final = 128 * 1024
_READY: Final = b"ready"
_KILL: Final = b"kill"


class ZygoteLost(Exception):
    """The zygote ended, or may not fork, before the job began: start the job without it."""


# The supervisor's side --------------------------------------------------------------------


class Forked:
    """A child of a zygote, with the part of ``subprocess.Popen`` that supervisors use."""

    def __init__(self, zygote: Zygote, line: socket.socket) -> None:
        self._zygote = zygote
        self._line = line
        self._lock = threading.Lock()
        self.pid = 0
        """0: not yet forked."""
        self.returncode: int | None = None
        self.lost = False
        """The zygote ended before it forked."""

    def poll(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""
        with self._lock:
            while self.returncode is None and select.select([self._line], [], [], 0)[0]:
                said = self._line.recv(64)
                if not said:
                    self.lost = self.pid == 0
                    self.returncode = -signal.SIGKILL
                elif self.pid == 0:
                    self.pid = int(said)
                else:
                    self.returncode = int(said)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises ``subprocess.TimeoutExpired``."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.poll()
            if status is not None:
                return status
            left_s = None if end_s is None else end_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise subprocess.TimeoutExpired("job", timeout or 0.0)
            select.select([self._line], [], [], left_s)

    def kill(self) -> None:
        """End it now; the zygote does it, which knows that the process is still its child."""
        with contextlib.suppress(OSError):
            self._line.send(_KILL)
        self._zygote.end_unless_ready()

    def close(self) -> None:
        """Free the line to the zygote."""
        self._line.close()


class Zygote:
    """One process with ``modules`` imported, in that order."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "converters.zygote", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # OpenBLAS, in numpy, starts its threads when it is imported.
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
            )
        finally:
            theirs.close()

    @property
    def alive(self) -> bool:
        """Whether jobs can be handed to it."""
        return self._process.poll() is None

    def end_unless_ready(self) -> None:
        """Do not wait for imports that nobody needs any longer."""
        if not self._ready and not select.select([self._control], [], [], 0)[0]:
            self._process.kill()

    def close(self) -> None:
        """End it; children that still run end as their supervisor's death would end them."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def spawn(
        self,
        job: Path,
        result: Path,
        *,
        environment: Mapping[str, str],
        log_fd: int,
        progress_fd: int,
    ) -> Forked:
        """Fork a child for one job; it may wait for the zygote's imports.

        Raises ``ZygoteLost``.
        """
        message = json.dumps(
            {"job": str(job), "result": str(result), "environment": dict(environment)}
        ).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if len(message) > _MAX_MESSAGE_BYTES:
                raise ZygoteLost
            try:
                socket.send_fds(self._control, [message], [log_fd, progress_fd, theirs.fileno()])
            except OSError as error:
                raise ZygoteLost from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._ready = self._ready or bool(select.select([self._control], [], [], 0)[0])
        return Forked(self, ours)


_zygotes: dict[tuple[str, ...], Zygote] = {}
_zygotes_lock = threading.Lock()
_KEYED: Final = ("OMP_NUM_THREADS", "PYTHONPATH", "PATH", "KERAS_BACKEND")
"""Variables that are read at import; the others are set anew in each child."""


def find_zygote(stack: str, environment: Mapping[str, str]) -> Zygote | None:
    """This process's zygote of a stack, started if need be; None where there can be none."""
    if sys.platform != "linux" or stack not in PRELOADED:
        return None  # elsewhere system libraries start threads, or there is no such socket
    key = (stack, *(environment.get(name, "") for name in _KEYED))
    with _zygotes_lock:
        known = _zygotes.get(key)
        if known is None:
            known = _zygotes[key] = Zygote(PRELOADED[stack], environment)
        return known if known.alive else None  # it would end again, for the same reason


# The zygote's side ------------------------------------------------------------------------


class _Nursery:
    """The zygote's loop: fork on request, tell pid and exit status, kill on request."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines: dict[int, socket.socket] = {}
        """pid -> line to its supervisor."""

    def run(self) -> NoReturn:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            lines = {line.fileno(): pid for pid, line in self._lines.items()}
            ready = select.select([self._control.fileno(), wake_read, *lines], [], [])[0]
            if wake_read in ready:
                os.read(wake_read, 4096)
            for fileno in ready:
                if fileno in lines:
                    self._kill(lines[fileno])
            self._reap()
            if self._control.fileno() in ready:
                self._accept()

    def _accept(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE_BYTES, 3)
        if not message:
            for pid in self._lines:  # nobody waits for their results
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        log_fd, progress_fd, line_fd = descriptors
        line = socket.socket(fileno=line_fd)
        pid = os.fork()
        if pid == 0:
            self._become_job(json.loads(message), log_fd, progress_fd, line)
        os.close(log_fd)
        os.close(progress_fd)
        self._lines[pid] = line
        with contextlib.suppress(OSError):
            line.send(str(pid).encode())

    def _kill(self, pid: int) -> None:
        """Asked for, or nobody listens any longer; it is still ours, so the pid is its own."""
        line = self._lines[pid]
        with contextlib.suppress(OSError):
            line.recv(64)
        os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        for pid in list(self._lines):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                line = self._lines.pop(pid)
                with contextlib.suppress(OSError):
                    line.send(str(os.waitstatus_to_exitcode(status)).encode())
                line.close()

    def _become_job(
        self, message: dict[str, object], log_fd: int, progress_fd: int, line: socket.socket
    ) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, _interrupt)
            for other in (self._control, line, *self._lines.values()):
                other.close()
            os.dup2(log_fd, 1)
            os.dup2(log_fd, 2)
            environment = message["environment"]
            assert isinstance(environment, dict)  # noqa: S101  # what spawn sends
            os.environ.clear()
            os.environ.update(environment)
            os.environ["NEARFAR_PROGRESS_FD"] = str(progress_fd)
            job, result = Path(str(message["job"])), Path(str(message["result"]))
            os.chdir(job.parent)
            from converters.worker import work

            work(job, result)
        finally:
            os._exit(70)  # EX_SOFTWARE: nothing but work() ends a job


_interrupt = signal.getsignal(signal.SIGINT)


def _threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def main() -> NoReturn:
    """``python -m converters.zygote CONTROL_FD MODULE...``."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if _threads() != 1:
        os._exit(0)  # fork would copy locks that no thread will ever release
    gc.collect()
    gc.freeze()  # collections in children do not touch, so not copy, these pages
    control.send(_READY)
    _Nursery(control).run()


if __name__ == "__main__":
    main()
