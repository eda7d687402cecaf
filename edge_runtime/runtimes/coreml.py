"""Core ML programs: interpreted anywhere, or run by Core ML itself on a Mac.

Interpretation (``edge_runtime.runtimes.mil``) gives the program's meaning in fp32, rounded
to fp16 where the program says so; needed are PyTorch and the protobuf schema that
coremltools carries. On macOS, ``CoreMLRuntime(compute_units=...)`` runs the package with
Core ML instead, on the chosen processors: what the Neural Engine makes of it shows only
there. ``edge_runtime.runtimes.mil.device.compare`` puts the two side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import BackendUnavailable, ModelLoadError, TensorError
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import Availability, LoadedModel, installed_version

if TYPE_CHECKING:
    from edge_runtime.runtimes.mil.device import ComputeUnits

__all__ = ["CLASSIFIER_OUTPUTS", "CoreMLModel", "CoreMLRuntime", "check_ends", "package_name"]

_INSTALL = "pip install 'nearfar[convert]'"

CLASSIFIER_OUTPUTS = ("classLabel", "classLabel_probs")
"""What a classifier answers beside the tensors of its task."""


class CoreMLRuntime:
    """Runs ``.mlpackage``."""

    format = "coreml"

    def __init__(self, *, compute_units: ComputeUnits | None = None) -> None:
        self._compute_units = compute_units

    def availability(self) -> Availability:
        """Whether coremltools and torch are installed; they are not imported."""
        for package in ("torch", "coremltools"):
            if find_spec(package) is None:
                return Availability(
                    available=False, reason=f"{package} is not installed", install=_INSTALL
                )
        return Availability(available=True, version=installed_version("coremltools"))

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> LoadedModel:
        """Read the program and its weights, or have Core ML compile them.

        Raises ``BackendUnavailable`` (also for compute units anywhere but on macOS) or
        ``ModelLoadError``.
        """
        if self._compute_units is not None:
            from edge_runtime.runtimes.mil.device import DeviceModel

            return DeviceModel(path, variant, self._compute_units)
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
    """One MIL program, interpreted."""

    def __init__(self, interpreter: Any, variant: Variant) -> None:
        self._interpreter = interpreter
        self._inputs = variant.inputs
        self._outputs = variant.outputs
        check_ends(variant, interpreter.input_names, interpreter.output_names)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's inputs, found to be the package's."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's outputs, found to be the package's."""
        return self._outputs

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference; 8-bit pixels stand for an image input."""
        named = {}
        for spec, array in zip(self._inputs, inputs, strict=True):
            spec.check(array)
            named[spec.name] = array
        answer = self._interpreter.run(named)
        arrays = []
        for spec in self._outputs:
            array = answer[package_name(spec.name, named)]
            if array.shape != spec.shape:
                raise TensorError(f"output {spec.name!r} has shape {list(array.shape)}")
            arrays.append(array.astype(spec.dtype, copy=False))
        return arrays

    def close(self) -> None:
        """Drop the program."""
        self._interpreter = None


def package_name(output: str, inputs: Iterable[str]) -> str:
    """An output's name inside a package: Core ML lets none have that of an input.

    An image from an image is ``image`` in the manifest and ``image_out`` in the package.
    """
    return f"{output}_out" if output in set(inputs) else output


def check_ends(variant: Variant, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise ``ModelLoadError`` unless a package takes and gives what ``variant`` records.

    A classifier's label and dictionary may come on top.
    """
    tensors = [name for name in outputs if name not in CLASSIFIER_OUTPUTS]
    recorded_inputs = [spec.name for spec in variant.inputs]
    recorded_outputs = [package_name(spec.name, recorded_inputs) for spec in variant.outputs]
    for kind, names, recorded in (
        ("inputs", list(inputs), recorded_inputs),
        ("outputs", tensors, recorded_outputs),
    ):
        if names != recorded:
            raise ModelLoadError(
                f"{variant.id}: the package's {kind} are {names}, recorded are {recorded}"
            )
