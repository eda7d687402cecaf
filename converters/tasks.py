"""From what a model answers to the ``Task`` it is, and how it gets its inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from converters.jobs import SourceRequest
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    ImageToImageTask,
    ReconstructionTask,
    SegmentationTask,
    Task,
    TaskName,
)
from edge_runtime.contract.tasks.detection import AnchorsRecord
from edge_runtime.contract.tensors import Layout, TensorSpec

if TYPE_CHECKING:
    from converters.sources import Source

__all__ = ["ANCHORS_FILE", "OUTPUT_NAMES", "ModelShape", "class_count", "describe_model"]

ANCHORS_FILE = "anchors.f32"

OUTPUT_NAMES: dict[TaskName, tuple[str, ...]] = {
    "classification": ("logits",),
    "detection": ("deltas", "logits"),
    "segmentation": ("scores",),
    "image_to_image": ("image",),
    "generation": ("image",),
    "reconstruction": ("image", "latent"),
}
"""What the reference of each task answers, in order; a latent may be missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The task of a model and its tensors, batch 1, NCHW."""

    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def class_count(task: Task) -> int | None:
    """How many labels the task needs; None: it has no classes."""
    if isinstance(task, ClassificationTask | DetectionTask | SegmentationTask):
        return task.classes
    return None


def _input_spec(source: Source) -> TensorSpec:
    if source.task == "generation":
        if source.latent_shape is None:
            raise ConfigError("a generator needs --latent: the shape of one input, for example 100")
        shape = (1, *source.latent_shape)
        layout: Layout = "NC" if len(shape) == 2 else "OTHER"
        return TensorSpec(name="latent", dtype="float32", shape=shape, layout=layout)
    assert source.preprocess is not None  # noqa: S101  # load_source saw to it
    shape = (1, source.preprocess.channels, *source.preprocess.size)
    return TensorSpec(name="image", dtype="float32", shape=shape, layout="NCHW")


def _layout(shape: tuple[int, ...]) -> Layout:
    return {2: "NC", 4: "NCHW"}.get(len(shape), "OTHER")  # type: ignore[return-value]


def _run_blank(source: Source, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """Answer one blank input and see what comes out."""
    import torch

    try:
        with torch.no_grad():
            answer: Any = source.module(torch.zeros(spec.shape))
    except Exception as error:  # whatever the user's forward raises
        raise SourceError(
            f"the model does not take float32 {list(spec.shape)}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} (check --input-size)"
        ) from error
    names = OUTPUT_NAMES[source.task]
    answers = (answer,) if isinstance(answer, torch.Tensor) else answer
    if not isinstance(answers, tuple | list) or not all(
        isinstance(one, torch.Tensor) for one in answers
    ):
        raise SourceError(
            f"the model answers with a {type(answer).__name__}; {source.task} needs "
            f"{' and '.join(names)}: wrap it in a module that returns tensors"
        )
    required = 1 if source.task == "reconstruction" else len(names)
    if not required <= len(answers) <= len(names):
        raise SourceError(
            f"the model answers {len(answers)} tensors; {source.task} needs {' and '.join(names)}"
        )
    specs = []
    for name, one in zip(names, answers, strict=False):
        if one.dim() == 0 or one.shape[0] != 1 or math.prod(one.shape) < 1:
            raise SourceError(f"output {name} is {list(one.shape)}: batch 1 was asked for")
        if not bool(torch.isfinite(one).all()):
            raise SourceError(
                f"the model answers NaN or infinity for a blank input ({name}): check weights"
            )
        shape = tuple(int(size) for size in one.shape)
        specs.append(TensorSpec(name=name, dtype="float32", shape=shape, layout=_layout(shape)))
    return tuple(specs)


def describe_model(source: Source, request: SourceRequest) -> ModelShape:
    """Run ``source`` once and name what it is.

    Raises ``SourceError`` where its answer does not fit the task, ``ConfigError`` where the
    command line lacks something.
    """
    spec = _input_spec(source)
    outputs = _run_blank(source, spec)
    task = _build(source, request, spec, outputs)
    return ModelShape(task=task, inputs=(spec,), outputs=outputs)


def _build(
    source: Source, request: SourceRequest, spec: TensorSpec, outputs: tuple[TensorSpec, ...]
) -> Task:
    shape = outputs[0].shape
    if source.task == "classification":
        if len(shape) != 2 or shape[1] < 2:
            raise SourceError(f"the model answers {list(shape)}; classification needs [1, classes]")
        if shape[1] > limits.MAX_LABELS:
            raise SourceError(f"{shape[1]} classes are more than {limits.MAX_LABELS}")
        return ClassificationTask(
            classes=shape[1],
            activation=source.activation,
            temperature=source.temperature,
            top_k=min(5, shape[1]),
        )
    if source.task == "detection":
        return _detection(source, request, outputs)
    if source.task == "segmentation":
        if len(shape) != 4 or not 2 <= shape[1] <= limits.MAX_MASK_CLASSES:
            raise SourceError(
                f"the model answers {list(shape)}; segmentation needs [1, classes, H, W] with "
                f"2 to {limits.MAX_MASK_CLASSES} classes"
            )
        return SegmentationTask(classes=shape[1])
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise SourceError(
            f"the model answers {list(shape)}; {source.task} needs an image [1, 1 or 3, H, W]"
        )
    scale, offset = source.output_scale, source.output_offset
    if source.task == "generation":
        return GenerationTask(
            latent_size=math.prod(spec.shape), output_scale=scale, output_offset=offset
        )
    if source.task == "reconstruction":
        latent = math.prod(outputs[1].shape) if len(outputs) == 2 else None
        return ReconstructionTask(latent_size=latent, output_scale=scale, output_offset=offset)
    factor = shape[2] / spec.shape[2]
    if factor != int(factor) or shape[3] != spec.shape[3] * int(factor):
        raise SourceError(
            f"the model answers {shape[2]}x{shape[3]} for {spec.shape[2]}x{spec.shape[3]}: "
            "image to image needs the same size or a whole multiple of it (check --input-size)"
        )
    return ImageToImageTask(output_scale=scale, output_offset=offset, upscale=int(factor))


def _detection(
    source: Source, request: SourceRequest, outputs: tuple[TensorSpec, ...]
) -> DetectionTask:
    parts = source.detection
    if parts is None:
        raise SourceError(
            "this source has no anchors: take torchvision:ssdlite320_mobilenet_v3_large, "
            "torchvision:retinanet_resnet50_fpn, or a FILE.py:CALLABLE that returns a "
            "converters.sources.Detector"
        )
    count = parts.anchors.shape[0]
    columns = parts.classes + (1 if parts.activation == "softmax" else 0)
    wanted = ((1, count, 4), (1, count, columns))
    if tuple(one.shape for one in outputs) != wanted:
        raise SourceError(
            f"the heads answer {[list(one.shape) for one in outputs]}; {count} anchors and "
            f"{parts.classes} classes need {[list(one) for one in wanted]}"
        )
    options: dict[str, Any] = {}
    if request.score_threshold is not None:
        options["score_threshold"] = request.score_threshold
    return DetectionTask(
        classes=parts.classes,
        activation=parts.activation,
        anchors=AnchorsRecord(path=ANCHORS_FILE, count=count),
        box_weights=parts.box_weights,
        **options,
    )
