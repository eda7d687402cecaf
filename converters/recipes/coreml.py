"""Core ML ML programs: which iOS each precision needs.

``min_os`` of a recipe is the oldest iOS that it can be written for. Without ``--min-ios`` a
file is written for ``PREFERRED_IOS`` or later: its operators are the better tested ones.
"""

from __future__ import annotations

from typing import Final

from converters.recipes.base import Recipe
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.manifest import MinOs, Precision

__all__ = [
    "PREFERRED_IOS",
    "RECIPES",
    "REFUSED",
    "check_min_os",
    "deployment_ios",
]

PREFERRED_IOS: Final = 17
"""Major version without ``--min-ios``, unless the precision needs a newer one."""


def _recipe(ios: str, *, calibrated: bool = False, gains: bool = False) -> Recipe:
    return Recipe(
        calibrated=calibrated,
        gains=gains,
        rounded=calibrated,
        min_os=MinOs(ios=ios),
        accelerators=("cpu", "gpu", "npu"),
    )


RECIPES: dict[Precision, Recipe] = {
    # The Neural Engine has no fp32.
    "fp32": Recipe(min_os=MinOs(ios="15.0"), accelerators=("cpu", "gpu")),
    "fp16": _recipe("15.0"),
    "int8": _recipe("17.0", calibrated=True),
    # Weights that make up for the errors of the layers before: 7 to 17 dB on small nets.
    "int8w": _recipe("16.0", gains=True),
    "int4w": _recipe("18.0", gains=True),
    "pal4": _recipe("16.0", gains=True),
    "fp16+sparse": _recipe("16.0", gains=True),
    "int8w+sparse": _recipe("18.0", gains=True),
}

REFUSED: dict[Precision, str] = {
    "int8-dyn": "Core ML has no dynamic quantization: take int8w, or int8 with calibration images",
    "a16w8": "Core ML has no 16-bit integer activations: take int8w, which computes in fp16",
}


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def check_min_os(precision: Precision, min_os: MinOs | None) -> None:
    """Raise ``PrecisionRefused`` when the precision needs a newer iOS than asked for."""
    needed = RECIPES[precision].min_os.ios
    if min_os is None or min_os.ios is None or needed is None:
        return
    if _major(min_os.ios) < _major(needed):
        raise PrecisionRefused(
            f"coreml {precision} needs iOS {needed}, and --min-ios is {min_os.ios}: raise it, or "
            "take a precision that runs there ('nearfar formats' lists them)"
        )


def deployment_ios(precision: Precision, min_os: MinOs | None) -> int:
    """The major iOS version to write for. Raises ``PrecisionRefused``; see ``check_min_os``."""
    check_min_os(precision, min_os)
    needed = RECIPES[precision].min_os.ios
    asked = PREFERRED_IOS if min_os is None or min_os.ios is None else _major(min_os.ios)
    return max(min(asked, PREFERRED_IOS), _major(needed or "0"))
