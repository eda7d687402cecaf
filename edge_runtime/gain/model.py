"""From samples to a gain curve, and how well it does on the half it has not seen.

With labels, the paired difference "cloud right - local right" of each image is regressed on
the local confidence, falling (isotonic): its mean at c is P(cloud right | c) - P(local
right | c). Both models mostly err on the same images, so the difference varies less than
either side, and one regression of it beats the difference of two.

Without labels only the agreement of both answers is measured. What it says of who is right
is taken from the prior: with a = P(local right), r = P(cloud right | local right),
w = P(cloud right | local wrong), and s = the share of answers wrong on both sides that are
the same,

    P(agree) = r a + s (1 - w) (1 - a),

which gives a, and from it the prior's own gain r a + w (1 - a) - a.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from edge_runtime.gain.curve import GainCurve, Knots
from edge_runtime.gain.fit import Values, isotonic_blocks
from edge_runtime.gain.samples import Samples
from edge_runtime.policies.adaptive import GainPrior

__all__ = [
    "PRICES",
    "PRIOR_IMAGES",
    "GainBin",
    "GainFigures",
    "Spending",
    "cross_fitted_gain",
    "fit_gain",
    "gain_figures",
]

PRIOR_IMAGES: Final = 20
"""The prior counts as so many images, spread evenly over confidence: where there are no
images the curve is the prior's, and a handful of them cannot bend it far."""
MAX_KNOTS: Final = 128
SAME_MISTAKE: Final = 0.5
"""s above: of answers wrong on both sides, the share that name the same thing. Assumed."""
NODES: Final = 8
_ANY: Final = 0.5
"""Where the only knot of a constant lies."""
PRICES: Final = (0.005, 0.02, 0.05, 0.1)
_GAIN_BINS: Final = 6


def fit_gain(samples: Samples, prior: GainPrior) -> GainCurve:
    """The curve of all ``samples``; those without confidence give a constant."""
    local, cloud = samples.local_right, samples.cloud_right
    if local is not None and cloud is not None:
        return _of_labels(samples, cloud - local, local, prior)
    return _of_agreement(samples, prior)


def _of_labels(
    samples: Samples, difference: Values, local_right: Values, prior: GainPrior
) -> GainCurve:
    share = float(local_right.mean())
    if samples.confidence is None:
        return GainCurve(
            knots=((_ANY, float(difference.mean())),), own=((_ANY, share),), local_right=share
        )
    gains = _regressed(samples.confidence, difference, prior.signed, increasing=False)
    own = _regressed(samples.confidence, local_right, float, increasing=True)
    return GainCurve(knots=gains, own=own, nodes=_nodes(samples.confidence), local_right=share)


def _of_agreement(samples: Samples, prior: GainPrior) -> GainCurve:
    share = _own_share(float(samples.agreement.mean()), prior)
    if samples.confidence is None:
        return GainCurve(
            knots=((_ANY, prior.signed(share)),), own=((_ANY, share),), local_right=share
        )
    agree = _regressed(
        samples.confidence, samples.agreement, lambda c: _agreement(c, prior), increasing=True
    )
    own = tuple((c, _own_share(value, prior)) for c, value in agree)
    return GainCurve(
        knots=tuple((c, prior.signed(right)) for c, right in own),
        own=own,
        nodes=_nodes(samples.confidence),
        local_right=share,
    )


def _regressed(
    confidence: Values, values: Values, expected: Callable[[float], float], *, increasing: bool
) -> Knots:
    """Isotonic regression of ``values``, with the prior's ``expected`` ones among them."""
    spread = (np.arange(PRIOR_IMAGES) + 0.5) / PRIOR_IMAGES
    x = np.concatenate([confidence, spread])
    y = np.concatenate([values, [expected(float(c)) for c in spread]])
    weights = np.ones(len(x))
    if len(np.unique(x)) > 8 * MAX_KNOTS:
        x, y, weights = _binned(x, y)
    blocks = isotonic_blocks(x, y, weights, increasing=increasing)
    return _spaced([(block.position, block.value) for block in blocks])


def _nodes(confidence: Values) -> tuple[float, ...]:
    shares = (np.arange(NODES) + 0.5) / NODES
    return tuple(float(value) for value in np.quantile(confidence, shares))


