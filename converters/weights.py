"""Load trained weights: safetensors, or a pickle that may hold nothing but tensors."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

from edge_runtime.contract import limits
from edge_runtime.contract.archives import check_zip
from edge_runtime.contract.errors import SourceError, WeightsMismatch

__all__ = ["check_weights_file", "file_digest", "load_into", "read_state_dict"]

Kind = Literal["safetensors", "hdf5", "zip", "other"]


def check_weights_file(path: Path) -> Kind:
    """What a weights file is by its first bytes.

    Raises ``SourceError`` unless it is a file of at most ``limits.MAX_WEIGHTS_BYTES``. A zip,
    as torch writes it, must unpack to no more, and be readable in one way only.
    """
    try:
        if not path.is_file():
            raise SourceError(f"weights file {path} does not exist: check --weights")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise SourceError(f"weights file {path} cannot be read: {error.strerror}") from None
    if size > limits.MAX_WEIGHTS_BYTES:
        raise SourceError(
            f"{path.name} has {size} bytes, more than {limits.MAX_WEIGHTS_BYTES}: save only "
            "the weights, without the optimizer's state"
        )
    if size == 0:
        raise SourceError(f"{path.name} is empty: save or copy it again")
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return "safetensors"
    if not start.startswith(b"PK"):
        return "other"
    check_zip(path, "a weights file", SourceError)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith(("/constants.pkl", "/models/model.json")) for name in names):
        raise SourceError(
            f"{path.name} is a whole saved model, not only weights: pass it as SOURCE, "
            "without --weights"
        )
    return "zip"


def read_state_dict(path: Path) -> dict[str, Any]:
    """Tensors by name from ``.safetensors``, or ``.pth``/``.pt``/``.bin`` (weights only).

    Wrappers as ``{"state_dict": ...}`` and the prefix ``module.`` of data-parallel
    training are taken off. Raises ``SourceError``.
    """
    kind = check_weights_file(path)
    if kind == "hdf5":
        raise SourceError(f"{path.name} holds Keras weights: this source is a torch model")
    if kind == "safetensors" and path.suffix != ".safetensors":
        raise SourceError(f"{path.name} is a safetensors file: name it .safetensors")
    if kind == "zip" and path.suffix == ".safetensors":
        raise SourceError(f"{path.name} was written by torch.save: name it .pth")
    named = path.suffix == ".safetensors"
    loaded = _read_safetensors(path) if named else _read_pickle(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    import torch

    if not isinstance(loaded, dict) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise SourceError(f"{path.name} holds no state dict: save model.state_dict()")
    if loaded and all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    for name, value in loaded.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise SourceError(f"{path.name} holds NaN ({name}): take an earlier checkpoint")
    return loaded


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except Exception as error:  # safetensors has its own types
        raise _unreadable(path, error) from None


def _read_pickle(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SourceError(
            f"{path.name} is a pickle with more than tensors in it, which could run any "
            "code: save only model.state_dict(), best as safetensors"
        ) from None
    except Exception as error:  # torch raises many types
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SourceError:
    reason = f"{type(error).__name__}: {error}".split("\n", 1)[0].split(". ", 1)[0]
    return SourceError(
        f"{path.name} is no readable weights file ({reason[:200]}): save or copy it again"
    )


def load_into(model: Any, path: Path) -> str:
    """Load ``path`` into a torch module, every tensor, strictly; returns its hex SHA-256.

    Raises ``WeightsMismatch`` that names the first missing, unexpected and misshapen
    tensors.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    missing = sorted(n for n in own if n not in state and not n.endswith("num_batches_tracked"))
    unexpected = sorted(n for n in state if n not in own)
    misshapen = [
        f"{n}: file {list(state[n].shape)}, model {list(own[n].shape)}"
        for n in sorted(own)
        if n in state and state[n].shape != own[n].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsMismatch(
            f"{path.name} does not fit the model: {'; '.join(problems)}. "
            "Check that source and weights belong together (number of classes, width)"
        )
    for name in own:  # batch counters are not weights; old files lack them
        if name not in state:
            state[name] = own[name]
    model.load_state_dict(state, strict=True)
    return file_digest(path)


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
