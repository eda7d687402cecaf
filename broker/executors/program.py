"""A ``torch.export`` program from encoded images to ranked labels.

The one module of the broker that imports torch, and only inside its functions: the worker
process and the inline executor use it, the front process never does.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.executors.base import Device, ImageInput
from broker.models.servable import OpenedServable
from edge_runtime.contract import preprocess
from edge_runtime.contract.errors import (
    BackendUnavailable,
    BrokerFault,
    ConfigError,
    InferenceError,
    ManifestError,
    ModelLoadError,
    NearfarError,
    TensorError,
)
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    ReferenceRecord,
    decode_reference_record,
)
from edge_runtime.contract.tasks.classification import Prediction, postprocess
from edge_runtime.contract.tensors import pack_image

__all__ = ["TorchProgram", "pick_device", "use_threads"]

_LOG = logging.getLogger(__name__)


def _no_progress() -> None:
    """Nobody watches."""


class TorchProgram:
    """One servable in memory. Not thread-safe: one caller at a time."""

    def __init__(self, servable: OpenedServable, module: Any, device: str) -> None:
        self._servable = servable
        self._module = module
        self._device = device

    @classmethod
    def load(cls, servable: OpenedServable, device: str) -> TorchProgram:
        """Load ``model.pt2`` onto ``cpu`` or ``cuda`` and try it on one and two images.

        Raises ``BackendUnavailable`` without torch, ``ManifestError`` when the record inside
        the file is not what the manifest says, and ``ModelLoadError``.
        """
        torch = _import_torch()
        name = servable.manifest.name
        extra_files = {REFERENCE_RECORD_NAME: ""}
        try:
            with _quiet_torch():
                exported = torch.export.load(servable.program_path, extra_files=extra_files)
        except Exception as error:  # zip, schema and C++ errors of many types
            raise ModelLoadError(
                f"torch cannot load the program of {name!r} ({_first_line(error)}): "
                "export it again with the torch this broker has"
            ) from None
        _check_record(servable, extra_files[REFERENCE_RECORD_NAME])
        try:
            program = cls(servable, _on_device(exported, device), device)
            program._try_out()
        except NearfarError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{name!r} loads but does not run on {device} ({_first_line(error)})"
            ) from None
        return program

    def _try_out(self) -> None:
        """Zeros through the model at batch 1 and 2: shapes, dtype and the batch axis."""
        spec = self._servable.manifest.model.inputs[0]
        for batch in (1, 2):
            try:
                scores = self._forward(np.zeros((batch, *spec.shape[1:]), dtype=spec.dtype))
            except InferenceError as error:
                raise ModelLoadError(
                    f"{self._servable.manifest.name!r} does not take a batch of {batch} "
                    f"({error.detail}): export it with a dynamic batch axis"
                ) from None
            expected = (batch, self._servable.task.classes)
            if scores.shape != expected:
                raise ModelLoadError(
                    f"{self._servable.manifest.name!r} gives {list(scores.shape)} for a batch "
                    f"of {batch}; its manifest says {list(expected)}"
                )

    def _forward(self, array: NDArray[np.generic]) -> NDArray[np.float32]:
        """``[batch, ...]`` to float32 ``[batch, classes]``. Raises ``InferenceError``."""
        import torch

        try:
            with torch.inference_mode():
                answer = self._module(torch.from_numpy(array).to(self._device))
                if isinstance(answer, tuple | list) and len(answer) == 1:
                    answer = answer[0]
                if not isinstance(answer, torch.Tensor):
                    raise InferenceError("the model does not give exactly one tensor")
                return answer.float().cpu().numpy()
        except torch.AcceleratorError:
            raise  # the device context is broken: only a new process mends that
        except (RuntimeError, AssertionError) as error:
            raise InferenceError(f"the model failed: {_first_line(error)}") from None

    def run(
        self, batch: Sequence[ImageInput], progress: Callable[[], None] = _no_progress
    ) -> list[tuple[Prediction, ...] | NearfarError]:
        """Answer a batch; an image that cannot be used leaves its error in its place.

        ``progress`` is called after each image and after the model: signs of life.
        """
        results: list[tuple[Prediction, ...] | NearfarError] = []
        arrays: list[NDArray[np.float32]] = []
        rows: list[int] = []
        for item in batch:
            try:
                arrays.append(self._prepare(item.image))
                rows.append(len(results))
                results.append(())
            except NearfarError as error:
                results.append(error)
            except Exception:
                _LOG.exception("pre-processing failed in a way nobody foresaw")
                results.append(BrokerFault("the broker failed on this image; it is logged"))
            progress()
        if not arrays:
            return results
        try:
            scores = self._forward(np.concatenate(arrays))
        except InferenceError as error:
            for row in rows:
                results[row] = error
            return results
        progress()
        for row, image_scores in zip(rows, scores, strict=True):
            results[row] = self._rank(image_scores, batch[row].top_k)
        return results

    def _prepare(self, image: bytes) -> NDArray[np.float32]:
        """Encoded bytes to the model's input with batch 1."""
        manifest = self._servable.manifest
        pixels = preprocess.apply(manifest.preprocess, decode_image(image))
        try:
            return pack_image(pixels, manifest.model.inputs[0])
        except TensorError as error:  # the servable contradicts itself: not the image's fault
            raise InferenceError(error.detail) from None

    def _rank(
        self, scores: NDArray[np.float32], top_k: int | None
    ) -> tuple[Prediction, ...] | NearfarError:
        try:
            return postprocess(self._servable.task, scores, self._servable.labels, top_k)
        except TensorError as error:
            return InferenceError(error.detail)


def _on_device(exported: Any, device: str) -> Any:
    """The callable module, with parameters and constants of the graph on ``device``."""
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(exported, device).module()


def pick_device(wanted: Device) -> str:
    """``cuda`` where it is wanted or there, else ``cpu``. Raises ``ConfigError``."""
    torch = _import_torch()
    available = bool(torch.cuda.is_available())
    if wanted == "cuda" and not available:
        raise ConfigError("torch finds no CUDA device: pass --device cpu, or auto")
    return "cuda" if available and wanted != "cpu" else "cpu"


def use_threads(threads: int) -> None:
    """Threads of one forward pass on the CPU, for this whole process."""
    _import_torch().set_num_threads(threads)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(f"torch: {error}; pip install 'nearfar[broker]'") from None
    return torch


def _check_record(servable: OpenedServable, record: str | bytes) -> None:
    manifest = servable.manifest
    if not record:
        raise ManifestError(
            f"{manifest.model.path} holds no {REFERENCE_RECORD_NAME}: "
            "make the servable with nearfar export"
        )
    expected = ReferenceRecord(
        task=manifest.task,
        preprocess=manifest.preprocess,
        inputs=manifest.model.inputs,
        outputs=manifest.model.outputs,
    )
    if decode_reference_record(record) != expected:
        raise ManifestError(
            f"{manifest.model.path} was exported for another task, pre-processing or tensors "
            "than servable.json says: export it again"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch.export logs the traceback of a failed load; the typed error says it once."""
    log = logging.getLogger("torch.export")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.disabled = before
