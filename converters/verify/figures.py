"""What a comparison of two sets of answers finds: plain structs, sent between processes."""

from __future__ import annotations

import msgspec

__all__ = ["SQNR_CAP_DB", "Closeness", "Finding"]

SQNR_CAP_DB = 200.0
"""Reported for identical answers: infinity is no JSON number."""


class Closeness(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's answers against the reference's, over ``images`` inputs."""

    images: int
    sqnr_db_mean: float | None
    """None: this variant answers in another form (NMS or argmax in its graph)."""
    sqnr_db_min: float | None
    max_abs: float | None
    finite: bool
    agreement: float | None = None
    """Classification: share of images with the same first class. Detection: share of the
    reference's boxes found again. Segmentation: share of pixels. None: images, or no boxes."""
    disagreements: int = 0
    """Images, boxes or pixels, of ``compared``."""
    compared: int = 0
    confident: int = 0
    """Classification: images on which the reference gives its first class at least 0.5."""
    confident_disagreements: int = 0
    metrics: dict[str, float] = {}
    """``top5``; ``map``; ``miou``; ``psnr_db``, ``psnr_db_min``, ``ssim``."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong with one variant, by name."""

    name: str
    """A stable word: see ``docs/conversion.md``."""
    detail: str
