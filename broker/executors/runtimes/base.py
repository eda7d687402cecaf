"""What every model runtime looks like. This module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from broker.executors.base import LoadedModel
from edge_runtime.contract.preprocess import Normalization
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "Affine",
    "ModelRuntime",
    "OutOfMemory",
    "affine_of",
    "cpu_has_amx",
    "cpu_multiplies_bf16",
    "first_line",
    "normalized",
]


class OutOfMemory(Exception):
    """A batch did not fit: a smaller one may."""


class Affine(NamedTuple):
    """Normalization of 8-bit pixels as ``pixel * scale + shift``, float32, for each channel.

    Both are computed in double precision and rounded once. The result is off the contract's
    table by the rounding of one product and one sum: at most
    ``2**-23 * (abs(pixel * scale) + abs(shift))``.
    """

    scale: NDArray[np.float32]
    """Broadcasts over the model's input: ``[C, 1, 1]``, or ``[C]`` for NHWC."""
    shift: NDArray[np.float32]


def affine_of(record: Normalization, spec: TensorSpec) -> Affine:
    """``(value / scale - mean) / std`` in one multiplication and one addition."""
    std = np.asarray(record.std, dtype=np.float64)
    scale = 1.0 / (record.scale * std)
    shift = -np.asarray(record.mean, dtype=np.float64) / std
    shape = (-1, 1, 1) if spec.layout == "NCHW" else (-1,)
    return Affine(scale.astype(np.float32).reshape(shape), shift.astype(np.float32).reshape(shape))


def normalized(rows: NDArray[np.generic], affine: Affine) -> NDArray[np.float32]:
    """8-bit pixels by ``affine``, where the runtime does not do it."""
    values = np.multiply(rows, affine.scale, dtype=np.float32)
    values += affine.shift
    return values


class ModelRuntime(Protocol):
    """One model in memory. One caller at a time."""

    @property
    def info(self) -> LoadedModel:
        """What runs, and how exactly."""

    def forward(
        self, rows: NDArray[np.generic], affine: Affine | None
    ) -> list[NDArray[np.generic]]:
        """``[batch, ...]`` to one array an output, floats as float32.

        ``affine``: ``rows`` are 8-bit pixels to be normalized by it on the device. Raises
        ``InferenceError``, or ``OutOfMemory``.
        """

    def free(self) -> None:
        """Drop the model; nothing runs afterwards."""


def cpu_has_amx() -> bool:
    """Whether this processor multiplies bfloat16 matrices by tiles (Intel AMX)."""
    return "amx_bf16" in _cpu_flags()


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has any instructions for it: AMX, or AVX512-BF16."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_cpu_flags())


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return next((line for line in text.splitlines() if line.startswith("flags")), "").split()


def first_line(error: BaseException) -> str:
    """Type and first line of an error: libraries add pages of their own source."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
