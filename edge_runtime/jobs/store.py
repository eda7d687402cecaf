"""Jobs in the state folder, so that they outlive the app: record, body, and answer of each.

    ID.body    written first: a record without one would be a job that cannot be done
    ID.json    the record; from here on the job is accepted
    ID.answer  once there is one; the body goes then

Each file appears whole, or not at all, and is on the disk before the next step. Whatever a
crash leaves without its record is removed at the next start.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import decode_image
from edge_runtime.offload.transport import HttpResponse
from edge_runtime.photo import Photo
from edge_runtime.state import open_folder, remove_file, write_atomic

__all__ = ["Deferral", "JobRecord", "JobStore", "StoredAnswer"]

_log = logging.getLogger(__name__)
_MAX_JOBS: Final = 256
_MAX_BYTES: Final = 256 * 2**20
_TTL_S: Final = 7 * 86_400.0
_MAX_RECORD_BYTES: Final = 16 * 1024
_MAX_ANSWER_BYTES: Final = limits.MAX_ANSWER_BYTES // 3 * 4 + _MAX_RECORD_BYTES
"""In base64, with its headers."""
_NAME: Final = re.compile(r"[0-9a-f]{32}\Z")
_HEADERS: Final = ("content-type", "server-timing")


class Deferral(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a job may be sent."""

    expires_s: float
    """Unix seconds: not later than this."""
    unmetered: bool
    charging: bool


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
    deferred: Deferral | None = None
    """It waits for better conditions; None: it goes at once."""


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer as it came, and whose it is."""

    model: str
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, model: str, response: HttpResponse) -> StoredAnswer:
        """What of ``response`` is needed to read it again."""
        kept = {
            name: value
            for name, value in response.headers.items()
            if name in _HEADERS or name.startswith("x-")
        }
        return cls(model=model, headers=kept, body=response.body)

    def response(self) -> HttpResponse:
        """As it came."""
        return HttpResponse(status=200, headers=self.headers, body=self.body)


class _StoredPhoto(Photo):
    """The photo of a job, in its file until it is needed, and not kept in memory then."""

    def __init__(self, path: Path, media_type: str) -> None:
        super().__init__(None, None)
        self._path = path
        self._media_type = media_type
        self._size = path.stat().st_size

    def pixels(self) -> NDArray[np.uint8]:
        return decode_image(self.upload()[0])

    @property
    def upload_bytes(self) -> int:
        return self._size

    def upload(self) -> tuple[bytes, str]:
        return read_bounded(self._path, limits.MAX_IMAGE_BYTES), self._media_type


_decoder = msgspec.json.Decoder(JobRecord)
_answer_decoder = msgspec.json.Decoder(StoredAnswer)


class JobStore:
    """``folder`` None: nothing is kept, and jobs end with the runtime."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else open_folder(folder)
        self._remove_orphans()

    @property
    def lasting(self) -> bool:
        """Whether jobs outlive the process."""
        return self._folder is not None

    def records(self, bundle: str) -> list[JobRecord]:
        """Those of a bundle, oldest first. Old ones are removed, broken ones passed over.

        A deferred one stays until it expires: its owner is told of that.
        """
        found = []
        for path in self._paths():
            try:
                record = _decoder.decode(read_bounded(path, _MAX_RECORD_BYTES))
            except (NearfarError, msgspec.DecodeError, UnicodeDecodeError) as error:
                _log.warning("%s is passed over: %s", path.name, error)
                continue
            since_s = record.created_s if record.deferred is None else record.deferred.expires_s
            if since_s < time.time() - _TTL_S:
                self.remove(record.id)
            elif record.bundle == bundle and record.id == path.stem:
                found.append(record)
        return sorted(found, key=lambda record: record.created_s)

    def add(self, record: JobRecord, body: bytes) -> None:
        """Accept a job: it is on the disk when this returns.

        Raises ``LimitExceeded`` when there are too many, ``ConfigError`` when the disk fails.
        """
        if self._folder is None:
            return
        kept = self._paths()
        held_bytes = sum(_size(path.with_suffix(".body")) for path in kept)
        if len(kept) >= _MAX_JOBS or held_bytes + len(body) > _MAX_BYTES:
            raise LimitExceeded(
                f"{len(kept)} jobs of {held_bytes} bytes are in the state folder already: "
                "forget() those that are done"
            )
        write_atomic(self._folder / f"{record.id}.body", body)
        self.write(record)

    def write(self, record: JobRecord) -> None:
        """A record that changed."""
        if self._folder is not None:
            write_atomic(self._folder / f"{record.id}.json", msgspec.json.encode(record))

    def photo(self, record: JobRecord) -> Photo:
        """What was submitted, read when it is needed. Raises ``OSError``."""
        return _StoredPhoto(self._path(record, "body"), record.media_type)

    def body(self, record: JobRecord) -> bytes:
        """What was submitted. Raises ``MissingFile``."""
        return read_bounded(self._path(record, "body"), limits.MAX_IMAGE_BYTES)

    def write_answer(self, record: JobRecord, answer: StoredAnswer) -> None:
        """Keep it; the body goes. Raises ``ConfigError`` when the disk fails."""
        if self._folder is not None:
            write_atomic(self._path(record, "answer"), msgspec.json.encode(answer))
            remove_file(self._path(record, "body"))

    def answer(self, record: JobRecord) -> StoredAnswer | None:
        """The answer, if there is one that can be read."""
        if self._folder is None or not self._path(record, "answer").exists():
            return None
        try:
            data = read_bounded(self._path(record, "answer"), _MAX_ANSWER_BYTES)
            return _answer_decoder.decode(data)
        except (NearfarError, msgspec.DecodeError, UnicodeDecodeError) as error:
            _log.warning("the answer of job %s cannot be read: %s", record.id, error)
            return None

    def remove(self, job_id: str) -> None:
        """All its files; the record first."""
        if self._folder is not None:
            for kind in ("json", "body", "answer"):
                remove_file(self._folder / f"{job_id}.{kind}")

    def _path(self, record: JobRecord, kind: str) -> Path:
        assert self._folder is not None  # noqa: S101  # there would be no such record
        return self._folder / f"{record.id}.{kind}"

    def _paths(self) -> list[Path]:
        if self._folder is None:
            return []
        return [path for path in self._folder.glob("*.json") if _NAME.match(path.stem)]

    def _remove_orphans(self) -> None:
        if self._folder is None:
            return
        known = {path.stem for path in self._paths()}
        for path in self._folder.iterdir():
            if path.suffix in (".body", ".answer") and path.stem not in known:
                remove_file(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
