"""TensorFlow Lite (LiteRT)."""

from __future__ import annotations

from converters.recipes.base import Recipe
from edge_runtime.contract.manifest import MinOs, Precision

__all__ = ["RECIPES", "REFUSED"]

_OS = MinOs(android_api=24, ios="15.0")

RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(min_os=_OS, accelerators=("cpu", "gpu")),
    "fp16": Recipe(from_fp32=True, min_os=_OS, accelerators=("cpu", "gpu")),
    "int8": Recipe(calibrated=True, rounded=True, min_os=_OS, accelerators=("cpu", "gpu", "npu")),
    "int8-dyn": Recipe(from_fp32=True, gains=True, rounded=True, min_os=_OS, accelerators=("cpu",)),
    "int8w": Recipe(from_fp32=True, gains=True, rounded=True, min_os=_OS, accelerators=("cpu",)),
    "int4w": Recipe(from_fp32=True, gains=True, min_os=_OS, accelerators=("cpu",)),
    "a16w8": Recipe(calibrated=True, rounded=True, min_os=_OS, accelerators=("cpu", "npu")),
}

REFUSED: dict[Precision, str] = {
    "pal4": "palettes are a Core ML storage form: take pal4 in coreml",
    "fp16+sparse": "LiteRT's sparse tensors are not written by its converter: take it in coreml",
    "int8w+sparse": "LiteRT's sparse tensors are not written by its converter: take it in coreml",
}
