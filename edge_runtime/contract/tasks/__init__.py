"""Tasks: what goes into a model and what comes out, defined once and used by all."""

from __future__ import annotations

from edge_runtime.contract.tasks.classification import ClassificationTask, Prediction
from edge_runtime.contract.tasks.detection import DetectionTask
from edge_runtime.contract.tasks.generation import GenerationTask
from edge_runtime.contract.tasks.image_to_image import ImageToImageTask
from edge_runtime.contract.tasks.reconstruction import ReconstructionTask
from edge_runtime.contract.tasks.segmentation import SegmentationTask

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "GenerationTask",
    "ImageToImageTask",
    "Prediction",
    "ReconstructionTask",
    "SegmentationTask",
    "Task",
]

Task = (
    ClassificationTask
    | DetectionTask
    | SegmentationTask
    | ImageToImageTask
    | GenerationTask
    | ReconstructionTask
)
