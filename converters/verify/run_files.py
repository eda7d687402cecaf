"""Child process: run saved files of one format, or the reference, on every input."""

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
from converters.prepare import latent, tensors
from converters.verify.compare import Comparison
from converters.verify.diagnose import diagnose
from converters.verify.figures import Closeness, Finding
from converters.verify.inside import check_metadata, read_inside
from converters.verify.probes import probe
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
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec, canonical, pack_image
from edge_runtime.runtimes.base import LoadedModel, find_runtime

__all__ = [
    "EVALUATION_SEED",
    "Inputs",
    "canonical_outputs",
    "load_reference",
    "read_anchors",
    "run_files",
    "saved_answers",
]

EVALUATION_SEED = 1_000_000
"""Latents that judge a generator; far from those that calibrated it."""

_DIAGNOSED = 16
"""Images whose answers are kept to find out what is wrong."""
_DOUBT_DB = 25.0
_DOUBT_AGREEMENT = 0.97

Outputs = list[NDArray[np.generic]]
Run = Callable[[NDArray[Any]], Outputs]


class _Images:
    """Decoded images, resized once for each geometry and kept as 8-bit pixels."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._pixels: dict[bytes, list[NDArray[np.uint8]]] = {}

    def pixels(self, record: Preprocess) -> list[NDArray[np.uint8]]:
        """Each image as uint8 ``[H, W, C]``."""
        key = canonical_json((record.resize, record.crop, record.flip_horizontal, record.color))
        if key not in self._pixels:
            self._pixels[key] = [self._read(path, record) for path in self._paths]
        return self._pixels[key]

    @staticmethod
    def _read(path: str, record: Preprocess) -> NDArray[np.uint8]:
        try:
            return apply_uint8(record, decode_image(Path(path).read_bytes()))
        except ImageError as error:
            raise type(error)(f"image {path}: {error.detail}") from None


class Inputs:
    """What models of one task are fed with: images, or latents by seed."""

    def __init__(self, images: list[str], latents: int) -> None:
        self._images = _Images(images)
        self._latents = latents
        self.count = len(images) or latents

    def pixels(self, record: Preprocess) -> list[NDArray[np.uint8]]:
        """Each image as uint8 ``[H, W, C]``, before the normalization."""
        return self._images.pixels(record)

    def fed(self, record: Preprocess | None, spec: TensorSpec) -> Iterator[NDArray[Any]]:
        """Each input as ``spec`` wants it, batch 1."""
        if record is None:
            for number in range(self._latents):
                yield latent(spec, EVALUATION_SEED + number)
            return
        plain = spec.dtype == "uint8"  # the normalization is in the graph
        table = normalization_table(record.normalization)
        for pixels in self._images.pixels(record):
            if plain:
                yield pack_image(pixels, spec)
                continue
            channels = range(pixels.shape[2])
            values = np.stack([table[c][pixels[:, :, c]] for c in channels], axis=2)
            yield pack_image(values, spec)


def read_anchors(path: str | None) -> NDArray[np.float32] | None:
    """The anchors of a detector, float32 ``[N, 4]``."""
    if path is None:
        return None
    return np.frombuffer(Path(path).read_bytes(), dtype="<f4").reshape(-1, 4)


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def run_files(job: RunJob) -> RunResult:
    """Run everything the job names; a file that fails is reported, not raised."""
    import torch

    torch.set_num_threads(1)  # the lite interpreter is 40 times slower on two
    inputs = Inputs(job.images, job.latents)
    result = RunResult(errors={}, peak_ram_bytes={}, milliseconds={})
    if job.reference is not None or job.reference_source is not None:
        _run_reference(job, inputs, result)
    for item in job.variants:
        try:
            if item is job.variants[0]:
                _warm_up(item)
            _run_variant(job, item, inputs, result)
        except ImageError:
            raise  # the images are at fault, not the file
        except NearfarError as error:
            result.errors[item.variant.id] = (error.code, error.detail)
    return result


# The reference ---------------------------------------------------------------------------


def _run_reference(job: RunJob, inputs: Inputs, result: RunResult) -> None:
    import torch

    if job.reference is not None:
        program, record = load_reference(Path(job.reference))
        result.record = record
        preprocess, spec = record.preprocess, record.inputs[0]
    else:
        from converters.sources import load_source

        assert job.reference_source is not None  # noqa: S101  # checked by the caller
        source = load_source(job.reference_source)
        program, preprocess, spec = source.module, source.preprocess, job.reference_inputs[0]
    if job.reference_preprocess is not None:
        preprocess = job.reference_preprocess

    def run(batch: NDArray[Any]) -> Outputs:
        with torch.no_grad():
            answers = tensors(program(torch.from_numpy(batch)))
        return [np.asarray(answer.numpy(), dtype=np.float32) for answer in answers]

    runs = [("reference", inputs, preprocess)]
    runs += [(f"probe{k}", inputs, probe) for k, probe in enumerate(job.probes)]
    for name, chosen, prepared in runs:
        with _reference_fault():
            _save_answers(job, name, chosen.fed(prepared, spec), chosen.count, run)
    if job.golden:
        with _reference_fault():
            _save_answers(job, "golden", _golden(job, preprocess, spec), len(job.golden), run)


@contextlib.contextmanager
def _reference_fault() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"the reference does not take these inputs: {reason}") from error


def _golden(
    job: RunJob, record: Preprocess | None, spec: TensorSpec
) -> Iterator[NDArray[np.float32]]:
    if record is not None:
        yield from Inputs(job.golden, 0).fed(record, spec)
        return
    for name in job.golden:
        values = np.frombuffer(Path(name).read_bytes(), dtype="<f4")
        if values.size != int(np.prod(spec.shape)):
            raise ManifestError(f"{name} is no latent of shape {list(spec.shape)}")
        yield values.reshape(spec.shape)


def _save_answers(
    job: RunJob, name: str, fed: Iterator[NDArray[Any]], count: int, run: Run
) -> None:
    """Write ``<name>.<output>.npy``, float32 ``[count, ...]``."""
    files: list[NDArray[np.float32]] = []
    for number, batch in enumerate(fed):
        answers = run(batch)
        if not files:
            files = [
                np.lib.format.open_memmap(
                    Path(job.out_dir) / f"{name}.{k}.npy",
                    mode="w+",
                    dtype=np.float32,
                    shape=(count, *answer.shape[1:]),
                )
                for k, answer in enumerate(answers)
            ]
        for file, answer in zip(files, answers, strict=True):
            file[number] = answer[0]
        report_progress(f"running {name}", number + 1, count)
    if not files:
        raise TensorError("no input to run")


def load_reference(path: Path) -> tuple[Any, ReferenceRecord]:
    """A ``model.pt2``, screened, and the record inside it. Raises ``ModelLoadError``."""
    import torch

    screen_program(path, REFERENCE_RECORD_NAME, ModelLoadError)
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


# The variants ----------------------------------------------------------------------------


def _run_variant(job: RunJob, item: VariantRun, inputs: Inputs, result: RunResult) -> None:
    variant = item.variant
    spec = variant.inputs[0]
    first = next(inputs.fed(variant.preprocess, spec))  # reads all: not the model's memory
    _return_memory()
    before = _resident_bytes()
    model = find_runtime(variant.format).load(Path(item.path), variant)
    milliseconds: list[float] = []

    def run(batch: NDArray[Any]) -> Outputs:
        start = time.perf_counter()
        answers = model.run([batch])
        milliseconds.append((time.perf_counter() - start) * 1e3)
        return canonical_outputs(model, answers)

    run(first)
    result.peak_ram_bytes[variant.id] = max(0, _resident_bytes() - before)
    reference = saved_answers(Path(job.out_dir))
    comparison = Comparison(job.task, read_anchors(job.anchors))
    top1: list[int] = []
    sample: list[Outputs] = []
    for number, batch in enumerate(inputs.fed(variant.preprocess, spec)):
        answers = run(batch)
        if number < _DIAGNOSED:
            sample.append(answers)
        comparison.add([one[number : number + 1] for one in reference], answers)
        if isinstance(job.task, ClassificationTask):
            top1.append(int(np.asarray(answers[0]).reshape(-1).argmax()))
        report_progress(f"running {variant.id}", number + 1, inputs.count)
    figures = comparison.result()
    result.figures[variant.id] = figures
    result.per_input[variant.id] = comparison.per_input()
    result.top1[variant.id] = top1
    if figures.finite and figures.sqnr_db_mean is not None and job.probes:
        result.probe_db[variant.id] = _probe(job, item, inputs, run, reference)
    result.milliseconds[variant.id] = statistics.median(milliseconds[1:] or milliseconds)
    model.close()
    _inspect(job, item, result)
    if sample and _doubtful(figures):
        given = [np.concatenate(one).astype(np.float32) for one in zip(*sample, strict=True)]
        wanted = [np.array(one[: len(sample)]) for one in reference]
        found = diagnose(job.task, wanted, given, read_anchors(job.anchors))
        result.findings.setdefault(variant.id, []).extend(found)


def _doubtful(figures: Closeness) -> bool:
    """Far enough from the reference to ask why; the gates decide whether it passes."""
    mean = figures.sqnr_db_mean
    return (mean is not None and mean < _DOUBT_DB) or (
        figures.agreement is not None and figures.agreement < _DOUBT_AGREEMENT
    )


def canonical_outputs(model: LoadedModel, answers: list[NDArray[np.generic]]) -> Outputs:
    """A model's answers in the reference's axis order."""
    return [canonical(answer, spec) for answer, spec in zip(answers, model.outputs, strict=True)]


def saved_answers(folder: Path) -> list[NDArray[np.float32]]:
    """The reference's answers, one array an output, ``[inputs, ...]``."""
    files = sorted(folder.glob("reference.*.npy"))
    return [np.load(path, mmap_mode="r") for path in files]


def _probe(
    job: RunJob,
    item: VariantRun,
    inputs: Inputs,
    run: Run,
    reference: list[NDArray[np.float32]],
) -> list[float]:
    """Mean SQNR of the first output on the first images, under each other pre-processing."""
    return probe(
        [inputs.fed(record, item.variant.inputs[0]) for record in job.probes],
        lambda batch: np.asarray(run(batch)[0], np.float32),
        reference[0][: job.probe_images],
    )


def _inspect(job: RunJob, item: VariantRun, result: RunResult) -> None:
    """What the file itself says: how its weights are stored, and the record inside."""
    from converters.verify.census import find_census

    try:
        census = find_census(item.variant.format, Path(item.path))
        inside = read_inside(item.variant.format, Path(item.path))
    except NearfarError as error:
        found = result.findings.setdefault(item.variant.id, [])
        found.append(Finding(name="unreadable", detail=error.detail))
        return
    if census is not None:
        result.quantized_share[item.variant.id] = census.quantized_share
    found = check_metadata(inside, item.variant, job.task, tuple(job.labels))
    result.findings.setdefault(item.variant.id, []).extend(found)


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
