"""Whether a canary is worse than the stable version, with a bound on false alarms.

Both answer requests at the same time, so what befalls the machine befalls both. Failures are
compared by Fisher's exact test, batch times by van Elteren's. A test that is repeated as data
comes in would reject by chance in the end: here the looks are few (each at half as much data
again), and the chance of a false alarm is shared out over them, look k getting the part
1 / (k (k + 1)) of its half, which sums up to 1 over all k. By the union bound the chance of ever
being wrong is then at most what was asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

__all__ = ["Arm", "Comparison", "Regression", "fisher_greater", "latency_ratio", "van_elteren"]

_MIN_BATCHES: Final = 30
_KEPT_BATCHES: Final = 4096
_NEXT_LOOK: Final = 1.5
_NEGLIGIBLE: Final = 1e-17


@dataclass(frozen=True, slots=True)
class Regression:
    """What was found, for people."""

    kind: str
    """``errors`` or ``latency``."""
    detail: str
    p_value: float


@dataclass(slots=True)
class Arm:
    """What one version did during the trial."""

    requests: int = 0
    """Those that the split gave it and that it could have answered."""
    failures: int = 0
    batches: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_BATCHES))
    """Images and milliseconds of the latest ones."""
    ran: int = 0
    """Batches of all the trial."""

    @property
    def failure_share(self) -> float:
        """0 before the first request."""
        return self.failures / self.requests if self.requests else 0.0


@dataclass(slots=True)
class _Looks:
    """When to test next, and at which level."""

    at: float
    share: float
    taken: int = 0

    def level(self) -> float:
        """Of the next look."""
        number = self.taken + 1
        return self.share / (number * (number + 1))

    def take(self, count: int) -> None:
        self.taken += 1
        self.at = max(self.at, count) * _NEXT_LOOK


class Comparison:
    """One trial. ``false_alarm``: chance that an equally good canary is ever found worse."""

    def __init__(
        self,
        *,
        min_requests: int,
        false_alarm: float,
        max_latency_ratio: float,
        max_error_increase: float,
    ) -> None:
        self.canary = Arm()
        self.stable = Arm()
        self._max_ratio = max_latency_ratio
        self._max_increase = max_error_increase
        self._by_errors = _Looks(float(min_requests), false_alarm / 2)
        self._by_latency = _Looks(float(_MIN_BATCHES), false_alarm / 2)

    def request(self, *, canary: bool, failed: bool) -> Regression | None:
        """A request of the split ended."""
        arm = self.canary if canary else self.stable
        arm.requests += 1
        arm.failures += failed
        if self.canary.requests < self._by_errors.at or not self.stable.requests:
            return None
        level = self._by_errors.level()
        self._by_errors.take(self.canary.requests)
        return self._judge_errors(level)

    def _judge_errors(self, level: float) -> Regression | None:
        new, old = self.canary, self.stable
        if new.failure_share - old.failure_share <= self._max_increase:
            return None
        p_value = fisher_greater(new.failures, new.requests, old.failures, old.requests)
        if p_value > level:
            return None
        return Regression(
            "errors",
            f"{new.failures} of {new.requests} requests failed, "
            f"{old.failures} of {old.requests} of the stable version",
            p_value,
        )

    def batch(self, *, canary: bool, images: int, duration_ms: float) -> Regression | None:
        """A batch of one of the two ran."""
        arm = self.canary if canary else self.stable
        arm.batches.append((images, duration_ms))
        arm.ran += 1
        if self.canary.ran < self._by_latency.at or self.stable.ran < _MIN_BATCHES:
            return None
        level = self._by_latency.level()
        self._by_latency.take(self.canary.ran)
        return self._judge_latency(level)

    def _judge_latency(self, level: float) -> Regression | None:
        ratio = latency_ratio(self.canary.batches, self.stable.batches)
        if ratio <= self._max_ratio:
            return None
        p_value = van_elteren(self.canary.batches, self.stable.batches)
        if p_value > level:
            return None
        return Regression(
            "latency",
            f"batches take {ratio:.2f} times as long as those of the stable version, "
            "sizes being equal",
            p_value,
        )


def fisher_greater(failed: int, total: int, control_failed: int, control_total: int) -> float:
    """P of Fisher's exact test, one-sided: P(X >= failed) by chance.

    X is hypergeometric: of all failures, how many fall on ``total`` of all requests
    (R. A. Fisher, "The design of experiments", 1935, section 11). 1.0 where the share of failures
    is not above the control's.
    """
    everybody, failures = total + control_total, failed + control_failed
    if failed * everybody <= total * failures:
        return 1.0
    p_value = 0.0
    for count in range(failed, min(failures, total) + 1):
        term = math.exp(
            _log_choose(failures, count)
            + _log_choose(everybody - failures, total - count)
            - _log_choose(everybody, total)
        )
        p_value += term
        if term < _NEGLIGIBLE * p_value:  # beyond the mode they only get smaller
            break
    return min(p_value, 1.0)


def _log_choose(n: int, k: int) -> float:
    if k < 0 or k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _strata(
    runs: Iterable[tuple[int, float]], control: Iterable[tuple[int, float]]
) -> list[tuple[list[float], list[float]]]:
    """Times of both, by batch size, where both have some."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    for side, batches in enumerate((runs, control)):
        for images, duration_ms in batches:
            found.setdefault(images, ([], []))[side].append(duration_ms)
    return [pair for pair in found.values() if pair[0] and pair[1]]


