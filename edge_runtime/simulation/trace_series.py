"""From what a file says to what a simulation reads: rates per 100 ms, round trips per 200 ms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_runtime.contract.errors import ContractError, LimitExceeded

__all__ = [
    "BIN_MS",
    "LOST_RTT_MS",
    "MAX_RATE_MBPS",
    "MIN_SERIES_S",
    "RTT_STEP_MS",
    "bins_of_opportunities",
    "bins_of_samples",
    "check_bins",
    "check_rtt",
    "rtt_of_samples",
    "usable_runs",
]

FloatArray = npt.NDArray[np.float64]

BIN_MS: Final = 100.0
"""Time that one value of a rate series covers, ms."""
RTT_STEP_MS: Final = 200.0
"""Time between two values of a round-trip series, ms."""
LOST_RTT_MS: Final = 2_000.0
"""What a lost reply counts as, ms."""
MIN_SERIES_S: Final = 10.0
"""A shorter recording says nothing about how its link changes, s."""
MAX_SERIES_S: Final = 86_400.0
MAX_RATE_MBPS: Final = 10_000.0
MAX_RTT_MS: Final = 60_000.0
_MAX_STEP_S: Final = 10.0
_MIN_GAP_S: Final = 5.0
_GAP_STEPS: Final = 5.0
_MAX_RUNS: Final = 64
_PACKET_MEGABITS: Final = 1500 * 8 / 1e6


def check_bins(rates_mbps: FloatArray) -> FloatArray:
    """The rates of one recording, per 100 ms, if a simulation can use them.

    Raises ``ContractError``: not finite, negative, never above 0, too short; and
    ``LimitExceeded``: above 10 Gbit/s or longer than a day.
    """
    if not np.isfinite(rates_mbps).all():
        raise ContractError("a rate is not a finite number")
    if (rates_mbps < 0).any():
        raise ContractError(f"a rate is negative ({rates_mbps.min():g} Mbit/s)")
    if rates_mbps.size and rates_mbps.max() > MAX_RATE_MBPS:
        raise LimitExceeded(
            f"a rate of {rates_mbps.max():.3g} Mbit/s is not plausible: is it in another unit? "
            "Name it in a header or pass --rate-unit"
        )
    seconds = rates_mbps.size * BIN_MS / 1e3
    if seconds > MAX_SERIES_S:
        raise LimitExceeded(f"it lasts {seconds:.0f} s; the most is {MAX_SERIES_S:.0f} s")
    if seconds < MIN_SERIES_S:
        raise ContractError(f"it lasts {seconds:.1f} s; at least {MIN_SERIES_S:.0f} s are needed")
    if not rates_mbps.any():
        raise ContractError("its rate is never above 0")
    return rates_mbps


def usable_runs(runs: Sequence[FloatArray]) -> tuple[list[FloatArray], int]:
    """The recordings of a file that a simulation can use, and how many it cannot.

    Raises what is wrong with the first when there is none, and ``LimitExceeded`` when any
    has an impossible value.
    """
    usable: list[FloatArray] = []
    first: ContractError | None = None
    for run in runs:
        try:
            usable.append(check_bins(run))
        except LimitExceeded:
            raise
        except ContractError as error:
            first = first or error
    if not usable:
        raise first or ContractError("it has no values")
    return usable, len(runs) - len(usable)


def check_rtt(rtt_ms: FloatArray) -> FloatArray:
    """Round trips, if a simulation can use them; ``ContractError``, ``LimitExceeded``."""
    if not np.isfinite(rtt_ms).all():
        raise ContractError("a round trip is not a finite number")
    if (rtt_ms <= 0).any():
        raise ContractError(f"a round trip of {rtt_ms.min():g} ms makes no sense")
    if rtt_ms.size and rtt_ms.max() > MAX_RTT_MS:
        raise LimitExceeded(f"a round trip of {rtt_ms.max():.3g} ms is above {MAX_RTT_MS:.0f} ms")
    seconds = rtt_ms.size * RTT_STEP_MS / 1e3
    if seconds > MAX_SERIES_S:
        raise LimitExceeded(f"it lasts {seconds:.0f} s; the most is {MAX_SERIES_S:.0f} s")
    if seconds < MIN_SERIES_S:
        raise ContractError(
            f"its round trips last {seconds:.1f} s; at least {MIN_SERIES_S:.0f} s are needed"
        )
    return rtt_ms


def bins_of_opportunities(times_ms: npt.NDArray[np.int64]) -> FloatArray:
    """Rates from mahimahi's list: each time is one chance to send 1500 bytes.

    The rates are whole packets: their sum is all that could be sent.
    """
    if times_ms[0] < 0:
        raise ContractError(f"a time is negative ({times_ms[0]} ms)")
    if times_ms[-1] > MAX_SERIES_S * 1e3:
        raise LimitExceeded(f"it lasts {times_ms[-1] / 1e3:.0f} s; the most is {MAX_SERIES_S:.0f}")
    packets = np.bincount(times_ms // int(BIN_MS))
    return np.asarray(packets * _PACKET_MEGABITS / (BIN_MS / 1e3), dtype=np.float64)


def bins_of_samples(times_s: FloatArray, rates_mbps: FloatArray) -> list[FloatArray]:
    """Rates per 100 ms from samples of a rate, each holding until the next.

    A step back in time, or a gap of more than five usual steps (and 5 s), starts another
    run; samples of one time are averaged. Raises ``ContractError`` when samples are more
    than 10 s apart as a rule, or the time runs back again and again, or a rate is negative.
    """
    if rates_mbps.size and rates_mbps.min() < 0:
        raise ContractError(f"a rate is negative ({rates_mbps.min():g} Mbit/s)")
    steps = np.diff(times_s)
    forward = steps[steps > 0]
    if not forward.size:
        raise ContractError("its time does not move on")
    usual_s = float(np.median(forward))
    if usual_s > _MAX_STEP_S:
        raise ContractError(
            f"it has one value every {usual_s:g} s; at most {_MAX_STEP_S:g} s tell how a link "
            "changes (is the time in another unit? Name it in the header, as time_ms)"
        )
    breaks = np.flatnonzero((steps < 0) | (steps > max(_MIN_GAP_S, _GAP_STEPS * usual_s))) + 1
    if breaks.size >= _MAX_RUNS:
        raise ContractError(f"its time jumps {breaks.size} times: one recording a file is needed")
    return [
        _resample(t, r, usual_s, BIN_MS / 1e3)
        for t, r in zip(np.split(times_s, breaks), np.split(rates_mbps, breaks), strict=True)
    ]


def _resample(times_s: FloatArray, values: FloatArray, last_s: float, step_s: float) -> FloatArray:
    """Means over steps of a function that holds each value until the next time."""
    starts, groups = np.unique(times_s, return_inverse=True)
    held = np.bincount(groups, weights=values) / np.bincount(groups)
    edges = np.append(starts, starts[-1] + last_s) - starts[0]
    # Times of 0.1 s steps are no exact doubles: without the margin the last one would be lost.
    count = int((edges[-1] + 1e-6) / step_s)
    if count > MAX_SERIES_S / step_s:
        raise LimitExceeded(f"it lasts {edges[-1]:.0f} s; the most is {MAX_SERIES_S:.0f} s")
    area = np.concatenate(([0.0], np.cumsum(held * np.diff(edges))))
    at = np.interp(np.arange(count + 1) * step_s, edges, area)
    # Differences of sums leave dust of 1e-12, which would turn an outage into a slow link.
    return np.maximum(np.round(np.diff(at) / step_s, 6), 0.0) if count else np.empty(0)


def rtt_of_samples(
    times_s: Sequence[float] | FloatArray, rtt_ms: Sequence[float] | FloatArray
) -> FloatArray:
    """Round trips every 200 ms from replies at times, each holding until the next."""
    times, values = np.asarray(times_s, np.float64), np.asarray(rtt_ms, np.float64)
    steps = np.diff(times)
    if not steps.size or (steps < 0).any() or not (steps > 0).any():
        raise ContractError("the times of its round trips do not move on")
    usual_s = float(np.median(steps[steps > 0]))
    if times[-1] - times[0] + usual_s > MAX_SERIES_S:
        raise LimitExceeded(f"it lasts longer than {MAX_SERIES_S:.0f} s")
    grid = np.arange(times[0], times[-1] + usual_s - 1e-6, RTT_STEP_MS / 1e3)
    return values[np.searchsorted(times, grid + 1e-6, side="right") - 1]
