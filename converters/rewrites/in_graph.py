"""Post-processing inside the file: exact NMS with static shapes, or the argmax of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from converters.jobs import InGraph
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.tasks import DetectionTask, SegmentationTask, Task
from edge_runtime.contract.tasks.detection import MAX_LOG_SCALE
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["ArgmaxMask", "NmsDetector", "append_in_graph"]

_ITERATIONS = 12
"""Chains of boxes that suppress one another longer than this would need more; two were
enough on real photos."""


class ArgmaxMask(nn.Module):
    """``classes`` int32 ``[B, H, W]`` instead of one score plane a class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The class of every pixel."""
        scores: torch.Tensor = self.model(image)
        return scores.argmax(dim=1).to(torch.int32)


class NmsDetector(nn.Module):
    """``boxes``, ``scores``, ``classes`` instead of heads: decode, then greedy NMS.

    Greedy NMS is the fixed point of keep = 1 - min(1, M keep), where M[i, j] = 1 when box
    j scores better than i, has its class and overlaps it by more than the threshold; each
    iteration settles one more link of every chain, so no loop over boxes is needed.
    """

    def __init__(self, model: nn.Module, task: DetectionTask, anchors: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.task = task
        size = anchors[:, 2:] - anchors[:, :2]
        self.register_buffer("size", size)
        self.register_buffer("center", anchors[:, :2] + 0.5 * size)
        self.register_buffer("weights", torch.tensor(task.box_weights))
        self.count = min(task.candidates, anchors.shape[0] * task.classes)
        # Strictly lower triangle: who ranks before whom.
        self.register_buffer("before", torch.tril(torch.ones(self.count, self.count), -1))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[1, K, 4]``, ``[1, K]`` (0: suppressed), ``[1, K]``; best first."""
        deltas, logits = self.model(image)
        task = self.task
        if task.activation == "sigmoid":
            scores = torch.sigmoid(logits[0])
        else:
            scores = torch.softmax(logits[0], dim=-1)[:, 1:]
        best, index = torch.topk(scores.reshape(-1), self.count)
        rows = torch.div(index, task.classes, rounding_mode="floor")
        classes = index - rows * task.classes
        scaled = torch.index_select(deltas[0], 0, rows) / self.weights
        size = torch.index_select(self.size, 0, rows)
        middle = scaled[:, :2] * size + torch.index_select(self.center, 0, rows)
        half = 0.5 * size * torch.exp(torch.clamp(scaled[:, 2:], max=MAX_LOG_SCALE))
        boxes = torch.cat([middle - half, middle + half], dim=1)
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        overlap = torch.clamp(high - low, min=0.0)
        shared = overlap[:, :, 0] * overlap[:, :, 1]
        extent = torch.clamp(boxes[:, 2:] - boxes[:, :2], min=0.0)
        area = extent[:, 0] * extent[:, 1]
        union = area[:, None] + area[None, :] - shared
        label = classes.to(torch.float32)
        same = (torch.abs(label[:, None] - label[None, :]) < 0.5).to(torch.float32)
        beats = (shared > task.iou_threshold * union).to(torch.float32) * same * self.before
        strong = (best >= task.score_threshold).to(torch.float32)
        keep = strong
        for _ in range(_ITERATIONS):
            hits = torch.matmul(beats, keep[:, None])[:, 0]
            keep = strong * (1.0 - torch.clamp(hits, max=1.0))
        return boxes[None], (best * keep)[None], label[None]


def append_in_graph(
    model: nn.Module,
    task: Task,
    wanted: tuple[InGraph, ...],
    source: Any,
    outputs: tuple[TensorSpec, ...],
) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    """Wrap ``model``; returns the wrapper and what it answers.

    Raises ``PrecisionRefused`` where the task has no such post-processing.
    """
    if wanted == ("argmax",) and isinstance(task, SegmentationTask):
        _, _, height, width = outputs[0].shape
        spec = TensorSpec(name="classes", dtype="int32", shape=(1, height, width), layout="OTHER")
        return ArgmaxMask(model).eval(), (spec,)
    if wanted == ("nms",) and isinstance(task, DetectionTask):
        anchors = torch.as_tensor(source.detection.anchors, dtype=torch.float32)
        wrapper = NmsDetector(model, task, anchors).eval()
        count = wrapper.count
        shapes = {"boxes": (1, count, 4), "scores": (1, count), "classes": (1, count)}
        return wrapper, tuple(
            TensorSpec(name=name, dtype="float32", shape=shape, layout="OTHER")
            for name, shape in shapes.items()
        )
    raise PrecisionRefused(
        f"{' and '.join(wanted)} in the graph: nms is for detection, argmax for segmentation"
    )
