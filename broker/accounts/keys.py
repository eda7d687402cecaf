"""API keys: ``nf_<id>.<secret>``, kept as the id and the SHA-256 of the secret.

The secret is 256 random bits, so a fast hash is enough: there is nothing to guess. The
file is JSON, readable by its owner alone, and replaced as a whole by every change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, Unauthorized

__all__ = ["ApiKey", "KeyFile", "KeyRing", "Principal"]

_LOG = logging.getLogger(__name__)
_KEY = re.compile(r"nf_([a-z0-9]{12})\.([A-Za-z0-9_-]{43})")
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_RELOAD_EVERY_S = 0.5
_NO_SUCH_SECRET = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
_REFUSED = "this API key is not valid here: ask the operator for one"

KeyId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]{12}$(?!\n)")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Weight = Annotated[float, msgspec.Meta(ge=0.001, le=1000)]
Priority = Annotated[int, msgspec.Meta(ge=1, le=3)]
Rate = Annotated[float, msgspec.Meta(ge=0.001, le=1_000_000)]
Tenant = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$(?!\n)")]


class ApiKey(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One key as stored: the secret itself is nowhere."""

    id: KeyId
    secret_sha256: Sha256
    tenant: Tenant
    created: datetime
    """UTC."""
    admin: bool = False
    """May take models out of service and put them back."""
    weight: Weight = 1.0
    """Of its tenant's share of a device that more is asked of than it can do."""
    max_priority: Priority = 2
    """The best class that its requests may ask for; 1 is the highest."""
    rate_per_s: Rate | None = None
    """Requests to run a model; None: as many as it likes."""
    burst: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    """How many of them at once."""


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["nearfar.keys"] = "nearfar.keys"
    schema_version: Literal[1] = 1
    keys: Annotated[tuple[ApiKey, ...], msgspec.Meta(max_length=limits.MAX_KEYS)] = ()


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks: always from a key, never from a header of the request."""

    tenant: str
    key_id: str
    admin: bool = False
    weight: float = 1.0
    max_priority: int = 2
    rate_per_s: float | None = None
    burst: int = 1


class KeyFile:
    """The file of keys at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[ApiKey, ...]:
        """Every key. Raises ``ConfigError`` on a file others can read, or no sense in it."""
        try:
            with self.path.open("rb") as file:
                self._check_private(os.fstat(file.fileno()))
                data = file.read(limits.MAX_KEYS_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"cannot read the key file {self.path} ({error.strerror}): "
                "make one with nearfar keys add"
            ) from None
        if len(data) > limits.MAX_KEYS_FILE_BYTES:
            raise ConfigError(f"{self.path} has more than {limits.MAX_KEYS_FILE_BYTES} bytes")
        try:
            document = msgspec.json.decode(data, type=_Document)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path} is no key file: {error}") from None
        if len({key.id for key in document.keys}) != len(document.keys):
            raise ConfigError(f"{self.path} holds one key id twice: revoke and add it again")
        return document.keys

    def add(
        self,
        tenant: str,
        *,
        admin: bool = False,
        weight: float = 1.0,
        max_priority: int = 2,
        rate_per_s: float | None = None,
        burst: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key, store its hash, and return it with its text, which is shown once.

        ``burst`` None: what ``rate_per_s`` allows in a second, at least one request. Raises
        ``ConfigError`` on a tenant that is no plain lower-case name, or a number out of bounds.
        """
        if burst is None:
            burst = max(1, math.ceil(rate_per_s or 1.0))
        secret = secrets.token_urlsafe(32)
        try:
            key = msgspec.convert(
                {
                    "id": "".join(secrets.choice(_ID_ALPHABET) for _ in range(12)),
                    "secret_sha256": _sha256(secret),
                    "tenant": tenant,
                    "created": datetime.now(UTC).replace(microsecond=0),
                    "admin": admin,
                    "weight": weight,
                    "max_priority": max_priority,
                    "rate_per_s": rate_per_s,
                    "burst": burst,
                },
                ApiKey,
            )
        except msgspec.ValidationError as error:
            if "$.tenant" not in str(error):
                raise ConfigError(f"a key cannot be made: {error}") from None
            raise ConfigError(
                f"tenant {tenant!r} must be 1 to 64 of a-z 0-9 . _ - and start with a letter "
                "or digit"
            ) from None
        with self._locked():
            keys = self.read() if self.path.exists() else ()
            self._write((*keys, key))
        return key, f"nf_{key.id}.{secret}"

    def revoke(self, key_id: str) -> ApiKey:
        """Take a key out. Raises ``ConfigError`` when there is none of this id."""
        with self._locked():
            keys = self.read()
            found = next((key for key in keys if key.id == key_id), None)
            if found is None:
                raise ConfigError(f"no key {key_id!r} in {self.path}: see nearfar keys list")
            self._write(tuple(key for key in keys if key is not found))
        return found

    def _check_private(self, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"the key file {self.path} is not a regular file")
        if info.st_mode & 0o077:
            raise ConfigError(
                f"the key file {self.path} can be read by others: chmod 600 {self.path}"
            )
        if info.st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"the key file {self.path} belongs to another user: chown it")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one command changes the file at a time; the folder is what is locked."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"cannot open {self.path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        """Replace the file at once: a reader sees the old one or the new one."""
        if len(keys) > limits.MAX_KEYS:
            raise ConfigError(f"a key file holds at most {limits.MAX_KEYS} keys: revoke some")
        text = msgspec.json.format(msgspec.json.encode(_Document(keys=keys)), indent=2) + b"\n"
        try:
            descriptor, name = tempfile.mkstemp(  # mode 0600
                prefix=f".{self.path.name}.", dir=self.path.parent
            )
            draft = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(self.path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None


class KeyRing:
    """The keys of a running broker. Follows the file: a revoked key is out within a second.

    The file is the truth. One that cannot be read any more admits nobody until it can.
    """

    def __init__(self, file: KeyFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._keys = {key.id: key for key in file.read()}
        self._seen = self._fingerprint()
        self._next_look_s = clock() + _RELOAD_EVERY_S

    def authenticate(self, authorization: str | None) -> Principal:
        """Who sent this ``Authorization`` header. Raises ``Unauthorized``.

        An unknown id costs the same comparison as a known one with a wrong secret.
        """
        self._follow()
        if authorization is None:
            raise Unauthorized("an API key is needed: send Authorization: Bearer nf_...")
        scheme, _, token = authorization.partition(" ")
        match = _KEY.fullmatch(token.strip())
        if scheme.lower() != "bearer" or match is None:
            raise Unauthorized("send the API key as Authorization: Bearer nf_<id>.<secret>")
        key = self._keys.get(match[1])
        expected = _NO_SUCH_SECRET if key is None else key.secret_sha256
        matches = hmac.compare_digest(_sha256(match[2]), expected)
        if key is None or not matches:
            raise Unauthorized(_REFUSED)
        return Principal(
            tenant=key.tenant,
            key_id=key.id,
            admin=key.admin,
            weight=key.weight,
            max_priority=key.max_priority,
            rate_per_s=key.rate_per_s,
            burst=key.burst,
        )

    def require_valid(self, principal: Principal) -> None:
        """Raise ``Unauthorized`` once the key that ``principal`` came with is revoked."""
        self._follow()
        if principal.key_id not in self._keys:
            raise Unauthorized(_REFUSED)

    def _follow(self) -> None:
        now_s = self._clock()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _RELOAD_EVERY_S
        seen = self._fingerprint()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = {key.id: key for key in self._file.read()}
        except ConfigError as error:
            self._keys = {}
            _LOG.error("no key is accepted any more: %s", error.detail)

    def _fingerprint(self) -> tuple[int, int, int, int] | None:
        try:
            info = self._file.path.stat()
        except OSError:
            return None
        return info.st_mtime_ns, info.st_ino, info.st_size, info.st_mode


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
