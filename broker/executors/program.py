"""A ``torch.export`` program from encoded images, or seeds, to answers.

The one module of the broker that imports torch, and only inside its functions: the worker
process and the inline executor use it, the front process never does.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.executors.base import (
    BatchItem,
    LoadedModel,
    Outcome,
    Precision,
    RuntimeName,
    TensorAnswer,
)
from broker.executors.decoding import prepare_pixels
from broker.executors.device import (
    decode_threads,
    forget_traces,
    import_torch,
    release_memory,
)
from broker.executors.runtimes.base import (
    Affine,
    ModelRuntime,
    OutOfMemory,
    affine_of,
    first_line,
)
from broker.executors.runtimes.calibration import read_photos
from broker.executors.runtimes.choose import choose_runtime
from broker.models.servable import OpenedServable
from edge_runtime.contract.answer_codec import encode_answer
from edge_runtime.contract.errors import (
    BrokerFault,
    InferenceError,
    ManifestError,
    ModelLoadError,
    NearfarError,
    TensorError,
)
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    ReferenceRecord,
    decode_reference_record,
)
from edge_runtime.contract.pipeline import (
    Prepared,
    finish,
    prepare_seed,
    prepare_tensor,
)
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.tensors import canonical, to_little_endian
from edge_runtime.contract.wire import EncodedAnswer, decode_seed

__all__ = ["Begun", "TorchProgram", "normalization_of"]

_LOG = logging.getLogger(__name__)


_PART = 4
"""Images of one forward pass on the CPU while more of the batch decode: larger ones gain
nothing there, and the decoders then work beside the model."""


Begun = Iterator[Prepared | NearfarError]
"""Inputs of a batch as they become ready, in its order."""


def _no_progress() -> None:
    """Nobody watches."""


class TorchProgram:
    """One servable in memory. Not thread-safe: one caller at a time."""

    def __init__(
        self, servable: OpenedServable, runtime: ModelRuntime, affine: Affine | None, device: str
    ) -> None:
        manifest = servable.manifest
        self._servable = servable
        self._runtime: ModelRuntime = runtime
        self._affine = affine
        self._device = device
        self._anchors = servable.anchors()
        self._spec = manifest.model.inputs[0]
        self._pixel_spec = msgspec.structs.replace(self._spec, dtype="uint8")
        self._decoders = ThreadPoolExecutor(decode_threads(), thread_name_prefix="decode")
        self.cap: int | None = None
        """The largest batch that memory holds, once a larger one did not fit."""

    @classmethod
    def load(
        cls,
        servable: OpenedServable,
        device: str,
        *,
        runtime: RuntimeName = "auto",
        precision: Precision = "auto",
        threads: int = 1,
        known: LoadedModel | None = None,
        calibration: str | None = None,
    ) -> TorchProgram:
        """Load ``model.pt2`` onto ``cpu`` or ``cuda`` and try it on one and two images.

        ``runtime``, ``precision``, ``known``: see ``choose_runtime``. ``calibration``: the
        folder of photos that int8 is learned on.

        The file is screened from outside first: torch runs code that a hostile one brings.
        Raises ``BackendUnavailable`` without torch, ``ManifestError`` when the record inside
        the file is not what the manifest says, and ``ModelLoadError``.
        """
        torch = import_torch()
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
                f"torch cannot load the program of {name!r} ({first_line(error)}): "
                "export it again with the torch this broker has"
            ) from None
        _check_record(servable, extra_files[REFERENCE_RECORD_NAME])
        spec, affine = servable.manifest.model.inputs[0], normalization_of(servable)
        try:
            chosen = choose_runtime(
                exported,
                spec,
                affine,
                device,
                runtime=runtime,
                precision=precision,
                threads=threads,
                known=known,
                photos=partial(read_photos, servable, calibration),
            )
            program = cls(servable, chosen, affine, device)
            program._try_out()
        except NearfarError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{name!r} loads but does not run on {device} ({first_line(error)})"
            ) from None
        return program

    @property
    def loaded(self) -> LoadedModel:
        """How it runs."""
        return self._runtime.info

    def free(self) -> None:
        """Give its memory back to the system, and to other processes on the device."""
        self._runtime.free()
        self._decoders.shutdown(wait=False)
        forget_traces()
        gc.collect()
        release_memory(self._device)

    def _try_out(self) -> None:
        """Zeros through the model at batch 1 and 2: shapes, dtype and the batch axis."""
        model, name = self._servable.manifest.model, self._servable.manifest.name
        spec = model.inputs[0]
        for batch in (1, 2):
            try:
                zeros = np.zeros((batch, *spec.shape[1:]), dtype=spec.dtype)
                outputs = self._runtime.forward(zeros, None)
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

    def _forward(self, rows: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """Rows of one dtype, in as many parts as memory asks for: what does not fit is halved.

        What fits is remembered as ``cap``, so that it is tried once. Raises
        ``InferenceError``, also when a single row does not fit.
        """
        # An input of pixels has its normalization inside the model: no affine then.
        affine = self._affine if rows[0].dtype == np.uint8 else None
        parts: list[list[NDArray[np.generic]]] = []
        at = 0
        while at < len(rows):
            size = min(len(rows) - at, self.cap or len(rows))
            try:
                parts.append(self._runtime.forward(np.concatenate(rows[at : at + size]), affine))
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

    def begin(self, batch: Sequence[BatchItem]) -> Begun:
        """Decode the images of a batch on threads, behind those that decode already.

        What is given back is for ``run``, once.
        """
        return self._decoders.map(self._prepare_safely, batch)

    def run(
        self,
        batch: Sequence[BatchItem],
        progress: Callable[[], None] = _no_progress,
        begun: Begun | None = None,
    ) -> list[Outcome]:
        """Answer a batch; a request that cannot be used leaves its error in its place.

        Images decode on threads; on the CPU the first of them run through the model
        meanwhile. ``progress`` is called after each input, after each run of the model and
        after each answer: signs of life. ``begun``: what ``begin`` gave for this batch.
        """
        decodes = len(batch) > 1 and not all(item.tensor for item in batch)
        given = begun
        if given is None and decodes:
            given = self.begin(batch)
        elif given is None:  # waking a thread takes longer than looking at a tensor
            given = map(self._prepare_safely, batch)
        results: dict[int, Outcome] = {}
        prepared: dict[int, Prepared] = {}
        part = _PART if decodes and self._device == "cpu" else len(batch)
        for row, one in enumerate(given):
            progress()
            if isinstance(one, NearfarError):
                results[row] = one
            else:
                prepared[row] = one
            if len(prepared) == part and row + 1 < len(batch):
                results |= self._answers(batch, prepared, progress)
                prepared = {}
        if prepared:
            results |= self._answers(batch, prepared, progress)
        return [results[row] for row in range(len(batch))]

    def _answers(
        self,
        batch: Sequence[BatchItem],
        prepared: dict[int, Prepared],
        progress: Callable[[], None],
    ) -> dict[int, Outcome]:
        """Run what was prepared, by its place in the batch: pixels together, then tensors."""
        answers: dict[int, Outcome] = {}
        for dtype in {one.array.dtype for one in prepared.values()}:
            alike = {row: one for row, one in prepared.items() if one.array.dtype == dtype}
            try:
                outputs = self._forward([one.array for one in alike.values()])
            except InferenceError as error:
                if len(alike) == 1:
                    answers |= dict.fromkeys(alike, error)
                    continue
                for row, one in alike.items():  # so that the others need not fail with it
                    answers |= self._answers(batch, {row: one}, progress)
                continue
            progress()
            typed = [
                output.astype(spec.dtype, copy=False)
                for output, spec in zip(outputs, self._servable.manifest.model.outputs, strict=True)
            ]
            for at, (row, one) in enumerate(alike.items()):
                answers[row] = self._finish_safely(typed, at, one, batch[row])
                progress()
        return answers

    def _finish_safely(
        self, outputs: list[NDArray[np.generic]], at: int, prepared: Prepared, item: BatchItem
    ) -> Outcome:
        try:
            return self._finish([output[at : at + 1] for output in outputs], prepared, item)
        except TensorError as error:  # what the model gave, not what the caller sent
            return InferenceError(error.detail)
        except Exception:
            return _unforeseen("post-processing")

    def _prepare_safely(self, item: BatchItem) -> Prepared | NearfarError:
        try:
            return self._prepare(item)
        except NearfarError as error:
            return error
        except Exception:
            return _unforeseen("pre-processing")

    def _prepare(self, item: BatchItem) -> Prepared:
        """A body to the model's input with batch 1; an image to pixels, not yet normalized."""
        record, spec = self._servable.manifest.preprocess, self._spec
        if item.tensor:
            return prepare_tensor(record, spec, item.body)
        if record is None:
            return prepare_seed(spec, decode_seed(item.body))
        return prepare_pixels(record, self._pixel_spec, item.body)

    def _finish(
        self, outputs: list[NDArray[np.generic]], prepared: Prepared, item: BatchItem
    ) -> EncodedAnswer | TensorAnswer:
        if item.outputs is None:
            return self._task_answer(outputs, prepared, item)
        return TensorAnswer(
            tensors=tuple(to_little_endian(outputs[place]) for place in item.outputs),
            answer=self._task_answer(outputs, prepared, item) if item.answered else None,
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


def normalization_of(servable: OpenedServable) -> Affine | None:
    """What the pixels of an image still need; None: nothing, or no image goes in."""
    record, spec = servable.manifest.preprocess, servable.manifest.model.inputs[0]
    if record is None or spec.dtype != "float32":
        return None
    return affine_of(record.normalization, spec)


def _shapes(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"


def _unforeseen(step: str) -> BrokerFault:
    _LOG.exception("%s failed in a way nobody foresaw", step)
    return BrokerFault("the broker failed on this request; it is logged")


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
