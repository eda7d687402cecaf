"""Do the ranges that a quantized file declares fit the values that images really give?

Two faults leave a sound-looking int8 file: ranges far narrower than the values (clipped),
and ranges measured on noise in place of images. Both are read off the file: each quantized
tensor is matched with the value of the reference that it stands for, and its declared range
is held against that value's range on evaluation images, and on noise. Measured on trained
nets (the zoo's small one, MobileNetV1 and V2, ResNet-20):

* energy outside the declared range, 10 log10(sum x^2 / sum (x - clip(x))^2), worst tensor:
  20 dB and more after calibration with 8 to 64 photos, 3 to 7 dB with a quarter of their
  ranges, 1 to 6 dB with noise in 0..1;
* mean distance of declared ranges, in ranges, from those on noise of the right kind and on
  images: 0.04 to 0.09 and 0.19 to 0.60 after calibration with noise; with photos 0.13 to
  0.6 from the nearest noise and 0.02 to 0.2 from images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import Finding
from converters.verify.values import Value, as_reference, sampled

__all__ = [
    "Bounds",
    "RangeRow",
    "Spread",
    "activation_floor",
    "is_fixed",
    "judge_ranges",
    "match_values",
]

Array = NDArray[np.float32]
Bounds = tuple[float, float]

_FIXED: tuple[Bounds, ...] = ((0.0, 255 / 256), (-1.0, 127 / 128), (-1.0, 32767 / 32768))
_SOFT_FLOOR = -0.376
_SOFT_RATIO = 4.0
_LEAST_CORRELATION = 0.3
_NEAR = 0.05
"""Of correlation: nodes this close to the best may stand for the value as well."""
_WORST_CLIP_DB = 14.0
_MEDIAN_CLIP_DB = 20.0
_MAX_CLIP_DB = 120.0
_TOLD_APART = 0.15
"""Distance of ranges on noise from those on images, for a tensor to tell which was used."""
_BEYOND = 0.2
_SYMMETRIC = 0.006
"""Of the width: -128..127 around a zero point of 0 are off by one step in 255."""
_LEAST_ROWS = 3
_NOISE_DISTANCE = {1: 0.1, 2: 0.1}
"""By how many tensors tell; more of them average out what a few may have by chance."""
_NOISE_DISTANCE_MANY = 0.22
_NOISE_RATIO = 0.3
_NOISE_RATIO_CLIPPED = 0.5
"""Ranges that clip need an explanation; for ranges that hold every value it must be better."""
_GAP = 0.1


@dataclasses.dataclass
class Spread:
    """What one value of the reference does over several inputs, seen from one range."""

    declared: Bounds
    floor: float | None = None
    """The range is that of an activation behind the node which gives nothing below this."""
    low: float = 0.0
    high: float = 0.0
    """Zero is always inside, as in every quantized range."""
    energy: float = 0.0
    lost: float = 0.0

    def add(self, value: Array) -> None:
        """The value for one input, or for a batch of them."""
        if self.floor is not None:
            value = np.maximum(value, self.floor)
        self.low = min(self.low, float(value.min()))
        self.high = max(self.high, float(value.max()))
        self.energy += _energy(value)
        if self.low < self.declared[0] or self.high > self.declared[1]:
            self.lost += _energy(value - np.clip(value, *self.declared))

    @property
    def clip_db(self) -> float:
        """Signal over what the declared range cuts off, in dB, at most 120."""
        floor = self.energy * 10.0 ** (-_MAX_CLIP_DB / 10.0)
        if self.energy == 0.0:
            return _MAX_CLIP_DB
        return float(10.0 * np.log10(self.energy / max(self.lost, floor)))


@dataclasses.dataclass(frozen=True)
class RangeRow:
    """One quantized tensor of the file beside the reference's value."""

    name: str
    declared: Bounds
    real: Bounds
    """On evaluation images."""
    clip_db: float
    noise: Mapping[str, Bounds] = dataclasses.field(default_factory=dict)
    """By kind of noise."""
    limits: Bounds | None = None
    """Of the input: what no pixel can exceed after the pre-processing."""


