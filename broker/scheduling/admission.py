"""Who is let in, decided on the headers alone, before a byte of the body is read.

    wait   = max(full batches due earlier, full batches of its fair share)
    start  = max(upload, rest of the running batch + wait)
    finish = start + T(own batch)
    admit  when finish + margin <= deadline

The upload and the wait overlap, so the longer one counts. Requests due earlier go first
(EDF); those due later do not delay this one, but whoever asks for more than a fair share
(``shares.py``) waits behind its own. The margin is learned from how late answers came compared
with their prediction.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from broker.scheduling.latency import LatencyModel, RecentQuantile
from edge_runtime.contract.errors import DeadlineExceeded, NearfarError, Overloaded

__all__ = ["Forecast", "Margin", "UploadRate", "forecast", "refusal", "wants_probe"]

_PROBE_AFTER_S = 1.0
_MIN_MEASURED_BYTES = 4096
_RECENT_UPLOADS = 8
_FRESH_UPLOAD_S = 1.0
"""A mobile uplink that was too slow is often fast again a second later."""
_LATE_SHARE = 0.02
_ERRORS = 1024
"""Answers that the margin is learned from."""


class Forecast(msgspec.Struct, frozen=True):
    """What a request can expect, in milliseconds from now."""

    upload_ms: float
    wait_ms: float
    """Until the batch it would join starts."""
    batch_ms: float
    """That batch, in 95 of 100 runs."""
    alone_ms: float
    """A batch of one, on average."""
    undisturbed: bool
    """Nobody runs, and nobody is due earlier."""

    @property
    def start_ms(self) -> float:
        """Until that batch starts with this request in it."""
        return max(self.upload_ms, self.wait_ms)

    @property
    def finish_ms(self) -> float:
        """Until its answer."""
        return self.start_ms + self.batch_ms

    @property
    def idle_finish_ms(self) -> float:
        """The same with nobody else there, and alone in its batch."""
        return self.upload_ms + self.alone_ms


def forecast(
    latency: LatencyModel,
    *,
    ahead: int,
    others_ms: float,
    residual_ms: float,
    upload_ms: float,
    max_batch: int,
    fair_ms: float = 0.0,
    recent_batch: int = 0,
) -> Forecast:
    """Predict for a request of one model.

    ``ahead``: requests of this model with an earlier deadline, uploading ones included;
    ``others_ms``: work of other models on the same executor that goes first;
    ``residual_ms``: what is left of the batch that runs; ``fair_ms``: see ``Shares.wait_ms``;
    ``recent_batch``: images of the batch that runs: the next one will hardly be smaller.
    """
    full_ms = latency.mean_ms(max_batch)
    full_batches, own_batch = divmod(ahead, max_batch)
    due_ms = others_ms + full_batches * full_ms if full_batches else others_ms
    if fair_ms > 0.0 and full_ms > 0.0:
        # In whole batches too: what does not fill one shares a batch with this request.
        fair_batches, rest_ms = divmod(fair_ms, full_ms)
        if fair_batches * full_ms >= due_ms:
            due_ms = fair_batches * full_ms
            own_batch = max(own_batch, int(rest_ms / full_ms * max_batch))
    wait_ms = residual_ms + due_ms
    own_batch = min(max(own_batch + 1, recent_batch), max_batch)
    return Forecast(
        upload_ms=upload_ms,
        wait_ms=wait_ms,
        batch_ms=latency.high_ms(own_batch),
        alone_ms=latency.mean_ms(1),
        undisturbed=not ahead and not wait_ms,
    )


def refusal(predicted: Forecast, left_ms: float, margin_ms: float = 0.0) -> NearfarError | None:
    """Why not to admit a request with so much time left; None: admit it.

    ``DeadlineExceeded`` when not even an idle broker could make it, else ``Overloaded``.
    On an idle broker the average run decides and no margin counts: to try costs nobody else.
    """
    if math.isinf(predicted.wait_ms):
        return Overloaded("the process that runs the model is down: ask again later")
    if predicted.idle_finish_ms <= left_ms and (
        predicted.undisturbed or predicted.finish_ms + margin_ms <= left_ms
    ):
        return None
    if predicted.idle_finish_ms > left_ms:
        return DeadlineExceeded(
            f"this takes about {predicted.idle_finish_ms:.0f} ms and {left_ms:.0f} ms are left: "
            "answer on the device, or allow more time"
        )
    return Overloaded(
        f"the answer would come in about {predicted.finish_ms:.0f} ms and {left_ms:.0f} ms are "
        "left: answer on the device, or ask again later"
    )


def wants_probe(latency: LatencyModel, now_s: float) -> bool:
    """Whether T(b) is so old that an idle executor should measure it again.

    One slow run must not shut the door for good: refused requests teach nothing.
    """
    return latency.age_s(now_s) > _PROBE_AFTER_S


class Margin:
    """How much later than predicted answers come, so that 2 of 100 admitted ones are late.

    The 98 % quantile of the latest errors, one for each octave of deadlines. One for all would
    let long deadlines, whose errors are larger, shut out the short ones.
    """

    def __init__(self) -> None:
        self._by_octave: dict[int, RecentQuantile] = {}

    def for_deadline(self, left_ms: float, full_ms: float) -> float:
        """The margin for a request with so much time left; ``full_ms``: of a full batch.

        At most half of the time, and what two full batches leave of it: more would keep the
        device idle after a fault that has passed, as small batches cannot show that it has.
        A quarter it may always be.
        """
        errors = self._by_octave.get(_octave(left_ms))
        error_ms = None if errors is None else errors.value
        if error_ms is None:
            return 0.0
        most_ms = min(left_ms / 2, max(left_ms - 2 * full_ms, left_ms / 4))
        return min(max(error_ms, 0.0), most_ms)

    def observe(self, left_ms: float, error_ms: float) -> None:
        """A request that had ``left_ms`` was answered this much later than predicted.

        Infinity: not at all. Negative: earlier.
        """
        octave = _octave(left_ms)
        errors = self._by_octave.get(octave)
        if errors is None:
            errors = self._by_octave[octave] = RecentQuantile(1.0 - _LATE_SHARE, _ERRORS)
        errors.observe(min(error_ms, left_ms))


def _octave(left_ms: float) -> int:
    return math.frexp(max(left_ms, 1.0))[1]


class UploadRate:
    """How fast the bodies of one connection arrive.

    One link, one rate: what other clients need says nothing about this one. The fastest of
    the latest uploads counts, and only while it is fresh: a link that was slow must not be
    taken for slow forever, as refused requests upload nothing that could show otherwise.
    """

    __slots__ = ("_measured_s", "_ms_per_byte")

    def __init__(self) -> None:
        self._ms_per_byte: deque[float] = deque(maxlen=_RECENT_UPLOADS)
        self._measured_s = -math.inf

    def observe(self, size_bytes: int, duration_ms: float, now_s: float) -> None:
        """A body of this size took so long; tiny ones say nothing about the rate."""
        if size_bytes >= _MIN_MEASURED_BYTES:
            self._ms_per_byte.append(duration_ms / size_bytes)
            self._measured_s = now_s

    def expected_ms(self, size_bytes: int, now_s: float) -> float:
        """How long a body of this size will take at least; 0 when nothing fresh is known."""
        if now_s - self._measured_s > _FRESH_UPLOAD_S:
            return 0.0
        return size_bytes * min(self._ms_per_byte)
