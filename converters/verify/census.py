"""What a saved file says about how it stores its weights, whatever its format."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from converters.formats.census_types import Census

__all__ = ["find_census"]

_MODULES = {
    "tflite": "converters.formats.census:census",
    "torchscript": "converters.formats.census:census",
    "coreml": "converters.formats.coreml_census:census",
    "executorch": "converters.formats.executorch_census:census",
}


def find_census(format_name: str, path: Path) -> Census | None:
    """The census of one file; None for a format of someone else's that has none.

    Raises ``ModelLoadError`` when the file cannot be read.
    """
    name = _MODULES.get(format_name)
    if name is None:
        return None
    module, _, function = name.partition(":")
    if find_spec(module) is None:
        return None
    result: Census = getattr(import_module(module), function)(path)
    return result
