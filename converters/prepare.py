"""First stage of a conversion: the fp32 reference, golden answers, calibration pixels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from converters.jobs import Prepared, PrepareJob, Rounded, RoundJob
from converters.sources import Source, load_source
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
from edge_runtime.contract.preprocess import Preprocess, apply
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import installed_version

__all__ = ["export_reference", "load_pixels", "prepare", "prepared_module", "round_for_int8"]

_CHANCE_P = 0.01
_MIN_LABELED = 20


def load_pixels(record: Preprocess, path: Path, role: str) -> Any:
    """One image, pre-processed: float32 ``[1, C, H, W]``; names the file when it is bad."""
    try:
        image = apply(record, decode_image(path.read_bytes()))
    except ImageError as error:
        raise type(error)(f"{role} image {path}: {error.detail}") from None
    return np.ascontiguousarray(image.transpose(2, 0, 1))[None]


def prepare(job: PrepareJob) -> Prepared:
    """Build, check, export and run the source once.

    Raises the errors of ``load_source`` and ``CalibrationError``, ``SourceError``.
    """
    import torch

    report_progress("building the model")
    source = load_source(job.source)
    height, width = source.preprocess.size
    shape = (1, source.preprocess.channels, height, width)
    outputs = _probe(source, shape)
    classes = outputs.shape[1]
    labels = source.labels
    if labels is None:
        labels = tuple(f"class {index}" for index in range(classes))
    if len(labels) != classes:
        raise ConfigError(
            f"the model has {classes} outputs and there are {len(labels)} labels: check --labels"
        )
    task = ClassificationTask(
        classes=classes,
        activation=source.activation,
        temperature=source.temperature,
        top_k=min(5, classes),
    )
    inputs = (TensorSpec(name="image", dtype="float32", shape=shape, layout="NCHW"),)
    out_dir = Path(job.out_dir)
    report_progress("exporting the fp32 reference")
    record = ReferenceRecord(
        task=task, preprocess=source.preprocess, inputs=inputs, outputs=(outputs,)
    )
    program = export_reference(source.module, record, out_dir / "model.pt2")
    for number, name in enumerate(job.golden):
        report_progress("answering golden images", number + 1, len(job.golden))
        pixels = load_pixels(source.preprocess, Path(name), "golden")
        with torch.no_grad():
            answer = program(torch.from_numpy(pixels)).numpy()
        (out_dir / (Path(name).stem + ".f32")).write_bytes(answer.astype("<f4").tobytes())
    accuracy = None
    if job.calibration:
        accuracy = _write_calibration(job, source, program, classes, out_dir)
    return Prepared(
        task=task,
        preprocess=source.preprocess,
        labels=list(labels),
        labels_given=source.labels is not None,
        inputs=inputs,
        outputs=(outputs,),
        source_sha256=source.source_sha256,
        weights=source.weights,
        weights_sha256=source.weights_sha256,
        tools={name: installed_version(name) for name in ("torch", "torchvision")},
        calibration_accuracy=accuracy,
    )


def _probe(source: Source, shape: tuple[int, ...]) -> TensorSpec:
    """Run one blank image and see what comes out."""
    import torch

    try:
        with torch.no_grad():
            answer = source.module(torch.zeros(shape))
    except Exception as error:  # whatever the user's forward raises
        raise SourceError(
            f"the model does not take float32 {list(shape)}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} (check --input-size)"
        ) from error
    if not isinstance(answer, torch.Tensor):
        raise SourceError(
            f"the model answers with a {type(answer).__name__}; classification needs one "
            "tensor: wrap it in a module that returns the logits"
        )
    if answer.dim() != 2 or answer.shape[0] != 1 or answer.shape[1] < 2:
        raise SourceError(
            f"the model answers {list(answer.shape)}; classification needs [1, classes]"
        )
    if not bool(torch.isfinite(answer).all()):
        raise SourceError("the model answers NaN or infinity for a blank image: check weights")
    if answer.shape[1] > limits.MAX_LABELS:
        raise SourceError(f"{answer.shape[1]} classes are more than {limits.MAX_LABELS}")
    return TensorSpec(name="logits", dtype="float32", shape=tuple(answer.shape), layout="NC")


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
        difference = float((program(check) - module(check)).abs().max())
        scale = float(module(check).abs().max()) or 1.0
    if not difference <= 1e-4 * scale:
        raise SourceError(f"the exported program differs from the model by {difference:.2e}")
    return program


def _write_calibration(
    job: PrepareJob, source: Source, program: Any, classes: int, out_dir: Path
) -> float | None:
    """Save the calibration pixels; check the labels against the model when there are any."""
    import torch

    count = len(job.calibration)
    shape = (count, source.preprocess.channels, *source.preprocess.size)
    pixels = np.lib.format.open_memmap(
        out_dir / "calibration.npy", mode="w+", dtype=np.float32, shape=shape
    )
    right = 0
    for number, name in enumerate(job.calibration):
        report_progress("reading calibration images", number + 1, count)
        batch = load_pixels(source.preprocess, Path(name), "calibration")
        pixels[number] = batch[0]
        if job.calibration_classes:
            wanted = job.calibration_classes[number]
            if wanted >= classes:
                raise CalibrationError(
                    f"{name} is labeled {wanted}, the model has classes 0 to {classes - 1}"
                )
            with torch.no_grad():
                right += int(program(torch.from_numpy(batch)).argmax()) == wanted
    pixels.flush()
    if not job.calibration_classes:
        return None
    if count >= _MIN_LABELED and chance_probability(right, count, classes) > _CHANCE_P:
        raise CalibrationError(
            f"the model gets {right} of {count} labeled calibration images right, no better "
            "than chance: the labels are of another order, or the pre-processing is wrong"
        )
    return right / count


def prepared_module(source: Source, rounded: Path | None) -> tuple[Any, list[str]]:
    """The module that converters start from, and the rewrites it went through.

    With ``rounded``: batch norms folded and the weights that ``round_for_int8`` chose.
    """
    if rounded is None:
        return source.module, []
    import torch
    from safetensors.torch import load_file

    from converters.rewrites.fold import fold_batch_norm

    module = copy.deepcopy(source.module)
    height, width = source.preprocess.size
    example = torch.rand(
        (2, source.preprocess.channels, height, width),
        generator=torch.Generator().manual_seed(0),
    )
    folded = fold_batch_norm(module, example)
    state = load_file(str(rounded))
    for name, layer in module.named_modules():  # bias correction may add a bias
        if f"{name}.bias" in state and getattr(layer, "bias", False) is None:
            layer.bias = torch.nn.Parameter(state[f"{name}.bias"], requires_grad=False)
    module.load_state_dict(state, strict=True)
    names = ["round_weights"]
    if folded:
        names.insert(0, "fold_batch_norm")
    return module, names


def round_for_int8(job: RoundJob) -> Rounded:
    """Fold, round and save the weights that every int8 variant uses."""
    import torch
    from safetensors.torch import save_file

    from converters.rewrites.fold import fold_batch_norm
    from converters.rewrites.rounding import round_weights, sample_count

    report_progress("building the model")
    source = load_source(job.source)
    pixels = np.load(job.calibration, mmap_mode="r")
    module = source.module
    folded = fold_batch_norm(module, torch.from_numpy(np.array(pixels[:2])))
    count = sample_count(pixels.shape)
    step = max(1, pixels.shape[0] // count)
    samples = torch.from_numpy(np.array(pixels[::step][:count]))
    rounded = round_weights(
        module,
        samples,
        lambda done, total: report_progress("choosing int8 weights", done, total),
    )
    tensors = {name: value.contiguous().clone() for name, value in module.state_dict().items()}
    save_file(tensors, job.out_file)
    return Rounded(folded=folded, rounded=rounded)
