"""Which precision each format has, what it takes, and why the others cannot be.

Precision names: ``fp32``, ``fp16``, ``int8`` (static: weights and activations),
``int8-dyn`` (weights stored, activations quantized while running), ``int8w`` and ``int4w``
(weights only), ``pal4`` (weights from a palette of 16), ``a16w8`` (16-bit activations),
``+sparse`` (small weights set to zero and stored as such).
"""

from __future__ import annotations

from typing import get_args

from converters.recipes import coreml, executorch, tflite, torchscript
from converters.recipes.base import Recipe
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.manifest import Format, Precision

__all__ = ["FORMATS", "OFFERED", "RECIPES", "REFUSED", "Recipe", "find_recipe"]

_MODULES = {
    "torchscript": torchscript,
    "tflite": tflite,
    "coreml": coreml,
    "executorch": executorch,
}

FORMATS: tuple[Format, ...] = get_args(Format)
OFFERED: tuple[Precision, ...] = get_args(Precision)

RECIPES: dict[tuple[Format, Precision], Recipe] = {
    (name, precision): recipe
    for name in FORMATS
    for precision, recipe in _MODULES[name].RECIPES.items()
}

REFUSED: dict[tuple[Format, Precision], str] = {
    (name, precision): reason
    for name in FORMATS
    for precision, reason in _MODULES[name].REFUSED.items()
}


def find_recipe(format_name: Format, precision: Precision) -> Recipe:
    """The recipe, or ``PrecisionRefused`` with the reason."""
    recipe = RECIPES.get((format_name, precision))
    if recipe is None:
        raise PrecisionRefused(f"{format_name} {precision}: {REFUSED[(format_name, precision)]}")
    return recipe