def _energy(value: Array) -> float:
    """Sum of squares, in single precision: good to a thousandth of a decibel."""
    flat = value.reshape(-1)
    return float(np.dot(flat, flat))


def is_fixed(declared: Bounds) -> bool:
    """Whether an operator has this range by its definition, whatever the inputs: a sigmoid's.

    TFLite 8-bit quantization specification: 0..255/256 for LOGISTIC and SOFTMAX, -1..127/128
    for TANH; in 16 bits -1..32767/32768 for all three.
    """
    low, high = declared
    return any(
        math.isclose(low, fixed[0], abs_tol=1e-6) and math.isclose(high, fixed[1], abs_tol=1e-6)
        for fixed in _FIXED
    )


def activation_floor(declared: Bounds) -> float | None:
    """What an activation that has such a range never goes below; None: it looks like none.

    0 for a ReLU; at least -0.375 for hard swish, SiLU and GELU, whose values above are far
    larger. Beside these the reference may have the node before the activation only.
    """
    low, high = declared
    if low == 0.0:
        return 0.0
    return low if _SOFT_FLOOR <= low < 0.0 and high > _SOFT_RATIO * -low else None


def match_values(values: Sequence[Value], nodes: Mapping[str, Array]) -> list[list[str]]:
    """For each value the nodes of the reference that it may stand for; [] for none.

    ``nodes``: the reference's values for the same input, in the order of computation. Found
    by correlation, which neither clipping nor a wrong scale destroys, and by order: the best
    monotone alignment of the two sequences.
    """
    names = list(nodes)
    score = np.zeros((len(values), len(names)))
    few = [sampled(node) for node in nodes.values()]
    for row, value in enumerate(values):
        same: dict[tuple[int, ...], Array | None] = {}
        for place, node in enumerate(nodes.values()):
            if node.shape not in same:
                other = as_reference(value.array, node.shape)
                same[node.shape] = None if other is None else sampled(other)
            chosen_few = same[node.shape]
            if chosen_few is not None:
                score[row, place] = _correlation(few[place], chosen_few)
    score[score < _LEAST_CORRELATION] = 0.0
    chosen = _align(score)
    found: list[list[str]] = []
    for row, column in enumerate(chosen):
        if column is None:
            found.append([])
            continue
        before = max((c for c in chosen[:row] if c is not None), default=0)
        after = min((c for c in chosen[row + 1 :] if c is not None), default=len(names) - 1)
        found.append(
            [
                names[near]
                for near in range(before, after + 1)
                if score[row, near] >= score[row, column] - _NEAR
            ]
        )
    return found


def _correlation(one: Array, other: Array) -> float:
    first = np.asarray(one, np.float64).ravel()
    second = np.asarray(other, np.float64).ravel()
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm > 0.0 else 0.0


def _align(score: NDArray[np.float64]) -> list[int | None]:
    """For each row a column, never smaller than that of the row before; largest sum."""
    rows, columns = score.shape
    best = np.zeros((rows + 1, columns))
    """``best[r, c]``: rows below ``r``, columns up to ``c``."""
    for row in range(rows):
        best[row + 1] = np.maximum.accumulate(best[row] + score[row])
    chosen: list[int | None] = [None] * rows
    column = columns - 1
    for row in range(rows - 1, -1, -1):
        while column > 0 and best[row + 1, column - 1] == best[row + 1, column]:
            column -= 1
        if score[row, column] > 0.0:
            chosen[row] = column
    return chosen


