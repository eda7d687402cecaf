"""What a ``.pte`` really holds: see ``converters.formats.census_types``.

Operators on XNNPACK are named ``xnnpack.Conv2d``, those that run on ExecuTorch's portable
kernels keep their own name, ``aten::topk.values``. Biases of int8 layers are stored as
int32, scales of channels beside the weights: neither counts as a weight.
"""

from __future__ import annotations

from pathlib import Path

from converters.formats.census_types import Census, make_census
from converters.formats.executorch_file import read_pte

__all__ = ["census"]


def census(path: Path) -> Census:
    """Count what the saved file holds. Raises ``ModelLoadError``."""
    file = read_pte(path)
    operators = {f"xnnpack.{name}": count for name, count in file.delegated.items()}
    return make_census(file.constants, {**operators, **file.kernels}, file.delegated_int8)
