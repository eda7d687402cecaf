"""ExecuTorch interpreter for ``.pte`` files (XNNPACK on CPU), the one that phones have.

ExecuTorch checks the program in a file before it runs it, not the blob inside that is
XNNPACK's: bits flipped there may end the process or hang it. A bundle's digests are checked
when it is opened, and the converter loads files in a child process of their own.
"""

from __future__ import annotations

import weakref
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

__all__ = ["ExecuTorchRuntime"]

_INSTALL = "pip install executorch"
_METHOD = "forward"
_DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32",
    11: "bool",
}  # fmt: skip
"""``ScalarType`` of ExecuTorch, where a tensor of ours may have it."""
_ERRORS = {
    "0x1": "internal error, most often a tensor outside of what XNNPACK takes",
    "0x12": "the file is empty or damaged: copy or convert it again",
    "0x14": "an operator that this ExecuTorch does not have: install a newer one",
    "0x20": "no such method, or a backend that this ExecuTorch does not have",
    "0x21": "not enough memory",
    "0x22": "the file cannot be read",
    "0x23": "the file is damaged: copy or convert it again",
    "0x30": "a delegate of another version of ExecuTorch: install the one that wrote it",
}
"""Its error codes (``runtime/core/error.h``), as far as loading a file meets them."""

_loaded: weakref.WeakSet[ExecuTorchModel] = weakref.WeakSet()
"""Models alive: each holds a pointer to the thread pool that it was loaded with."""


class ExecuTorchRuntime:
    """Runs ``.pte`` through ``executorch.runtime``; its tensors are torch's."""

    format = "executorch"

    def availability(self) -> Availability:
        """Whether ExecuTorch and torch are installed; they are not imported."""
        for package in ("torch", "executorch"):
            if find_spec(package) is None:
                return Availability(
                    available=False, reason=f"{package} is not installed", install=_INSTALL
                )
        return Availability(available=True, version=installed_version("executorch"))

    def load(self, path: Path, variant: Variant, *, threads: int = 1) -> ExecuTorchModel:
        """Load a ``.pte`` and compare its tensors with the manifest's.

        ExecuTorch has one thread pool a process: ``threads`` holds for models loaded while
        no other is open.
        """
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification
        except ImportError as error:
            raise BackendUnavailable(f"executorch: {error}; {_INSTALL}") from None
        if not _loaded and portable_lib._threadpool_get_thread_count() != threads:
            portable_lib._unsafe_reset_threadpool(threads)
        try:
            program = Runtime.get().load_program(
                path, verification=Verification.InternalConsistency
            )
            if _METHOD not in program.method_names:
                raise ModelLoadError(f"{path.name} has no method {_METHOD!r}: convert it again")
            method = program.load_method(_METHOD)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"ExecuTorch cannot load {path.name}: {_reason(error)}") from None
        return ExecuTorchModel(program, method, variant)


class ExecuTorchModel:
    """One loaded method."""

    def __init__(self, program: Any, method: Any, variant: Variant) -> None:
        self._program = program
        self._method = method
        self._inputs = variant.inputs
        self._outputs = variant.outputs
        meta = method.metadata
        given = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
        taken = [meta.output_tensor_meta(index) for index in range(meta.num_outputs())]
        _match(given, variant.inputs, variant.id, "inputs")
        _match(taken, variant.outputs, variant.id, "outputs")
        _loaded.add(self)

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
        import torch

        for spec, array in zip(self._inputs, inputs, strict=True):
            spec.check(array)
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        try:
            answers = self._method.execute(tensors)
        except RuntimeError as error:
            raise InferenceError(f"ExecuTorch failed: {_reason(error)}") from None
        if len(answers) != len(self._outputs):
            raise TensorError(f"{len(answers)} outputs, {len(self._outputs)} are recorded")
        arrays = [answer.numpy().copy() for answer in answers]
        for spec, array in zip(self._outputs, arrays, strict=True):
            spec.check(array)
        return arrays

    def close(self) -> None:
        """Drop the method and its program."""
        self._method = self._program = None
        _loaded.discard(self)


def _reason(error: Exception) -> str:
    """What ExecuTorch's error code means, or the first line of the message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    code = "0x" + lines[0].rpartition("0x")[2].strip(" :.")
    return _ERRORS.get(code, lines[0][:200])


def _match(found: list[Any], specs: tuple[TensorSpec, ...], variant_id: str, kind: str) -> None:
    """Dtypes and shapes of the file and of the manifest, in order, must agree."""
    if len(found) != len(specs):
        raise ModelLoadError(
            f"{variant_id}: the file has {len(found)} {kind}, the manifest {len(specs)}"
        )
    for info, spec in zip(found, specs, strict=True):
        dtype, shape = _DTYPES.get(info.dtype(), "another type"), tuple(info.sizes())
        if dtype != spec.dtype or shape != spec.shape:
            raise ModelLoadError(
                f"{variant_id}: the file has {dtype}{list(shape)}, the manifest records "
                f"{spec.dtype}{list(spec.shape)} for {spec.name!r}"
            )
