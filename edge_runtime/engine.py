"""Put the parts of an ``EdgeRuntime`` together, and take them apart again."""

from __future__ import annotations

import os
import random
import ssl
import threading
from collections.abc import Callable

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.calibrated import Calibrated
from edge_runtime.conditions import Conditions, ConditionsSource
from edge_runtime.contract.errors import BackendUnavailable, ConfigError, NearfarError
from edge_runtime.contract.tasks import Task, has_labels
from edge_runtime.contract.wire import PictureType
from edge_runtime.history import History
from edge_runtime.local import LocalModel
from edge_runtime.log.recorder import LogSink, Recorder
from edge_runtime.log.writer import DecisionLog
from edge_runtime.offload.discovery import Expected
from edge_runtime.offload.endpoint import check_api_key, check_broker_url
from edge_runtime.offload.transport import Transport
from edge_runtime.offload.uplink import Uplink
from edge_runtime.policies.base import Policy, Prices
from edge_runtime.policies.registry import find_policy
from edge_runtime.variants import select_variant

__all__ = [
    "Engine",
    "choose_policy",
    "close_parts",
    "connect",
    "load_local",
    "open_log",
    "open_transport",
]


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What every request of one runtime shares."""

    task: Task
    policies: Calibrated
    local: LocalModel | None
    local_error: NearfarError | None
    """Why ``local`` is None although the policy would use it."""
    uplink: Uplink | None
    conditions: ConditionsSource
    prices: Prices
    history: History
    recorder: Recorder | None = None
    """None: no decision log was asked for."""

    @property
    def policy(self) -> Policy:
        """As it was asked for; a request takes it from ``policies``."""
        return self.policies.policy


def choose_policy(policy: str | Policy, *, connected: bool) -> Policy:
    """The policy by name or as given. Raises ``ConfigError``."""
    chosen = find_policy(policy) if isinstance(policy, str) else policy
    if not isinstance(chosen, Policy):
        raise ConfigError("policy must be a name or an object with the members of Policy")
    if not chosen.uses_local and not connected:
        raise ConfigError(f"{chosen.name} needs a broker: pass broker=URL")
    return chosen


def open_transport(
    broker: str | None,
    transport: Transport | None,
    *,
    api_key: str | None,
    tls: ssl.SSLContext | None,
    allow_plain_http: bool,
    session: bool,
) -> Transport | None:
    """The transport to use, if any; nothing is connected yet.

    Raises ``ConfigError``, or ``BackendUnavailable`` when aiohttp is not installed.
    """
    if broker is not None and transport is not None:
        raise ConfigError("pass broker= or transport=, not both")
    if api_key is not None:
        check_api_key(api_key)
    if broker is None:
        return transport
    check_broker_url(broker, with_key=api_key is not None and not allow_plain_http)
    try:
        from edge_runtime.offload.client import AiohttpTransport
        from edge_runtime.offload.session_transport import SessionTransport
    except ImportError as error:
        raise BackendUnavailable(
            f"a broker needs {error.name}, which is not installed: pip install 'nearfar[edge]'"
        ) from None
    http = AiohttpTransport(broker, tls=tls)
    return SessionTransport(http, api_key=api_key) if session else http


def load_local(
    bundle: Bundle,
    variant: str,
    *,
    fits_ms: float,
    threads: int,
    connected: bool,
) -> tuple[LocalModel | None, NearfarError | None]:
    """The local model, or why there is none although a broker can answer instead."""
    try:
        return LocalModel(
            lambda: select_variant(bundle, variant, fits_ms=fits_ms, threads=threads)
        ), None
    except BackendUnavailable as error:
        if variant != "auto" or not connected:
            raise
        return None, error  # as in Firebase: the cloud steps in where no model runs


def connect(
    transport: Transport,
    bundle: Bundle,
    *,
    cloud_model: str | None,
    image_type: PictureType,
    api_key: str | None,
    conditions: Conditions,
    early: bool,
) -> Uplink:
    """Start the network thread; ``early``: open a connection at once unless data is spared."""
    labels = bundle.manifest.labels if has_labels(bundle.manifest.task) else None
    uplink = Uplink(
        transport,
        expected=Expected(
            task=bundle.manifest.task,
            labels=bundle.labels,
            labels_sha256=None if labels is None else labels.sha256,
        ),
        image_type=image_type,
        cloud_model=cloud_model,
        api_key=api_key,
        link_type=conditions.link_type,
        random=random.random,
    )
    if early and conditions.data_saver is not True:
        uplink.prewarm(forced=True)
    return uplink


def open_log(
    log: str | os.PathLike[str] | LogSink | None,
) -> tuple[LogSink | None, DecisionLog | None]:
    """Where entries go, and the log that closes with the runtime: one that it made itself.

    Raises ``ConfigError``.
    """
    if log is None or not isinstance(log, str | os.PathLike):
        if log is not None and not callable(log):
            raise ConfigError("log must be a path, a DecisionLog, or a function of an entry")
        return log, None
    made = DecisionLog(log)
    return made, made


def close_parts(
    local: LocalModel | None,
    uplink: Uplink | None,
    log: DecisionLog | None = None,
    end_jobs: Callable[[], None] = lambda: None,
) -> None:
    """Jobs, the network, then the local model, to which what was being uploaded falls back.

    The garbage collector may call this in one of the threads to be ended; another one does
    it then, since no thread can wait for itself.
    """
    if threading.current_thread().name.startswith("nearfar-"):
        threading.Thread(target=close_parts, args=(local, uplink, log, end_jobs)).start()
        return
    end_jobs()
    if uplink is not None:
        uplink.close()
    if local is not None:
        local.close()
    if log is not None:
        log.close()