def _agreement(right: float, prior: GainPrior) -> float:
    both_wrong = (1.0 - prior.cloud_right_if_local_wrong) * (1.0 - right)
    return prior.cloud_right_if_local_right * right + SAME_MISTAKE * both_wrong


def _own_share(agreement: float, prior: GainPrior) -> float:
    """The inverse of ``_agreement``, within [0, 1]."""
    least = SAME_MISTAKE * (1.0 - prior.cloud_right_if_local_wrong)
    span = max(prior.cloud_right_if_local_right - least, 1e-6)
    return min(max((agreement - least) / span, 0.0), 1.0)


def _binned(x: Values, y: Values) -> tuple[Values, Values, Values]:
    """Means of ``MAX_KNOTS`` neighborhoods of as many points each, with their weights."""
    order = np.argsort(x, kind="stable")
    parts = np.array_split(order, MAX_KNOTS)
    means = [(x[part].mean(), y[part].mean(), float(len(part))) for part in parts]
    columns = np.array(means)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _spaced(knots: list[tuple[float, float]]) -> Knots:
    """At most ``MAX_KNOTS`` knots, and none so close to another that a slope overflows."""
    kept: list[tuple[float, float]] = []
    for position, value in knots:
        position, value = min(max(position, 0.0), 1.0), min(max(value, -1.0), 1.0)
        if not kept or position - kept[-1][0] > 1e-9:
            kept.append((position, value))
    if len(kept) > MAX_KNOTS:
        chosen = np.linspace(0, len(kept) - 1, MAX_KNOTS).round().astype(int)
        kept = [kept[number] for number in chosen]
    return tuple(kept)


# Judged on what it has not seen ---------------------------------------------------------


class GainBin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images of like predicted gain."""

    images: int
    predicted: float
    measured: float
    """Mean of cloud right - local right."""


class Spending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Uploading where the gain is above a price: what comes of it."""

    price: float
    uploaded: float
    """Share of images."""
    right: float
    """Share of images whose final answer is right."""


class GainFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One gain on labeled images it was not fitted to."""

    error: float
    """Mean over images of ``|predicted - measured|`` of their bin of six."""
    squared_error: float
    """Mean of (predicted - (cloud right - local right))^2 of single images."""
    bins: tuple[GainBin, ...]
    spending: tuple[Spending, ...]


def cross_fitted_gain(samples: Samples, prior: GainPrior) -> Values:
    """The signed gain of each image by the curve of the other half, ``[N]``."""
    fold = samples.fold
    predicted = np.empty(len(samples))
    for half in (0, 1):
        curve = fit_gain(samples.where(fold != half), prior)
        predicted[fold == half] = _evaluated(curve, samples.where(fold == half))
    return predicted


def _evaluated(gain: GainCurve | GainPrior, samples: Samples) -> Values:
    if samples.confidence is None:
        return np.full(len(samples), gain.signed(gain.local_right))
    return np.array([gain.signed(float(c)) for c in samples.confidence])


def prior_gain(samples: Samples, prior: GainPrior) -> Values:
    """The signed gain of each image by the prior, ``[N]``."""
    return _evaluated(prior, samples)


def gain_figures(samples: Samples, predicted: Values) -> GainFigures:
    """How a predicted signed gain ``[N]`` compares with labeled ``samples``."""
    assert samples.local_right is not None  # noqa: S101  # callers have labels
    assert samples.cloud_right is not None  # noqa: S101
    measured = samples.cloud_right - samples.local_right
    bins = []
    for part in np.array_split(np.argsort(predicted, kind="stable"), _GAIN_BINS):
        if len(part):
            bins.append(
                GainBin(
                    images=len(part),
                    predicted=float(predicted[part].mean()),
                    measured=float(measured[part].mean()),
                )
            )
    spending = []
    for price in PRICES:
        uploads = np.maximum(predicted, 0.0) > price
        final = np.where(uploads, samples.cloud_right, samples.local_right)
        spending.append(
            Spending(price=price, uploaded=float(uploads.mean()), right=float(final.mean()))
        )
    return GainFigures(
        error=sum(b.images * abs(b.predicted - b.measured) for b in bins) / len(samples),
        squared_error=float(np.mean((predicted - measured) ** 2)),
        bins=tuple(bins),
        spending=tuple(spending),
    )
