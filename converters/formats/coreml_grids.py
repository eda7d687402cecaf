"""What compressed weights can be: the numbers that each storage form is able to hold.

A grid is fitted to one layer's weights, canonical form ``[O, I, K]``: outputs, inputs of one
group, positions in the kernel. ``nearest`` rounds a number to the grid; ``pack`` turns
weights that lie on it into what the file stores. Scales and palettes are fp16 already, so
that packing loses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from converters.rewrites.compensate import Steps

__all__ = [
    "Grid",
    "Int4Grid",
    "Int8Grid",
    "Packed",
    "PaletteGrid",
    "SparseGrid",
    "keep_highest",
    "lamp_masks",
    "lamp_scores",
]

BLOCK = 32
"""Inputs that share one scale of 4-bit weights."""
_LEVELS = 127
_PALETTE = 16
_TINY = 2.0**-14
"""Smallest normal fp16: no scale is smaller."""
_SAMPLE = 1 << 22
"""Numbers that a palette is made from, of a larger layer."""
_SLICE = 1 << 15
"""Numbers whose scales are searched at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """One weight as stored; all arrays have the axes of the weight, ``O`` and ``I`` first."""

    data: NDArray[Any]
    """int8 steps, 4-bit steps in int8, palette indices in uint8, or fp16 values."""
    bits: int
    scale: NDArray[np.float16] | None = None
    palette: NDArray[np.float16] | None = None
    """``[16]``, ascending."""
    mask: NDArray[np.bool_] | None = None
    """Where a weight is not zero."""


class Grid(Steps, Protocol):
    """The numbers one layer may hold, and how the file stores them."""

    def pack(self, weight: torch.Tensor) -> Packed:
        """``weight`` ``[O, I, K]``, already on the grid, as the file stores it."""


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().to(values.dtype)


