"""The state of a run after an epoch, written so that a crash leaves the old or the new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from converters.finetune.settings import DataRecord, EpochReport, Settings
from edge_runtime.contract.errors import ConfigError

__all__ = ["CHECKPOINT", "Identity", "State", "load_checkpoint", "save_checkpoint", "write_atomic"]

CHECKPOINT = "checkpoint.pt"


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run is a function of: a checkpoint of another one cannot be continued."""

    source: str
    source_sha256: str | None
    weights: str
    weights_sha256: str | None
    preprocess: str
    """Canonical JSON of the record."""
    settings: Settings
    data: DataRecord
    tools: dict[str, str]


class State(msgspec.Struct, kw_only=True):
    """Everything that changes from epoch to epoch. Tensors are torch's."""

    epoch: int = 0
    model: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None = None
    """The moving average's state, with one."""
    best: dict[str, Any] | None = None
    """The best weights so far; None while the start is best."""
    best_epoch: int = 0
    history: list[EpochReport] = []
    seconds: float = 0.0


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a new file beside it, flushed, then renamed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, identity: Identity, state: State) -> None:
    """Replace ``path`` by the state after an epoch."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(
        {
            "identity": msgspec.json.encode(identity).decode(),
            "history": msgspec.json.encode(state.history).decode(),
            "epoch": state.epoch,
            "best_epoch": state.best_epoch,
            "seconds": state.seconds,
            "model": state.model,
            "optimizer": state.optimizer,
            "average": state.average,
            "best": state.best,
        },
        buffer,
    )
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: Identity) -> State:
    """The state in ``path``, which must be of the same run; tensors only, no pickled code.

    Raises ``ConfigError`` when there is none, it is damaged, or it is of another run, whose
    differences are named.
    """
    import torch

    if not path.is_file():
        raise ConfigError(f"{path} does not exist: there is nothing to --resume, leave it out")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        before = msgspec.json.decode(stored["identity"], type=Identity)
        history = msgspec.json.decode(stored["history"], type=list[EpochReport])
    except Exception as error:  # torch and pickle raise many types
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigError(f"{path} is damaged ({reason}): start again with --force") from None
    differences = _differences(before, identity)
    if differences:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(differences[:4])}. Give the same "
            "options and data to --resume, or start again with --force"
        )
    return State(
        epoch=stored["epoch"],
        model=stored["model"],
        optimizer=stored["optimizer"],
        average=stored["average"],
        best=stored["best"],
        best_epoch=stored["best_epoch"],
        history=history,
        seconds=stored["seconds"],
    )


def _differences(before: msgspec.Struct, now: msgspec.Struct) -> list[str]:
    found = []
    for field in before.__struct_fields__:
        old, new = getattr(before, field), getattr(now, field)
        if isinstance(old, msgspec.Struct) and isinstance(new, msgspec.Struct):
            found += _differences(old, new)
        elif old != new:
            found.append(f"{field} was {old!r}, is {new!r}")
    return found
