"""``nearfar run --save``: answers as picture files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.contract.answer_codec import class_colors
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.imaging import decode_image
from edge_runtime.drawing import draw_boxes, overlay_classes
from edge_runtime.results import Result

__all__ = ["Saver"]


class Saver:
    """Writes PNG files into one folder, none over another of the same run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from None

    def save(self, name: str, result: Result) -> dict[str, str]:
        """Paths of what was written, by kind; ``name``: the photo's path, or a seed.

        ``boxes``: the photo with its boxes. ``mask``: the class of each of the photo's
        pixels, with a palette; ``overlay``: the photo with these colors. ``image``: an
        answer that is one. Raises ``ConfigError`` when a file cannot be written.
        """
        if result.task == "generation":
            stem = self._stem(f"seed-{name}")
        else:
            stem = self._stem(re.sub(r"[^\w.-]", "_", Path(name).stem) or "photo")
        if result.image is not None:
            return {"image": self._write(f"{stem}.image.png", Image.fromarray(result.image))}
        if result.task == "detection":
            drawn = draw_boxes(_photo(name), result.boxes)
            return {"boxes": self._write(f"{stem}.boxes.png", Image.fromarray(drawn))}
        if result.class_map is not None:
            photo = _photo(name)
            class_map = result.class_map_for(photo.shape[0], photo.shape[1])
            mask = Image.fromarray(class_map)
            mask.putpalette(class_colors().tobytes())
            overlay = Image.fromarray(overlay_classes(photo, class_map))
            return {
                "mask": self._write(f"{stem}.mask.png", mask),
                "overlay": self._write(f"{stem}.overlay.png", overlay),
            }
        return {}

    def _stem(self, wanted: str) -> str:
        stem, number = wanted, 1
        while stem in self._taken:
            number += 1
            stem = f"{wanted}-{number}"
        self._taken.add(stem)
        return stem

    def _write(self, name: str, picture: Image.Image) -> str:
        path = self._folder / name
        try:
            picture.save(path, "PNG")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        return str(path)


def _photo(path: str) -> NDArray[np.uint8]:
    return decode_image(Path(path).read_bytes())