class Int8Grid:
    """One scale an output, largest magnitude = 127 steps."""

    def __init__(self, weight: torch.Tensor) -> None:
        largest = weight.abs().flatten(1).amax(1).double()
        self._exact = (largest / _LEVELS).clamp(min=_TINY)
        """Not yet rounded to fp16: what decides the steps."""
        self.scale = _half(self._exact)

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See ``Steps``."""
        scale = self.scale.reshape(values.shape)
        return torch.clamp(torch.round(values / scale), -_LEVELS, _LEVELS) * scale

    def pack(self, weight: torch.Tensor) -> Packed:
        """Any weight: it is rounded here."""
        scale = self._exact.reshape(-1, 1, 1).to(weight.dtype)
        steps = torch.clamp(torch.round(weight / scale), -_LEVELS, _LEVELS)
        return Packed(
            data=steps.to(torch.int8).numpy(),
            bits=8,
            scale=self.scale.reshape(-1, 1, 1).numpy().astype(np.float16),
        )


class Int4Grid:
    """Blocks of inputs with one scale each, steps -8..7.

    Each scale is searched for: the largest magnitude may become 7 steps, or -8, or be cut
    off, whichever leaves the least squared error, weighted by ``importance`` ``[G, I*K]``.
    """

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        outputs, inputs, positions = weight.shape
        self._positions = positions
        self._block = _block(inputs)
        blocks = inputs // self._block
        rows = weight.reshape(outputs * blocks, -1)
        weights = torch.ones(1, dtype=rows.dtype)
        if importance is not None:
            repeated = importance.repeat_interleave(outputs // importance.shape[0], 0)
            weights = repeated.reshape(outputs * blocks, -1).to(rows.dtype)
        chosen = [  # a slice at a time stays in the processor's cache
            _best_scale(part, weights if len(weights) == 1 else weights[at : at + len(part)])
            for at, part in _slices(rows)
        ]
        best = torch.cat(chosen)
        self.scale = best.reshape(outputs, blocks).double()

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See ``Steps``."""
        groups, rows = values.shape
        blocks = (columns // self._positions) // self._block
        scales = self.scale.reshape(groups, rows, -1)
        scale = torch.gather(scales, 2, blocks[:, None, None].expand(-1, rows, 1))[:, :, 0]
        return _steps4(values, scale) * scale

    def pack(self, weight: torch.Tensor) -> Packed:
        """Any weight: it is rounded here."""
        scale = self.scale.repeat_interleave(self._block, 1)[:, :, None].to(weight.dtype)
        return Packed(
            data=_steps4(weight, scale).to(torch.int8).numpy(),
            bits=4,
            scale=self.scale[:, :, None].numpy().astype(np.float16),
        )


def _slices(rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    height = max(1, _SLICE // rows.shape[1])
    for at in range(0, len(rows), height):
        yield at, rows[at : at + height]


def _best_scale(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The scale of each row with the least squared error, weighted: ``[rows, 1]``."""
    largest = rows.abs().amax(1, keepdim=True)
    best = _half((largest / 7).clamp(min=_TINY))
    error = torch.full_like(best, float("inf"))
    for cut in np.linspace(0.5, 1.05, 23):
        for sign in (1.0, -1.0):  # -8 serves the side with the largest magnitude
            scale = sign * _half((largest * float(cut) / 7).clamp(min=_TINY))
            wrong = _steps4(rows, scale) * scale - rows
            cost = (wrong * wrong * weights).sum(1, keepdim=True)
            better = cost < error
            best = torch.where(better, scale, best)
            error = torch.where(better, cost, error)
    return best


def _steps4(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(values / scale), -8, 7)


def _block(inputs: int) -> int:
    """The longest block of at most 32 that divides ``inputs``; all of them below 8."""
    longest = max(size for size in range(1, BLOCK + 1) if inputs % size == 0)
    return longest if longest >= 8 or inputs <= BLOCK else inputs


class PaletteGrid:
    """16 numbers for the whole layer, from k-means weighted by ``importance`` ``[G, I*K]``.

    A scale for each output on top would gain 1 dB and cost 32 bytes an output: Core ML
    stores it as a palette an output, a third more of a small net.
    """

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        rows = weight.flatten(1)
        weights = torch.ones(1, dtype=torch.float64)
        if importance is not None:
            weights = importance.repeat_interleave(rows.shape[0] // importance.shape[0], 0)
        step = max(1, rows.numel() // _SAMPLE)
        palette = _k_means(
            rows[:, ::step].double().reshape(-1), weights.expand(rows.shape)[:, ::step].reshape(-1)
        )
        self.palette = torch.sort(_half(palette)).values
        self._edges = ((self.palette[1:] + self.palette[:-1]) / 2).contiguous()

    def _indices(self, values: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self._edges.to(values.dtype), values.contiguous())

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See ``Steps``."""
        return self.palette[self._indices(values)]

    def pack(self, weight: torch.Tensor) -> Packed:
        """Any weight: it is rounded here."""
        return Packed(
            data=self._indices(weight).to(torch.uint8).numpy(),
            bits=4,
            palette=self.palette.numpy().astype(np.float16),
        )


def _k_means(values: torch.Tensor, weights: torch.Tensor, rounds: int = 60) -> torch.Tensor:
    """16 centers of weighted numbers: Lloyd's algorithm on at most 4096 bins."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return torch.linspace(low - 0.5, low + 0.5, _PALETTE, dtype=torch.float64)
    bins = 4096
    places = ((values - low) * ((bins - 1) / (high - low))).round().long()
    mass = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, places, weights)
    total = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, places, weights * values)
    filled = mass > 0
    mass, points = mass[filled], total[filled] / mass[filled]
    if len(points) <= _PALETTE:
        spare = points[-1:].expand(_PALETTE - len(points))
        return torch.cat([points, spare])
    # Start at equal shares of mass^(1/3), the density of the best quantizer.
    spread = torch.cumsum(mass ** (1 / 3), 0)
    wanted = (torch.arange(_PALETTE, dtype=torch.float64) + 0.5) / _PALETTE * spread[-1]
    centers = points[torch.searchsorted(spread, wanted).clamp(max=len(points) - 1)]
    for _ in range(rounds):
        edges = (centers[1:] + centers[:-1]) / 2
        owner = torch.searchsorted(edges.contiguous(), points)
        share = torch.zeros(_PALETTE, dtype=torch.float64).scatter_add_(0, owner, mass)
        moment = torch.zeros(_PALETTE, dtype=torch.float64).scatter_add_(0, owner, mass * points)
        moved = torch.where(share > 0, moment / share.clamp(min=1e-300), centers)
        moved = torch.sort(moved).values
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


class SparseGrid:
    """Zero outside ``mask`` ``[O, I, K]``; inside, fp16 or (``quantized``) int8."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, *, quantized: bool) -> None:
        self._mask = mask.reshape(weight.shape).double()
        self._int8 = Int8Grid(weight * self._mask.to(weight.dtype)) if quantized else None

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See ``Steps``."""
        groups, rows = values.shape
        allowed = self._mask.reshape(groups, rows, -1)
        there = torch.gather(allowed, 2, columns[:, None, None].expand(-1, rows, 1))[:, :, 0]
        if self._int8 is not None:
            return self._int8.nearest(columns, values) * there
        return _half(values) * there

    def pack(self, weight: torch.Tensor) -> Packed:
        """Any weight: it is cut and rounded here."""
        mask = self._mask.bool().numpy()
        cut = weight * self._mask.to(weight.dtype)
        if self._int8 is None:
            return Packed(data=cut.numpy().astype(np.float16), bits=16, mask=mask)
        packed = self._int8.pack(cut)
        return dataclasses.replace(packed, mask=mask)


def lamp_masks(weights: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """Which weights stay when the share ``sparsity`` of all must go: the highest scores."""
    return keep_highest(lamp_scores(weights), sparsity)


def lamp_scores(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each weight counts: LAMP (Lee et al., ICLR 2021, equation 3), float64.

    A weight's score is its square over the sum of the squares in its layer that are not
    smaller. Layers with few large weights so lose more than layers where all count.
    """
    scores = []
    for weight in weights:
        squares = weight.detach().double().reshape(-1) ** 2
        order = torch.argsort(squares, stable=True)
        tails = squares[order].flip(0).cumsum(0).flip(0)
        score = torch.empty_like(squares)
        score[order] = squares[order] / tails.clamp(min=1e-300)
        scores.append(score.reshape(weight.shape))
    return scores


def keep_highest(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """True where a score is none of the lowest; they are the share ``sparsity`` of all."""
    every = torch.cat([score.reshape(-1) for score in scores])
    count = round(sparsity * every.numel())
    if count == 0:
        return [torch.ones(score.shape, dtype=torch.bool) for score in scores]
    bound = torch.kthvalue(every, count).values
    return [score > bound for score in scores]
