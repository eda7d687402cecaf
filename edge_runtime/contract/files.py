"""Folders that a manifest describes: read within bounds, verify, write atomically."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ConfigError,
    DigestMismatch,
    LimitExceeded,
    ManifestError,
    MissingFile,
    UnlistedFile,
    UnsafePath,
)
from edge_runtime.contract.manifest import FileEntry, Labels, labels_digest

__all__ = [
    "atomic_directory",
    "file_entries",
    "hash_file",
    "read_bounded",
    "read_labels",
    "verify_tree",
]

_CHUNK = 1 << 20


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most ``max_bytes``. ``MissingFile``, ``LimitExceeded``."""
    try:
        # Without O_NONBLOCK a named pipe would wait here for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor, not a path
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MissingFile(f"{path} is not a regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise MissingFile(f"cannot read {path}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise LimitExceeded(f"{path} has more than {max_bytes} bytes")
    return data


def hash_file(path: Path) -> tuple[str, int]:
    """Hex SHA-256 and size of a file, streamed."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _walk(root: Path) -> Iterator[str]:
    """Relative POSIX paths of everything below ``root`` that is no folder."""
    for folder, names, files in os.walk(root, followlinks=False):
        for name in [*files, *(n for n in names if (Path(folder) / n).is_symlink())]:
            yield (Path(folder) / name).relative_to(root).as_posix()


def file_entries(
    root: Path, *, exclude: Iterable[str] = (), no_ship: Iterable[str] = ()
) -> tuple[FileEntry, ...]:
    """An entry for each file below ``root``, sorted by path.

    ``exclude``: relative paths to leave out; ``no_ship``: path prefixes marked
    ``ship: false``.
    """
    skip = set(exclude)
    private = tuple(no_ship)
    entries = []
    for relative in sorted(_walk(root)):
        if relative in skip:
            continue
        sha256, size = hash_file(root / relative)
        ship = not relative.startswith(private) if private else True
        entries.append(FileEntry(path=relative, size_bytes=size, sha256=sha256, ship=ship))
    return tuple(entries)


def verify_tree(root: Path, files: Iterable[FileEntry], *, manifest_name: str) -> None:
    """Check that ``root`` holds exactly ``files`` and its manifest, byte for byte.

    Raises ``MissingFile``, ``UnlistedFile``, ``UnsafePath`` (a symbolic link or device)
    or ``DigestMismatch``, each naming the file.
    """
    listed = {entry.path: entry for entry in files}
    present = set(_walk(root))
    extra = sorted(present - set(listed) - {manifest_name})
    if extra:
        raise UnlistedFile(f"{extra[0]!r} is not listed in {manifest_name}: remove it")
    for path, entry in listed.items():
        file = root / path
        try:
            info = file.lstat()
        except OSError:
            raise MissingFile(
                f"{path!r} is listed in {manifest_name} and is not there: "
                "copy the whole folder again"
            ) from None
        if not stat.S_ISREG(info.st_mode):
            raise UnsafePath(f"{path!r} is a link or device, not a regular file")
        if info.st_size != entry.size_bytes:
            raise DigestMismatch(
                f"{path!r} has {info.st_size} bytes, {entry.size_bytes} are recorded: "
                "the copy is damaged or was changed"
            )
        sha256, _ = hash_file(file)
        if sha256 != entry.sha256:
            raise DigestMismatch(
                f"{path!r} has other bytes than recorded: the copy is damaged or was changed"
            )


def read_labels(root: Path, labels: Labels) -> tuple[str, ...]:
    """The class names of a verified folder. Raises ``ManifestError``."""
    data = read_bounded(root / labels.path, limits.MAX_LABELS_BYTES)
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise ManifestError(f"{labels.path} is not UTF-8") from None
    if lines and lines[-1] == "":
        lines.pop()
    if len(lines) != labels.count or labels_digest(lines) != labels.sha256:
        raise ManifestError(f"{labels.path} does not hold the {labels.count} recorded labels")
    return tuple(lines)


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder that becomes ``target`` only when the block ends well.

    It lies beside the target (one file system) under a hidden name; on an error it is
    removed and ``target`` stays as it was. Raises ``ConfigError`` when ``target`` exists,
    is no empty folder, and ``replace`` is not set.
    """
    if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists: choose another output, or pass --force")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            old = work.with_name(work.name + ".old")
            target.rename(old)
            try:
                work.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
