"""Golden images: drawn, not photographed, so that a bundle carries nobody's pictures.

Colorful, with edges, gradients and texture, in several sizes, encodings and orientations.
Every implementation of the pre-processing must turn them into the same tensor, and every
variant is compared with the reference's answers for them.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["GOLDEN_COUNT", "write_golden_images"]

GOLDEN_COUNT = 8
_SIZES = (
    (320, 240),
    (240, 320),
    (256, 256),
    (400, 300),
    (97, 131),
    (64, 48),
    (500, 211),
    (224, 224),
)


def _draw(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """One picture, uint8 ``[height, width, 3]``, from integer arithmetic alone."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * 255 // max(width - 1, 1) + 40 * index) % 256
    green = (y * 255 // max(height - 1, 1) + 90 * index) % 256
    blue = ((x + 2 * y) * (3 + index) // 5) % 256
    image = np.stack([red, green, blue], axis=2)
    for shape in range(3 + index % 3):
        seed = (index * 7 + shape * 13 + 5) % 31
        center_x = width * (seed % 5 + 1) // 6
        center_y = height * (seed % 7 + 1) // 8
        radius = max(3, min(width, height) * (2 + seed % 3) // 12)
        color = np.array([(seed * 37) % 256, (seed * 91) % 256, (seed * 53) % 256])
        if shape % 2:
            inside = (abs(x - center_x) < radius) & (abs(y - center_y) < radius * 2 // 3)
        else:
            inside = (x - center_x) ** 2 + (y - center_y) ** 2 < radius * radius
        image[inside] = color
    noise = (x * 1103515245 + y * 12345 + index * 2654435761) >> 7
    return np.clip(image + (noise % 17 - 8)[:, :, None], 0, 255).astype(np.uint8)


def _encode(index: int, image: NDArray[np.uint8]) -> tuple[bytes, str]:
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if index % 4 == 3:
        exif = Image.Exif()
        exif[0x0112] = 6  # stored on its side: rotate 90 degrees clockwise to see it upright
        picture.save(buffer, "JPEG", quality=92, subsampling=0, exif=exif)
        return buffer.getvalue(), "jpg"
    picture.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue(), "png"


def write_golden_images(folder: Path) -> list[Path]:
    """Write the golden images into ``folder``; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (width, height) in enumerate(_SIZES[:GOLDEN_COUNT]):
        data, suffix = _encode(index, _draw(index, width, height))
        path = folder / f"golden_{index:02d}.{suffix}"
        path.write_bytes(data)
        paths.append(path)
    return paths
