"""LiteRT (TensorFlow Lite) interpreter for ``.tflite`` files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import BackendUnavailable, InferenceError, ModelLoadError
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["LiteRTRuntime"]

_INSTALL = "pip install 'nearfar[edge]'"


class LiteRTRuntime:
    """Runs ``.tflite`` through the ``ai-edge-litert`` wheel (XNNPACK on CPU)."""

    format = "tflite"

    def availability(self) -> Availability:
        """Whether ``ai-edge-litert`` is installed; it is not imported."""
        if find_spec("ai_edge_litert") is None:
            return Availability(
                available=False, reason="ai-edge-litert is not installed", install=_INSTALL
            )
        return Availability(available=True, version=installed_version("ai-edge-litert"))

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> LiteRTModel:
        """Load a ``.tflite`` and compare its tensors with the manifest's."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise BackendUnavailable(f"ai-edge-litert: {error}; {_INSTALL}") from None
        try:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelLoadError(f"LiteRT cannot load {path.name}: {error}") from None
        return LiteRTModel(interpreter, variant)


class LiteRTModel:
    """One allocated interpreter."""

    def __init__(self, interpreter: Any, variant: Variant) -> None:
        self._interpreter = interpreter
        self._inputs = variant.inputs
        self._outputs = variant.outputs
        given = _ordered(interpreter, variant.inputs, "input")
        taken = _ordered(interpreter, variant.outputs, "output")
        self._input_ids = _match(given, variant.inputs, variant.id)
        self._output_ids = _match(taken, variant.outputs, variant.id)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's inputs, found to be the file's."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's outputs, found to be the file's."""
        return self._outputs

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference."""
        for spec, index, array in zip(self._inputs, self._input_ids, inputs, strict=True):
            spec.check(array)
            self._interpreter.set_tensor(index, array)
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise InferenceError(f"LiteRT failed: {error}") from None
        return [self._interpreter.get_tensor(index).copy() for index in self._output_ids]

    def close(self) -> None:
        """Drop the interpreter."""
        self._interpreter = None


def _ordered(interpreter: Any, specs: tuple[TensorSpec, ...], role: str) -> list[dict[str, Any]]:
    """Details of the file's inputs or outputs, in manifest order where the names allow.

    Files of nearfar name them in their one signature; for others the file's order holds.
    """
    details: list[dict[str, Any]] = getattr(interpreter, f"get_{role}_details")()
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return details
    ((key, names),) = signatures.items()
    if sorted(names[f"{role}s"]) != sorted(spec.name for spec in specs):
        return details
    by_name = getattr(interpreter.get_signature_runner(key), f"get_{role}_details")()
    return [by_name[spec.name] for spec in specs]


def _match(
    details: list[dict[str, Any]], specs: tuple[TensorSpec, ...], variant_id: str
) -> list[int]:
    """Interpreter tensor indices in manifest order; dtype and shape must agree."""
    if len(details) != len(specs):
        raise ModelLoadError(
            f"{variant_id}: the file has {len(details)} tensors, the manifest {len(specs)}"
        )
    indices = []
    for detail, spec in zip(details, specs, strict=True):
        shape = tuple(int(n) for n in detail["shape"])
        if np.dtype(detail["dtype"]) != np.dtype(spec.dtype) or shape != spec.shape:
            raise ModelLoadError(
                f"{variant_id}: the file has {np.dtype(detail['dtype'])}{list(shape)}, the "
                f"manifest records {spec.dtype}{list(spec.shape)} for {spec.name!r}"
            )
        indices.append(int(detail["index"]))
    return indices
