"""Core ML ML programs."""

from __future__ import annotations

from converters.recipes.base import Recipe
from edge_runtime.contract.manifest import MinOs, Precision

__all__ = ["RECIPES", "REFUSED"]

_OS = MinOs(ios="17.0")

RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(min_os=_OS, accelerators=("cpu", "gpu")),
    "fp16": Recipe(min_os=_OS, accelerators=("cpu", "gpu", "npu")),
    "int8": Recipe(calibrated=True, rounded=True, min_os=_OS, accelerators=("cpu", "gpu", "npu")),
}

REFUSED: dict[Precision, str] = {
    "int8-dyn": "Core ML has no dynamic quantization: take int8w, or int8 with calibration images",
    "a16w8": "Core ML has no 16-bit integer activations: take fp16 with int8w",
    "int8w": "not offered yet",
    "int4w": "not offered yet",
    "pal4": "not offered yet",
    "fp16+sparse": "not offered yet",
    "int8w+sparse": "not offered yet",
}
