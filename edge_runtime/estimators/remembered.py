"""What a network taught before: kept as numbers, and believed less the older they are.

With probability ``w = exp(-age / 7 days)`` the network is as it was, else it is any network
of its type: the moments of that mixture are the prior of the next visit,

    m = w m1 + (1 - w) m0
    V = w V1 + (1 - w) V0 + w (1 - w) (m1 - m0)^2

where ``m1, V1`` are the stored state, aged as the filter ages it (``link.py``), and ``m0, V0``
those of the link type. Pure; ages are seconds.
"""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec

from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.rtt import RttEstimator

__all__ = ["LocalMemory", "NetworkMemory", "recall", "recall_latencies", "remember"]

_TAU_S: Final = 7 * 86_400.0
_MAX_SAMPLES: Final = 16
_MIN_SAMPLES: Final = 2
_MAX_LATENCIES: Final = 32

_Finite = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
_Variance = Annotated[float, msgspec.Meta(ge=0, le=1e4)]
_Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=600_000)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class NetworkMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network; it says nothing of where or whose it is."""

    seen_s: float
    """Unix seconds."""
    mean: _Finite
    variance: _Variance
    long_run_mean: _Finite
    long_run_variance: _Variance
    outage_share: _Share
    samples: Annotated[int, msgspec.Meta(ge=0)]
    srtt_ms: _Milliseconds
    rttvar_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)]


class LocalMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latencies of one variant's file on this device."""

    seen_s: float
    latencies_ms: Annotated[tuple[_Milliseconds, ...], msgspec.Meta(max_length=64)]


def remember(path: PathEstimator, now_s: float, unix_s: float) -> NetworkMemory | None:
    """What is worth keeping of a path; None: too little was learned on it."""
    link, rtt = path.link, path.rtt
    if link.samples < _MIN_SAMPLES or not rtt.samples:
        return None
    aged = link.at(now_s)
    return NetworkMemory(
        seen_s=unix_s,
        mean=aged.log_rate_mean,
        variance=max(aged.log_rate_deviation**2 - link.noise_variance, 0.0),
        long_run_mean=link.long_run_mean,
        long_run_variance=link.long_run_variance,
        outage_share=link.outage_share,
        samples=min(link.samples, _MAX_SAMPLES),
        srtt_ms=max(rtt.srtt_ms, 1e-3),
        rttvar_ms=rtt.rttvar_ms,
    )


def recall(memory: NetworkMemory, link_type: str, age_s: float) -> PathEstimator:
    """The path as it is believed to be ``age_s`` later, before the first exchange."""
    fresh = PathEstimator.prior(link_type)
    age_s = max(age_s, 0.0)
    w = math.exp(-age_s / _TAU_S)
    keep = math.exp(-age_s / fresh.link.tau_s)
    mean = memory.long_run_mean + (memory.mean - memory.long_run_mean) * keep
    variance = memory.variance * keep**2 + memory.long_run_variance * (1.0 - keep**2)
    link = msgspec.structs.replace(
        fresh.link,
        mean=w * mean + (1.0 - w) * fresh.link.mean,
        variance=_mixed(w, mean, variance, fresh.link.mean, fresh.link.variance),
        long_run_mean=w * memory.long_run_mean + (1.0 - w) * fresh.link.long_run_mean,
        long_run_variance=_mixed(
            w,
            memory.long_run_mean,
            memory.long_run_variance,
            fresh.link.long_run_mean,
            fresh.link.long_run_variance,
        ),
        outage_share=w * memory.outage_share + (1.0 - w) * fresh.link.outage_share,
        samples=round(w * memory.samples),
    )
    return msgspec.structs.replace(fresh, link=link, rtt=_recall_rtt(memory, fresh.rtt, w))


def _recall_rtt(memory: NetworkMemory, fresh: RttEstimator, w: float) -> RttEstimator:
    """A prior around the stored mean: the first sample still replaces it (RFC 6298)."""
    srtt_ms = w * memory.srtt_ms + (1.0 - w) * fresh.srtt_ms
    scale = srtt_ms / fresh.srtt_ms
    return msgspec.structs.replace(
        fresh,
        srtt_ms=srtt_ms,
        rttvar_ms=w * memory.rttvar_ms
        + (1.0 - w) * fresh.rttvar_ms
        + w * (1.0 - w) * abs(memory.srtt_ms - fresh.srtt_ms),
        recent_ms=tuple(scale * one for one in fresh.recent_ms),
        nodes_ms=tuple(scale * one for one in fresh.nodes_ms),
    )


def _mixed(w: float, mean: float, variance: float, mean0: float, variance0: float) -> float:
    return w * variance + (1.0 - w) * variance0 + w * (1.0 - w) * (mean - mean0) ** 2


def recall_latencies(memory: LocalMemory, age_s: float) -> tuple[float, ...]:
    """The last of them, fewer the older they are: heat and updates change a device."""
    share = math.exp(-max(age_s, 0.0) / _TAU_S)
    count = round(share * min(len(memory.latencies_ms), _MAX_LATENCIES))
    return memory.latencies_ms[len(memory.latencies_ms) - count :]
