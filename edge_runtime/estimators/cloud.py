"""How long the broker itself takes: its queue, its model, and sending the answer."""

from __future__ import annotations

import math

import msgspec

from edge_runtime.contract.wire import ServerTiming

__all__ = ["CloudEstimator"]

_ALPHA = 1 / 4
_HINT_TAU_S = 5.0
_RECENT_STEP = 0.5
_RECENT_TAU_S = 10.0
_TAIL_STEP = 0.05


class CloudEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """Means from ``Server-Timing``, and the queue delay that the broker announced last."""

    queue_mean_ms: float = 5.0
    inference_mean_ms: float = 30.0
    answer_mean_ms: float = 0.0
    samples: int = 0
    hint_ms: float | None = None
    hint_at_s: float = 0.0
    recent_queue_ms: float = 5.0
    recent_s: float = 0.0
    tail_mean_ms: float = 5.0
    """Slow mean of the queue: what to expect when nothing recent is known."""

    def observe(
        self,
        timing: ServerTiming,
        queue_delay_ms: float | None,
        now_s: float,
        *,
        answer_ms: float | None = None,
    ) -> CloudEstimator:
        """One answer's headers, and how long its body took; what is None stays as it was."""
        state = self
        if timing.queue_ms is not None or timing.inference_ms is not None:
            state = msgspec.structs.replace(
                state,
                queue_mean_ms=self._step(self.queue_mean_ms, timing.queue_ms),
                inference_mean_ms=self._step(self.inference_mean_ms, timing.inference_ms),
                answer_mean_ms=self._step(self.answer_mean_ms, answer_ms),
                samples=self.samples + 1,
            )
        if timing.queue_ms is not None:
            recent = self.recent_at(now_s)
            state = msgspec.structs.replace(
                state,
                recent_queue_ms=recent + _RECENT_STEP * (timing.queue_ms - recent),
                recent_s=now_s,
                tail_mean_ms=self.tail_mean_ms + _TAIL_STEP * (timing.queue_ms - self.tail_mean_ms),
            )
        if queue_delay_ms is not None:
            state = msgspec.structs.replace(state, hint_ms=float(queue_delay_ms), hint_at_s=now_s)
        return state

    def unanswered(self, waited_ms: float, now_s: float) -> CloudEstimator:
        """The broker had the whole body for ``waited_ms`` and was given up without an answer.

        A censored sample of an exponential: it adds to the time and not to the count, so the
        mean grows by all of it (Lawless, Statistical Models for Lifetime Data, section 4.1).
        """
        waited_ms -= self.inference_mean_ms
        if not waited_ms > 0.0:
            return self
        return msgspec.structs.replace(
            self,
            recent_queue_ms=self.recent_at(now_s) + _RECENT_STEP * waited_ms,
            recent_s=now_s,
        )

    def _step(self, mean: float, sample: float | None) -> float:
        if sample is None:
            return mean
        return sample if self.samples == 0 else mean + _ALPHA * (sample - mean)

    def queue_ms(self, now_s: float) -> float:
        """Predicted wait: the broker's own announcement, fading into the mean within seconds."""
        if self.hint_ms is None:
            return self.queue_mean_ms
        trust = math.exp(-max(0.0, now_s - self.hint_at_s) / _HINT_TAU_S)
        return trust * self.hint_ms + (1.0 - trust) * self.queue_mean_ms

    def recent_at(self, now_s: float) -> float:
        """Mean queue of the last answers, fading into the slow one.

        Overload comes and goes within seconds; waits are about exponential, so the mean says
        it all.
        """
        trust = math.exp(-max(0.0, now_s - self.recent_s) / _RECENT_TAU_S)
        return trust * self.recent_queue_ms + (1.0 - trust) * self.tail_mean_ms
