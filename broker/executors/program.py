"""A ``torch.export`` program from encoded images, or seeds, to answers.

The one module of the broker that imports torch, and only inside its functions: the worker
process and the inline executor use it, the front process never does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.executors.base import BatchItem, Device, LoadedModel, Outcome, TensorAnswer
from broker.models.servable import OpenedServable
from edge_runtime.contract.answer_codec import encode_answer
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
from edge_runtime.contract.pipeline import (
    Prepared,
    finish,
    prepare_image,
    prepare_seed,
    prepare_tensor,
)
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.tensors import canonical, to_little_endian
from edge_runtime.contract.wire import EncodedAnswer, decode_seed

__all__ = ["TorchProgram", "pick_device", "use_threads"]

_LOG = logging.getLogger(__name__)


_CPU_ALLOCATOR = "DefaultCPUAllocator: "
"""How torch begins to say that the system gave it no memory."""


class OutOfMemory(Exception):
    """A batch did not fit: a smaller one may."""


def _no_progress() -> None:
    """Nobody watches."""


class TorchProgram:
    """One servable in memory. Not thread-safe: one caller at a time."""

    def __init__(self, servable: OpenedServable, module: Any, device: str) -> None:
        self._servable = servable
        self._module = module
        self._device = device
        self._anchors = servable.anchors()
        self.cap: int | None = None
        """The largest batch that memory holds, once a larger one did not fit."""

    @classmethod
    def load(cls, servable: OpenedServable, device: str) -> TorchProgram:
        """Load ``model.pt2`` onto ``cpu`` or ``cuda`` and try it on one and two images.

        The file is screened from outside first: torch runs code that a hostile one brings.
        Raises ``BackendUnavailable`` without torch, ``ManifestError`` when the record inside
        the file is not what the manifest says, and ``ModelLoadError``.
        """
        torch = _import_torch()
        name = servable.manifest.name
        try:
            screen_program(servable.program_path, REFERENCE_RECORD_NAME, ModelLoadError)
        except ModelLoadError as error:
            raise ModelLoadError(f"cannot load the program of {name!r}: {error.detail}") from None
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

    @property
    def loaded(self) -> LoadedModel:
        """How it runs."""
        return LoadedModel("eager", "fp32")

    def free(self) -> None:
        """Give its memory back to the system, and to other processes on the device."""
        self._module = None
        gc.collect()
        release_memory(self._device)

    def _try_out(self) -> None:
        """Zeros through the model at batch 1 and 2: shapes, dtype and the batch axis."""
        model, name = self._servable.manifest.model, self._servable.manifest.name
        spec = model.inputs[0]
        for batch in (1, 2):
            try:
                outputs = self._forward(np.zeros((batch, *spec.shape[1:]), dtype=spec.dtype))
            except InferenceError as error:
                raise ModelLoadError(
                    f"{name!r} does not take a batch of {batch} "
                    f"({error.detail}): export it with a dynamic batch axis"
                ) from None
            given = [list(output.shape) for output in outputs]
            expected = [[batch, *output.shape[1:]] for output in model.outputs]
            if given != expected:
                raise ModelLoadError(
                    f"{name!r} gives {_shapes(given)} for a batch of {batch}; its manifest says "
                    f"{_shapes(expected)}"
                )

    def _forward(self, array: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """``[batch, ...]`` to one array an output, floats as float32.

        Raises ``InferenceError``, or ``OutOfMemory``.
        """
        import torch

        try:
            with torch.inference_mode():
                answer = self._module(torch.from_numpy(array).to(self._device))
                outputs = answer if isinstance(answer, tuple | list) else (answer,)
                if not all(isinstance(output, torch.Tensor) for output in outputs):
                    raise InferenceError("the model gives something that is no tensor")
                return [_to_numpy(output) for output in outputs]
        except MemoryError:
            raise OutOfMemory from None
        except torch.AcceleratorError:
            raise  # the device context is broken: only a new process mends that
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error):
                raise OutOfMemory from None
            raise InferenceError(f"the model failed: {_first_line(error)}") from None

    def _forward_in_parts(self, rows: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """``_forward`` in as many parts as memory asks for: a part that does not fit is halved.

        What fits is remembered as ``cap``, so that it is tried once. Raises
        ``InferenceError`` when a single row does not fit.
        """
        parts: list[list[NDArray[np.generic]]] = []
        at = 0
        while at < len(rows):
            size = min(len(rows) - at, self.cap or len(rows))
            try:
                parts.append(self._forward(np.concatenate(rows[at : at + size])))
            except OutOfMemory:
                release_memory(self._device)
                if size == 1:
                    raise InferenceError("the model needs more memory than there is") from None
                self.cap = size // 2
                continue
            at += size
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def run(
        self, batch: Sequence[BatchItem], progress: Callable[[], None] = _no_progress
    ) -> list[Outcome]:
        """Answer a batch; a request that cannot be used leaves its error in its place.

        ``progress`` is called after each input, after the model and after each answer:
        signs of life.
        """
        results: dict[int, Outcome] = {}
        prepared: dict[int, Prepared] = {}
        for row, item in enumerate(batch):
            try:
                prepared[row] = self._prepare(item)
            except NearfarError as error:
                results[row] = error
            except Exception:
                results[row] = _unforeseen("pre-processing")
            progress()
        if prepared:
            results |= self._answers(batch, prepared, progress)
        return [results[row] for row in range(len(batch))]

    def _answers(
        self,
        batch: Sequence[BatchItem],
        prepared: dict[int, Prepared],
        progress: Callable[[], None],
    ) -> dict[int, Outcome]:
        """Run what was prepared, by its place in the batch."""
        try:
            outputs = self._forward_in_parts([one.array for one in prepared.values()])
        except InferenceError as error:
            return dict.fromkeys(prepared, error)
        progress()
        answers: dict[int, Outcome] = {}
        for at, (row, one) in enumerate(prepared.items()):
            try:
                own = [output[at : at + 1] for output in outputs]
                answers[row] = self._finish(own, one, batch[row])
            except TensorError as error:  # what the model gave, not what the caller sent
                answers[row] = InferenceError(error.detail)
            except Exception:
                answers[row] = _unforeseen("post-processing")
            progress()
        return answers

    def _prepare(self, item: BatchItem) -> Prepared:
        """A body to the model's input with batch 1."""
        manifest = self._servable.manifest
        spec = manifest.model.inputs[0]
        if item.tensor:
            return prepare_tensor(manifest.preprocess, spec, item.body)
        if manifest.preprocess is None:
            return prepare_seed(spec, decode_seed(item.body))
        pixels = decode_image(item.body)
        try:
            return prepare_image(manifest.preprocess, spec, pixels)
        except TensorError as error:  # the servable contradicts itself: not the image's fault
            raise InferenceError(error.detail) from None

    def _finish(
        self, outputs: list[NDArray[np.generic]], prepared: Prepared, item: BatchItem
    ) -> EncodedAnswer | TensorAnswer:
        specs = self._servable.manifest.model.outputs
        typed = [
            output.astype(spec.dtype, copy=False)
            for output, spec in zip(outputs, specs, strict=True)
        ]
        if item.outputs is None:
            return self._task_answer(typed, prepared, item)
        return TensorAnswer(
            tensors=tuple(to_little_endian(typed[place]) for place in item.outputs),
            answer=self._task_answer(typed, prepared, item) if item.answered else None,
        )

    def _task_answer(
        self, outputs: list[NDArray[np.generic]], prepared: Prepared, item: BatchItem
    ) -> EncodedAnswer:
        specs = self._servable.manifest.model.outputs
        answer = finish(
            self._servable.task,
            [canonical(output, spec) for output, spec in zip(outputs, specs, strict=True)],
            prepared,
            labels=self._servable.labels,
            anchors=self._anchors,
            top_k=item.top_k,
        )
        return encode_answer(answer, media_type=item.media_type, colored=item.colored)


def _to_numpy(tensor: Any) -> NDArray[np.generic]:
    """On the CPU; numpy has no bfloat16, so floats become float32."""
    on_cpu = tensor.float() if tensor.is_floating_point() else tensor
    return on_cpu.cpu().numpy()


def _shapes(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"


def _unforeseen(step: str) -> BrokerFault:
    _LOG.exception("%s failed in a way nobody foresaw", step)
    return BrokerFault("the broker failed on this request; it is logged")


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


def release_memory(device: str) -> None:
    """Hand what was freed back: from torch's cache to the device, from the heap to the system."""
    if device == "cuda":
        _import_torch().cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


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
