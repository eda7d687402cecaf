"""The images to calibrate with: a folder, and a CSV of their classes."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.contract import limits
from edge_runtime.contract.errors import EvaluationError, LimitExceeded, MissingFile
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import sniff_media_type

__all__ = ["Photos", "data_digest", "read_photos"]


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Files in the order to ask them, with the class of each where labels say it."""

    files: tuple[Path, ...]
    classes: tuple[int, ...] | None


def read_photos(
    folder: Path, labels: Path | None, *, split: str | None, class_count: int | None, most: int
) -> Photos:
    """At most ``most`` images, drawn from all by a fixed seed when there are more.

    ``labels``: ``file,class_index[,split]`` with paths inside ``folder``; None: every JPEG,
    PNG and WebP below it. Raises ``EvaluationError``.
    """
    root = folder.absolute()
    if not root.is_dir():
        raise EvaluationError(f"the folder {folder} does not exist: name one with --data")
    if labels is None:
        files = sorted(path for path in root.rglob("*") if path.is_file() and _is_image(path))
        classes: list[int] = []
    else:
        files, classes = _read_csv(labels, root, split, class_count)
    if not files:
        raise EvaluationError(f"{folder} holds no JPEG, PNG or WebP image: choose another folder")
    if len(files) > limits.MAX_DATASET_FILES:
        raise EvaluationError(f"{len(files)} images are more than {limits.MAX_DATASET_FILES}")
    chosen = np.arange(len(files))
    if len(files) > most:
        chosen = np.sort(np.random.default_rng(0).choice(len(files), most, replace=False))
    return Photos(
        files=tuple(files[number] for number in chosen),
        classes=None if labels is None else tuple(classes[number] for number in chosen),
    )


def data_digest(digests: tuple[str, ...], classes: tuple[int, ...] | None) -> str:
    r"""Hex SHA-256 of ``"<digest> <class or ->\\n"`` of each image, sorted."""
    said = ["-"] * len(digests) if classes is None else [str(one) for one in classes]
    lines = sorted(f"{digest} {one}\n" for digest, one in zip(digests, said, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return sniff_media_type(file.read(16)) is not None
    except OSError:
        return False


def _read_csv(
    path: Path, root: Path, split: str | None, class_count: int | None
) -> tuple[list[Path], list[int]]:
    try:
        text = read_bounded(path, limits.MAX_CSV_BYTES).decode("utf-8-sig")
    except (MissingFile, LimitExceeded) as error:
        raise EvaluationError(error.detail) from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{path} is not UTF-8 text: save it as such") from None
    reader = csv.DictReader(io.StringIO(text))
    for column in ("file", "class_index", *(() if split is None else ("split",))):
        if column not in (reader.fieldnames or []):
            raise EvaluationError(
                f"{path} has no column {column!r}: it needs file,class_index[,split]"
            )
    files: list[Path] = []
    classes: list[int] = []
    seen: set[str] = set()
    try:
        for number, row in enumerate(reader, 2):
            if split is not None and row["split"] != split:
                continue
            name, index = row["file"] or "", (row["class_index"] or "").strip()
            where = f"{path}, line {number}"
            if not name or not index.isascii() or not index.isdigit() or len(index) > 9:
                raise EvaluationError(f"{where}: write a file and a whole class_index")
            if class_count is not None and int(index) >= class_count:
                raise EvaluationError(
                    f"{where}: class {index} of a bundle with {class_count} classes (from 0)"
                )
            if name in seen:
                raise EvaluationError(f"{where}: {name!r} is listed twice")
            seen.add(name)
            file = root / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                raise EvaluationError(f"{where}: {name!r} is no file inside {root}")
            files.append(file)
            classes.append(int(index))
    except csv.Error as error:
        raise EvaluationError(f"{path} is no CSV ({error}): write file,class_index") from None
    if not files:
        of_split = "" if split is None else f" of split {split!r}"
        raise EvaluationError(f"{path} lists no file{of_split}")
    return files, classes
