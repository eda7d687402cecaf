"""Core ML packages: the MIL interpreter on Linux.

On macOS the same package also runs on Core ML itself; that path needs Apple's framework
and is not part of this runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import BackendUnavailable, ModelLoadError, TensorError
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["CoreMLRuntime"]

_INSTALL = "pip install 'nearfar[convert]'"


class CoreMLRuntime:
    """Runs ``.mlpackage`` by interpreting its MIL program in torch."""

    format = "coreml"

    def availability(self) -> Availability:
        """Whether coremltools and torch are installed; they are not imported."""
        for package in ("torch", "torchvision", "coremltools"):
            if find_spec(package) is None:
                return Availability(
                    available=False, reason=f"{package} is not installed", install=_INSTALL
                )
        return Availability(available=True, version=installed_version("coremltools"))

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> CoreMLModel:
        """Read the program and its weights."""
        from edge_runtime.runtimes.mil.program import read_program

        function = read_program(path)
        try:
            import torch

            from edge_runtime.runtimes.mil.interpreter import Interpreter
        except ImportError as error:
            raise BackendUnavailable(f"Core ML: {error}; {_INSTALL}") from None
        torch.set_num_threads(threads)
        return CoreMLModel(Interpreter(function), variant)


class CoreMLModel:
    """One MIL program."""

    def __init__(self, interpreter: Any, variant: Variant) -> None:
        self.interpreter = interpreter
        self._inputs = variant.inputs
        self._outputs = variant.outputs
        for kind, names, specs in (
            ("inputs", interpreter.input_names, variant.inputs),
            ("outputs", interpreter.output_names, variant.outputs),
        ):
            recorded = [spec.name for spec in specs]
            if names != recorded:
                raise ModelLoadError(
                    f"{variant.id}: the package's {kind} are {names}, recorded are {recorded}"
                )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's inputs, found to be the package's."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's outputs, found to be the package's."""
        return self._outputs

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference."""
        for spec, array in zip(self._inputs, inputs, strict=True):
            spec.check(array)
        named = {spec.name: array for spec, array in zip(self._inputs, inputs, strict=True)}
        answer = self.interpreter.run(named)
        arrays = []
        for spec in self._outputs:
            array = answer[spec.name]
            if array.shape != spec.shape:
                raise TensorError(f"output {spec.name!r} has shape {list(array.shape)}")
            arrays.append(array.astype(spec.dtype, copy=False))
        return arrays

    def close(self) -> None:
        """Drop the program."""
        self.interpreter = None
