"""Which images to train on and which to hold out: folders, a CSV, or no labels at all."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from converters.dataset import read_dataset
from edge_runtime.contract import limits
from edge_runtime.contract.errors import EvaluationError, LimitExceeded, MissingFile
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import sniff_media_type

__all__ = [
    "Found",
    "Sample",
    "Split",
    "check_split",
    "digest_of",
    "find_labeled",
    "find_unlabeled",
    "split_seeded",
]

_HELD_OUT = ("val", "valid", "validation")
_IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
)
Role = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One image file."""

    path: Path
    label: int | None
    """Index into the classes; None without labels."""
    role: Role | None = None
    """None: a seeded split decides."""
    sha256: str = ""
    """Of the file."""
    pixels: str = ""
    """SHA-256 of the decoded pixels: the same picture under another coding is found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Images as the folder or CSV lists them, not yet decoded."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...] | None
    """Names by index; None without labels or names."""
    source: Literal["folders", "csv", "seeded"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What to train on and what to measure on; no picture is in both."""

    train: tuple[Sample, ...]
    heldout: tuple[Sample, ...]


def _is_candidate(path: Path) -> bool:
    """An image by its first bytes or by its name: the latter may prove unreadable."""
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return sniff_media_type(file.read(16)) is not None
    except OSError:
        return False


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_candidate(path))


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _explicit_split(folder: Path) -> tuple[Path, Path] | None:
    """``train`` and ``val`` below ``folder``, when it has them."""
    train = folder / "train"
    held_out = [folder / name for name in _HELD_OUT if (folder / name).is_dir()]
    if not train.is_dir():
        return None
    if not held_out:
        raise EvaluationError(
            f"{folder} has train/ and no val/: add held-out images as val/, or put the class "
            "folders directly below it and let a seeded split hold some out"
        )
    if len(held_out) > 1:
        names = " and ".join(f"{path.name}/" for path in held_out)
        raise EvaluationError(f"{folder} has {names}: keep one as val/")
    return train, held_out[0]


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    if not folder.is_dir():
        raise EvaluationError(f"data folder {folder} does not exist")
    return folder


def find_labeled(
    folder: Path,
    *,
    labels_csv: Path | None = None,
    splits: tuple[str, str] | None = None,
    names: Sequence[str] | None = None,
) -> Found:
    """Images of ``folder`` with their classes.

    ``labels_csv``: ``file,class_index[,split]``; ``splits``: the names of its training and
    held-out splits (None: ``train`` and ``val`` when the column has both). Without it the
    class is the folder: ``train/<class>/`` and ``val/<class>/``, or ``<class>/``. ``names``:
    class names in the order of the outputs. Raises ``EvaluationError``.
    """
    folder = _existing(folder)
    if labels_csv is not None:
        return _from_csv(folder, labels_csv, splits, names)
    if splits is not None:
        raise EvaluationError("a split's name needs a labels CSV: pass --data-labels too")
    return _from_folders(folder, names)


def _from_csv(
    folder: Path, path: Path, splits: tuple[str, str] | None, names: Sequence[str] | None
) -> Found:
    if splits is None and {"train", "val"} <= _splits_of(path):
        splits = ("train", "val")
    if splits is None:
        listed = read_dataset(folder, labels=path, purpose="evaluation")
        samples = _listed(listed.files, listed.classes, None)
    else:
        samples = []
        roles: tuple[Role, Role] = ("train", "heldout")
        for split, role in zip(splits, roles, strict=True):
            listed = read_dataset(folder, labels=path, split=split, purpose="evaluation")
            samples += _listed(listed.files, listed.classes, role)
    highest = max(sample.label or 0 for sample in samples)
    if names is not None and highest >= len(names):
        raise EvaluationError(
            f"{path.name} has class_index {highest}, there are {len(names)} class names: "
            "pass --labels with a line for each class"
        )
    classes = tuple(names) if names is not None else tuple(f"class {i}" for i in range(highest + 1))
    return Found(samples=tuple(samples), classes=classes, source="csv" if splits else "seeded")


def _listed(
    files: Iterable[Path], classes: Iterable[int] | None, role: Role | None
) -> list[Sample]:
    return [
        Sample(path=file, label=label, role=role)
        for file, label in zip(files, classes or (), strict=True)
    ]


def _splits_of(path: Path) -> set[str]:
    try:
        text = read_bounded(path, limits.MAX_CSV_BYTES).decode("utf-8-sig")
    except (MissingFile, LimitExceeded, UnicodeDecodeError):
        return set()  # read_dataset says what is wrong
    return {row.get("split") or "" for row in csv.DictReader(text.splitlines())}


