"""Round-trip time after RFC 6298: a smoothed mean and its mean deviation."""

from __future__ import annotations

import itertools
import math
from typing import Final

import msgspec

__all__ = ["RTT_PRIORS_MS", "RttEstimator"]

RTT_PRIORS_MS: Final[dict[str, float]] = {
    "ethernet": 15.0,
    "wifi": 25.0,
    "5g": 40.0,
    "lte": 60.0,
    "3g": 150.0,
    "unknown": 60.0,
}
"""Before the first sample; typical pings by link type, rounded."""

_ALPHA = 1 / 8
_BETA = 1 / 4
_GRANULARITY_MS = 1.0
_MIN_RTO_MS = 1000.0
_LEAST_MS = 0.1
_RECENT = 16
_BELIEVED_S = 5.0
_FADING_S = 15.0
"""Links that move forget about half of what they were in ten seconds."""
_NODE_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_PRIOR_SPREAD = (2.2, 0.6, 1.35, 0.8, 1.0)
"""In no order: the last of the recent samples count more. The last is 1: it keeps the scale."""
_PRIOR_WEIGHT = 1.0
"""Samples that the prior's scale counts for. Fitted on half of the recorded links (by trace);
on the other half forecasts got better as well."""
_RECENCY_PRIOR = 0.5
_RECENCY_WEIGHT = 8.0


class RttEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """SRTT and RTTVAR in milliseconds."""

    srtt_ms: float
    rttvar_ms: float
    samples: int = 0
    recent_ms: tuple[float, ...] = ()
    """The last 16 samples, oldest first."""
    assumed: int = 0
    """So many of ``recent_ms``, the first ones, were never measured: they say how round trips of
    such links spread, and what is measured says around what."""
    nodes_ms: tuple[float, ...] = ()
    """Five equally likely round trips: RFC 6298's two moments do for a timer, but round trips
    of moving devices have tails that no normal has."""

    @classmethod
    def prior(cls, link_type: str = "unknown") -> RttEstimator:
        """What to believe before the first sample."""
        rtt_ms = RTT_PRIORS_MS.get(link_type, RTT_PRIORS_MS["unknown"])
        spread = tuple(rtt_ms * factor for factor in _PRIOR_SPREAD)
        nodes = tuple(sorted(spread))
        return cls(
            srtt_ms=rtt_ms,
            rttvar_ms=rtt_ms / 2,
            recent_ms=spread,
            assumed=len(spread),
            nodes_ms=nodes,
        )

    def observe(self, rtt_ms: float) -> RttEstimator:
        """One sample. The first sets SRTT = R, RTTVAR = R/2 (RFC 6298 section 2.2)."""
        if not math.isfinite(rtt_ms) or rtt_ms < 0:
            return self
        recent, assumed = (*self._rescaled(rtt_ms)[1 - _RECENT :], rtt_ms), self.assumed
        if len(self.recent_ms) >= _RECENT:
            assumed = max(assumed - 1, 0)
        nodes = _nodes(recent)
        if self.samples == 0:
            return RttEstimator(
                srtt_ms=rtt_ms,
                rttvar_ms=rtt_ms / 2,
                samples=1,
                recent_ms=recent,
                assumed=assumed,
                nodes_ms=nodes,
            )
        rttvar_ms = (1 - _BETA) * self.rttvar_ms + _BETA * abs(self.srtt_ms - rtt_ms)
        srtt_ms = (1 - _ALPHA) * self.srtt_ms + _ALPHA * rtt_ms
        return RttEstimator(
            srtt_ms=srtt_ms,
            rttvar_ms=rttvar_ms,
            samples=self.samples + 1,
            recent_ms=recent,
            assumed=assumed,
            nodes_ms=nodes,
        )

    def _rescaled(self, rtt_ms: float) -> tuple[float, ...]:
        """``recent_ms``, what was assumed of it moved to the geometric mean of all samples."""
        assumed = self.assumed
        if not assumed:
            return self.recent_ms
        scale_ms = max(self.recent_ms[assumed - 1], _LEAST_MS)
        factor = (max(rtt_ms, _LEAST_MS) / scale_ms) ** (1.0 / (_PRIOR_WEIGHT + self.samples + 1))
        usual = tuple(factor * one for one in self.recent_ms[:assumed])
        return (*usual, *self.recent_ms[assumed:])

    def relaxed(self, age_s: float, link_type: str) -> RttEstimator:
        """What to believe when the last sample is ``age_s`` old: the worse, the less.

        A stall ends, and nobody who believes in it asks again to find out. So what is above
        the prior of the link fades into it after some seconds of silence; what is below stays.
        """
        if age_s <= _BELIEVED_S or not self.samples:
            return self
        prior = RttEstimator.prior(link_type)
        if self.srtt_ms <= prior.srtt_ms:
            return self
        trust = math.exp(-(age_s - _BELIEVED_S) / _FADING_S)

        def faded(value_ms: float, usual_ms: float) -> float:
            return usual_ms + trust * max(value_ms - usual_ms, 0.0)

        nodes = tuple(
            min(node, faded(node, usual))
            for node, usual in zip(self.nodes_ms, prior.nodes_ms, strict=False)
        )
        return msgspec.structs.replace(
            self,
            srtt_ms=faded(self.srtt_ms, prior.srtt_ms),
            rttvar_ms=faded(self.rttvar_ms, prior.rttvar_ms),
            recent_ms=nodes,
            assumed=0,
            nodes_ms=nodes,
        )

    @property
    def median_ms(self) -> float:
        """Of the nodes."""
        return self.nodes_ms[len(self.nodes_ms) // 2] if self.nodes_ms else self.srtt_ms

    @property
    def deviation_ms(self) -> float:
        """Standard deviation of a normal with this mean deviation (times sqrt(pi / 2))."""
        return self.rttvar_ms * math.sqrt(math.pi / 2)

    @property
    def rto_ms(self) -> float:
        """Retransmission timeout; TCP forgets its window after this much idle (RFC 5681)."""
        return max(_MIN_RTO_MS, self.srtt_ms + max(_GRANULARITY_MS, 4 * self.rttvar_ms))


def _nodes(recent_ms: tuple[float, ...]) -> tuple[float, ...]:
    """Quantiles of the recent samples, of which the last ones count more where they tell more."""
    count = len(recent_ms)
    recency = 2.0 * _recency(recent_ms)
    weighted = sorted(
        (
            value,
            1.0
            + (2.0 * recency if number >= count - 4 else 0.0)
            + (4.0 * recency if number == count - 1 else 0.0),
        )
        for number, value in enumerate(recent_ms)
    )
    total = sum(weight for _, weight in weighted)
    nodes, below, place = [], 0.0, 0
    for quantile in _NODE_QUANTILES:
        while place < count - 1 and below + weighted[place][1] < quantile * total:
            below += weighted[place][1]
            place += 1
        nodes.append(weighted[place][0])
    return tuple(nodes)


def _recency(recent_ms: tuple[float, ...]) -> float:
    """How much a sample says of the next one: the correlation of successive logarithms.

    From von Neumann's ratio (Annals of Mathematical Statistics 12(4), 1941), which knows no
    negative one here, drawn to one half as long as there are few.
    """
    logs = [math.log(max(value, _LEAST_MS)) for value in recent_ms]
    mean = sum(logs) / len(logs)
    variance = sum((value - mean) ** 2 for value in logs)
    if variance <= 0.0 or len(logs) < 3:
        return _RECENCY_PRIOR
    steps = sum((b - a) ** 2 for a, b in itertools.pairwise(logs))
    found = min(max(1.0 - 0.5 * steps / variance, 0.0), 1.0)
    return (len(logs) * found + _RECENCY_WEIGHT * _RECENCY_PRIOR) / (len(logs) + _RECENCY_WEIGHT)
