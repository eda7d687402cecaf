"""Pre-processing of a file with the normalization in its graph: it takes plain pixels."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.preprocess import NAMED, Normalization, Preprocess

__all__ = ["baked_record", "to_pixel_values"]


def baked_record(record: Preprocess) -> Preprocess:
    """What a file with the rest of ``record`` in its graph expects: plain pixels."""
    if record.color == "GRAY":
        return msgspec.structs.replace(
            record, normalization=Normalization(scale=1.0, mean=(0.0,), std=(1.0,))
        )
    color, normalization = NAMED["raw"]
    return msgspec.structs.replace(record, color=color, normalization=normalization)


def to_pixel_values(record: Preprocess, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo the normalization of ``[N, C, H, W]``: the 8-bit values, as float32, in RGB order."""
    table = record.normalization
    mean = np.array(table.mean).reshape(1, -1, 1, 1)
    std = np.array(table.std).reshape(1, -1, 1, 1)
    values = np.rint((np.asarray(pixels, dtype=np.float64) * std + mean) * table.scale)
    if record.color == "BGR":
        values = values[:, ::-1]
    return np.ascontiguousarray(np.clip(values, 0, 255), dtype=np.float32)
