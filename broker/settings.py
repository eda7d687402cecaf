"""Every setting of a broker, in one frozen struct, checked before anything starts."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any

import msgspec

from broker.executors.base import Device, Precision, RuntimeName
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError

__all__ = ["Settings", "build_settings", "is_spec"]

_SPEC = re.compile(r"[a-z]+:.+", re.DOTALL)
_ORIGIN = re.compile(
    r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:]+\](:[0-9]{1,5})?"
)

_MAX_KEY_CHARS = 1024

Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


def _spare_cores() -> int:
    """All cores of this process but one, which the front process keeps."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``nearfar serve`` was told, with defaults for the rest."""

    models: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_MODELS)]
    """Servable folders, folders of servables, or specs to export first (``zoo:NAME``)."""
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 8080
    """0: any free one."""
    keys: str | None = None
    """Key file; None: nobody is asked for a key, which only loopback allows."""
    state: str | None = None
    """Folder for what is worth keeping over a restart; None: nothing is kept."""
    routing: str | None = None
    """File of routing rules; None: none, or those of ``state``."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the broker; ``*``: all of them."""
    jobs: str | None = None
    """Folder in which jobs survive a restart; None: they end with the process."""
    executor: str = "worker"
    device: Device = "auto"
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = msgspec.field(
        default_factory=_spare_cores
    )
    """Threads of one forward pass on the CPU."""
    runtime: RuntimeName = "auto"
    precision: Precision = "auto"
    """Of the models' arithmetic; docs/operations.md says what ``auto`` takes."""
    calibration: str | None = None
    """Folder of photos that the precision ``int8`` is learned on."""
    backend: str | None = None
    """URL of the executor ``oip``, or address of the cluster of ``ray``."""
    memory_budget_mb: Annotated[float, msgspec.Meta(gt=0, le=10_000_000)] | None = None
    """Millions of bytes that program files in memory may have together; None: no bound."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Actors of the executor ``ray``; a batch is spread over them."""
    backend_key_file: str | None = None
    """Its first line is the API key for the backend."""
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BATCH)] = 8
    max_queue: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_QUEUE)] = limits.MAX_QUEUE
    """Requests that upload or wait, of all models together."""
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_CONNECTIONS)] = 1024
    drain_timeout_s: Seconds = 10.0
    """How long a shutdown waits for what is in flight."""
    hang_timeout_s: Seconds = 30.0
    """A worker that gives no sign of life for so long during a batch is replaced."""
    start_timeout_s: Seconds = 300.0
    """Loading the models."""

    def check(self) -> None:
        """Raise ``ConfigError`` where settings make no sense together."""
        if not is_loopback(self.host) and self.keys is None:
            raise ConfigError(
                f"{self.host!r} can be reached from other machines: pass --keys FILE "
                "(nearfar keys add makes it), or bind 127.0.0.1"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"CORS origin {origin!r} must be like https://app.example, without a path"
                )
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise ConfigError("CORS origin '*' already allows every other one: pass it alone")
        if self.memory_budget_mb is not None and self.executor == "oip":
            raise ConfigError("--memory-budget is not for the executor oip: its server has its own")
        if (self.precision == "int8") != (self.calibration is not None):
            raise ConfigError("--precision int8 and --calibration DIR go together: pass both")
        if self.precision == "int8" and self.runtime != "openvino":
            raise ConfigError("--precision int8 is for OpenVINO: pass --runtime openvino")
        if len(set(self.models)) != len(self.models):
            raise ConfigError("the same --models value is given twice")

    def read_backend_key(self) -> str | None:
        """The API key for the backend. ``ConfigError`` when its file cannot be used."""
        if self.backend_key_file is None:
            return None
        try:
            with Path(self.backend_key_file).open(encoding="ascii") as file:
                key = file.readline(_MAX_KEY_CHARS).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --backend-key: {type(error).__name__}") from None
        if not key.isprintable() or not key:
            raise ConfigError("the first line of --backend-key is no key")
        return key

    @property
    def folders(self) -> tuple[Path, ...]:
        """The ``models`` that are folders."""
        return tuple(Path(model) for model in self.models if not is_spec(model))

    @property
    def specs(self) -> tuple[str, ...]:
        """The ``models`` to export first."""
        return tuple(model for model in self.models if is_spec(model))


def build_settings(**values: Any) -> Settings:
    """Settings from names and values. ``ConfigError`` on an unknown name or a bad value."""
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from None
    settings.check()
    return settings


def is_spec(model: str) -> bool:
    """Whether a ``--models`` value names something to export (``zoo:digits-large``)."""
    return _SPEC.fullmatch(model) is not None


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only. Raises ``ConfigError``."""
    try:
        return _is_loopback_address(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(f"host {host!r} is no address of this machine") from None
    return all(_is_loopback_address(str(info[4][0])) for info in found)


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
