"""Pixels for training and for measuring.

Held-out images go through the declared pre-processing (``edge_runtime.contract.preprocess``)
and nothing else: what is measured is what will be served. Training images are augmented as
8-bit RGB, then get the same color order and the same normalization table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from converters.finetune.data import Sample
from converters.finetune.settings import Settings
from edge_runtime.contract import limits
from edge_runtime.contract.errors import EvaluationError, ImageError, LimitExceeded, MissingFile
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.preprocess import (
    Preprocess,
    ResizeExact,
    apply_uint8,
    normalization_table,
)
from edge_runtime.contract.resample import resize, shorter_side_size

__all__ = [
    "DeclaredImages",
    "TrainingImages",
    "Unreadable",
    "identify",
    "normalize",
    "refuse_unreadable",
]

_MARGIN = 1.25
"""Training photos are kept this much larger than the input, for the random crop."""
_CACHE_BYTES = 2 * 2**30
_NAMED = 5

Progress = Callable[[str, int, int], None]


class Unreadable(msgspec.Struct, frozen=True):
    """A file that is no usable image, and why."""

    path: Path
    reason: str


def identify(
    samples: Sequence[Sample], progress: Progress
) -> tuple[list[Sample], list[Unreadable]]:
    """Decode every image once: digests of those that decode, and the others by name."""
    good: list[Sample] = []
    bad: list[Unreadable] = []
    for number, sample in enumerate(samples):
        progress("reading images", number, len(samples))
        try:
            data = read_bounded(sample.path, limits.MAX_IMAGE_BYTES)
            rgb = decode_image(data)
        except (ImageError, MissingFile, LimitExceeded) as error:
            bad.append(Unreadable(sample.path, error.detail))
            continue
        shape = f"{rgb.shape[0]}x{rgb.shape[1]}:".encode()
        good.append(
            dataclasses.replace(
                sample,
                sha256=hashlib.sha256(data).hexdigest(),
                pixels=hashlib.sha256(shape + rgb.tobytes()).hexdigest(),
            )
        )
    return good, bad


def refuse_unreadable(bad: Sequence[Unreadable]) -> None:
    """Raise ``EvaluationError`` that counts and names unreadable files, if there are any."""
    if not bad:
        return
    named = "; ".join(f"{item.path} ({item.reason})" for item in bad[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    raise EvaluationError(
        f"{len(bad)} images are unreadable: {named}{more}. Repair or remove them, or pass "
        "--skip-unreadable"
    )


def _decode(path: Path) -> NDArray[np.uint8]:
    return decode_image(read_bounded(path, limits.MAX_IMAGE_BYTES))


def _to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 ``[H, W, C]`` to a contiguous ``[C, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def normalize(record: Preprocess, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, C, H, W]`` in the record's color order to float32, by the contract's table."""
    table = torch.from_numpy(normalization_table(record.normalization))
    return torch.stack([table[c][pixels[:, c].long()] for c in range(pixels.shape[1])], dim=1)


class DeclaredImages:
    """Images as the served model gets them: declared pre-processing, nothing else."""

    def __init__(
        self, samples: Sequence[Sample], record: Preprocess, progress: Progress, what: str
    ) -> None:
        """Raises ``EvaluationError`` for an image that the pre-processing refuses."""
        self.samples = tuple(samples)
        self.record = record
        pixels = []
        for number, sample in enumerate(samples):
            progress(what, number, len(samples))
            pixels.append(_preprocessed(record, sample.path))
        self.pixels = torch.stack(pixels)
        """uint8 ``[N, C, H, W]``."""
        labels = [sample.label for sample in samples]
        self.labels = None if None in labels else torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """float32 ``[B, C, H, W]``, in order."""
        for part in self.pixels.split(size):
            yield normalize(self.record, part)


def _preprocessed(record: Preprocess, path: Path) -> torch.Tensor:
    try:
        return _to_tensor(apply_uint8(record, _decode(path)))
    except ImageError as error:
        raise EvaluationError(f"{path}: {error.detail}") from None


class TrainingImages:
    """Photos to draw augmented batches from."""

    def __init__(
        self,
        samples: Sequence[Sample],
        record: Preprocess,
        settings: Settings,
        progress: Progress,
    ) -> None:
        """Raises ``EvaluationError`` for an image that the pre-processing refuses."""
        self.samples = tuple(samples)
        self.record = record
        self.settings = settings
        labels = [sample.label for sample in samples]
        self.labels = None if None in labels else torch.tensor(labels, dtype=torch.int64)
        self._transform = _augmentation(record, settings) if settings.augment else None
        self._cache: list[torch.Tensor] | None = None
        side = math.ceil(max(record.size) * _MARGIN)
        if len(samples) * side * side * 3 * 1.5 <= _CACHE_BYTES:
            self._cache = []
            for number, sample in enumerate(samples):
                progress("reading training images", number, len(samples))
                self._cache.append(self._read(sample.path))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def steps(self) -> int:
        """Batches an epoch; the last, shorter one is left out."""
        return max(1, len(self) // self.settings.batch)

    def _read(self, path: Path) -> torch.Tensor:
        if self._transform is None:
            return _preprocessed(self.record, path)
        rgb = _decode(path)
        wanted = math.ceil(max(self.record.size) * _MARGIN)
        height, width = rgb.shape[:2]
        if min(height, width) > wanted:
            height, width = shorter_side_size(height, width, wanted)
            rgb = resize(rgb, height, width, "resize_bilinear_aa@1")
        return _to_tensor(rgb)

    def epoch(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Shuffled batches, float32 ``[B, C, H, W]`` and classes; a function of ``seed`` alone.

        Sets torch's global seed, which augmentation and dropout draw from.
        """
        torch.manual_seed(seed)
        order = torch.randperm(len(self))
        size = min(self.settings.batch, len(self))
        for step in range(self.steps):
            chosen = order[step * size : (step + 1) * size]
            batch = self._batch(chosen.tolist())
            yield batch, None if self.labels is None else self.labels[chosen]

    def _batch(self, indices: Iterable[int]) -> torch.Tensor:
        images = []
        for index in indices:
            image = (
                self._cache[index]
                if self._cache is not None
                else self._read(self.samples[index].path)
            )
            images.append(image if self._transform is None else self._transform(image))
        pixels = torch.stack(images)
        if self._transform is not None:
            pixels = _in_color_order(self.record, pixels)
        return normalize(self.record, pixels)


def _in_color_order(record: Preprocess, rgb: torch.Tensor) -> torch.Tensor:
    """What follows the crop in the declared steps: flip and color, on uint8 ``[B, 3, H, W]``."""
    if record.color == "RGB" and not record.flip_horizontal:
        return rgb
    height, width = rgb.shape[2:]
    rest = msgspec.structs.replace(
        record, resize=ResizeExact(height=height, width=width), crop=None
    )
    return torch.stack(
        [_to_tensor(apply_uint8(rest, image.permute(1, 2, 0).numpy())) for image in rgb]
    )


def _augmentation(record: Preprocess, settings: Settings) -> Any:
    """Random crop, flip, RandAugment and color jitter (torchvision v2)  on uint8 ``[3, H, W]``."""
    from torchvision.transforms import v2

    steps: list[Any] = [
        v2.RandomResizedCrop(record.size, scale=(settings.crop_scale, 1.0), antialias=True)
    ]
    if settings.flip:
        steps.append(v2.RandomHorizontalFlip())
    if settings.rand_augment:
        steps.append(v2.RandAugment(num_ops=settings.rand_augment))
    if settings.color_jitter:
        amount = settings.color_jitter
        steps.append(v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount))
    return v2.Compose(steps)