def _from_folders(folder: Path, names: Sequence[str] | None) -> Found:
    explicit = _explicit_split(folder)
    roots: list[tuple[Path, Role | None]]
    roots = [(folder, None)] if explicit is None else [(explicit[0], "train")]
    if explicit is not None:
        roots.append((explicit[1], "heldout"))
    found = [child.name for child in _class_folders(roots[0][0])]
    if not found:
        raise EvaluationError(
            f"{roots[0][0]} has no class folders: lay images out as <class>/<image>, or pass "
            "--data-labels CSV"
        )
    if names is not None and set(names) != set(found):
        odd = sorted(set(names) ^ set(found))
        raise EvaluationError(
            f"the class folders and --labels differ in {', '.join(map(repr, odd[:5]))}: "
            "name each folder as its label"
        )
    classes = tuple(names) if names is not None else tuple(found)
    samples: list[Sample] = []
    for root, role in roots:
        unknown = sorted({child.name for child in _class_folders(root)} - set(classes))
        if unknown:
            raise EvaluationError(f"{root / unknown[0]} is a class that train/ has not")
        for label, name in enumerate(classes):
            files = _images(root / name) if (root / name).is_dir() else []
            if not files:
                raise EvaluationError(f"class {name!r} is empty: {root / name} holds no image")
            samples += [Sample(path=file, label=label, role=role) for file in files]
    return Found(
        samples=tuple(samples), classes=classes, source="seeded" if explicit is None else "folders"
    )


def find_unlabeled(folder: Path) -> Found:
    """All images of ``folder``, without classes; ``train/`` and ``val/`` are kept apart.

    Raises ``EvaluationError``.
    """
    folder = _existing(folder)
    explicit = _explicit_split(folder)
    roots: list[tuple[Path, Role | None]] = [(folder, None)]
    if explicit is not None:
        roots = [(explicit[0], "train"), (explicit[1], "heldout")]
    samples = [
        Sample(path=path, label=None, role=role) for root, role in roots for path in _images(root)
    ]
    if not samples:
        raise EvaluationError(f"{folder} holds no JPEG, PNG or WebP image: choose another folder")
    return Found(
        samples=tuple(samples), classes=None, source="seeded" if explicit is None else "folders"
    )


def split_seeded(samples: Sequence[Sample], *, share: float, seed: int) -> Split:
    """Hold out ``share`` of each class, drawn by ``seed`` from the pixel digests.

    Equal pictures stay on one side; file names and their order do not matter. Each class
    keeps at least one image on each side. Raises ``EvaluationError`` for a class with
    fewer than two different pictures.
    """
    train: list[Sample] = []
    heldout: list[Sample] = []
    by_label: dict[int | None, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        by_label[sample.label][sample.pixels].append(sample)
    for label, pictures in by_label.items():
        if len(pictures) < 2:
            raise EvaluationError(
                f"class {label} has one picture ({next(iter(pictures.values()))[0].path}): two "
                "are the least, one to train on and one to hold out"
            )
        order = sorted(pictures)
        random.Random(f"{seed}:{label}").shuffle(order)  # noqa: S311  # no secret
        count = min(len(order) - 1, max(1, round(share * len(order))))
        chosen = set(order[:count])
        for digest, copies in pictures.items():
            (heldout if digest in chosen else train).extend(copies)

    def by_path(sample: Sample) -> Path:
        return sample.path

    return Split(
        train=tuple(sorted(train, key=by_path)), heldout=tuple(sorted(heldout, key=by_path))
    )


def check_split(split: Split, classes: Sequence[str] | None, *, all_classes: bool) -> int:
    """Refuse a split that would flatter or mislead; returns the number of duplicates.

    ``all_classes``: every class needs training images, as for a new head. Raises
    ``EvaluationError`` for a picture on both sides (leak), for one picture under two
    classes, for a single class, and for a class without training images.
    """
    labels: dict[str, Sample] = {}
    for sample in (*split.train, *split.heldout):
        other = labels.setdefault(sample.pixels, sample)
        if other.label != sample.label:
            raise EvaluationError(
                f"{other.path} and {sample.path} are the same picture under two classes: remove one"
            )
    trained = {sample.pixels: sample for sample in split.train}
    leaks = [(trained[s.pixels], s) for s in split.heldout if s.pixels in trained]
    if leaks:
        first, second = leaks[0]
        raise EvaluationError(
            f"{len(leaks)} held-out images are training images too, the first {second.path} = "
            f"{first.path}: figures on them would prove nothing, remove them from one side"
        )
    if not split.heldout or not split.train:
        raise EvaluationError("there must be images to train on and images to hold out")
    if classes is not None:
        counts = Counter(sample.label for sample in split.train)
        if len(classes) < 2 or len(counts) < 2:
            raise EvaluationError("there is one class: a classifier needs two or more")
        empty = [name for index, name in enumerate(classes) if not counts[index]]
        if empty and all_classes:
            raise EvaluationError(
                f"class {empty[0]!r} is empty: no training image has it ({len(empty)} such "
                "classes); remove it from the labels or add images"
            )
    return len(split.train) - len(trained)


def digest_of(samples: Iterable[Sample]) -> str:
    """Hex SHA-256 of the sorted file digests, one a line."""
    lines = "".join(f"{digest}\n" for digest in sorted(sample.sha256 for sample in samples))
    return hashlib.sha256(lines.encode()).hexdigest()
