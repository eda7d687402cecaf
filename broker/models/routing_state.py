"""Routing rules over a restart: what was changed while a broker ran, in one file.

A canary that was rolled back stays so when its broker starts again. The rules of ``--routing``
are where a broker begins; what was changed since then goes before them, until the file itself
is changed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from broker.executors.base import EventSink
from broker.models.repository import Repository
from broker.models.rollout import Rollouts
from broker.models.routing import Rules, read_routing
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.contract.manifest import Name, Version

__all__ = ["begin_routing"]

_FILE_NAME: Final = "routing.json"


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rules: Rules
    previous: Version | None = None


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["nearfar.routing"] = "nearfar.routing"
    schema_version: Literal[1] = 1
    file_sha256: str | None = None
    """Of the routing file that these rules began with."""
    models: Annotated[dict[Name, _Kept], msgspec.Meta(max_length=limits.MAX_MODELS)] = {}


def begin_routing(
    rollouts: Rollouts,
    repository: Repository,
    *,
    routing: Path | None,
    state: Path | None,
    events: EventSink,
) -> None:
    """Give ``rollouts`` its first rules, and keep its changes in the folder ``state`` from then on.

    What was kept counts where it began with the same routing file, and for each model whose
    versions are still there; what does not count is an event, ``routing_state_ignored``. Raises
    ``ConfigError`` for either path.
    """
    rules, digest = ({}, None) if routing is None else read_routing(routing, repository)
    kept = None if state is None else _read(state / _FILE_NAME, events)
    if kept is not None and kept.file_sha256 != digest:
        events("routing_state_ignored", {"reason": "the routing file is another one"})
        kept = None
    for name, one in rules.items():
        if kept is None or name not in kept.models:
            rollouts.set_rules(name, one)
    for name, known in ({} if kept is None else kept.models).items():
        try:
            rollouts.set_rules(name, known.rules, known.previous)
        except NearfarError as error:
            events("routing_state_ignored", {"model": name, "reason": error.detail})
            if name in rules:
                rollouts.set_rules(name, rules[name])
    if state is not None:
        path = state / _FILE_NAME
        rollouts.on_change = lambda: _write(path, rollouts, digest, events)


def _read(path: Path, events: EventSink) -> _Document | None:
    try:
        with path.open("rb") as file:
            data = file.read(limits.MAX_ROUTING_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error.strerror}") from None
    if len(data) > limits.MAX_ROUTING_BYTES:
        events("routing_state_ignored", {"reason": "it is too large"})
        return None
    try:
        return msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        events("routing_state_ignored", {"reason": str(error)})
        return None


def _write(path: Path, rollouts: Rollouts, digest: str | None, events: EventSink) -> None:
    """Replace the file, at once: a change that was acknowledged is there after a crash."""
    models = {
        name: _Kept(rules=rules, previous=previous)
        for name, (rules, previous) in rollouts.rules().items()
    }
    data = msgspec.json.encode(_Document(file_sha256=digest, models=models))
    draft: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=".routing.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except OSError as error:
        events("state_not_written", {"reason": str(error.strerror)})
        if draft is not None:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
