"""Folders of images for calibration and evaluation, with labels and split hygiene."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    CalibrationError,
    ConversionError,
    EvaluationError,
    LimitExceeded,
    MissingFile,
)
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import sniff_media_type

__all__ = ["Dataset", "image_digests", "read_dataset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Image files in a fixed order, with class indices when they are known."""

    files: tuple[Path, ...]
    classes: tuple[int, ...] | None = None


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return sniff_media_type(file.read(16)) is not None
    except OSError:
        return False


def _read_labels(
    path: Path, split: str | None, fail: type[ConversionError]
) -> list[tuple[str, int]]:
    try:
        text = read_bounded(path, limits.MAX_CSV_BYTES).decode("utf-8-sig")
    except (MissingFile, LimitExceeded) as error:
        raise fail(error.detail) from None
    except UnicodeDecodeError:
        raise fail(f"{path} is not UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text))
    fields = reader.fieldnames or []
    for column in ("file", "class_index", *(("split",) if split is not None else ())):
        if column not in fields:
            raise fail(f"{path} has no column {column!r}: it needs file,class_index[,split]")
    rows = []
    seen: set[str] = set()
    for number, row in enumerate(reader, 2):
        if split is not None and row["split"] != split:
            continue
        name, index = row["file"], (row["class_index"] or "").strip()
        if not name or not index.isdigit():
            raise fail(f"{path}, line {number}: write a file and a whole class_index")
        if name in seen:
            raise fail(f"{path}, line {number}: {name!r} is listed twice")
        seen.add(name)
        rows.append((name, int(index)))
    if not rows:
        where = f" of split {split!r}" if split is not None else ""
        raise fail(f"{path} lists no file{where}")
    return rows


def read_dataset(
    folder: Path,
    *,
    labels: Path | None = None,
    split: str | None = None,
    purpose: str,
) -> Dataset:
    """The images of ``folder``, or those that a labels CSV lists.

    ``purpose`` is ``calibration`` or ``evaluation`` and chooses the error class:
    ``CalibrationError`` or ``EvaluationError``, for a folder without images, a CSV that
    does not fit it, or a listed file that is not there.
    """
    fail: type[ConversionError] = CalibrationError if purpose == "calibration" else EvaluationError
    folder = folder.absolute()  # child processes work elsewhere
    if not folder.is_dir():
        raise fail(f"{purpose} folder {folder} does not exist")
    if split is not None and labels is None:
        raise fail(f"a split needs a labels CSV: pass the {purpose} labels too")
    if labels is None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_image(path))
        if not files:
            raise fail(f"{folder} holds no JPEG, PNG or WebP image: choose another folder")
        _check_count(len(files), fail)
        return Dataset(files=tuple(files))
    rows = _read_labels(labels, split, fail)
    _check_count(len(rows), fail)
    files = []
    for name, _ in rows:
        path = folder / name
        if not path.is_file():
            raise fail(f"{labels} lists {name!r}, which is not in {folder}")
        files.append(path)
    return Dataset(files=tuple(files), classes=tuple(index for _, index in rows))


def _check_count(count: int, fail: type[ConversionError]) -> None:
    if count > limits.MAX_DATASET_FILES:
        raise fail(f"{count} images are more than {limits.MAX_DATASET_FILES}: take a sample")


def image_digests(files: Iterable[Path]) -> list[str]:
    """Hex SHA-256 of each file's bytes: identity by content, whatever the name."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
