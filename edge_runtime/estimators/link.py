"""The upload rate of the link, as a distribution that ages.

The logarithm of the rate is an Ornstein-Uhlenbeck process (Uhlenbeck and Ornstein, 1930)
around a slow mean ``mu``, observed with noise and filtered after Kalman (1960):

    m(t + d) = mu + (m - mu) e^(-d/tau)
    V(t + d) = V e^(-2d/tau) + s2 (1 - e^(-2d/tau))
    K = V / (V + R);  m' = m + K (y - m);  V' = (1 - K) V

On recorded mobile uplinks the correlation of the log rate falls to about one half after ten
seconds: an old sample says little, so ``tau`` is 6 s and not a minute. Three things are
added, because mobile links are no single Gaussian process:

* the spread ``s2`` around the slow mean is learned, from deviations cut at 2.5 sigma;
* the state may also have been drawn anew (a hand-over): ``fresh_share``;
* links go away and come back (millimeter waves behind a bus, Wi-Fi at the door). A sample
  far below the long run is no rate but an outage; it sets the probability of being in one,
  which relaxes to the share of outages seen, within seconds.

Samples come from the receiver only (``Server-Timing: recv`` and the size of the body): a
local send returns long before its bytes have left the device.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from edge_runtime.estimators.transfer import (
    INITIAL_WINDOW_BYTES,
    required_rate,
    slow_start_rounds,
    wire_bytes,
)

__all__ = ["LINK_PRIORS", "LinkEstimate", "LinkEstimator"]

LINK_PRIORS: Final[dict[str, tuple[float, float]]] = {
    # link type: (median uplink in Mbit/s, standard deviation of its logarithm)
    "ethernet": (50.0, 1.0),
    "wifi": (20.0, 1.3),
    "5g": (40.0, 1.2),
    "lte": (10.0, 1.1),
    "3g": (0.8, 0.7),
    "unknown": (10.0, 1.5),
}
"""Before the first sample. Medians of public uplink recordings, rounded; wide on purpose."""

_MIN_RECV_MS = 1.0  # below this a receive time is the reader's scheduling, not the link
_MIN_BODY_BYTES = 4096  # smaller bodies leave in one burst and measure nothing
_MIN_LOG_RATE = math.log(100.0)
_MAX_LOG_RATE = math.log(1.25e9)
_MEAN_STEP = 0.1
_VARIANCE_STEP = 0.1
_MIN_LONG_RUN_VARIANCE = 0.04
_FAR = 2.5
"""Deviations, and natural logarithms, below the long-run mean at which a sample is an outage."""
_KNOWN_SAMPLES = 3
_OUTAGE_STEP = 0.1
_OUTAGE_SURE = 0.98
_MIN_OUTAGE = 0.005
_ROUND_TRIP_JITTER = 0.2
"""Standard deviation of the sum of a few round trips, in shares of it."""
_NO_LIKELIHOOD = 1e-12
_MIN_Z = -8.0  # beyond, the truncated tail is numerically empty


class LinkEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Log-normal belief about the upload rate (bytes per second) at one moment."""

    log_rate_mean: float
    log_rate_deviation: float
    fresh_share: float = 0.0
    """P(the link has changed its state since the last sample), as by a hand-over."""
    long_run_mean: float = 0.0
    long_run_deviation: float = 1.0
    outage: float = 0.0
    """P(nothing passes); the rest describes the link when something does."""

    @property
    def median_rate(self) -> float:
        """Bytes per second that the link beats half of the time."""
        return math.exp(self.log_rate_mean)


class LinkEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """State of the filter; times are seconds of any monotonic clock."""

    mean: float
    variance: float
    long_run_mean: float
    long_run_variance: float
    updated_s: float | None = None
    samples: int = 0
    bounds: int = 0
    """Uploads that were cut off and showed no more than a bound."""
    tau_s: float = 6.0
    jump_tau_s: float = 10.0
    outage_tau_s: float = 4.0
    outage: float = 0.02
    """P(in an outage) at ``updated_s``."""
    outage_share: float = 0.02
    noise_variance: float = 0.1

    @classmethod
    def prior(cls, link_type: str = "unknown", *, tau_s: float = 6.0) -> LinkEstimator:
        """What to believe before the first sample on a link of this type."""
        mbit_s, deviation = LINK_PRIORS.get(link_type, LINK_PRIORS["unknown"])
        mean = math.log(mbit_s * 1e6 / 8)
        variance = deviation * deviation
        return cls(
            mean=mean,
            variance=variance,
            long_run_mean=mean,
            long_run_variance=variance,
            tau_s=tau_s,
        )

    def at(self, now_s: float) -> LinkEstimate:
        """The belief at ``now_s``."""
        mean, variance = self._aged(now_s)
        kept = 0.0
        if self.updated_s is not None:
            kept = math.exp(-max(0.0, now_s - self.updated_s) / self.jump_tau_s)
        return LinkEstimate(
            log_rate_mean=mean,
            log_rate_deviation=math.sqrt(variance + self.noise_variance),
            fresh_share=1.0 - kept,
            long_run_mean=self.long_run_mean,
            long_run_deviation=math.sqrt(self.long_run_variance + self.noise_variance),
            outage=self._outage_at(now_s),
        )

    def _outage_at(self, now_s: float) -> float:
        if self.updated_s is None:
            return self.outage
        keep = math.exp(-max(0.0, now_s - self.updated_s) / self.outage_tau_s)
        return self.outage_share + (self.outage - self.outage_share) * keep

    def _mean_step(self) -> float:
        """A mean of the first samples, a forgetting one later."""
        return max(_MEAN_STEP, 1.0 / (self.samples + self.bounds + 2))

    def _moderate(self, away: float) -> float:
        """Huber's psi: fades are deep and rare, and the long run is what is usual."""
        most = math.sqrt(self.long_run_variance)
        return min(max(away, -most), most)

    def _far_below(self, log_rate: float) -> bool:
        if self.samples + self.bounds < _KNOWN_SAMPLES:
            return False  # a slow link, for all that is known
        gap = _FAR * max(1.0, math.sqrt(self.long_run_variance))
        return log_rate < self.long_run_mean - gap

    def _gone(self, now_s: float) -> LinkEstimator:
        """Nothing passed: an outage, or a link that is no longer what it was."""
        mean, variance = self._aged(now_s)
        return msgspec.structs.replace(
            self,
            mean=mean,
            variance=variance,
            long_run_mean=self.long_run_mean - _MEAN_STEP * math.sqrt(self.long_run_variance),
            outage=_OUTAGE_SURE,
            outage_share=self.outage_share + _OUTAGE_STEP * (1.0 - self.outage_share),
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
            samples=self.samples + 1,
        )

    def observe_alive(self, now_s: float) -> LinkEstimator:
        """Something small passed: no rate, but no outage either."""
        if self._outage_at(now_s) <= self.outage_share:
            return self
        mean, variance = self._aged(now_s)
        return msgspec.structs.replace(
            self,
            mean=mean,
            variance=variance,
            outage=0.5 * self.outage_share,
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
        )

    def _aged(self, now_s: float) -> tuple[float, float]:
        if self.updated_s is None:
            return self.mean, self.variance
        keep = math.exp(-max(0.0, now_s - self.updated_s) / self.tau_s)
        mean = self.long_run_mean + (self.mean - self.long_run_mean) * keep
        variance = self.variance * keep**2 + self.long_run_variance * (1.0 - keep**2)
        return mean, variance

    def observe(self, rate: float, now_s: float) -> LinkEstimator:
        """One sample of the rate in bytes per second."""
        sample = min(max(math.log(max(rate, 1.0)), _MIN_LOG_RATE), _MAX_LOG_RATE)
        if self._far_below(sample):
            return self._gone(now_s)
        mean, variance = self._aged(now_s)
        gain = variance / (variance + self.noise_variance)
        most = _FAR * math.sqrt(self.long_run_variance)
        away = min(max(sample - self.long_run_mean, -most), most)
        long_run_variance = self.long_run_variance + _VARIANCE_STEP * (
            away * away - self.long_run_variance
        )
        return msgspec.structs.replace(
            self,
            mean=mean + gain * (sample - mean),
            variance=(1.0 - gain) * variance,
            long_run_mean=self.long_run_mean + self._mean_step() * self._moderate(away),
            long_run_variance=max(long_run_variance, _MIN_LONG_RUN_VARIANCE),
            outage=0.0,
            outage_share=(1.0 - _OUTAGE_STEP) * self.outage_share,
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
            samples=self.samples + 1,
        )

    def observe_at_most(self, rate: float, now_s: float) -> LinkEstimator:
        """An upload that was cut off: the rate was below ``rate`` (a censored sample).

        The belief becomes the normal that has the moments of the truncated one: with
        ``a = (ln rate - m) / sigma`` and ``h = phi(a) / Phi(a)``, m' = m - sigma h and
        V' = V (1 - a h - h^2). A bound far above the belief changes nothing.
        """
        if rate <= 0 or not math.isfinite(rate):
            return self
        bound = max(math.log(rate), _MIN_LOG_RATE)
        if self._far_below(bound):
            return self._gone(now_s)
        mean, variance = self._aged(now_s)
        deviation = math.sqrt(variance)
        a = max((bound - mean) / max(deviation, 1e-9), _MIN_Z)
        below = 0.5 * math.erfc(-a / math.sqrt(2))
        hazard = math.exp(-a * a / 2) / (math.sqrt(2 * math.pi) * below)
        # Bayes: an outage explains the cut for sure, the link as it is believed by ``below``
        gone = max(self._outage_at(now_s), _MIN_OUTAGE)
        gone = gone / (gone + (1.0 - gone) * below)
        away = min(0.0, max(bound - self.long_run_mean, -_FAR * math.sqrt(self.long_run_variance)))
        variance *= min(max(1.0 - a * hazard - hazard * hazard, 0.0), 1.0)
        # a normal of these moments leaks over the bound: one deviation is kept below it
        most = bound - math.sqrt(variance + self.noise_variance)
        return msgspec.structs.replace(
            self,
            mean=max(min(mean - deviation * hazard, max(most, _MIN_LOG_RATE)), _MIN_LOG_RATE),
            variance=variance,
            long_run_mean=self.long_run_mean + self._mean_step() * away,
            outage=gone,
            outage_share=self.outage_share + _OUTAGE_STEP * (gone - self.outage_share),
            bounds=self.bounds + 1,
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
        )

    def observe_at_least(self, rate: float, now_s: float) -> LinkEstimator:
        """TCP's window, not the link, was the limit: the rate was above ``rate``.

        The mirror of ``observe_at_most``: with ``h = phi(a) / (1 - Phi(a))``,
        m' = m + sigma h and V' = V (1 + a h - h^2).
        """
        if rate <= 0 or not math.isfinite(rate):
            return self
        mean, variance = self._aged(now_s)
        deviation = math.sqrt(variance)
        bound = min(math.log(rate), _MAX_LOG_RATE)
        a = min((bound - mean) / max(deviation, 1e-9), -_MIN_Z)
        hazard = math.exp(-a * a / 2) / (math.sqrt(2 * math.pi) * 0.5 * math.erfc(a / math.sqrt(2)))
        most = _FAR * math.sqrt(self.long_run_variance)
        away = max(0.0, min(bound - self.long_run_mean, most))
        return msgspec.structs.replace(
            self,
            mean=min(mean + deviation * hazard, _MAX_LOG_RATE),
            variance=variance * min(max(1.0 + a * hazard - hazard * hazard, 0.0), 1.0),
            long_run_mean=self.long_run_mean + self._mean_step() * away,
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
        )

    def observe_upload(
        self,
        body_bytes: int,
        recv_ms: float,
        rtt_ms: float,
        now_s: float,
        *,
        window_bytes: float = INITIAL_WINDOW_BYTES,
        rtt_nodes_ms: tuple[float, ...] = (),
    ) -> LinkEstimator:
        """The receiver took ``recv_ms`` to read a body: ``observe_time`` of it."""
        if body_bytes < _MIN_BODY_BYTES or not math.isfinite(recv_ms):
            return self
        return self.observe_time(
            wire_bytes(body_bytes),
            recv_ms,
            rtt_nodes_ms or (rtt_ms,),
            now_s,
            window_bytes=window_bytes,
        )

    def observe_time(
        self,
        size_bytes: float,
        elapsed_ms: float,
        rtt_nodes_ms: tuple[float, ...],
        now_s: float,
        *,
        window_bytes: float = INITIAL_WINDOW_BYTES,
    ) -> LinkEstimator:
        """``size_bytes`` took ``elapsed_ms``, slow start included: which rates explain that?

        Each of the equally likely round trips asks for another rate (``required_rate``), and
        the closer slow start alone comes to the time, the less the rest says:

            ln r* = ln required_rate,   R* = R + (c T / (T - j RTT) - c)^2

        with ``c`` the jitter of a sum of round trips. The belief becomes the normal that has
        the moments of the mixture of their Kalman updates, weighted by how well each was
        predicted (assumed density filtering). Where no round trip leaves time for the bytes
        themselves, the quotient of bytes and time bounds the rate from below.
        """
        budget_ms = max(elapsed_ms, _MIN_RECV_MS)
        plain = 1000.0 * size_bytes / budget_ms
        usual_ms = rtt_nodes_ms[len(rtt_nodes_ms) // 2]
        usual = required_rate(size_bytes, budget_ms, usual_ms, window_bytes)
        if usual < math.inf and self._far_below(math.log(max(usual, 1.0))):
            return self._gone(now_s)
        mean, variance = self._aged(now_s)
        found: list[tuple[float, float, float]] = []
        rounds = tuple(slow_start_rounds(size_bytes, window_bytes))
        for rtt_ms in rtt_nodes_ms:
            needed, waited_ms = 0.0, 0.0
            for j, left in rounds:
                time_ms = budget_ms - j * rtt_ms
                if time_ms <= 0.0:
                    needed = math.inf
                    break
                if 1000.0 * left / time_ms > needed:
                    needed, waited_ms = 1000.0 * left / time_ms, j * rtt_ms
            if needed == math.inf:
                continue
            slope = budget_ms / (budget_ms - waited_ms)
            noise = self.noise_variance + (_ROUND_TRIP_JITTER * (slope - 1.0)) ** 2
            sample = min(max(math.log(max(needed, 1.0)), _MIN_LOG_RATE), _MAX_LOG_RATE)
            spread = variance + noise
            likely = slope * math.exp(-0.5 * (sample - mean) ** 2 / spread) / math.sqrt(spread)
            gain = variance / spread
            found.append((likely, mean + gain * (sample - mean), (1.0 - gain) * variance))
        total = sum(likely for likely, _, _ in found)
        if total <= _NO_LIKELIHOOD:
            if found:
                return self.observe(usual if usual <= 4.0 * plain else plain, now_s)
            known = self.observe_at_least(plain, now_s)
            return msgspec.structs.replace(known, samples=known.samples + 1)
        new_mean = sum(likely * m for likely, m, _ in found) / total
        new_variance = sum(likely * (v + (m - new_mean) ** 2) for likely, m, v in found) / total
        return self._learned(new_mean, min(new_variance, variance), mean, variance, now_s)

    def _learned(
        self, mean: float, variance: float, before: float, before_variance: float, now_s: float
    ) -> LinkEstimator:
        """The state after a sample that took the belief from ``before`` to ``mean``.

        The sample that would have done so is ``before + (mean - before) / gain``; what says
        less than a plain one moves the long run less.
        """
        gain = max(1.0 - variance / max(before_variance, 1e-9), 1e-6)
        noise = before_variance * (1.0 - gain) / gain
        says = min(1.0, self.noise_variance / max(noise, 1e-9))
        most = _FAR * math.sqrt(self.long_run_variance)
        away = min(max(before + (mean - before) / gain - self.long_run_mean, -most), most)
        long_run_variance = self.long_run_variance + says * _VARIANCE_STEP * (
            away * away - self.long_run_variance
        )
        return msgspec.structs.replace(
            self,
            mean=min(max(mean, _MIN_LOG_RATE), _MAX_LOG_RATE),
            variance=variance,
            long_run_mean=self.long_run_mean + says * self._mean_step() * self._moderate(away),
            long_run_variance=max(long_run_variance, _MIN_LONG_RUN_VARIANCE),
            outage=0.0,
            outage_share=(1.0 - _OUTAGE_STEP) * self.outage_share,
            updated_s=now_s if self.updated_s is None else max(now_s, self.updated_s),
            samples=self.samples + 1,
        )
