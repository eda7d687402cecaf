"""Trained weights in a cache folder: made once, checked at every use.

A file is named after its recipe: the source text of the modules that make it and the
versions of torch, numpy and Pillow. It carries a record (temperature, accuracy) and a digest over
record and tensors, so a damaged file is noticed and made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from converters.zoo.digits import Progress
from edge_runtime.contract.errors import BackendUnavailable, ConfigError, SourceError
from edge_runtime.contract.manifest import canonical_json

__all__ = [
    "CACHE_VARIABLE",
    "WeightsRecord",
    "cache_folder",
    "ensure_weights",
    "read_record",
    "save_weights",
    "weights_file",
]

CACHE_VARIABLE: Final = "NEARFAR_CACHE"
_METADATA_KEY: Final = "nearfar"
_RECIPE_SOURCES: Final = ("digits.py", "nets.py", "photo.py", "train.py")
_MAX_WEIGHTS_BYTES: Final = 64 * 2**20
_LOCK_POLL_S: Final = 0.2


class WeightsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured when the weights were trained."""

    name: str
    temperature: float
    test_accuracy: float
    test_photos: int


class _Sealed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    record: WeightsRecord
    sha256: str


def cache_folder() -> Path:
    """``$NEARFAR_CACHE``, or ``~/.cache/nearfar``."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "nearfar"


def weights_file(name: str) -> Path:
    """Where the weights of a zoo model lie, or will lie."""
    digest = hashlib.sha256()
    for source in _RECIPE_SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    for package in ("torch", "numpy", "pillow"):
        digest.update(f"{package}=={version(package)}\n".encode())
    return cache_folder() / "zoo" / f"{name}-{digest.hexdigest()[:16]}.safetensors"


def _digest(tensors: Mapping[str, NDArray[np.generic]], record: WeightsRecord) -> str:
    digest = hashlib.sha256(canonical_json(record))
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_weights(
    path: Path, tensors: Mapping[str, NDArray[np.generic]], record: WeightsRecord
) -> None:
    """Write tensors and record as safetensors; the file appears whole or not at all."""
    from safetensors.numpy import save

    # One key holds all: safetensors does not keep the order of several.
    sealed = _Sealed(record=record, sha256=_digest(tensors, record))
    data = save(dict(tensors), {_METADATA_KEY: canonical_json(sealed).decode()})
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_record(path: Path) -> WeightsRecord | None:
    """The record of a weights file; None when it is missing, damaged or too large."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise BackendUnavailable(
            "the digits zoo needs safetensors: pip install 'nearfar[convert]'"
        ) from None
    try:
        if path.stat().st_size > _MAX_WEIGHTS_BYTES:
            return None
        with safe_open(str(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sealed = msgspec.json.decode(text, type=_Sealed)
    except (OSError, SafetensorError, msgspec.DecodeError):
        return None
    return sealed.record if sealed.sha256 == _digest(tensors, sealed.record) else None


def ensure_weights(name: str, progress: Progress | None = None) -> tuple[Path, WeightsRecord]:
    """The checked weights file of a zoo model; trains it when it is missing or damaged.

    Two processes never train the same file at once: the second waits and reuses it.
    Raises ``ConfigError`` when the cache folder cannot be written, ``SourceError`` when
    training fails.
    """
    path = weights_file(name)
    record = read_record(path)
    if record is not None:
        return path, record
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), progress):
            record = read_record(path)
            if record is None:
                _train_in_child(name, path, progress)
                record = read_record(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write to the cache folder {path.parent} ({error.strerror}): "
            f"set {CACHE_VARIABLE} to a folder that you can write"
        ) from None
    if record is None:
        raise SourceError(f"the trained weights {path} cannot be read back: check the disk")
    return path, record


@contextmanager
def _locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the system frees it when a holder dies."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if progress is not None:
                    progress("waiting for another process that trains it", 0, 0)
                time.sleep(_LOCK_POLL_S)
        yield


def _train_in_child(name: str, path: Path, progress: Progress | None) -> None:
    """Run ``converters.zoo.train`` and pass its progress on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "converters.zoo.train", name, str(path)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as child,
    ):
        assert child.stdout is not None  # noqa: S101
        try:
            for line in child.stdout:
                if progress is not None:
                    event = json.loads(line)
                    progress(f"{event['message']} ({name})", event["done"], event["total"])
        except BaseException:
            child.terminate()
            raise
        if child.wait() != 0:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            raise SourceError(f"training {name} failed: {last}")
