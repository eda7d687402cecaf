"""What the policies of the literature remember, as one frozen state.

It is part of a ``Situation``, so that their decisions can be replayed like ours. Fed with
every upload: its size, how long its answer took, and whether it came in time.
"""

from __future__ import annotations

import math

import msgspec

__all__ = ["FEATURES", "BaselineMemory"]

FEATURES = 5
_EWMA = 0.3
_THROUGHPUTS = 5
_RATIOS = 50


def _identity() -> tuple[float, ...]:
    return tuple(float(row == column) for row in range(FEATURES) for column in range(FEATURES))


class BaselineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in bytes per second."""

    ewma_rate: float | None = None
    throughputs: tuple[float, ...] = ()
    """The last five, oldest first (RobustMPC)."""
    errors: tuple[float, ...] = ()
    """Relative errors of the harmonic mean of five on the next one."""
    ratios: tuple[float, ...] = ()
    """Observed over predicted time (conformal prediction), the last fifty."""
    inverse: tuple[float, ...] = _identity()
    """LinUCB's inverse design matrix, row by row, ridge 1."""
    rewards: tuple[float, ...] = (0.0,) * FEATURES
    rounds: int = 0
    """Decisions since the last upload (forced sampling)."""
    tokens: float = 10.0
    """gRPC A6 retry throttling."""

    def harmonic_rate(self) -> float | None:
        """Harmonic mean of the last five, discounted by its largest recent error."""
        if not self.throughputs:
            return None
        mean = len(self.throughputs) / sum(1.0 / rate for rate in self.throughputs)
        return mean / (1.0 + max(self.errors, default=0.0))

    def decided(self) -> BaselineMemory:
        """One more decision."""
        return msgspec.structs.replace(self, rounds=self.rounds + 1)

    def uploaded(
        self,
        size_bytes: float,
        total_ms: float,
        predicted_ms: float | None,
        features: tuple[float, ...],
        *,
        in_time: bool,
    ) -> BaselineMemory:
        """The answer to an upload of ``size_bytes`` took ``total_ms``, set-up included.

        One that was cut off counts with the time until then and ``in_time`` false.
        """
        rate = max(1.0, 1e3 * size_bytes / max(total_ms, 1.0))
        ewma = rate if self.ewma_rate is None else (1 - _EWMA) * self.ewma_rate + _EWMA * rate
        errors = self.errors
        if self.throughputs:
            mean = len(self.throughputs) / sum(1.0 / past for past in self.throughputs)
            errors = (*errors, abs(mean - rate) / rate)[-_THROUGHPUTS:]
        ratios = self.ratios
        if predicted_ms is not None and predicted_ms > 0:
            ratios = (*ratios, total_ms / predicted_ms)[-_RATIOS:]
        inverse, rewards = self._learn(features, float(in_time))
        return msgspec.structs.replace(
            self,
            ewma_rate=ewma,
            throughputs=(*self.throughputs, rate)[-_THROUGHPUTS:],
            errors=errors,
            ratios=ratios,
            inverse=inverse,
            rewards=rewards,
            rounds=0,
            tokens=min(10.0, self.tokens + 0.1),
        )

    def failed(self) -> BaselineMemory:
        """An attempt failed: one token less."""
        return msgspec.structs.replace(self, tokens=max(0.0, self.tokens - 1.0))

    def _learn(
        self, features: tuple[float, ...], reward: float
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Sherman and Morrison's rank-one update of the inverse."""
        if len(features) != FEATURES:
            return self.inverse, self.rewards
        rows = range(FEATURES)
        column = [sum(self.inverse[FEATURES * i + j] * features[j] for j in rows) for i in rows]
        scale = 1.0 + sum(features[i] * column[i] for i in rows)
        inverse = tuple(
            self.inverse[FEATURES * i + j] - column[i] * column[j] / scale
            for i in rows
            for j in rows
        )
        return inverse, tuple(self.rewards[i] + reward * features[i] for i in rows)

    def upper_bound(self, features: tuple[float, ...], width: float) -> float:
        """LinUCB (Li et al., WWW 2010): x'theta + width sqrt(x' A^-1 x)."""
        rows = range(FEATURES)
        column = [sum(self.inverse[FEATURES * i + j] * features[j] for j in rows) for i in rows]
        mean = sum(column[i] * self.rewards[i] for i in rows)
        spread = sum(column[i] * features[i] for i in rows)
        return mean + width * math.sqrt(max(0.0, spread))
