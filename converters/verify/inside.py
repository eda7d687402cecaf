"""What a saved file says of itself, against what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import msgspec

from converters.verify.figures import Finding
from edge_runtime.contract.manifest import FileMetadata, Variant
from edge_runtime.contract.tasks import Task

__all__ = ["check_metadata", "read_inside"]

_READERS = {
    "tflite": "converters.formats.metadata",
    "torchscript": "converters.formats.metadata",
    "coreml": "converters.formats.metadata",
    "executorch": "converters.formats.executorch_file",
}


def read_inside(format_name: str, path: Path) -> str | None:
    """The JSON stored in a model file; None when there is none. Raises ``ModelLoadError``."""
    module = _READERS.get(format_name)
    if module is None or find_spec(module) is None:
        return None
    reader = cast("Callable[[Path], str | None]", import_module(module).read_metadata)
    return reader(path)


def check_metadata(
    text: str | None, variant: Variant, task: Task, labels: tuple[str, ...]
) -> list[Finding]:
    """A file that explains itself otherwise than the manifest does: one of them is wrong.

    A file without metadata is someone else's and says nothing.
    """
    if text is None:
        return []
    try:
        inside = msgspec.json.decode(text, type=FileMetadata)
    except msgspec.DecodeError as error:
        return [Finding(name="metadata", detail=f"the record inside the file is broken: {error}")]
    found = []
    if inside.labels and inside.labels != labels:
        differ = sum(a != b for a, b in zip(inside.labels, labels, strict=False))
        found.append(
            Finding(
                name="labels",
                detail=f"the labels inside the file are not the bundle's: {differ} of "
                f"{len(inside.labels)} differ, so answers would carry wrong names",
            )
        )
    if inside.preprocess != variant.preprocess:
        found.append(
            Finding(
                name="preprocess-record",
                detail="the pre-processing recorded inside the file is not the manifest's: one "
                "of them was changed after conversion",
            )
        )
    if inside.task != task:
        found.append(
            Finding(name="task", detail="the task recorded inside the file is not the manifest's")
        )
    return found
