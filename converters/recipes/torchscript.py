"""TorchScript for PyTorch Mobile."""

from __future__ import annotations

from converters.recipes.base import Recipe
from edge_runtime.contract.manifest import MinOs, Precision

__all__ = ["RECIPES", "REFUSED"]

_OS = MinOs(android_api=21, ios="12.0")

RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(min_os=_OS, accelerators=("cpu",)),
    "int8": Recipe(calibrated=True, rounded=True, min_os=_OS, accelerators=("cpu",)),
    "int8-dyn": Recipe(min_os=_OS, accelerators=("cpu",)),
}

REFUSED: dict[Precision, str] = {
    "fp16": "PyTorch Mobile's CPU kernels compute in fp32 or int8; half-precision operators are "
    "missing: take int8, or fp16 in tflite or coreml",
    "int8w": "PyTorch Mobile has no weight-only kernels: take int8, or int8w in tflite or coreml",
    "int4w": "PyTorch Mobile has no 4-bit kernels: take int4w in tflite or coreml",
    "pal4": "palettes are a Core ML storage form: take pal4 in coreml",
    "a16w8": "PyTorch Mobile has no 16-bit integer kernels: take a16w8 in tflite",
    "fp16+sparse": "a .ptl stores zeros as they are: take fp16+sparse in coreml",
    "int8w+sparse": "a .ptl stores zeros as they are: take int8w+sparse in coreml",
}
