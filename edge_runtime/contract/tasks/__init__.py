"""Tasks: what goes into a model and what comes out, defined once and used by all."""

from __future__ import annotations

from typing import Literal, TypeGuard

from edge_runtime.contract.tasks.classification import ClassificationTask, Prediction
from edge_runtime.contract.tasks.detection import Box, DetectionTask
from edge_runtime.contract.tasks.generation import GenerationTask
from edge_runtime.contract.tasks.image_to_image import ImageToImageTask
from edge_runtime.contract.tasks.reconstruction import ReconstructionTask
from edge_runtime.contract.tasks.segmentation import SegmentationTask

__all__ = [
    "Box",
    "ClassificationTask",
    "DetectionTask",
    "GenerationTask",
    "ImageToImageTask",
    "Prediction",
    "ReconstructionTask",
    "SegmentationTask",
    "Task",
    "TaskName",
    "has_labels",
    "task_name",
]

Task = (
    ClassificationTask
    | DetectionTask
    | SegmentationTask
    | ImageToImageTask
    | GenerationTask
    | ReconstructionTask
)

TaskName = Literal[
    "classification",
    "detection",
    "segmentation",
    "image_to_image",
    "generation",
    "reconstruction",
]

_NAMES: dict[type, TaskName] = {
    ClassificationTask: "classification",
    DetectionTask: "detection",
    SegmentationTask: "segmentation",
    ImageToImageTask: "image_to_image",
    GenerationTask: "generation",
    ReconstructionTask: "reconstruction",
}


def task_name(task: Task) -> TaskName:
    """The task's tag in the manifest."""
    return _NAMES[type(task)]


def has_labels(
    task: Task,
) -> TypeGuard[ClassificationTask | DetectionTask | SegmentationTask]:
    """Whether its answers name classes."""
    return isinstance(task, ClassificationTask | DetectionTask | SegmentationTask)
