"""Child process: run saved files of one format, or the reference, on every image."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import RunJob, RunResult, VariantRun
from converters.worker import report_progress
from edge_runtime.contract.errors import (
    ImageError,
    ManifestError,
    ModelLoadError,
    NearfarError,
    TensorError,
)
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    ReferenceRecord,
    canonical_json,
    decode_reference_record,
)
from edge_runtime.contract.preprocess import Preprocess, apply_uint8, normalization_table
from edge_runtime.contract.tensors import pack_image
from edge_runtime.runtimes.base import find_runtime

__all__ = ["run_files"]

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _Images:
    """Decoded images, resized once for each geometry and kept as 8-bit pixels."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._pixels: dict[bytes, list[NDArray[np.uint8]]] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def prepared(self, record: Preprocess) -> Iterator[NDArray[np.float32]]:
        """Each image as float32 ``[H, W, C]``."""
        key = canonical_json((record.resize, record.crop, record.flip_horizontal, record.color))
        if key not in self._pixels:
            self._pixels[key] = [self._read(path, record) for path in self._paths]
        table = normalization_table(record.normalization)
        for pixels in self._pixels[key]:
            yield np.stack([table[c][pixels[:, :, c]] for c in range(pixels.shape[2])], axis=2)

    @staticmethod
    def _read(path: str, record: Preprocess) -> NDArray[np.uint8]:
        try:
            return apply_uint8(record, decode_image(Path(path).read_bytes()))
        except ImageError as error:
            raise type(error)(f"image {path}: {error.detail}") from None


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def run_files(job: RunJob) -> RunResult:
    """Run everything the job names; a file that fails is reported, not raised."""
    import torch

    torch.set_num_threads(1)  # the lite interpreter is 40 times slower on two
    images = _Images(job.images)
    result = RunResult(errors={}, peak_ram_bytes={}, milliseconds={})
    if job.reference is not None or job.reference_source is not None:
        _run_reference(job, images, result)
    for item in job.variants:
        try:
            if item is job.variants[0]:
                _warm_up(item)
            _run_variant(job, item, images, result)
        except ImageError:
            raise  # the images are at fault, not the file
        except NearfarError as error:
            result.errors[item.variant.id] = (error.code, error.detail)
    return result


def _run_reference(job: RunJob, images: _Images, result: RunResult) -> None:
    import torch

    if job.reference is not None:
        program, record = load_reference(Path(job.reference))
        result.record = record
        preprocess = record.preprocess
    else:
        from converters.sources import load_source

        assert job.reference_source is not None  # noqa: S101  # checked by the caller
        source = load_source(job.reference_source)
        program, preprocess = source.module, source.preprocess
    if job.reference_preprocess is not None:
        preprocess = job.reference_preprocess

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]
        with torch.no_grad():
            answer = program(torch.from_numpy(batch))
        return np.asarray(answer.numpy()[0], dtype=np.float32)

    runs = [("reference", images, preprocess)]
    runs += [(f"reference.probe{k}", images, probe) for k, probe in enumerate(job.probes)]
    if job.golden:
        runs.append(("reference.golden", _Images(job.golden), preprocess))
    for name, chosen, prepared in runs:
        try:
            answers = _answers(name, run, chosen, prepared, len(chosen))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ModelLoadError(f"the reference does not take these images: {reason}") from error
        _save(Path(job.out_dir) / f"{name}.npy", answers)


def load_reference(path: Path) -> tuple[Any, ReferenceRecord]:
    """A ``model.pt2`` and the record inside it. Raises ``ModelLoadError``."""
    import torch

    extra = {REFERENCE_RECORD_NAME: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra).module()
    except Exception as error:  # zip, JSON and torch types
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise ModelLoadError(
            f"torch cannot load {path.name}: {type(error).__name__}: {reason}"
        ) from error
    try:
        return program, decode_reference_record(extra[REFERENCE_RECORD_NAME])
    except ManifestError as error:
        raise ModelLoadError(error.detail) from None


def _run_variant(job: RunJob, item: VariantRun, images: _Images, result: RunResult) -> None:
    variant = item.variant
    first = next(images.prepared(variant.preprocess))  # reads all: not the model's memory
    _return_memory()
    before = _resident_bytes()
    model = find_runtime(variant.format).load(Path(item.path), variant)
    spec = model.inputs[0]
    milliseconds: list[float] = []

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        tensor = pack_image(pixels, spec)
        start = time.perf_counter()
        answer = model.run([tensor])[0]
        milliseconds.append((time.perf_counter() - start) * 1e3)
        return np.asarray(answer, dtype=np.float32).reshape(-1)

    run(first)
    result.peak_ram_bytes[variant.id] = max(0, _resident_bytes() - before)
    out_dir = Path(job.out_dir)
    answers = _answers(variant.id, run, images, variant.preprocess, len(images))
    _save(out_dir / f"{variant.id}.npy", answers)
    for number, record in enumerate(job.probes):
        probed = _answers(variant.id, run, images, record, job.probe_images)
        _save(out_dir / f"{variant.id}.probe{number}.npy", probed)
    result.milliseconds[variant.id] = statistics.median(milliseconds[1:] or milliseconds)
    model.close()


def _warm_up(item: VariantRun) -> None:
    """Run the backend once, so that its own code and pools do not count as a model's."""
    model = find_runtime(item.variant.format).load(Path(item.path), item.variant)
    model.run([np.zeros(spec.shape, dtype=spec.dtype) for spec in model.inputs])
    model.close()


def _return_memory() -> None:
    """Give freed heap pages back, so that the next model's growth is all its own."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _answers(
    name: str, run: Run, images: _Images, record: Preprocess, count: int
) -> NDArray[np.float32]:
    rows = []
    for number, pixels in enumerate(images.prepared(record)):
        if number >= count:
            break
        rows.append(run(pixels))
        report_progress(f"running {name}", number + 1, count)
    if not rows:
        raise TensorError("no image to run")
    return np.stack(rows)


def _save(path: Path, answers: NDArray[np.float32]) -> None:
    with path.open("wb") as file:
        np.save(file, answers)
