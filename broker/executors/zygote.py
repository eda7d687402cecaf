"""A process that has imported torch and forks workers: ``python -m broker.executors.zygote``.

::

    front process ── pipes, memory ─▶ zygote (libraries imported, one thread)
          ▲ pid, pidfd, exit status     └─ fork ─▶ worker: loads the models and serves

Importing torch takes seconds, a fork milliseconds: a worker that died is replaced in the
time its models take to load. The zygote itself loads no model and sees no request. Only a
process with one thread may fork and go on (POSIX ``fork``); where the libraries started
another one, workers are started from nothing instead.

It ends when its control socket closes, so it never outlives the front process. Workers do
not end with it: each follows its own input.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Final, NoReturn

import msgspec

__all__ = ["MAX_MESSAGE_BYTES", "Exited", "FromZygote", "Started", "main"]

MAX_MESSAGE_BYTES: Final = 4096
_PIPES: Final = 3
_DESCRIPTORS: Final = _PIPES + 1
"""Standard input, output and error of a worker, and the memory of its slots where there is any."""
_PRELOADED: Final = (
    "torch",
    "torch.export.passes",
    "torch._export.serde.serialize",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export.pt2_archive._package",
    "torch.export._trace",
    "torch.export._unlift",
    "torch.export._leakage_detection_utils",
    "torch._functorch.aot_autograd",
    "torch._export.passes.collect_tracepoints_pass",
    "torch._export.passes.add_runtime_assertions_for_constraints_pass",
    "torch.fx.experimental.validator",
    "torch.utils.serialization.config",
    "simplejpeg",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.WebPImagePlugin",
    "broker.executors.program",
    "broker.executors.worker_process",
)


class Started(msgspec.Struct, frozen=True, tag="started"):
    """From the zygote: the next worker's process. A pidfd travels beside it."""

    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """From the zygote: a worker ended; negative: by that signal."""

    pid: int
    status: int


FromZygote = Started | Exited


class _Nursery:
    """The zygote's loop: start a worker on request, tell how each one ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._running: set[int] = set()

    def run(self) -> NoReturn:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready = select.select([self._control.fileno(), wake_read], [], [])[0]
            if wake_read in ready:
                os.read(wake_read, 4096)
            self._reap()
            if self._control.fileno() in ready:
                self._accept()

    def _accept(self) -> None:
        message, given, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, _DESCRIPTORS)
        if not message:
            os._exit(0)
        if len(given) < _PIPES:
            os._exit(1)
        pid = _fork_worker(self._control, given) if _may_fork() else _start_worker(given)
        for descriptor in given:
            os.close(descriptor)
        self._running.add(pid)
        # Nobody but this process reaps it, so its number is still its own here.
        handle = os.pidfd_open(pid)
        self._tell(Started(pid), [handle])
        os.close(handle)

    def _reap(self) -> None:
        for pid in tuple(self._running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._running.discard(pid)
                self._tell(Exited(pid, os.waitstatus_to_exitcode(status)), [])

    def _tell(self, message: FromZygote, descriptors: list[int]) -> None:
        with contextlib.suppress(OSError):  # the front process ended: so will this one
            socket.send_fds(self._control, [msgspec.msgpack.encode(message)], descriptors)


def _may_fork() -> bool:
    return sum(1 for _ in Path("/proc/self/task").iterdir()) == 1


def _fork_worker(control: socket.socket, given: list[int]) -> int:
    """Fork; the child never returns from here."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        os.setsid()
        for target, descriptor in enumerate(given):  # in this order none is overwritten unread
            os.dup2(descriptor, target)
        os.closerange(len(given), max(*given, 64) + 1)
        from broker.executors import worker_process

        worker_process.main(_PIPES if len(given) > _PIPES else None)
    finally:
        os._exit(1)


def _start_worker(given: list[int]) -> int:
    """The same worker in a fresh interpreter."""
    memory = given[_PIPES:]
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.executors.worker_process", *map(str, memory)],
        stdin=given[0],
        stdout=given[1],
        stderr=given[2],
        start_new_session=True,
        pass_fds=memory,
    )
    process.returncode = 0  # reaped by the nursery, not by its Popen
    return process.pid


def _preload() -> None:
    """Import what every worker needs; what is missing, the worker reports by itself."""
    for name in _PRELOADED:
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the workers then leave the shared pages alone


def main() -> NoReturn:
    """Serve the control socket whose number is the argument, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    _Nursery(control).run()


if __name__ == "__main__":
    main()
