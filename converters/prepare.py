"""First stage of a conversion: the fp32 reference, golden answers, calibration inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import (
    Prepared,
    PrepareJob,
    Rounded,
    RoundJob,
    Sensitivity,
    SensitivityJob,
)
from converters.ready import EQUALIZED
from converters.sources import Source, load_source
from converters.sources.fingerprint import fingerprint, require_same
from converters.tasks import ANCHORS_FILE, class_count, describe_model
from converters.verify.metrics import chance_probability
from converters.worker import report_progress
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    CalibrationError,
    ConfigError,
    ImageError,
    SourceError,
)
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    ReferenceRecord,
    canonical_json,
)
from edge_runtime.contract.preprocess import Preprocess, apply, normalization_table
from edge_runtime.contract.tasks import Task
from edge_runtime.contract.tasks.generation import latent_from_seed
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import installed_version

__all__ = [
    "CALIBRATION_SEED",
    "export_reference",
    "golden_stride",
    "latent",
    "load_pixels",
    "order_layers",
    "prepare",
    "round_for_int8",
    "tensors",
    "thin",
]

CALIBRATION_SEED = 1000
"""Latents that calibrate a generator have this seed and the following ones."""
_CHANCE_P = 0.01
_MIN_LABELED = 20
_LIGHT = 0.01
_SENSITIVITY_INPUTS = 8


def load_pixels(record: Preprocess, path: Path, role: str) -> NDArray[np.float32]:
    """One image, pre-processed: float32 ``[1, C, H, W]``; names the file when it is bad."""
    try:
        image = apply(record, decode_image(path.read_bytes()))
    except ImageError as error:
        raise type(error)(f"{role} image {path}: {error.detail}") from None
    return np.ascontiguousarray(image.transpose(2, 0, 1))[None]


def latent(spec: TensorSpec, seed: int) -> NDArray[np.float32]:
    """A generator's input for ``seed``, of the shape of ``spec``."""
    count = int(np.prod(spec.shape))
    return latent_from_seed(seed, count).reshape(spec.shape)


def tensors(answer: Any) -> list[Any]:
    """What a module answered as a list of tensors."""
    return list(answer) if isinstance(answer, tuple | list) else [answer]


