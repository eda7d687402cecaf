"""torchvision's one-stage detectors as plain heads: SSD, SSDlite and RetinaNet.

torchvision's own forward resizes, normalizes, decodes and suppresses with shapes that
depend on the data. Here the image comes in at one fixed size, normalized; the heads'
numbers come out; and the anchors, which depend on the size alone, are computed once.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.sources.labels import is_background
from converters.sources.torchvision_models import new_model, weights_entry, weights_path
from converters.sources.types import Built, Detector, Finished
from converters.weights import load_into
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.preprocess import Normalization, Preprocess, ResizeExact

__all__ = ["build_detector", "is_torchvision_detector", "with_heads"]

_RETINANET_STRIDE = 32


def build_detector(name: str, request: SourceRequest, labels: tuple[str, ...] | None) -> Built:
    """SSD, SSDlite or RetinaNet, with torchvision's own weights, a file's, or random ones."""
    background = name.startswith("ssd")
    if labels is not None and background and is_background(labels[0]):
        labels = labels[1:]
    entry = weights_entry(name, request.weights)
    options: dict[str, Any] = {"weights_backbone": None}
    if entry is None and labels is not None:
        options["num_classes"] = len(labels) + background
    module = new_model(name, entry, options)
    built = Built(module=module, labels=labels, labels_given=labels is not None, finish=with_heads)
    path = weights_path(request.weights)
    if entry is not None:
        built.weights = f"torchvision {entry.name}"
        if labels is None:
            built.labels = tuple(entry.meta["categories"])[1 if background else 0 :]
    elif path is not None:
        built.weights, built.weights_sha256 = path.name, load_into(module, path)
        _restore_epsilon(module, path)
    if request.preprocess is None:
        built.preprocess = _own_record(name, module.transform, request)
    return built


def _own_record(name: str, transform: Any, request: SourceRequest) -> Preprocess:
    """The normalization that torchvision's detectors carry; the whole photo, squeezed."""
    height, width = request.input_height, request.input_width
    if height is None or width is None:
        if transform.fixed_size is None:
            raise ConfigError(f"torchvision:{name} takes any size: pass --input-size")
        width, height = (int(side) for side in transform.fixed_size)
    record = Preprocess(
        resize=ResizeExact(height=height, width=width),
        normalization=Normalization(
            scale=255.0, mean=tuple(transform.image_mean), std=tuple(transform.image_std)
        ),
    )
    record.check()
    return record


def _restore_epsilon(module: Any, path: Path) -> None:
    """Upstream sets the batch norms' epsilon to 0 for its first RetinaNet file, by name.

    The file itself says nothing of it; it is known by the hash in its own download name.
    """
    import torch
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

    published = Path(RetinaNet_ResNet50_FPN_Weights.COCO_V1.url).stem.rpartition("-")[2]
    with path.open("rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(published):
            return
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 0.0


def is_torchvision_detector(module: Any) -> bool:
    """Whether ``with_heads`` knows this net."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.ssd import SSD

    return isinstance(module, RetinaNet | SSD)


def with_heads(model: Any, shape: tuple[int, ...]) -> Finished:
    """Backbone and heads of ``model`` as one module, for images of ``shape`` (C, H, W).

    Frozen batch norms become ordinary ones with the same numbers, so that they can be
    folded. Raises ``ConfigError`` for a size that the anchors do not fit.
    """
    import torch
    from torchvision.models.detection import RetinaNet

    from converters.sources.wrappers import DetectionHeads

    height, width = shape[1:]
    retina = isinstance(model, RetinaNet)
    if retina and (height % _RETINANET_STRIDE or width % _RETINANET_STRIDE):
        raise ConfigError(
            f"RetinaNet's anchors need an --input-size that is a multiple of {_RETINANET_STRIDE}, "
            f"not {height}x{width}"
        )
    coder = model.head.regression_head.box_coder if retina else model.box_coder
    if not math.isclose(coder.bbox_xform_clip, math.log(1000.0 / 16.0), rel_tol=1e-6):
        raise SourceError("the box coder has a bbox_xform_clip of its own: use the default")
    _thaw_batch_norms(model)
    heads = DetectionHeads(model.backbone, model.head).eval()
    with torch.no_grad():
        try:
            anchors = _anchors(model, height, width)
            _, logits = heads(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"the detector does not take {height}x{width} pixels "
                f"({str(error).splitlines()[0][:200]}): pass a larger --input-size"
            ) from None
    columns = int(logits.shape[2])
    x, y, w, h = (float(weight) for weight in coder.weights)
    detector = Detector(
        module=heads,
        anchors=anchors,
        classes=columns if retina else columns - 1,
        activation="sigmoid" if retina else "softmax",
        box_weights=(x, y, w, h),
    )
    return Finished(module=heads, detection=detector)


def _anchors(model: Any, height: int, width: int) -> Any:
    """float32 ``[N, 4]`` corners from the model's own generator, in the heads' order."""
    import numpy as np
    import torch
    from torchvision.models.detection.image_list import ImageList

    image = torch.zeros(1, 3, height, width)
    features = model.backbone(image)
    maps = [features] if isinstance(features, torch.Tensor) else list(features.values())
    anchors = model.anchor_generator(ImageList(image, [(height, width)]), maps)[0]
    return np.ascontiguousarray(anchors.numpy(), dtype=np.float32)


def _thaw_batch_norms(model: Any) -> None:
    import torch
    from torchvision.ops import FrozenBatchNorm2d

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, FrozenBatchNorm2d):
                continue
            layer = torch.nn.BatchNorm2d(child.weight.shape[0], eps=child.eps)
            layer.weight.data, layer.bias.data = child.weight, child.bias
            layer.running_mean, layer.running_var = child.running_mean, child.running_var
            setattr(parent, name, layer.eval().requires_grad_(False))
