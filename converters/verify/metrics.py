"""How close two sets of answers are. numpy only."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SQNR_CAP_DB",
    "Closeness",
    "best_temperature",
    "chance_probability",
    "closeness",
    "cross_entropy",
    "sqnr_db",
]

SQNR_CAP_DB = 200.0
"""Reported for identical answers: infinity is no JSON number."""

_CONFIDENT = 0.5

Matrix = NDArray[np.floating]


class Closeness(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's answers against the reference's, over ``images`` images."""

    images: int
    sqnr_db_mean: float
    sqnr_db_min: float
    max_abs: float
    agreement: float
    disagreements: int
    confident: int
    """Images on which the reference gives its first class at least 0.5."""
    confident_disagreements: int
    finite: bool


def sqnr_db(reference: Matrix, answer: Matrix) -> NDArray[np.float64]:
    """Signal to quantization noise of each row, ``[N, outputs]`` to float64 ``[N]``.

    10 log10(sum r^2 / sum (r - a)^2), at most ``SQNR_CAP_DB``; NaN counts as -inf.
    """
    exact = np.asarray(reference, dtype=np.float64)
    noise = ((exact - np.asarray(answer, dtype=np.float64)) ** 2).sum(axis=1)
    signal = (exact**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10.0 * np.log10(signal / noise)
    ratio = np.where(noise == 0.0, SQNR_CAP_DB, ratio)
    ratio = np.where(np.isnan(noise), -SQNR_CAP_DB, ratio)
    return np.clip(ratio, -SQNR_CAP_DB, SQNR_CAP_DB)


def closeness(reference: Matrix, answer: Matrix, confidence: NDArray[np.float64]) -> Closeness:
    """Compare ``[N, classes]`` answers; ``confidence``: the reference's top score, ``[N]``."""
    ratios = sqnr_db(reference, answer)
    finite = bool(np.isfinite(answer).all())
    differs = reference.argmax(axis=1) != answer.argmax(axis=1)
    sure = confidence >= _CONFIDENT
    largest = float(np.abs(reference - answer).max()) if finite else 1e30
    return Closeness(
        images=len(reference),
        sqnr_db_mean=float(ratios.mean()),
        sqnr_db_min=float(ratios.min()),
        max_abs=largest,
        agreement=float(1.0 - differs.mean()),
        disagreements=int(differs.sum()),
        confident=int(sure.sum()),
        confident_disagreements=int((differs & sure).sum()),
        finite=finite,
    )


def cross_entropy(
    logits: Matrix, classes: NDArray[np.int64], temperature: float
) -> NDArray[np.float64]:
    """-log softmax(z / T)[class] of each row, in nats."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    total = np.log(np.exp(scaled).sum(axis=1))
    return np.asarray(total - scaled[np.arange(len(classes)), classes])


def best_temperature(logits: Matrix, classes: NDArray[np.int64]) -> float:
    """The temperature of least mean cross-entropy, on a grid from 0.05 to 20."""
    grid = np.exp(np.linspace(math.log(0.05), math.log(20.0), 97))
    return float(min(grid, key=lambda t: float(cross_entropy(logits, classes, float(t)).mean())))


def chance_probability(right: int, count: int, classes: int) -> float:
    """P(at least ``right`` of ``count`` by guessing among ``classes``): binomial tail."""
    from scipy.stats import binom

    return float(binom.sf(right - 1, count, 1.0 / classes))
