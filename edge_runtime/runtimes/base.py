"""What every interpreter of model files looks like, and how to find one.

``Runtime`` finds out whether its backend is installed and loads a file; ``LoadedModel``
runs it. Runtimes register in the entry-point group ``nearfar.runtimes`` (name: the format);
the built-in ones use the same group as anyone else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import BackendUnavailable
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "Availability",
    "LoadedModel",
    "Runtime",
    "available_runtimes",
    "find_runtime",
    "installed_version",
]


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a backend can be used here, and if not, why and what to install."""

    available: bool
    version: str = ""
    reason: str = ""
    install: str = ""


@runtime_checkable
class LoadedModel(Protocol):
    """One model in memory. Not thread-safe: one caller at a time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes, in order, read from the file itself where it says so."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` gives, in order."""

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference, batch 1. Raises ``TensorError`` or ``InferenceError``."""

    def close(self) -> None:
        """Free what the backend holds; the object is not used afterwards."""


@runtime_checkable
class Runtime(Protocol):
    """One interpreter. Importing its module and creating it imports no backend."""

    format: str

    def availability(self) -> Availability:
        """Whether the backend is there; never raises, imports nothing heavy."""

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> LoadedModel:
        """Load the file (or folder) at ``path``.

        Raises ``BackendUnavailable``, or ``ModelLoadError`` when the backend refuses the
        file or the file takes other tensors than ``variant`` records.
        """


def available_runtimes() -> Mapping[str, Runtime]:
    """Every registered runtime by format name; two of one name are a programming error."""
    found: dict[str, Runtime] = {}
    for point in sorted(entry_points(group="nearfar.runtimes"), key=lambda p: (p.name, p.value)):
        if point.name in found:
            raise RuntimeError(f"two runtimes are registered for format {point.name!r}")
        found[point.name] = point.load()()
    return found


def find_runtime(format_name: str) -> Runtime:
    """The usable runtime of a format. ``BackendUnavailable`` says what to install."""
    runtime = available_runtimes().get(format_name)
    if runtime is None:
        raise BackendUnavailable(f"no runtime is registered for format {format_name!r}")
    state = runtime.availability()
    if not state.available:
        raise BackendUnavailable(f"{format_name}: {state.reason}; install it with: {state.install}")
    return runtime


def installed_version(distribution: str) -> str:
    """Version of an installed distribution; empty when its metadata are missing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
