"""Load trained weights: safetensors, or a pickle that may hold nothing but tensors."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

from edge_runtime.contract.errors import SourceError, WeightsMismatch

__all__ = ["load_into", "read_state_dict"]


def read_state_dict(path: Path) -> dict[str, Any]:
    """Tensors by name from ``.safetensors``, or ``.pth``/``.pt``/``.bin`` (weights only).

    Wrappers as ``{"state_dict": ...}`` and the prefix ``module.`` of data-parallel
    training are taken off. Raises ``SourceError``.
    """
    import torch

    if not path.is_file():
        raise SourceError(f"weights file {path} does not exist: check --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(str(path)))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SourceError(
            f"{path.name} is a pickle with more than tensors in it, which could run any "
            "code: save only model.state_dict(), best as safetensors"
        ) from None
    except Exception as error:  # safetensors and torch raise many types
        reason = str(error).strip().split("\n", 1)[0]
        raise SourceError(f"{path.name} is no readable weights file: {reason}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise SourceError(f"{path.name} holds no state dict: save model.state_dict()")
    if loaded and all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    return loaded


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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
