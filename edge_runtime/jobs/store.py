"""Jobs in the state folder: one record and one body each, so that they outlive the app."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.state import open_folder, remove_file, write_atomic

__all__ = ["JobRecord", "JobStore"]

_log = logging.getLogger(__name__)
_MAX_JOBS: Final = 256
_TTL_S: Final = 7 * 86_400.0
_MAX_RECORD_BYTES: Final = 16 * 1024
_NAME: Final = re.compile(r"[0-9a-f]{32}\Z")


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is needed to go on with a job."""

    schema_version: Literal[1] = 1
    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
    """Made by the device; the idempotency key, too."""
    bundle: str
    """Name of the bundle: an app may have several."""
    created_s: float
    """Unix seconds."""
    media_type: str
    top_k: int | None = None
    on_device: bool
    """It runs here."""
    broker: str | None = None
    """Which one has it, or shall have it."""
    broker_job: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    """Its id there, once it is submitted."""


_decoder = msgspec.json.Decoder(JobRecord)


class JobStore:
    """``folder`` None: nothing is kept, and jobs end with the runtime."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else open_folder(folder)

    @property
    def lasting(self) -> bool:
        """Whether jobs outlive the process."""
        return self._folder is not None

    def records(self, bundle: str) -> list[JobRecord]:
        """Those of a bundle, oldest first. Old ones are removed, broken ones passed over."""
        found = []
        for path in self._paths():
            try:
                record = _decoder.decode(read_bounded(path, _MAX_RECORD_BYTES))
            except (NearfarError, msgspec.DecodeError, UnicodeDecodeError) as error:
                _log.warning("%s is passed over: %s", path.name, error)
                continue
            if record.created_s < time.time() - _TTL_S:
                self.remove(record.id)
            elif record.bundle == bundle and record.id == path.stem:
                found.append(record)
        return sorted(found, key=lambda record: record.created_s)

    def add(self, record: JobRecord, body: bytes) -> None:
        """The body first: a record without one would be a job that cannot be done.

        Raises ``LimitExceeded`` when there are too many, ``ConfigError`` when the disk fails.
        """
        if self._folder is None:
            return
        if len(self._paths()) >= _MAX_JOBS:
            raise LimitExceeded(
                f"{_MAX_JOBS} jobs are in the state folder already: forget() those that are done"
            )
        write_atomic(self._folder / f"{record.id}.body", body)
        self.write(record)

    def write(self, record: JobRecord) -> None:
        """A record that changed."""
        if self._folder is not None:
            write_atomic(self._folder / f"{record.id}.json", msgspec.json.encode(record))

    def body(self, record: JobRecord) -> bytes:
        """What was submitted. Raises ``MissingFile``."""
        assert self._folder is not None  # noqa: S101  # there would be no such record
        return read_bounded(self._folder / f"{record.id}.body", limits.MAX_IMAGE_BYTES)

    def remove(self, job_id: str) -> None:
        """Both files."""
        if self._folder is not None:
            remove_file(self._folder / f"{job_id}.json")
            remove_file(self._folder / f"{job_id}.body")

    def _paths(self) -> list[Path]:
        if self._folder is None:
            return []
        return [path for path in self._folder.glob("*.json") if _NAME.match(path.stem)]
