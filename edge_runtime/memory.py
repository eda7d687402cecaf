"""Estimates that outlive the process: one small file in the state folder.

At most 64 networks and 64 model files, the oldest forgotten first. A network is named by a
salted hash of what the platform calls it; the salt lies beside the file and never leaves the
device, so the file alone names no place. A file that cannot be read is moved aside, with a
log line, and ``fault`` says so to every decision.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from edge_runtime.contract.errors import MissingFile, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.remembered import (
    LocalMemory,
    NetworkMemory,
    recall,
    recall_latencies,
    remember,
)
from edge_runtime.state import open_folder, write_atomic

__all__ = ["Memory"]

_log = logging.getLogger(__name__)
_NAME: Final = "estimates.json"
_SALT_NAME: Final = "estimates.salt"
_SALT_BYTES: Final = 32
_MAX_BYTES: Final = 1 << 20
_MAX_ENTRIES: Final = 64
_SAVE_EVERY_S: Final = 30.0

_Kept = TypeVar("_Kept", NetworkMemory, LocalMemory)
_Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["nearfar.estimates"]
    schema_version: Literal[1]
    networks: Annotated[dict[_Key, NetworkMemory], msgspec.Meta(max_length=_MAX_ENTRIES)] = (
        msgspec.field(default_factory=dict)
    )
    local: Annotated[dict[_Key, LocalMemory], msgspec.Meta(max_length=_MAX_ENTRIES)] = (
        msgspec.field(default_factory=dict)
    )


def _document(networks: Mapping[str, NetworkMemory], local: Mapping[str, LocalMemory]) -> _Document:
    return _Document(
        format="nearfar.estimates", schema_version=1, networks=dict(networks), local=dict(local)
    )


class Memory:
    """Thread-safe. ``clock`` gives Unix seconds. Raises ``ConfigError`` for a useless folder."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = open_folder(folder)
        self._clock = clock
        self._lock = threading.Lock()
        self._saved_s = time.monotonic()
        self._saving: threading.Thread | None = None
        self._changed = False
        self.fault: str | None = None
        """A reason code: what was stored could not be read."""
        document, self._salt = self._read()
        self._networks, self._local = dict(document.networks), dict(document.local)

    def recall(self, link_type: str, network_id: str | None, broker: str) -> PathEstimator | None:
        """The way to ``broker`` on this network, as it was; None: not known."""
        with self._lock:
            found = self._networks.get(self._key("network", link_type, network_id or "", broker))
        if found is None:
            return None
        return recall(found, link_type, self._clock() - found.seen_s)

    def learned(
        self, path: PathEstimator, now_s: float, network_id: str | None, broker: str
    ) -> None:
        """Keep what was learned; ``now_s`` is on the clock of ``path``."""
        kept = remember(path, now_s, self._clock())
        if kept is None:
            return
        key = self._key("network", path.link_type, network_id or "", broker)
        with self._lock:
            _put(self._networks, key, kept)
            self._changed = True

    def recall_latencies(self, sha256: str, threads: int) -> tuple[float, ...]:
        """Of a model file on this device, with so many threads; empty: not known."""
        with self._lock:
            found = self._local.get(self._key("local", sha256, str(threads)))
        if found is None:
            return ()
        return recall_latencies(found, self._clock() - found.seen_s)

    def ran(self, sha256: str, threads: int, latencies_ms: tuple[float, ...]) -> None:
        """Keep the last latencies of a model file."""
        kept = tuple(min(max(one, 1e-3), 600_000.0) for one in latencies_ms[-64:])
        if not kept:
            return
        with self._lock:
            memory = LocalMemory(seen_s=self._clock(), latencies_ms=kept)
            _put(self._local, self._key("local", sha256, str(threads)), memory)
            self._changed = True

    def save_soon(self) -> None:
        """Write in the background, at most every 30 s; nobody waits for the disk."""
        with self._lock:
            recent = time.monotonic() - self._saved_s < _SAVE_EVERY_S
            busy = self._saving is not None and self._saving.is_alive()
            if recent or busy or not self._changed:
                return
            self._saved_s = time.monotonic()
            self._saving = threading.Thread(target=self.save, name="nearfar-memory", daemon=True)
            self._saving.start()

    def save(self) -> None:
        """Write now, whole or not at all; a full disk costs the memory, never an answer."""
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            document = _document(self._networks, self._local)
        try:
            write_atomic(self._folder / _NAME, msgspec.json.encode(document))
        except NearfarError as error:
            _log.warning("estimates are not kept: %s", error.detail)

    def close(self) -> None:
        """``save``, and no thread is left."""
        saving = self._saving
        if saving is not None:
            saving.join()
        self.save()

    def _key(self, *parts: str) -> str:
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, key=self._salt, digest_size=16).hexdigest()

    def _read(self) -> tuple[_Document, bytes]:
        path = self._folder / _NAME
        try:
            salt = self._read_salt()
            document = msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=_Document)
        except (NearfarError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if isinstance(error, MissingFile) and not path.exists():
                return _document({}, {}), self._make_salt()
            self.fault = "memory_unreadable"
            _log.warning("%s cannot be read and is left aside: %s", path, error)
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".unreadable"))
            return _document({}, {}), self._make_salt()
        return document, salt

    def _read_salt(self) -> bytes:
        salt = read_bounded(self._folder / _SALT_NAME, _SALT_BYTES)
        if len(salt) != _SALT_BYTES:
            raise MissingFile(f"{_SALT_NAME} is cut short")
        return salt

    def _make_salt(self) -> bytes:
        with contextlib.suppress(NearfarError):
            return self._read_salt()
        salt = secrets.token_bytes(_SALT_BYTES)
        write_atomic(self._folder / _SALT_NAME, salt)
        return salt


def _put(entries: dict[str, _Kept], key: str, value: _Kept) -> None:
    entries[key] = value
    while len(entries) > _MAX_ENTRIES:
        del entries[min(entries, key=lambda one: entries[one].seen_s)]
