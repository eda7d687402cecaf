"""T(b) kept over a restart: what was learned of each model on each device, in one file.

A broker that comes back into an overload must know from the first request how long its batches
take, in the mean and in the slow cases. The file is JSON, replaced as a whole, and only ever a
head start: one that is missing, broken or of another machine is left aside, and what is
measured at the start is weighed against it like any other run.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from broker.scheduling.latency import LatencyModel
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError

__all__ = ["Profiles"]

_MAX_FILE_BYTES = 4 * 2**20
_MAX_PROFILES = 4 * limits.MAX_MODELS
_MOST_RUNS = 64

_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=3_600_000)]
_BatchSize = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BATCH)]


class _Size(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latest runs of one batch size, oldest first."""

    batch: _BatchSize
    mean_ms: _Milliseconds
    runs_ms: Annotated[tuple[_Milliseconds, ...], msgspec.Meta(min_length=1, max_length=_MOST_RUNS)]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["nearfar.latency"] = "nearfar.latency"
    schema_version: Literal[1] = 1
    profiles: Annotated[
        dict[str, Annotated[tuple[_Size, ...], msgspec.Meta(max_length=limits.MAX_BATCH)]],
        msgspec.Meta(max_length=_MAX_PROFILES),
    ] = {}


class Profiles:
    """The file ``latency.json`` in the folder ``state``."""

    def __init__(self, state: Path) -> None:
        self._path = state / "latency.json"
        self._known: dict[str, tuple[_Size, ...]] = {}

    def read(self) -> str | None:
        """Take in what is there; why not, where it is of no use.

        Raises ``ConfigError`` when the folder cannot be made or read.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot use {self._path}: {error.strerror}") from None
        if len(data) > _MAX_FILE_BYTES:
            return f"{self._path} has more than {_MAX_FILE_BYTES} bytes"
        try:
            self._known = msgspec.json.decode(data, type=_Document).profiles
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return f"{self._path} makes no sense: {error}"
        return None

    def recall(self, name: str) -> LatencyModel | None:
        """What was learned under this name, as runs of long ago; None: nothing."""
        sizes = self._known.get(name)
        if not sizes:
            return None
        model = LatencyModel()
        for size in sizes:
            model.restore(size.batch, size.mean_ms, size.runs_ms)
        return model

    def write(self, learned: Mapping[str, LatencyModel]) -> None:
        """Replace the file; what it held under other names stays. Raises ``OSError``."""
        for name, model in learned.items():
            sizes = tuple(
                _Size(batch=batch, mean_ms=mean_ms, runs_ms=runs_ms)
                for batch, mean_ms, runs_ms in model.runs()
            )
            if sizes:
                self._known.pop(name, None)
                self._known[name] = sizes
        while len(self._known) > _MAX_PROFILES:  # the longest unused ones go
            del self._known[next(iter(self._known))]
        data = msgspec.json.encode(_Document(profiles=self._known))
        descriptor, draft = tempfile.mkstemp(prefix=".latency.", dir=self._path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(draft).replace(self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
            raise
