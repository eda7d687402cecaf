"""Write a decision log: append-only, bounded, off the request's path.

``DecisionLog`` takes entries from any thread at the cost of a queue's ``put``. A thread of
its own, which sleeps while there is nothing to do, encodes and writes them, whole lines in
one ``write``. A crash tears at most the last line; the next writer marks it. When the disk
refuses, entries are lost and counted, and no request fails for it.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.log.entries import MAX_LINE_BYTES, LogEntry
from edge_runtime.log.lines import Lost, PolicyLine, Resumed, encode

__all__ = ["DecisionLog"]

_log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES: Final = 8 * 2**20
MIN_MAX_BYTES: Final = 2**16
_MAX_WAITING: Final = 4096
_BATCH: Final = 256
_PREFACE_BYTES: Final = 256
"""At most what ``_preface`` says."""


class DecisionLog:
    """One JSON line for each request, in a file of its own user's (mode 0600).

    Args:
        path: appended to; made when it is not there. One writer at a time.
        max_bytes: the file is renamed to ``path.1`` before it grows beyond (64 KiB or more).
        keep: how many such older files stay, 0 to 99; so all take at most
            ``(keep + 1) * max_bytes``.
        labels: keep the label of each answer too.

    Raises:
        ConfigError: an argument makes no sense, the file cannot be opened, or another writer
            has it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        keep: int = 3,
        labels: bool = False,
    ) -> None:
        if max_bytes < MIN_MAX_BYTES:
            raise ConfigError(f"max_bytes of a log must be at least {MIN_MAX_BYTES}")
        if not 0 <= keep <= 99:
            raise ConfigError(f"keep must be 0 to 99, not {keep}")
        self.labels = labels
        self._worker = _Worker(Path(path).absolute(), max_bytes, keep)
        # Also runs when the object is dropped, and when the program ends.
        self._finalizer = weakref.finalize(self, self._worker.stop)

    @property
    def path(self) -> Path:
        """The file being written."""
        return self._worker.path

    @property
    def lost(self) -> int:
        """Entries that could not be written: the queue was full, or the disk refused."""
        return self._worker.lost

    def __call__(self, entry: LogEntry) -> None:
        """Take one entry; never blocks and never raises. After ``close`` it is lost."""
        self._worker.take(entry)

    def close(self) -> None:
        """Write what is waiting and close the file. Again: nothing happens."""
        self._finalizer()


class _Worker:
    """The file and its thread; knows nothing of the ``DecisionLog`` it outlives."""

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self.path = path
        self.lost = 0
        self._max_bytes, self._keep = max_bytes, keep
        self._queue: SimpleQueue[LogEntry | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._told_lost = 0
        self._known: set[str] = set()
        self._file, self._size = _open(path)
        self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"
        self._failed = False

    # From any thread ------------------------------------------------------------------

    def take(self, entry: LogEntry) -> None:
        """Queue it for the thread, which starts with the first one."""
        if self._thread is None:
            self._start()
        if self._stopped or self._queue.qsize() >= _MAX_WAITING:
            with self._lock:
                self.lost += 1
            return
        self._queue.put(entry)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="nearfar-log", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Write the rest, end the thread, close the file."""
        with self._lock:
            self._stopped = True
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join()
        os.close(self._file)

    # In the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            entries = [self._queue.get()]
            with suppress(Empty):
                while len(entries) < _BATCH:
                    entries.append(self._queue.get_nowait())
            going = None not in entries
            try:
                self._write([entry for entry in entries if entry is not None])
            except Exception:  # a broken entry must not end the log
                _log.exception("the decision log failed")

    def _write(self, entries: list[LogEntry]) -> None:
        for entry in entries:
            try:
                line = encode(entry)
            except Exception as error:  # a policy's own numbers
                self._lose(1, f"{type(error).__name__}: {error}")
                continue
            policy = PolicyLine.of(entry.policy)
            full = encode(policy)
            most = min(MAX_LINE_BYTES, self._max_bytes - len(full) - _PREFACE_BYTES)
            if max(len(line), len(full)) > most:
                self._lose(1, f"an entry has more than {most} bytes")
                continue
            head = b"" if policy.id in self._known else full
            needed = len(head) + len(line) + _PREFACE_BYTES
            if self._size and self._size + needed > self._max_bytes:
                self._rotate()
                head = full
            if self._append(self._preface() + head + line):
                self._known.add(policy.id)

    def _preface(self) -> bytes:
        """What happened since the last line that could be written."""
        said = b"\n" + encode(Resumed()) if self._torn else b""
        missing = self.lost - self._told_lost
        return said + (encode(Lost(count=missing)) if missing else b"")

    def _append(self, data: bytes) -> bool:
        missing = self.lost
        try:
            written = os.write(self._file, data)
        except OSError as error:
            self._lose(1, error.strerror or str(error))
            return False
        self._size += written
        if written < len(data):  # the disk is full
            self._torn = True
            self._lose(1, "the disk is full")
            return False
        self._torn, self._told_lost, self._failed = False, missing, False
        return True

    def _lose(self, count: int, why: str) -> None:
        with self._lock:
            self.lost += count
        if not self._failed:  # once, not for each request
            _log.warning("the decision log %s loses entries: %s", self.path, why)
        self._failed = True

    def _rotate(self) -> None:
        """``path`` becomes ``path.1``, which becomes ``path.2``; the oldest goes."""
        try:
            for number in range(self._keep, 0, -1):
                older = self._numbered(number - 1)
                if older.exists():
                    older.replace(self._numbered(number))
            self.path.unlink(missing_ok=True)
            fresh, size = _open(self.path)
        except (OSError, ConfigError) as error:
            _log.warning("the decision log %s cannot be rotated: %s", self.path, error)
            with suppress(OSError):  # bounded all the same
                os.ftruncate(self._file, 0)
            self._size = 0
        else:
            os.close(self._file)
            self._file, self._size = fresh, size
        self._torn = False
        self._known.clear()

    def _numbered(self, number: int) -> Path:
        return self.path if number == 0 else self.path.with_name(f"{self.path.name}.{number}")


def _open(path: Path) -> tuple[int, int]:
    """A descriptor to append to, locked for this process, and the file's size."""
    try:
        descriptor = os.open(
            path,
            os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC,
            0o600,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot write the decision log {path}: {error.strerror}: choose another file"
        ) from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path} is not a regular file: choose another one for the log")
        _lock(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, info.st_size


def _lock(descriptor: int, path: Path) -> None:
    """One writer for each file: two would tear each other's rotation."""
    try:
        import fcntl
    except ImportError:  # a system without it has no second writer's protection
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"another runtime writes the decision log {path}: give each its own file"
        ) from None
