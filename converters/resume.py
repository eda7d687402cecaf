"""Finished child jobs, kept by content: what ``nearfar convert --resume DIR`` takes up again.

What is stored are a job's files and its answer, with digests, under the key of
``converters/job_keys.py``: an entry that was damaged or cut short is no entry. Proofs are
never kept: every saved file is run again.

Whoever can write to the folder decides what the next bundle holds: treat it like the source.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from converters.job_keys import JobKeys, copy_digest, writes_golden
from converters.jobs import Artifact, ConvertJob, Job, JobResult, PrepareJob, RoundJob
from edge_runtime.contract.errors import ConfigError, UnsafePath
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.contract.paths import check_relative_path

__all__ = ["DEFAULT_MAX_BYTES", "JobCache"]

DEFAULT_MAX_BYTES = 20 * 2**30

_LAYOUT = "v1"
_RECORD = "entry.json"
_MAX_RECORD_BYTES = 64 * 2**20


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    """Relative to the job's folder."""
    size_bytes: int
    sha256: str


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: str
    result: JobResult
    files: tuple[_File, ...]
    """Stored as ``0000``, ``0001`` ... beside the record."""


class JobCache:
    """A folder of finished jobs, safe for several processes and threads.

    ``get`` before a job runs, ``put`` after it: with the same ``JobCache``, which remembers
    what the inputs were before.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Open or make ``folder``. Raises ``ConfigError`` when it cannot be written."""
        self._root = folder.absolute() / _LAYOUT
        self._max_bytes = max_bytes
        self._keys = JobKeys()
        self._before: dict[bytes, str] = {}
        self._lock = threading.Lock()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            ignore = self._root.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="ascii")
            self._clean()
        except OSError as error:
            raise ConfigError(
                f"cannot write to {folder} ({error.strerror}): choose another --resume folder"
            ) from None

    def get(self, job: Job) -> JobResult | None:
        """The result of an equal job, its files put where ``job`` wants them; or None.

        ``seconds`` and ``peak_rss_bytes`` are those of the run that made it.
        """
        key = self._keys.key(job)
        if key is None:
            return None
        with self._lock:
            self._before[canonical_json(job)] = key
        folder = self._root / key
        if not folder.is_dir():
            return None
        try:
            entry = _read_record(folder / _RECORD)
            if entry is None or entry.key != key:
                raise FileNotFoundError
            self._restore(job, folder, entry)
            os.utime(folder / _RECORD)
        except FileNotFoundError:
            self._remove(folder)
            return None
        except OSError:
            return None
        return entry.result

    def put(self, job: Job, result: JobResult) -> bool:
        """Keep the files and the answer of a job that has just ended well.

        Not kept (False): errors, proofs, results whose inputs changed while the job ran,
        and what does not fit. A full disk is no error: the conversion goes on.
        """
        with self._lock:
            before = self._before.pop(canonical_json(job), None)
        if result.answer is None or result.error_code or before is None:
            return False
        if self._keys.key(job) != before:
            return False
        try:
            with self._draft() as draft:
                size = _store(before, job, result, draft)
                if size > self._max_bytes:
                    return False
                draft.rename(self._root / before)
        except OSError:  # also: another process was faster
            return False
        self._evict(keep=before)
        return True

    # The folder ----------------------------------------------------------------------------

    def _restore(self, job: Job, folder: Path, entry: _Entry) -> None:
        """Copy and check every file, then move them to their places.

        Raises ``FileNotFoundError`` for an entry that is not what its record says.
        """
        if not entry.files:
            return
        target = _home(job)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".resume-") as scratch:
            staged = []
            for number, item in enumerate(entry.files):
                copy = Path(scratch) / f"{number:04d}"
                with _open_plain(folder / f"{number:04d}") as source, copy.open("wb") as file:
                    if copy_digest(source, file) != (item.sha256, item.size_bytes):
                        raise FileNotFoundError
                staged.append((copy, _place(job, item.path)))
            for copy, place in staged:
                place.parent.mkdir(parents=True, exist_ok=True)
                copy.replace(place)

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """A folder under a lock that the system frees when this process dies."""
        draft = Path(tempfile.mkdtemp(dir=self._root, prefix="draft-"))
        lock = draft.with_suffix(".lock")
        try:
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            lock.unlink(missing_ok=True)

    def _clean(self) -> None:
        """Remove the drafts of processes that died."""
        for draft in {path.with_suffix("") for path in self._root.glob("draft-*")}:
            lock = draft.with_suffix(".lock")
            try:
                with lock.open("a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(draft, ignore_errors=True)
                    lock.unlink(missing_ok=True)
            except BlockingIOError:
                continue  # its writer lives

    def _evict(self, *, keep: str) -> None:
        """Remove the entries that were not used for the longest time, until all fits."""
        found = []
        for folder in self._root.iterdir():
            if folder.is_dir() and not folder.name.startswith("draft-"):
                try:
                    files = [entry.stat() for entry in folder.iterdir()]
                    used = (folder / _RECORD).stat().st_mtime_ns
                except OSError:
                    used, files = 0, []
                found.append((folder.name == keep, used, folder, sum(f.st_size for f in files)))
        total = sum(size for *_, size in found)
        for _, _, folder, size in sorted(found):
            if total <= self._max_bytes:
                break
            self._remove(folder)
            total -= size

    def _remove(self, folder: Path) -> None:
        """Out of sight in one step, so that no reader sees half an entry."""
        try:
            with self._draft() as draft:
                folder.rename(draft / "removed")
        except OSError:
            return


def _home(job: Job) -> Path:
    if isinstance(job, PrepareJob | ConvertJob):
        return Path(job.out_dir)
    if isinstance(job, RoundJob):
        return Path(job.out_file).parent
    return Path(tempfile.gettempdir())  # no files


def _place(job: Job, name: str) -> Path:
    """Where a stored file goes; the name comes from the record. Raises ``FileNotFoundError``."""
    if isinstance(job, RoundJob):
        return Path(job.out_file)
    if isinstance(job, PrepareJob) and name.startswith("golden/"):
        places = {f"golden/{Path(path).name}": Path(path) for path in job.golden}
        if name not in places:
            raise FileNotFoundError
        return places[name]
    try:
        check_relative_path(name)
    except UnsafePath:
        raise FileNotFoundError from None
    return _home(job) / name


def _results(job: Job, result: JobResult) -> list[tuple[str, Path]]:
    """Name and place of each file that the job left."""
    if isinstance(job, RoundJob):
        return [("weights", Path(job.out_file))]
    if isinstance(job, ConvertJob) and isinstance(result.answer, Artifact):
        root = Path(job.out_dir)
        return _below(root, root / result.answer.path)
    if isinstance(job, PrepareJob):
        files = _below(Path(job.out_dir), Path(job.out_dir))
        if writes_golden(job):
            files += [(f"golden/{Path(path).name}", Path(path)) for path in job.golden]
        return files
    return []


def _below(root: Path, place: Path) -> list[tuple[str, Path]]:
    if place.is_file():
        return [(place.relative_to(root).as_posix(), place)]
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return [(path.relative_to(root).as_posix(), path) for path in files]


def _store(key: str, job: Job, result: JobResult, draft: Path) -> int:
    """Write an entry into ``draft``; returns its bytes."""
    files = []
    for number, (name, path) in enumerate(_results(job, result)):
        with path.open("rb") as source, (draft / f"{number:04d}").open("wb") as copy:
            sha256, size = copy_digest(source, copy)
        files.append(_File(path=name, size_bytes=size, sha256=sha256))
    body = msgspec.json.encode(_Entry(key=key, result=result, files=tuple(files)))
    record = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    (draft / _RECORD).write_bytes(record)
    return sum(item.size_bytes for item in files) + len(record)


def _read_record(path: Path) -> _Entry | None:
    """None for a record that is not whole, or of another nearfar."""
    with _open_plain(path) as file:
        digest, _, body = file.read(_MAX_RECORD_BYTES).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        return msgspec.json.decode(body, type=_Entry)
    except msgspec.DecodeError:
        return None


def _open_plain(path: Path) -> BinaryIO:
    """Open a regular file, never a link or pipe. Raises ``FileNotFoundError``."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise FileNotFoundError
    return path.open("rb")
