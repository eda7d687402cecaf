"""ExecuTorch with the XNNPACK backend.

Oldest systems, from ExecuTorch's own build files: ``minSdk = 23`` in
``extension/android/executorch_android/build.gradle`` and ``.iOS(.v17)`` in
``Package.swift`` of github.com/pytorch/executorch.
"""

from __future__ import annotations

from converters.recipes.base import Recipe
from edge_runtime.contract.manifest import MinOs, Precision

__all__ = ["RECIPES", "REFUSED"]

_OS = MinOs(android_api=23, ios="17.0")

RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(min_os=_OS, accelerators=("cpu",)),
    "int8": Recipe(calibrated=True, rounded=True, min_os=_OS, accelerators=("cpu",)),
}

REFUSED: dict[Precision, str] = {
    "fp16": "XNNPACK in ExecuTorch computes in fp32 or int8 here: take int8, or fp16 in tflite",
    "int8-dyn": "dynamically quantized convolutions do not load in ExecuTorch "
    "(github.com/pytorch/executorch/issues/11355): take int8, or int8-dyn in tflite",
    "int8w": "XNNPACK has no weight-only int8 convolutions: take int8, or int8w in tflite",
    "int4w": "XNNPACK has 4-bit weights for linear layers of language models only: take int8",
    "pal4": "palettes are a Core ML storage form: take pal4 in coreml",
    "a16w8": "XNNPACK has no 16-bit integer kernels: take a16w8 in tflite",
    "fp16+sparse": "a .pte stores zeros as they are: take fp16+sparse in coreml",
    "int8w+sparse": "a .pte stores zeros as they are: take int8w+sparse in coreml",
}
