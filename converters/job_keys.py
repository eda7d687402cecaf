"""Which result a child job must have: a digest of everything that decides it.

The job itself with each file replaced by its digest, nearfar's own source text, every
installed package, and the platform. Two jobs of one key have one result.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

import converters
import edge_runtime
from converters.jobs import (
    ConvertJob,
    Job,
    PrepareJob,
    RoundJob,
    SensitivityJob,
    SourceRequest,
)
from edge_runtime.contract.manifest import canonical_json

__all__ = ["JobKeys", "copy_digest", "writes_golden"]

_CHUNK = 1 << 20
_KEPT = (PrepareJob, RoundJob, SensitivityJob, ConvertJob)
_NO_PATHS = frozenset(("source", "labels", "metadata", "keep"))
"""Fields of jobs whose text is no path even if it looks like one; the source is done apart."""
# What a FILE.py may import or read: its folder is on the import path.
_SOURCE_SUFFIXES = frozenset((".py", ".json", ".toml", ".yaml", ".yml"))
_SKIPPED = frozenset(("__pycache__", "node_modules", "site-packages"))
_MAX_SOURCE_FILES = 2000


class _Uncertain(Exception):
    """Not everything that decides the result is known."""


def writes_golden(job: PrepareJob) -> bool:
    """A generator's golden inputs are results: the job writes the latents itself."""
    return job.source.task == "generation"


def copy_digest(source: BinaryIO, target: BinaryIO | None) -> tuple[str, int]:
    """Hex SHA-256 and size of ``source``, copied on the way."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest(), size


@cache
def _environment() -> list[str]:
    """The source text of converters and runtime, every installed package, the platform."""
    lines = []
    for package in (converters, edge_runtime):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{package.__name__}/{path.relative_to(root)} {digest}")
    lines += sorted({f"{one.name}=={one.version}" for one in distributions()})
    lines += [platform.python_version(), platform.system(), platform.machine()]
    return lines


class JobKeys:
    """Makes keys; remembers digests of files that did not change (by inode and times)."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, int, int, int, int], str] = {}
        self._lock = threading.Lock()

    def key(self, job: Job) -> str | None:
        """Hex SHA-256 of all that decides the job's result.

        None: a proof, or a job of which not everything is known (a file is missing, a
        source folder is too large to be read).
        """
        if not isinstance(job, _KEPT):
            return None
        try:
            material = {"job": self._material(job), "environment": _environment()}
        except (OSError, _Uncertain):
            return None
        return hashlib.sha256(canonical_json(material)).hexdigest()

    def _material(self, job: Any) -> dict[str, Any]:
        """The job with each file replaced by its digest, without where results go."""
        fields: dict[str, Any] = msgspec.to_builtins(job)
        fields["source"] = self._source(job.source)
        for name in ("out_dir", "out_file"):
            fields.pop(name, None)
        if isinstance(job, PrepareJob):
            names = [Path(path).name for path in job.golden]
            fields["golden"] = [names, [] if writes_golden(job) else fields["golden"]]
        return {
            name: value if name in _NO_PATHS else self._digested(value)
            for name, value in fields.items()
        }

    def _digested(self, value: Any) -> Any:
        """``value`` with each absolute path, also in a list, replaced by a digest."""
        if isinstance(value, list | tuple):
            return [self._digested(item) for item in value]
        if isinstance(value, str) and Path(value).is_absolute():
            return self._digest(Path(value))
        return value

    def _source(self, request: SourceRequest) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(request)
        kind, _, name = request.source.partition(":")
        file, _, attribute = request.source.rpartition(":")
        if kind == "zoo":
            fields["zoo"] = self._zoo(name)
        elif kind not in ("torchvision", "keras"):
            if file.endswith(".py"):
                fields["source"] = [self._python_folder(Path(file)), Path(file).name, attribute]
            else:
                path = Path(request.source)
                fields["source"] = [self._digest(path), path.name]
        for key in ("weights", "labels", "preprocess"):
            value = fields[key]
            if value is not None and Path(value).is_absolute():
                fields[key] = [self._digest(Path(value)), Path(value).name]
        return fields

    def _zoo(self, name: str) -> str | None:
        """Digest of its trained weights; None while they are not there."""
        from converters.zoo.weights import weights_file

        path = weights_file(name)
        return self._digest(path) if path.is_file() else None

    def _python_folder(self, file: Path) -> str:
        """Digest of all that ``file`` may import or read beside it."""
        found = []
        for folder, names, files in os.walk(file.parent):
            here = Path(folder)
            names[:] = [
                name
                for name in names
                if name not in _SKIPPED
                and not name.startswith(".")
                and not (here / name / "pyvenv.cfg").exists()
            ]
            found += [here / name for name in files if Path(name).suffix in _SOURCE_SUFFIXES]
            if len(found) > _MAX_SOURCE_FILES:
                raise _Uncertain
        lines = [f"{p.relative_to(file.parent)} {self._digest(p)}" for p in sorted(found)]
        return hashlib.sha256("\n".join([self._digest(file), *lines]).encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        """Of a file's bytes, or of the names and bytes of a folder's files."""
        if path.is_dir():
            lines = [
                f"{p.relative_to(path)} {self._digest(p)}"
                for p in sorted(path.rglob("*"))
                if p.is_file()
            ]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        info = path.stat()
        known = (str(path), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        with self._lock:
            found = self._digests.get(known)
        if found is None:
            with path.open("rb") as file:
                found = copy_digest(file, None)[0]
            with self._lock:
                self._digests[known] = found
        return found
