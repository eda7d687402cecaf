"""All that is known of the way to one broker, as one frozen value.

Fed by what a device can observe: the receiver's clock (``Server-Timing``), the receiver's
acknowledgements of an upload, round trips of small requests, uploads that were cut off, and
the queue delay that the broker announces. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.contract.wire import ServerTiming
from edge_runtime.estimators.cloud import CloudEstimator
from edge_runtime.estimators.link import LinkEstimator
from edge_runtime.estimators.rtt import RttEstimator
from edge_runtime.estimators.transfer import (
    INITIAL_WINDOW_BYTES,
    required_rate,
    window_limited,
    wire_bytes,
)

__all__ = ["PathEstimator"]

_MAX_WINDOW_BYTES = 1 << 20
_MIN_RECENT_MS = 30.0
_STALL_BYTES = 100.0
_WAITED = 5.0
_LONG = 3.0
_MIN_DRAINED_BYTES = 8192


class PathEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """Link, round trip, broker and TCP window."""

    link_type: str
    link: LinkEstimator
    rtt: RttEstimator
    rtt_s: float | None = None
    """When the last round trip was measured."""
    cloud: CloudEstimator = CloudEstimator()
    window_bytes: float = float(INITIAL_WINDOW_BYTES)
    window_s: float | None = None
    """When the window was last used."""
    used_s: float | None = None
    """Last byte to or from the broker: the radio's tail runs from here."""

    @classmethod
    def prior(cls, link_type: str = "unknown") -> PathEstimator:
        """Before the first exchange on a link of this type."""
        return cls(
            link_type=link_type,
            link=LinkEstimator.prior(link_type),
            rtt=RttEstimator.prior(link_type),
        )

    def window(self, now_s: float) -> float:
        """What TCP sends at once on the open connection (RFC 5681 sections 3.1 and 4.1).

        Small requests do not keep the window: an application that does not use it loses it
        (RFC 2861).
        """
        if self.window_s is None or (now_s - self.window_s) * 1e3 > self.rtt.rto_ms:
            return float(INITIAL_WINDOW_BYTES)
        return self.window_bytes

    def round_trip(self, now_s: float) -> RttEstimator:
        """What to expect of a round trip now."""
        if self.rtt_s is None:
            return self.rtt
        return self.rtt.relaxed(now_s - self.rtt_s, self.link_type)

    def used(self, now_s: float) -> PathEstimator:
        """A byte went to or came from the broker."""
        return msgspec.structs.replace(self, used_s=now_s)

    def answered(
        self,
        body_bytes: int,
        timing: ServerTiming,
        total_ms: float,
        *,
        window_bytes: float,
        queue_delay_ms: float | None = None,
        answer_ms: float | None = None,
        rated: bool = False,
        now_s: float,
    ) -> PathEstimator:
        """An upload's answer came ``total_ms`` after the first byte of its body could leave.

        ``answer_ms``: reading the answer's body. ``rated``: the upload gave samples of the
        rate while it went on.
        """
        state = self.pinged(
            total_ms - sum(t or 0.0 for t in (timing.recv_ms, timing.queue_ms, timing.inference_ms))
            if None not in (timing.recv_ms, timing.queue_ms, timing.inference_ms)
            else math.nan,
            now_s,
        )
        link = state.link
        if timing.recv_ms is not None and not rated:
            link = link.observe_upload(
                body_bytes,
                timing.recv_ms,
                state.rtt.srtt_ms,
                now_s,
                window_bytes=window_bytes,
                rtt_nodes_ms=state.rtt.nodes_ms,
            )
        return msgspec.structs.replace(
            state,
            link=link,
            cloud=state.cloud.observe(timing, queue_delay_ms, now_s, answer_ms=answer_ms),
            window_bytes=min(window_bytes + body_bytes, _MAX_WINDOW_BYTES),
            window_s=now_s,
        )

    def pinged(self, rtt_ms: float, now_s: float) -> PathEstimator:
        """A round trip was measured; NaN and negative values teach nothing.

        One that is several times longer than usual, or than the link's prior, waited for the
        link, not for the way: it counts as a long one, and the link is back. What is usual is
        the median: a mean would rise with every one of them, and let the next ones pass.
        """
        rtt = self.round_trip(now_s)
        measured = rtt_ms >= 0
        return msgspec.structs.replace(
            self,
            rtt=rtt.observe(min(rtt_ms, _LONG * rtt.median_ms)) if measured else self.rtt,
            rtt_s=now_s if measured else self.rtt_s,
            link=self.link.observe_alive(now_s),
            used_s=now_s,
        )

    def progressed(
        self,
        acknowledged_bytes: float,
        received_ms: float,
        *,
        body_bytes: float,
        window_bytes: float,
        now_s: float,
        recent: tuple[float, float] | None = None,
    ) -> PathEstimator:
        """What an upload under way, or cut off, shows.

        ``received_ms``: on the receiver's clock, from its first byte until what was last heard
        of it. The acknowledged part is a sample, and ``recent`` (bytes acknowledged within the
        last milliseconds) a fresher one; nothing acknowledged although it should have been is
        a bound, and so is what a full window allows.
        """
        if received_ms <= 1.0:
            return self
        link = self.link
        if acknowledged_bytes < 1.0:
            first = min(wire_bytes(body_bytes), window_bytes)
            overdue_ms = received_ms - 2.0 * self.rtt.deviation_ms
            if overdue_ms > 1.0:
                link = link.observe_at_most(1e3 * first / overdue_ms, now_s)
        elif window_limited(acknowledged_bytes, window_bytes):
            rate = required_rate(acknowledged_bytes, received_ms, self.rtt.srtt_ms, window_bytes)
            plain = 1e3 * acknowledged_bytes / received_ms
            link = link.observe_at_least(plain if rate > 4.0 * plain else rate, now_s)
        else:
            link = link.observe_time(
                acknowledged_bytes,
                received_ms,
                self.rtt.nodes_ms,
                now_s,
                window_bytes=window_bytes,
            )
            if recent is not None and recent[1] >= _MIN_RECENT_MS:
                link = link.observe(1e3 * max(recent[0], _STALL_BYTES) / recent[1], now_s)
        return msgspec.structs.replace(self, link=link)

    def cut(self, acknowledged_bytes: float, *, window_bytes: float, now_s: float) -> PathEstimator:
        """An upload that began with a window of ``window_bytes`` was cut off.

        What was acknowledged of it has opened the window.
        """
        if acknowledged_bytes < 1.0:
            return self
        return msgspec.structs.replace(
            self,
            window_bytes=min(window_bytes + acknowledged_bytes, _MAX_WINDOW_BYTES),
            window_s=now_s,
        )

    def drained(self, size_bytes: float, elapsed_ms: float, now_s: float) -> PathEstimator:
        """The rest of a cut upload was acknowledged ``elapsed_ms`` after the cut."""
        passed_ms = max(elapsed_ms - self.rtt.srtt_ms, 1.0)
        link = self.link.observe_alive(now_s)
        if size_bytes >= _MIN_DRAINED_BYTES and passed_ms <= _WAITED * self.rtt.srtt_ms:
            link = self.link.observe(1e3 * size_bytes / passed_ms, now_s)
        return msgspec.structs.replace(self, link=link, used_s=now_s)
