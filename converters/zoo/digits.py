"""Real handwritten digits as photos: scikit-learn's 1797 scans, split by scan.

The scans come with scikit-learn (UCI "Optical Recognition of Handwritten Digits", test
part, 13 writers), so nothing is downloaded. A scan belongs to one split for ever, decided
by its own content; every photo of it belongs to the same split.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from converters.zoo.photo import draw_scene, encode_jpeg, rasterize
from edge_runtime.contract.errors import BackendUnavailable, ConfigError, SourceError
from edge_runtime.contract.files import atomic_directory

__all__ = [
    "LABELS_NAME",
    "SPLITS",
    "Progress",
    "Split",
    "indices",
    "load_scans",
    "photo_seed",
    "render",
    "split",
    "write_split",
]

Split = Literal["train", "calib", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "calib", "test")
Progress = Callable[[str, int, int], None]
"""Called with a message, how much is done, and of how much."""

LABELS_NAME: Final = "labels.csv"
_PHOTO_NAME: Final = re.compile(r"digit-[0-9]{4}\.jpg")
_SCANS: Final = 1797
_SCANS_SHA256: Final = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
_TEST_SHARE: Final = 0.25
_CALIB_SHARE: Final = 0.06


@cache
def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans, uint8 ``[1797, 8, 8]`` of 0 (paper) to 16 (ink), and their digits.

    Raises ``BackendUnavailable`` without scikit-learn, ``SourceError`` when its digits are
    not the ones that the splits and the recorded accuracies are about.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BackendUnavailable(
            "the digits zoo needs scikit-learn: pip install 'nearfar[convert]'"
        ) from None
    data = load_digits()
    scans = np.ascontiguousarray(data.images.astype(np.uint8))
    digits = np.asarray(data.target, np.int64)
    digest = hashlib.sha256(scans.tobytes() + digits.astype("<i8").tobytes()).hexdigest()
    if digest != _SCANS_SHA256:
        raise SourceError(
            "this scikit-learn brings other digits than the zoo knows: "
            "install the version that constraints.txt names"
        )
    scans.flags.writeable = digits.flags.writeable = False
    return scans, digits


@cache
def _splits() -> tuple[Split, ...]:
    """The split of every scan: a uniform number from the scan's own digest decides."""
    scans, _ = load_scans()
    names: list[Split] = []
    for scan in scans:
        share = int.from_bytes(hashlib.sha256(scan.tobytes()).digest()[:4], "big") / 2**32
        if share < _TEST_SHARE:
            names.append("test")
        elif share < _TEST_SHARE + _CALIB_SHARE:
            names.append("calib")
        else:
            names.append("train")
    return tuple(names)


def split(index: int) -> Split:
    """The split that scan ``index`` (0 to 1796) and all its photos belong to."""
    if not 0 <= index < _SCANS:
        raise ConfigError(f"there is no scan {index}: choose 0 to {_SCANS - 1}")
    return _splits()[index]


def indices(name: Split) -> list[int]:
    """The scans of one split, in order."""
    return [index for index, own in enumerate(_splits()) if own == name]


def photo_seed(index: int, copy: int = 0) -> int:
    """Seed of a photo of scan ``index``; copy 0 is the one ``write_split`` writes."""
    return copy * 10_000 + index


def render(scan: NDArray[np.uint8], seed: int) -> bytes:
    """A photo of one scan (uint8 ``[8, 8]``) as JPEG: same arguments, same bytes."""
    scene = draw_scene(seed)
    return encode_jpeg(rasterize(scene, scan), scene.jpeg_quality)


def write_split(
    folder: Path,
    name: Split,
    count: int | None = None,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one photo of each scan (of the first ``count``) and ``labels.csv``.

    The CSV has a header and ``file,class_index,split`` rows. The folder appears whole or
    not at all. Returns the photos' paths. Raises ``ConfigError`` when ``folder`` exists
    and ``replace`` is not set or it holds anything else, or when there are fewer than
    ``count`` scans.
    """
    chosen = indices(name)
    if count is not None and not 1 <= count <= len(chosen):
        raise ConfigError(f"--count must be 1 to {len(chosen)} for the {name} split")
    chosen = chosen[:count]
    if replace and folder.exists():
        _check_own(folder)
    scans, digits = load_scans()
    rows: list[Sequence[str | int]] = [("file", "class_index", "split")]
    with atomic_directory(folder, replace=replace) as work:
        for done, index in enumerate(chosen):
            if progress is not None:
                progress(f"rendering {name} photos", done, len(chosen))
            file = f"digit-{index:04d}.jpg"
            (work / file).write_bytes(render(scans[index], photo_seed(index)))
            rows.append((file, int(digits[index]), name))
        with (work / LABELS_NAME).open("w", newline="", encoding="utf-8") as table:
            csv.writer(table, lineterminator="\n").writerows(rows)
    if progress is not None:
        progress(f"rendering {name} photos", len(chosen), len(chosen))
    return [folder / str(row[0]) for row in rows[1:]]


def _check_own(folder: Path) -> None:
    """Refuse to replace what ``write_split`` did not write."""
    if not folder.is_dir() or any(
        path.name != LABELS_NAME and not _PHOTO_NAME.fullmatch(path.name)
        for path in folder.iterdir()
    ):
        raise ConfigError(f"{folder} holds other files than digit photos: choose another output")
