"""Photos that a model's 8-bit ranges are learned on, and others that prove them."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.executors.decoding import prepare_pixels
from broker.models.servable import OpenedServable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ModelLoadError, NearfarError
from edge_runtime.contract.tasks import ClassificationTask

__all__ = ["LEAST_PHOTOS", "Photos", "read_photos"]

LEAST_PHOTOS: Final = 32
_MOST_PHOTOS: Final = 128


class Photos(NamedTuple):
    """Inputs of one model, ``[1, ...]`` of 8-bit pixels each."""

    learned: list[NDArray[np.generic]]
    """For the ranges."""
    held_out: list[NDArray[np.generic]]
    """For the comparison with fp32: no range has seen them."""
    classes: bool
    """The first output says which class it is."""


def read_photos(servable: OpenedServable, folder: str | None) -> Photos:
    """The first 128 files of ``folder`` by name, prepared for the model; every second is held out.

    Raises ``ModelLoadError`` without a folder, for fewer than 32 files or one that is no image,
    and for a model that takes no image.
    """
    name, record = servable.manifest.name, servable.manifest.preprocess
    if folder is None:
        raise ModelLoadError("int8 is learned on photos: pass --calibration DIR with 32 or more")
    if record is None:
        raise ModelLoadError(f"{name!r} takes no images: int8 cannot be learned for it")
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.is_file())[:_MOST_PHOTOS]
        if len(paths) < LEAST_PHOTOS:
            raise ModelLoadError(
                f"{folder} has {len(paths)} photos, int8 needs {LEAST_PHOTOS} like those to come"
            )
        spec = msgspec.structs.replace(servable.manifest.model.inputs[0], dtype="uint8")
        inputs: list[NDArray[np.generic]] = []
        for path in paths:
            with path.open("rb") as file:
                body = file.read(limits.MAX_IMAGE_BYTES + 1)
            try:
                inputs.append(prepare_pixels(record, spec, body).array)
            except NearfarError as error:
                raise ModelLoadError(f"cannot calibrate with {path}: {error.detail}") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read {folder}: {type(error).__name__}") from None
    return Photos(inputs[::2], inputs[1::2], isinstance(servable.task, ClassificationTask))
