"""``torchvision:NAME``: classification and segmentation nets, random, from a file or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.sources.random_weights import random_seed
from converters.sources.types import Built
from converters.weights import load_into, read_state_dict
from edge_runtime.contract.errors import ConfigError, SourceError, WeightsUnavailable
from edge_runtime.contract.preprocess import (
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
)

__all__ = ["build_torchvision", "offline"]

_DETECTORS = (
    "torchvision:ssdlite320_mobilenet_v3_large, torchvision:ssd300_vgg16 or "
    "torchvision:retinanet_resnet50_fpn"
)


def offline(what: str, error: Exception) -> WeightsUnavailable:
    """A failed download as a typed error that says how to go on without a network."""
    reason = str(error).strip().split("\n", 1)[0][:200]
    return WeightsUnavailable(
        f"{what} is not in the local cache and cannot be downloaded ({reason}): "
        "fetch it where there is a network and pass it as --weights FILE"
    )


def build_torchvision(name: str, request: SourceRequest, labels: tuple[str, ...] | None) -> Built:
    """The net that torchvision calls ``name``, for ``request.task``.

    Raises ``SourceError`` for a name that torchvision lacks or that no phone format can
    hold, ``ConfigError`` for the wrong task, ``WeightsUnavailable`` offline, and the errors
    of ``load_into``.
    """
    check_name(name, request)
    if request.task == "detection":
        from converters.sources.torchvision_detection import build_detector

        return build_detector(name, request, labels)
    entry = weights_entry(name, request.weights)
    if entry is not None:
        return _downloaded(name, request, entry)
    options: dict[str, Any] = {}
    if labels is not None:
        options["num_classes"] = len(labels)
    path = weights_path(request.weights)
    state = read_state_dict(path) if path is not None else {}
    if request.task == "segmentation":
        options["weights_backbone"] = None
        if not name.startswith("lraspp"):
            options["aux_loss"] = any(key.startswith("aux_classifier.") for key in state)
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # torchvision's own takes a minute of scipy
        options["aux_logits"] = any(key.startswith(("AuxLogits.", "aux1.")) for key in state)
    module = new_model(name, None, options)
    built = Built(module=module)
    if path is not None:
        built.weights, built.weights_sha256 = path.name, load_into(module, path)
    _without_auxiliary(module)
    return built


def check_name(name: str, request: SourceRequest) -> None:
    """Refuse a model that torchvision lacks, of another task, or that crops regions."""
    import torchvision

    listed = torchvision.models.list_models
    known = {
        "classification": listed(torchvision.models),
        "detection": listed(torchvision.models.detection),
        "segmentation": listed(torchvision.models.segmentation),
    }
    if "rcnn" in name and name in known["detection"]:
        raise SourceError(
            f"torchvision:{name} crops regions out of its feature maps (RoIAlign), which no "
            f"mobile format has: use {_DETECTORS}"
        )
    if name == "fcos_resnet50_fpn":
        raise SourceError(
            f"torchvision:{name} has a third head (center-ness) that the box decoder does not "
            f"know: use {_DETECTORS}"
        )
    if name in known.get(request.task, ()):
        return
    for task, names in known.items():
        if name in names:
            raise ConfigError(f"torchvision:{name} is for {task}: pass --task {task}")
    if request.task not in known:
        raise SourceError(
            f"torchvision has no model for {request.task}: pass FILE.py:CALLABLE or a saved model"
        )
    raise SourceError(
        f"torchvision has no {request.task} model {name!r}: see torchvision.models.list_models()"
    )


def weights_entry(name: str, choice: str | None) -> Any:
    """The member of torchvision's weights enum that ``choice`` names, or None."""
    import torchvision

    enum = torchvision.models.get_model_weights(name)
    if choice == "DEFAULT" or choice in enum.__members__:
        return enum[choice]
    return None


def weights_path(choice: str | None) -> Path | None:
    """``--weights`` as a file, unless it is absent or ``random:SEED``."""
    if choice is None or random_seed(choice) is not None:
        return None
    return Path(choice)


def new_model(name: str, entry: Any, options: dict[str, Any]) -> Any:
    """``torchvision.models.get_model`` with its download failures made typed."""
    import torchvision

    try:
        return torchvision.models.get_model(name, weights=entry, **options)
    except OSError as error:  # URLError is one
        raise offline(f"torchvision:{name} weights {entry.name}", error) from None


def _downloaded(name: str, request: SourceRequest, entry: Any) -> Built:
    segmentation = request.task == "segmentation"
    module = new_model(name, entry, {"weights_backbone": None} if segmentation else {})
    _without_auxiliary(module)
    own = None
    if request.preprocess is None:
        preset = entry.transforms()
        own = _segmentation_record(preset, request) if segmentation else _crop_record(preset, entry)
    return Built(
        module=module,
        preprocess=own,
        labels=tuple(entry.meta["categories"]),
        weights=f"torchvision {entry.name}",
    )


def _crop_record(preset: Any, entry: Any) -> Preprocess:
    if preset.interpolation.value != "bilinear":
        raise ConfigError(
            f"{entry} was trained with {preset.interpolation.value} resizing, which nearfar "
            "does not have: declare --preprocess torchvision --input-size N to use bilinear"
        )
    record = Preprocess(
        resize=ResizeShorterSide(size=int(preset.resize_size[0])),
        crop=CenterCrop(height=int(preset.crop_size[0]), width=int(preset.crop_size[0])),
        normalization=_normalization(preset),
    )
    record.check()
    return record


def _segmentation_record(preset: Any, request: SourceRequest) -> Preprocess:
    """The whole photo, squeezed: every pixel of it gets a class."""
    size = int(preset.resize_size[0])
    record = Preprocess(
        resize=ResizeExact(height=request.input_height or size, width=request.input_width or size),
        normalization=_normalization(preset),
    )
    record.check()
    return record


def _normalization(preset: Any) -> Normalization:
    return Normalization(scale=255.0, mean=tuple(preset.mean), std=tuple(preset.std))


def _without_auxiliary(module: Any) -> None:
    """Drop the heads that only training uses."""
    for name in ("aux_classifier", "AuxLogits", "aux1", "aux2"):
        if getattr(module, name, None) is not None:
            setattr(module, name, None)
    if hasattr(module, "aux_logits"):
        module.aux_logits = False
