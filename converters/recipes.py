"""Which precision each format has, and what it takes: data, no code.

Precision names: ``fp32``, ``fp16``, ``int8`` (static: weights and activations).
"""

from __future__ import annotations

import msgspec

from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.manifest import Accelerator, Format, MinOs, Precision

__all__ = ["FORMATS", "OFFERED", "RECIPES", "REFUSED", "Recipe", "find_recipe"]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What one format and precision needs, and where it runs."""

    calibrated: bool = False
    """Needs calibration images and the rounded weights."""
    from_fp32: bool = False
    """Starts from the same format's fp32 file."""
    min_os: MinOs
    accelerators: tuple[Accelerator, ...]


FORMATS: tuple[Format, ...] = ("torchscript", "tflite", "coreml")
OFFERED: tuple[Precision, ...] = ("fp32", "fp16", "int8")

_TORCHSCRIPT_OS = MinOs(android_api=21, ios="12.0")
_TFLITE_OS = MinOs(android_api=24, ios="15.0")
_COREML_OS = MinOs(ios="17.0")

RECIPES: dict[tuple[Format, Precision], Recipe] = {
    ("torchscript", "fp32"): Recipe(min_os=_TORCHSCRIPT_OS, accelerators=("cpu",)),
    ("torchscript", "int8"): Recipe(calibrated=True, min_os=_TORCHSCRIPT_OS, accelerators=("cpu",)),
    ("tflite", "fp32"): Recipe(min_os=_TFLITE_OS, accelerators=("cpu", "gpu")),
    ("tflite", "fp16"): Recipe(from_fp32=True, min_os=_TFLITE_OS, accelerators=("cpu", "gpu")),
    ("tflite", "int8"): Recipe(
        calibrated=True, min_os=_TFLITE_OS, accelerators=("cpu", "gpu", "npu")
    ),
    ("coreml", "fp32"): Recipe(min_os=_COREML_OS, accelerators=("cpu", "gpu")),
    ("coreml", "fp16"): Recipe(min_os=_COREML_OS, accelerators=("cpu", "gpu", "npu")),
    ("coreml", "int8"): Recipe(
        calibrated=True, min_os=_COREML_OS, accelerators=("cpu", "gpu", "npu")
    ),
}

REFUSED: dict[tuple[Format, Precision], str] = {
    ("torchscript", "fp16"): (
        "PyTorch Mobile's CPU kernels compute in fp32 or int8; half-precision operators are "
        "missing: take int8, or fp16 in tflite or coreml"
    ),
}


def find_recipe(format_name: Format, precision: Precision) -> Recipe:
    """The recipe, or ``PrecisionRefused`` with the reason."""
    recipe = RECIPES.get((format_name, precision))
    if recipe is None:
        reason = REFUSED.get(
            (format_name, precision), "this combination is not offered; see nearfar formats"
        )
        raise PrecisionRefused(f"{format_name} {precision}: {reason}")
    return recipe
