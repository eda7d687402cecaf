"""The folder in which a runtime keeps what shall outlive it: written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from pathlib import Path

from edge_runtime.contract.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runtimes in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderClaim", "open_folder", "remove_file", "write_atomic"]

_CLAIM_NAME = ".claim"


def open_folder(path: Path) -> Path:
    """The folder itself, made if need be, for its owner alone. Raises ``ConfigError``.

    What an interrupted write left behind is removed.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in path.glob(".new-*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use the folder {path} ({error.strerror})") from None
    return path


class FolderClaim:
    """One runtime in one folder: two would send each deferred image twice.

    A lock of the system's (flock), which ends with the process however that ends. Raises
    ``ConfigError`` where another runtime, of this process or another one, holds it. Claimed
    before anything is read there or cleaned up.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder / _CLAIM_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use the folder {folder} ({error.strerror})") from None
        self.close = weakref.finalize(self, os.close, descriptor)
        """Give it back; also when the object is dropped. Closing twice does nothing."""
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"another runtime uses the folder {folder}: close it first, or give each runtime "
                "a state folder of its own"
            ) from None
        except OSError:
            pass  # a file system without locks


def write_atomic(path: Path, data: bytes) -> None:
    """Readers, and a process after a crash, see the old file or the new one, never a part.

    The new bytes are on the disk before they get the name, and the name before this
    returns. Raises ``ConfigError`` when the disk is full or the folder is gone.
    """
    work = path.with_name(f".new-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, not a path
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path} ({error.strerror}): free some space") from None


def remove_file(path: Path) -> None:
    """Nothing is at ``path`` afterwards; on the disk, too, when this returns."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