def golden_stride(outputs: tuple[TensorSpec, ...]) -> int:
    """Keep every how many-th number, so that no golden output has too many."""
    largest = max(int(np.prod(spec.shape)) for spec in outputs)
    return -(-largest // limits.MAX_GOLDEN_VALUES)


def thin(output: NDArray[np.floating], stride: int) -> NDArray[np.float32]:
    """The numbers of one output that a golden vector keeps, float32."""
    return np.asarray(output, dtype=np.float32).reshape(-1)[::stride]


def prepare(job: PrepareJob) -> Prepared:
    """Build, check, export and run the source once.

    Raises the errors of ``load_source`` and ``CalibrationError``, ``SourceError``.
    """
    report_progress("building the model")
    source = load_source(job.source)
    found = fingerprint(source.module)
    model = describe_model(source, job.source)
    labels = _labels(source, model.task)
    out_dir = Path(job.out_dir)
    if source.detection is not None:
        anchors = np.asarray(source.detection.anchors, dtype="<f4")
        (out_dir / ANCHORS_FILE).write_bytes(anchors.tobytes())
    report_progress("exporting the fp32 reference")
    record = ReferenceRecord(
        task=model.task, preprocess=source.preprocess, inputs=model.inputs, outputs=model.outputs
    )
    program = export_reference(source.module, record, out_dir / "model.pt2")
    stride = golden_stride(model.outputs)
    for number, name in enumerate(job.golden):
        report_progress("answering golden inputs", number + 1, len(job.golden))
        _answer_golden(program, source, model.inputs[0], Path(name), number, stride, out_dir)
    accuracy = None
    if job.calibration or job.calibration_latents or job.calibration_noise:
        accuracy = _write_calibration(job, source, program, model.inputs[0], out_dir)
    return Prepared(
        task=model.task,
        preprocess=source.preprocess,
        labels=list(labels) if labels is not None else None,
        labels_given=source.labels is not None,
        golden_stride=stride,
        inputs=model.inputs,
        outputs=model.outputs,
        source_sha256=source.source_sha256,
        weights=source.weights,
        weights_sha256=source.weights_sha256,
        tools={name: installed_version(name) for name in ("torch", "torchvision")},
        calibration_accuracy=accuracy,
        fingerprint=found,
    )


def _labels(source: Source, task: Task) -> tuple[str, ...] | None:
    classes = class_count(task)
    if classes is None:
        return None
    if source.labels is None:
        return tuple(f"class {index}" for index in range(classes))
    if len(source.labels) != classes:
        raise ConfigError(
            f"the model has {classes} classes and there are {len(source.labels)} labels: "
            "check --labels"
        )
    return source.labels


def _answer_golden(
    program: Any,
    source: Source,
    spec: TensorSpec,
    path: Path,
    number: int,
    stride: int,
    out_dir: Path,
) -> None:
    import torch

    if source.preprocess is None:
        values = latent(spec, number)
        path.write_bytes(values.astype("<f4").tobytes())
    else:
        values = load_pixels(source.preprocess, path, "golden")
    with torch.no_grad():
        answers = tensors(program(torch.from_numpy(values)))
    for index, answer in enumerate(answers):
        kept = thin(answer.numpy(), stride)
        (out_dir / f"{path.stem}.{index}.f32").write_bytes(kept.astype("<f4").tobytes())


def export_reference(module: Any, record: ReferenceRecord, path: Path) -> Any:
    """``torch.export`` with a dynamic batch axis, saved with ``record`` inside.

    Returns the program as read back from ``path``, found equal to ``module`` on random
    input. Raises ``SourceError`` when the model cannot be exported.
    """
    import torch

    shape = record.inputs[0].shape[1:]
    example = torch.zeros((2, *shape))
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module,
                (example,),
                dynamic_shapes=(({0: torch.export.Dim("batch", min=1, max=limits.MAX_BATCH)}),),
            )
    except Exception as error:  # torch.export raises many types
        raise SourceError(
            f"torch.export cannot export the model with a dynamic batch: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    for node in exported.graph.nodes:  # no paths of the machine that exported it
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    torch.export.save(
        exported,
        str(path),
        extra_files={REFERENCE_RECORD_NAME: canonical_json(record).decode()},
    )
    program = torch.export.load(str(path)).module()
    generator = torch.Generator().manual_seed(0)
    check = torch.rand((3, *shape), generator=generator)
    with torch.no_grad():
        for own, read in zip(tensors(module(check)), tensors(program(check)), strict=True):
            difference = float((read - own).abs().max())
            scale = float(own.abs().max()) or 1.0
            if not difference <= 1e-4 * scale:
                raise SourceError(
                    f"the exported program differs from the model by {difference:.2e}"
                )
    return program


def _write_calibration(
    job: PrepareJob, source: Source, program: Any, spec: TensorSpec, out_dir: Path
) -> float | None:
    """Save the calibration inputs; check labels against the model when there are any."""
    count = len(job.calibration) or job.calibration_latents or job.calibration_noise
    inputs = np.lib.format.open_memmap(
        out_dir / "calibration.npy", mode="w+", dtype=np.float32, shape=(count, *spec.shape[1:])
    )
    if source.preprocess is None:
        for number in range(count):
            inputs[number] = latent(spec, CALIBRATION_SEED + number)[0]
        inputs.flush()
        return None
    if job.calibration_noise:
        generator = np.random.default_rng(CALIBRATION_SEED)
        table = normalization_table(source.preprocess.normalization)
        for number in range(count):
            pixels = generator.integers(0, 256, spec.shape[1:])
            inputs[number] = np.stack(
                [row[plane] for row, plane in zip(table, pixels, strict=True)]
            )
        inputs.flush()
        return None
    for number, name in enumerate(job.calibration):
        report_progress("reading calibration images", number + 1, count)
        inputs[number] = load_pixels(source.preprocess, Path(name), "calibration")[0]
    inputs.flush()
    if not job.calibration_classes or source.task != "classification":
        return None
    return _labeled_share(job, program, inputs)


def _labeled_share(job: PrepareJob, program: Any, pixels: NDArray[np.float32]) -> float:
    """Share of labeled calibration images that the model gets right; refuses chance."""
    import torch

    right, classes = 0, 0
    for number, (name, wanted) in enumerate(
        zip(job.calibration, job.calibration_classes, strict=True)
    ):
        with torch.no_grad():
            logits = program(torch.from_numpy(np.array(pixels[number : number + 1])))
        classes = int(logits.shape[1])
        if wanted >= classes:
            raise CalibrationError(
                f"{name} is labeled {wanted}, the model has classes 0 to {classes - 1}"
            )
        right += int(logits.argmax()) == wanted
    count = len(job.calibration)
    if count >= _MIN_LABELED and chance_probability(right, count, classes) > _CHANCE_P:
        raise CalibrationError(
            f"the model gets {right} of {count} labeled calibration images right, no better "
            "than chance: the labels are of another order, or the pre-processing is wrong"
        )
    return right / count


def round_for_int8(job: RoundJob) -> Rounded:
    """Fold, round and save the weights that every int8 variant uses."""
    import torch
    from safetensors.torch import save_file

    from converters.rewrites.equalize import equalize
    from converters.rewrites.fold import fold_batch_norm
    from converters.rewrites.rounding import round_weights, sample_count

    report_progress("building the model")
    source = load_source(job.source)
    require_same(source.module, job.fingerprint)
    pixels = np.load(job.calibration, mmap_mode="r")
    module = source.module
    folded = fold_batch_norm(module, torch.from_numpy(np.array(pixels[:2])))
    count = sample_count(pixels.shape)
    step = max(1, pixels.shape[0] // count)
    samples = torch.from_numpy(np.array(pixels[::step][:count]))
    report_progress("evening out channels")
    try:
        factors = equalize(module, samples)
    except Exception as error:  # a model may raise what it likes for another batch size
        report_progress(f"channels are left as they are: {type(error).__name__}")
        factors = {}
    try:
        rounded = round_weights(
            module,
            samples,
            lambda done, total: report_progress("choosing int8 weights", done, total),
        )
    except Exception as error:  # a model may take batch 1 only; it raises what it likes
        report_progress(f"weights are rounded one by one: {type(error).__name__}")
        rounded = 0
    values = {name: value.contiguous().clone() for name, value in module.state_dict().items()}
    values |= {EQUALIZED + name: factor for name, factor in factors.items()}
    save_file(values, job.out_file)
    return Rounded(folded=folded, rounded=rounded, equalized=len(factors))


def order_layers(job: SensitivityJob) -> Sensitivity:
    """The layers of the source in the order to keep them, and what keeping the first gains.

    First those whose 8 bits cost the answer most for what they weigh: a large layer in floating
    point soon makes the file twice its size. Below ``_LIGHT`` of all weights none is heavy.
    """
    import torch

    from converters.ready import rounded_module
    from converters.restore.sensitivity import keep_curve, layer_sensitivity

    report_progress("building the model")
    source = load_source(job.source)
    inputs = np.load(job.calibration, mmap_mode="r")
    step = max(1, inputs.shape[0] // _SENSITIVITY_INPUTS)
    samples = torch.from_numpy(np.array(inputs[::step][:_SENSITIVITY_INPUTS]))
    module = source.module
    if job.rounded is not None:
        module, _ = rounded_module(source, Path(job.rounded), inputs.shape[1:])
    layers = layer_sensitivity(
        module, samples, lambda done, total: report_progress("measuring layers", done, total)
    )
    sizes = {
        name: sum(p.numel() for p in module.get_submodule(name).parameters(recurse=False))
        for name, _ in layers
    }
    light = max(1.0, _LIGHT * sum(sizes.values()))
    layers.sort(key=lambda layer: 10 ** (layer[1] / 10) * max(sizes[layer[0]], light))
    report_progress("simulating kept layers")
    curve = keep_curve(module, samples, [name for name, _ in layers])
    return Sensitivity(layers=layers, curve=curve)
