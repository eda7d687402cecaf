"""TorchScript lite interpreter for ``.ptl`` files (PyTorch Mobile's, on Linux).

Two traps, both measured: with more than one thread the XNNPACK and QNNPACK pools of a
desktop wheel contend (130 ms instead of 3 ms for a small net on two cores), so inference
runs on one; and quantized files need ``qnnpack``, the engine that phones have.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import (
    BackendUnavailable,
    InferenceError,
    ModelLoadError,
    TensorError,
)
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["TorchScriptRuntime"]

_INSTALL = "pip install 'nearfar[convert]'"


class TorchScriptRuntime:
    """Runs ``.ptl`` through ``torch.jit.mobile``."""

    format = "torchscript"

    def availability(self) -> Availability:
        """Whether torch is installed; it is not imported."""
        if find_spec("torch") is None:
            return Availability(available=False, reason="torch is not installed", install=_INSTALL)
        return Availability(available=True, version=installed_version("torch"))

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> TorchScriptModel:
        """Load a ``.ptl``. ``threads`` is ignored: one is fastest, see the module."""
        try:
            import torch
            from torch.jit.mobile import _load_for_lite_interpreter
        except ImportError as error:
            raise BackendUnavailable(f"torch: {error}; {_INSTALL}") from None
        torch.set_num_threads(1)
        if "qnnpack" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "qnnpack"
        try:
            module = _load_for_lite_interpreter(str(path))
        except Exception as error:  # RuntimeError and many C++ types
            reason = str(error).split("\n", 1)[0]
            raise ModelLoadError(f"torch cannot load {path.name}: {reason}") from None
        return TorchScriptModel(module, variant)


class TorchScriptModel:
    """One lite-interpreter module. The file itself declares no tensors."""

    def __init__(self, module: Any, variant: Variant) -> None:
        self._module = module
        self._inputs = variant.inputs
        self._outputs = variant.outputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's inputs."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's outputs; each answer is checked against them."""
        return self._outputs

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference."""
        import torch

        for spec, array in zip(self._inputs, inputs, strict=True):
            spec.check(array)
        try:
            with torch.inference_mode():
                answer = self._module(*(torch.from_numpy(array) for array in inputs))
        except RuntimeError as error:
            raise InferenceError(f"TorchScript failed: {str(error).splitlines()[0]}") from None
        tensors = answer if isinstance(answer, tuple | list) else (answer,)
        if len(tensors) != len(self._outputs):
            raise TensorError(f"{len(tensors)} outputs, {len(self._outputs)} are recorded")
        arrays = [tensor.numpy().copy() for tensor in tensors]
        for spec, array in zip(self._outputs, arrays, strict=True):
            spec.check(array)
        return arrays

    def close(self) -> None:
        """Drop the module."""
        self._module = None