def van_elteren(runs: Iterable[tuple[int, float]], control: Iterable[tuple[int, float]]) -> float:
    """P, one-sided, that ``runs`` (images, milliseconds) take longer than ``control`` by chance.

    The Wilcoxon rank-sum test over strata, here batch sizes, each weighted 1 / (N + 1)
    (P. van Elteren, "On the combination of independent two-sample tests of Wilcoxon", Bulletin of
    the International Statistical Institute 37, 1960), normal approximation with ties corrected
    (E. L. Lehmann, "Nonparametrics", 1975, section 1.4). A small share of the traffic makes
    small batches, which are fast: without strata a canary would look better than it is. 1.0
    where no stratum holds both.
    """
    deviation = variance = 0.0
    for mine, others in _strata(runs, control):
        rank_sum, ties = _rank_sum(mine, others)
        m, n = len(mine), len(others)
        total = m + n
        spread = total + 1 - (ties / (total * (total - 1)) if total > 1 else 0.0)
        deviation += (rank_sum - m * (total + 1) / 2) / (total + 1)
        variance += m * n / 12 * spread / (total + 1) ** 2
    if variance <= 0.0:
        return 1.0
    return 0.5 * math.erfc(deviation / math.sqrt(2 * variance))


def _rank_sum(mine: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Sum of the (mean) ranks of ``mine``, and the sum of t^3 - t over ties of t values."""
    merged = sorted([(value, True) for value in mine] + [(value, False) for value in others])
    rank_sum = ties = 0.0
    start = 0
    while start < len(merged):
        end = start
        own = 0
        while end < len(merged) and merged[end][0] == merged[start][0]:
            own += merged[end][1]
            end += 1
        count = end - start
        rank_sum += own * (start + 1 + end) / 2
        ties += count**3 - count
        start = end
    return rank_sum, ties


def latency_ratio(runs: Iterable[tuple[int, float]], control: Iterable[tuple[int, float]]) -> float:
    """Ratio of median times, as a geometric mean over batch sizes; 1.0 where nothing compares.

    Each size counts m n / (m + n), the inverse variance of a difference of its two medians.
    """
    logs = weights = 0.0
    for mine, others in _strata(runs, control):
        weight = len(mine) * len(others) / (len(mine) + len(others))
        logs += weight * math.log(max(median(mine), 1e-6) / max(median(others), 1e-6))
        weights += weight
    return math.exp(logs / weights) if weights else 1.0
