"""What a source is before and after it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import TaskName
from edge_runtime.contract.tasks.classification import Activation

__all__ = ["Built", "Detector", "Finish", "Finished", "Source"]


@dataclasses.dataclass(kw_only=True)
class Detector:
    """What a detection factory returns: heads, and what their numbers mean."""

    module: Any
    """``forward(image)`` gives ``deltas`` ``[B, N, 4]`` and ``logits`` ``[B, N, C]``."""
    anchors: Any
    """float32 array ``[N, 4]``: x_min, y_min, x_max, y_max in input pixels."""
    classes: int
    """Without background."""
    activation: Literal["sigmoid", "softmax"]
    """Of the logits; ``softmax``: column 0 is the background."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


@dataclasses.dataclass(kw_only=True)
class Source:
    """A built model and what is known about it."""

    module: Any
    """In eval mode; ``forward(input)`` gives the tensor, or the tuple of tensors, that
    ``converters.tasks.OUTPUT_NAMES`` lists for the task, batch first, NCHW, float32."""
    task: TaskName
    preprocess: Preprocess | None
    """None only for a generator."""
    labels: tuple[str, ...] | None
    activation: Activation
    temperature: float
    detection: Detector | None = None
    latent_shape: tuple[int, ...] | None = None
    output_scale: float = 255.0
    output_offset: float = 0.0
    weights: str
    weights_sha256: str | None
    source_sha256: str | None


@dataclasses.dataclass(kw_only=True)
class Finished:
    """The module that answers as the task wants, and what became known on the way."""

    module: Any
    detection: Detector | None = None
    activation: Activation | None = None
    """What was taken off the end of a classifier."""


Finish = Callable[[Any, tuple[int, ...]], Finished]
"""Called with the module, its weights in, and the input's shape without batch."""


@dataclasses.dataclass(kw_only=True)
class Built:
    """What one kind of source knows by itself."""

    module: Any
    """A torch module; takes the weights file."""
    finish: Finish | None = None
    """None: ``module`` is what is converted."""
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    """None: the user's, or class numbers."""
    labels_given: bool = False
    """``labels`` are the user's, put right; else a labels file takes their place."""
    activation: Activation = "softmax"
    temperature: float = 1.0
    size: tuple[int, int] | None = None
    """Height and width, where the model takes no other."""
    weights: str | None = None
    """Set when the weights are in already."""
    weights_sha256: str | None = None
    source_sha256: str | None = None
