"""Measures of closeness between arrays. numpy, and scipy where a library has it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import SQNR_CAP_DB

__all__ = [
    "Matrix",
    "best_temperature",
    "chance_probability",
    "cross_entropy",
    "psnr_db",
    "sqnr_db",
    "ssim",
]

Matrix = NDArray[np.floating]


def sqnr_db(reference: Matrix, answer: Matrix) -> NDArray[np.float64]:
    """Signal to quantization noise of each row, ``[N, ...]`` to float64 ``[N]``.

    10 log10(sum r^2 / sum (r - a)^2), at most ``SQNR_CAP_DB``; NaN counts as the least.
    """
    exact = np.asarray(reference, dtype=np.float64).reshape(len(reference), -1)
    other = np.asarray(answer, dtype=np.float64).reshape(len(answer), -1)
    noise = ((exact - other) ** 2).sum(axis=1)
    signal = (exact**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10.0 * np.log10(signal / noise)
    ratio = np.where(noise == 0.0, SQNR_CAP_DB, ratio)
    ratio = np.where(np.isnan(noise), -SQNR_CAP_DB, ratio)
    return np.clip(ratio, -SQNR_CAP_DB, SQNR_CAP_DB)


def psnr_db(reference: NDArray[np.uint8], answer: NDArray[np.uint8]) -> float:
    """Peak signal to noise of two 8-bit images: 10 log10(255^2 / mean squared error).

    At most ``SQNR_CAP_DB``.
    """
    error = float(((reference.astype(np.float64) - answer.astype(np.float64)) ** 2).mean())
    if error == 0.0:
        return SQNR_CAP_DB
    return 10.0 * math.log10(255.0**2 / error)


def ssim(reference: NDArray[np.uint8], answer: NDArray[np.uint8]) -> float:
    """Structural similarity of two 8-bit images ``[H, W, C]``, mean over channels.

    Wang et al., IEEE TIP 2004: Gaussian window of deviation 1.5 cut off at 11 pixels,
    K1 = 0.01, K2 = 0.03, L = 255.
    """
    from scipy.ndimage import gaussian_filter

    def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(values, sigma=(1.5, 1.5, 0.0), truncate=3.5))

    x, y = reference.astype(np.float64), answer.astype(np.float64)
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x**2
    var_y = smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((top / bottom).mean())


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
