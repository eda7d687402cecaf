"""Put the parts of an ``EdgeRuntime`` together, and take them apart again."""

from __future__ import annotations

import os
import random
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.calibrated import Calibrated
from edge_runtime.conditions import ConditionsSource, read_conditions, read_network_id
from edge_runtime.contract.errors import BackendUnavailable, ConfigError, NearfarError
from edge_runtime.contract.tasks import Task, has_labels
from edge_runtime.contract.wire import PictureType
from edge_runtime.history import History
from edge_runtime.local import LocalModel
from edge_runtime.log.recorder import LogSink, Recorder
from edge_runtime.log.writer import DecisionLog
from edge_runtime.memory import Memory
from edge_runtime.offload.discovery import Expected
from edge_runtime.offload.endpoint import check_api_key, check_broker_url
from edge_runtime.offload.fleet import Fleet
from edge_runtime.offload.loop import LoopThread
from edge_runtime.offload.transport import Transport
from edge_runtime.offload.uplink import Uplink
from edge_runtime.offload.way import Way
from edge_runtime.policies.base import Policy, Prices
from edge_runtime.policies.registry import find_policy
from edge_runtime.punctuality import Punctuality
from edge_runtime.state import FolderClaim
from edge_runtime.variants import select_variant

__all__ = [
    "Engine",
    "choose_policy",
    "close_parts",
    "connect",
    "load_local",
    "open_log",
    "open_transports",
]

_MAX_BROKERS = 16


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What every request of one runtime shares."""

    task: Task
    policies: Calibrated
    local: LocalModel | None
    local_error: NearfarError | None
    """Why ``local`` is None although the policy would use it."""
    uplink: Way | None
    """To the broker, or to the brokers."""
    conditions: ConditionsSource
    prices: Prices
    history: History
    punctuality: Punctuality
    recorder: Recorder | None = None
    """None: no decision log was asked for."""

    def for_request(self) -> Engine:
        """The same with one broker, chosen among several."""
        if not isinstance(self.uplink, Fleet):
            return self
        return msgspec.structs.replace(self, uplink=self.uplink.choose())

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


def open_transports(
    broker: str | Sequence[str] | None,
    transport: Transport | Sequence[Transport] | None,
    *,
    api_key: str | None,
    tls: ssl.SSLContext | None,
    allow_plain_http: bool,
    session: bool,
) -> dict[str, Transport]:
    """The transports to use, by URL, or by number where they are the app's own.

    None is connected yet.

    Raises ``ConfigError``, or ``BackendUnavailable`` when aiohttp is not installed.
    """
    if broker is not None and transport is not None:
        raise ConfigError("pass broker= or transport=, not both")
    if api_key is not None:
        check_api_key(api_key)
    if broker is None:
        given = (transport,) if isinstance(transport, Transport) else transport or ()
        return {str(number): one for number, one in enumerate(given)}
    urls = (broker,) if isinstance(broker, str) else tuple(broker)
    if not 1 <= len(urls) <= _MAX_BROKERS or len(set(urls)) < len(urls):
        raise ConfigError(f"broker must be one URL, or 1 to {_MAX_BROKERS} different ones")
    for url in urls:
        check_broker_url(url, with_key=api_key is not None and not allow_plain_http)
    try:
        from edge_runtime.offload.client import AiohttpTransport
        from edge_runtime.offload.session_transport import SessionTransport
    except ImportError as error:
        raise BackendUnavailable(
            f"a broker needs {error.name}, which is not installed: pip install 'nearfar[edge]'"
        ) from None
    opened: dict[str, Transport] = {}
    for url in urls:
        http = AiohttpTransport(url, tls=tls)
        opened[url] = SessionTransport(http, api_key=api_key) if session else http
    return opened


def load_local(
    bundle: Bundle,
    variant: str,
    *,
    fits_ms: float,
    threads: int,
    connected: bool,
    memory: Memory | None = None,
) -> tuple[LocalModel | None, NearfarError | None]:
    """The local model, or why there is none although a broker can answer instead."""
    try:
        return LocalModel(
            lambda: select_variant(bundle, variant, fits_ms=fits_ms, threads=threads),
            memory=memory,
            threads=threads,
        ), None
    except BackendUnavailable as error:
        if variant != "auto" or not connected:
            raise
        return None, error  # as in Firebase: the cloud steps in where no model runs


def connect(
    transports: Mapping[str, Transport],
    bundle: Bundle,
    *,
    cloud_model: str | None,
    image_type: PictureType,
    api_key: str | None,
    source: ConditionsSource,
    memory: Memory | None,
    early: bool,
) -> Uplink | Fleet:
    """Start the network thread; ``early``: open a connection at once unless data is spared."""
    labels = bundle.manifest.labels if has_labels(bundle.manifest.task) else None
    expected = Expected(
        task=bundle.manifest.task,
        labels=bundle.labels,
        labels_sha256=None if labels is None else labels.sha256,
    )
    conditions = read_conditions(source)
    shared = LoopThread("nearfar-network") if len(transports) > 1 else None
    uplinks = [
        Uplink(
            transport,
            expected=expected,
            image_type=image_type,
            cloud_model=cloud_model,
            api_key=api_key,
            link_type=conditions.link_type,
            random=random.random,
            url=url,
            thread=shared,
            network_id=read_network_id(source),
            memory=memory,
        )
        for url, transport in transports.items()
    ]
    opened = uplinks[0] if shared is None else Fleet(uplinks, shared, random.random)
    if early and conditions.data_saver is not True:
        opened.prewarm(forced=True)
    return opened


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
    uplink: Uplink | Fleet | None,
    log: DecisionLog | None = None,
    end_jobs: Callable[[], None] = lambda: None,
    memory: Memory | None = None,
    claim: FolderClaim | None = None,
) -> None:
    """Jobs, the network, then the local model, to which what was being uploaded falls back.

    The state folder is another runtime's to use when nothing writes to it any longer.

    The garbage collector may call this in one of the threads to be ended; another one does
    it then, since no thread can wait for itself.
    """
    if threading.current_thread().name.startswith("nearfar-"):
        parts = (local, uplink, log, end_jobs, memory, claim)
        threading.Thread(target=close_parts, args=parts).start()
        return
    end_jobs()
    if uplink is not None:
        uplink.keep()
        uplink.close()
    if local is not None:
        local.keep()
        local.close()
    if memory is not None:
        memory.close()
    if claim is not None:
        claim.close()
    if log is not None:
        log.close()
