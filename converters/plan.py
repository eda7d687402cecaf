"""Which variants to write, and why the others cannot be: decided before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from converters.jobs import InGraph
from converters.recipes import RECIPES, REFUSED, Recipe
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.manifest import Format, InputMode, MinOs, Precision

__all__ = ["FileOptions", "Target", "plan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One variant to write."""

    format: Format
    precision: Precision
    recipe: Recipe

    @property
    def id(self) -> str:
        """``tflite-int8``."""
        return f"{self.format}-{self.precision}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What every file of the bundle takes and gives."""

    input_mode: InputMode = "float"
    in_graph: tuple[InGraph, ...] = ()
    min_os: MinOs | None = None
    keep: tuple[str, ...] = ()
    """Modules that stay in floating point where activations are quantized."""


def plan(
    formats: Sequence[Format], precisions: Sequence[Precision], options: FileOptions
) -> tuple[list[Target], list[str]]:
    """The variants to write, and a sentence for each combination that cannot be.

    Raises ``PrecisionRefused`` when a requested format or precision would get nothing.
    """
    targets = []
    refused = []
    for format_name in formats:
        for precision in precisions:
            recipe = RECIPES.get((format_name, precision))
            reason = REFUSED.get((format_name, precision), "not offered")
            if recipe is not None:
                reason = _obstacle(recipe, options)
            if recipe is None or reason:
                refused.append(f"{format_name} {precision}: {reason}")
            else:
                targets.append(Target(format=format_name, precision=precision, recipe=recipe))
    made_formats = {target.format for target in targets}
    made_precisions = {target.precision for target in targets}
    if set(formats) - made_formats or set(precisions) - made_precisions:
        raise PrecisionRefused("; ".join(refused))
    return targets, refused


def _obstacle(recipe: Recipe, options: FileOptions) -> str:
    """Why this recipe cannot be with these options; empty when it can."""
    if recipe.calibrated and "nms" in options.in_graph:
        return (
            "box decoding and NMS lose too much in integers: leave --nms out (the runtime does "
            "both), or take a float precision"
        )
    least = options.min_os
    if least is None:
        return ""
    own_ios, own_android = recipe.min_os.ios, recipe.min_os.android_api
    if least.ios is not None and own_ios is not None and _version(own_ios) > _version(least.ios):
        return f"it needs iOS {own_ios}, the app is to run on iOS {least.ios}"
    if (
        least.android_api is not None
        and own_android is not None
        and own_android > least.android_api
    ):
        return f"it needs Android API {own_android}, the app is to run on {least.android_api}"
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
