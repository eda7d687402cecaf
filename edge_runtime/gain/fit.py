"""Fit what a confidence means: temperature, isotonic regression, reliability. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Bin",
    "Block",
    "best_temperature",
    "binary_nll",
    "brier",
    "expected_calibration_error",
    "isotonic",
    "isotonic_blocks",
    "reliability",
    "top_score",
]

Values = NDArray[np.float64]
_Kind = TypeVar("_Kind", bound=np.generic)

_MIN_TEMPERATURE: Final = 0.05
_MAX_TEMPERATURE: Final = 20.0
_STEPS: Final = 30
"""Halvings of ln T: the last interval is 6e-9 wide."""
_BLOCK_ROWS: Final = 1024
_SMALLEST: Final = 1e-12


# Temperature ----------------------------------------------------------------------------


def best_temperature(logits: NDArray[np.floating], classes: NDArray[np.int64]) -> float:
    """The T of least negative log-likelihood of softmax(z / T), in [0.05, 20].

    ``logits``: ``[N, C]``; ``classes``: the right one of each row, ``[N]``. Temperature
    scaling (Guo et al., ICML 2017): one number for all classes, so the ranking of classes
    stays. The loss is convex in b = 1 / T with the slope mean(E_softmax(bz)[z] - z_right),
    so its zero is found by halving ln b.
    """

    def slope(beta: float) -> float:
        total = 0.0
        for rows, right in zip(_row_blocks(logits), _blocks(classes), strict=True):
            values = rows - rows.max(axis=1, keepdims=True)  # so that the best one counts 0
            weights = np.exp(beta * values)
            expected = (weights * values).sum(axis=1) / weights.sum(axis=1)
            total += float((expected - values[np.arange(len(right)), right]).sum())
        return total

    low, high = -math.log(_MAX_TEMPERATURE), -math.log(_MIN_TEMPERATURE)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def top_score(logits: NDArray[np.floating], temperature: float) -> Values:
    """The highest softmax(z / T) of each row of ``[N, C]``: ``[N]``."""
    parts = []
    for rows in _row_blocks(logits):
        values = (rows - rows.max(axis=1, keepdims=True)) / temperature
        parts.append(1.0 / np.exp(values).sum(axis=1))
    return np.concatenate(parts)


def _row_blocks(logits: NDArray[np.floating]) -> Iterator[Values]:
    """float64 copies of some rows at a time: a thousand classes of all images are large."""
    return (np.asarray(rows, dtype=np.float64) for rows in _blocks(logits))


def _blocks(array: NDArray[_Kind]) -> Iterator[NDArray[_Kind]]:
    return (array[at : at + _BLOCK_ROWS] for at in range(0, len(array), _BLOCK_ROWS))


# Isotonic regression --------------------------------------------------------------------


class Block(msgspec.Struct, frozen=True):
    """Neighbors that one value fits best."""

    position: float
    """Weighted mean of their x."""
    value: float
    weight: float


def isotonic(y: Values, weights: Values | None = None, *, increasing: bool = True) -> Values:
    """The monotone sequence of least weighted squared distance from ``y``: ``[N]``.

    Pool adjacent violators (Ayer et al., 1955; Barlow et al., 1972): neighbors in the wrong
    order are merged into their weighted mean until none are. ``weights``: above zero.
    """
    mass = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    counts, values = _pool(np.asarray(y, dtype=np.float64), mass, increasing=increasing)
    return np.repeat(values, counts)


def isotonic_blocks(
    x: Values, y: Values, weights: Values | None = None, *, increasing: bool = True
) -> tuple[Block, ...]:
    """``isotonic`` of points in any order as its level blocks, in rising x.

    Equal x are one point, their weighted mean. ``x``, ``y``, ``weights``: ``[N]``, N at
    least 1.
    """
    mass = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    xs, ys, ws = np.asarray(x)[order], np.asarray(y)[order], mass[order]
    starts = np.flatnonzero(np.concatenate([[True], xs[1:] != xs[:-1]]))
    weight = np.add.reduceat(ws, starts)
    counts, values = _pool(np.add.reduceat(ws * ys, starts) / weight, weight, increasing=increasing)
    blocks = np.cumsum([0, *counts[:-1]])
    heavy = np.add.reduceat(weight, blocks)
    middle = np.add.reduceat(weight * xs[starts], blocks) / heavy
    return tuple(
        Block(float(at), float(value), float(w))
        for at, value, w in zip(middle, values, heavy, strict=True)
    )


def _pool(values: Values, weights: Values, *, increasing: bool) -> tuple[list[int], Values]:
    """How many points each level block holds, and its value."""
    sign = 1.0 if increasing else -1.0
    blocks: list[tuple[int, float, float]] = []  # points, weight, value times sign
    for value, weight in zip(sign * values, weights, strict=True):
        block = (1, float(weight), float(value))
        while blocks and blocks[-1][2] >= block[2]:
            count, mass, level = blocks.pop()
            total = mass + block[1]
            block = (count + block[0], total, (mass * level + block[1] * block[2]) / total)
        blocks.append(block)
    return [count for count, _, _ in blocks], np.array([sign * level for _, _, level in blocks])


# Reliability ----------------------------------------------------------------------------


class Bin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers of one stretch of confidence."""

    low: float
    high: float
    images: int
    confidence: float
    """Their mean."""
    right: float
    """The share of them that is right."""


def reliability(confidence: Values, right: Values, bins: int = 15) -> tuple[Bin, ...]:
    """Bins of equal width over [0, 1], empty ones left out (Guo et al., section 2).

    ``confidence`` and ``right`` (0 to 1): ``[N]``.
    """
    index = np.minimum((np.asarray(confidence) * bins).astype(np.int64), bins - 1)
    found = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            found.append(
                Bin(
                    low=number / bins,
                    high=(number + 1) / bins,
                    images=int(inside.sum()),
                    confidence=float(confidence[inside].mean()),
                    right=float(right[inside].mean()),
                )
            )
    return tuple(found)


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """Mean over images of ``|right - confidence|`` of their bin: ECE (Guo et al., eq. 3)."""
    total = sum(one.images for one in bins)
    return sum(one.images * abs(one.right - one.confidence) for one in bins) / total


def brier(confidence: Values, right: Values) -> float:
    """Mean of (confidence - right)^2 (Brier, 1950)."""
    return float(np.mean((confidence - right) ** 2))


def binary_nll(confidence: Values, right: Values) -> float:
    """Mean negative log-likelihood of "this answer is right", in nats."""
    sure = np.clip(confidence, _SMALLEST, 1.0 - _SMALLEST)
    return float(-np.mean(right * np.log(sure) + (1.0 - right) * np.log1p(-sure)))