def judge_ranges(rows: Sequence[RangeRow]) -> list[Finding]:
    """``noise-calibration`` or ``clipped-calibration``, or nothing."""
    rows = [_symmetric(row) for row in rows]
    for row in rows:
        if _exceeds(row):
            return [
                Finding(
                    name="noise-calibration",
                    detail=f"its input may hold {_text(row.declared)}, "
                    "but after its pre-processing every image lies within "
                    f"{_text(row.limits)}: it was calibrated with something else, such as "
                    "noise: calibrate with real images",
                )
            ]
    kinds = {kind for row in rows for kind in row.noise}
    found = [one for kind in sorted(kinds) if (one := _from_noise(rows, kind)) is not None]
    if found:
        _, finding = min(found, key=lambda pair: pair[0])
        return [finding]
    if not rows:
        return []
    worst = min(rows, key=lambda row: row.clip_db)
    median = float(np.median([row.clip_db for row in rows]))
    if worst.clip_db < _WORST_CLIP_DB or (len(rows) >= _LEAST_ROWS and median < _MEDIAN_CLIP_DB):
        return [
            Finding(
                name="clipped-calibration",
                detail=f"its activation ranges are too narrow: {worst.name} may hold "
                f"{_text(worst.declared)} and takes {_text(worst.real)} on these inputs, and "
                f"clipping alone leaves it {worst.clip_db:.1f} dB ({median:.0f} dB in the median "
                f"of {len(rows)} tensors): calibrate with more, and real, images",
            )
        ]
    return []


def _text(bounds: Bounds | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3g} to {bounds[1]:.3g}"


def _exceeds(row: RangeRow) -> bool:
    """Whether the range is far wider than any input."""
    if row.limits is None:
        return False
    low, high = min(row.limits[0], 0.0), max(row.limits[1], 0.0)
    least, most = row.declared
    return max(low - least, most - high) > _BEYOND * (high - low)


def _symmetric(row: RangeRow) -> RangeRow:
    """A row whose declared range is symmetric by its kind, with the others made so too."""
    low, high = row.declared
    if low == 0.0 or abs(low + high) > _SYMMETRIC * (high - low):
        return row

    def same(bounds: Bounds) -> Bounds:
        most = max(-bounds[0], bounds[1], 0.0)
        return -most, most

    return dataclasses.replace(
        row,
        real=same(row.real),
        noise={kind: same(bounds) for kind, bounds in row.noise.items()},
        limits=None if row.limits is None else same(row.limits),
    )


def _from_noise(rows: Sequence[RangeRow], kind: str) -> tuple[float, Finding] | None:
    """Whether noise of one kind explains the declared ranges far better than images do.

    Images may have been fewer or paler: one factor may make all their ranges narrower.
    """
    telling = [
        row for row in rows if kind in row.noise and _apart(row.real, row.noise[kind]) > _TOLD_APART
    ]
    if not telling:
        return None

    def off(chosen: Sequence[RangeRow], factor: float) -> float:
        return float(
            np.mean(
                [
                    _apart(row.declared, (factor * row.real[0], factor * row.real[1]))
                    for row in chosen
                ]
            )
        )

    factor = min(np.exp(np.linspace(0.0, np.log(0.05), 40)), key=lambda f: off(rows, f))
    images = off(telling, factor)
    noise = float(np.mean([_apart(row.declared, row.noise[kind]) for row in telling]))
    # The others need not tell noise from images, but noise must explain their ranges too:
    # many images reach extremes that few do not, and one tensor may do so by chance.
    every = float(np.mean([_apart(r.declared, r.noise[kind]) for r in rows if kind in r.noise]))
    most = _NOISE_DISTANCE.get(len(telling), _NOISE_DISTANCE_MANY)
    clips = min(row.clip_db for row in rows) < _WORST_CLIP_DB
    ratio = _NOISE_RATIO_CLIPPED if clips else _NOISE_RATIO
    if max(noise, every) > most or noise > ratio * images or images < noise + _GAP:
        return None
    return noise, Finding(
        name="noise-calibration",
        detail=f"its activation ranges are those of noise ({kind}), not of images: in "
        f"{len(telling)} of {len(rows)} tensors, those that tell them apart, they lie "
        f"{noise:.0%} of a range from the noise's and {images:.0%} from the images': calibrate "
        "with real images",
    )


def _apart(one: Bounds, other: Bounds) -> float:
    """|difference| of both ends over the wider range, zero inside both; 0 when equal."""
    first = min(one[0], 0.0), max(one[1], 0.0)
    second = min(other[0], 0.0), max(other[1], 0.0)
    width = max(first[1] - first[0], second[1] - second[0])
    if width <= 0.0:
        return 0.0
    return (abs(first[0] - second[0]) + abs(first[1] - second[1])) / width
