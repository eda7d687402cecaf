"""Run a package with Core ML itself, on macOS, and compare it with the interpretation.

Core ML exists on Apple's systems only: everywhere else ``DeviceModel`` raises
``BackendUnavailable``. What goes in and out is marshalled by two functions that work, and
are tested, on any system; the call between them is the only line that is not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    InferenceError,
    ModelLoadError,
    TensorError,
)
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.mil.program import read_spec
from edge_runtime.runtimes.mil.schema import import_coremltools

__all__ = [
    "ComputeUnits",
    "DeviceComparison",
    "DeviceModel",
    "compare",
    "image_inputs",
    "prediction_arguments",
    "prediction_outputs",
]

ComputeUnits = Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"]
"""coremltools' names of the processors that Core ML may use."""


class DeviceComparison(msgspec.Struct, frozen=True, kw_only=True):
    """How far Core ML's answers are from the interpreter's, over all outputs and inputs."""

    compute_units: ComputeUnits
    inferences: int
    max_abs: float
    sqnr_db: float
    """10 log10(sum interpreted^2 / sum difference^2), at most 200."""


class DeviceModel:
    """One package, compiled and run by Core ML."""

    def __init__(self, path: Path, variant: Variant, compute_units: ComputeUnits) -> None:
        if compute_units not in get_args(ComputeUnits):
            raise ConfigError(
                f"compute units {compute_units!r}: take one of {', '.join(get_args(ComputeUnits))}"
            )
        if not _is_mac():
            raise BackendUnavailable(
                "Core ML runs on macOS only: leave compute units out to interpret the program"
            )
        coremltools = import_coremltools()
        self._images = image_inputs(read_spec(path))
        self._variant = variant
        try:
            self._model: Any = coremltools.models.MLModel(
                str(path), compute_units=coremltools.ComputeUnit[compute_units]
            )
        except Exception as error:  # coremltools raises many types
            raise ModelLoadError(f"Core ML refuses {path.name}: {error}") from error

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's inputs."""
        return self._variant.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The manifest's outputs."""
        return self._variant.outputs

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One inference."""
        arguments = prediction_arguments(self._variant.inputs, inputs, self._images)
        try:
            answer = self._model.predict(arguments)
        except Exception as error:  # Core ML's own errors come as RuntimeError and others
            raise InferenceError(f"Core ML failed: {error}") from error
        return prediction_outputs(self._variant.outputs, answer, tuple(arguments))

    def close(self) -> None:
        """Drop the model."""
        self._model = None


def _is_mac() -> bool:
    return sys.platform == "darwin"


def image_inputs(spec: Any) -> frozenset[str]:
    """Names of the inputs that a package takes as images; ``spec``: its protobuf model."""
    return frozenset(
        item.name for item in spec.description.input if item.type.WhichOneof("Type") == "imageType"
    )


def prediction_arguments(
    specs: Sequence[TensorSpec], inputs: Sequence[NDArray[np.generic]], images: frozenset[str]
) -> dict[str, Any]:
    """What ``MLModel.predict`` takes: PIL images for image inputs, arrays for the others.

    ``inputs``: arrays of ``specs``, images as uint8 ``[1, 1 or 3, H, W]``. Raises
    ``TensorError`` where they do not fit.
    """
    arguments: dict[str, Any] = {}
    for spec, array in zip(specs, inputs, strict=True):
        spec.check(array)
        if spec.name not in images:
            arguments[spec.name] = np.asarray(array, dtype=np.float32)
            continue
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[:2] not in ((1, 1), (1, 3)):
            raise TensorError(f"image {spec.name!r} must be uint8 [1, 1 or 3, H, W]")
        pixels = np.asarray(array[0], dtype=np.uint8)
        if pixels.shape[0] == 1:
            arguments[spec.name] = Image.fromarray(pixels[0], mode="L")
        else:
            arguments[spec.name] = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return arguments


def prediction_outputs(
    specs: Sequence[TensorSpec], answer: Mapping[str, Any], inputs: Sequence[str] = ()
) -> list[NDArray[np.generic]]:
    """The arrays of ``specs`` out of what ``MLModel.predict`` gives. Raises ``TensorError``.

    ``inputs``: the package's, whose names no output has (``package_name``). A classifier's
    label and dictionary are left aside.
    """
    from edge_runtime.runtimes.coreml import package_name

    arrays: list[NDArray[np.generic]] = []
    for spec in specs:
        name = package_name(spec.name, inputs)
        if name not in answer:
            raise TensorError(f"Core ML gave no {name!r}, only {', '.join(sorted(answer))}")
        array = np.asarray(answer[name])
        if array.size != np.prod(spec.shape, dtype=np.int64):
            raise TensorError(f"Core ML gave {spec.name!r} as {list(array.shape)}")
        arrays.append(np.ascontiguousarray(array.reshape(spec.shape).astype(spec.dtype)))
    return arrays


def compare(
    path: Path,
    variant: Variant,
    inputs: Sequence[Sequence[NDArray[np.generic]]],
    compute_units: ComputeUnits = "ALL",
) -> DeviceComparison:
    """Run each of ``inputs`` both ways. Raises as ``DeviceModel`` and the interpreter do."""
    from edge_runtime.runtimes.coreml import CoreMLRuntime

    device = DeviceModel(path, variant, compute_units)
    interpreted = CoreMLRuntime().load(path, variant)
    power = noise = largest = 0.0
    for arrays in inputs:
        pairs = zip(interpreted.run(arrays), device.run(arrays), strict=True)
        for expected, actual in pairs:
            difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
            power += float((np.asarray(expected, np.float64) ** 2).sum())
            noise += float((difference**2).sum())
            largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    ratio = power / noise if noise > 0 else float("inf")
    return DeviceComparison(
        compute_units=compute_units,
        inferences=len(inputs),
        max_abs=largest,
        sqnr_db=min(10.0 * float(np.log10(max(ratio, 1e-20))), 200.0),
    )
