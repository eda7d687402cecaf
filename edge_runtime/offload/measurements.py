"""What the exchanges with one broker have taught about link, round trip and broker."""

from __future__ import annotations

from edge_runtime.contract.wire import (
    QUEUE_DELAY_HEADER,
    SERVER_TIMING_HEADER,
    ServerTiming,
    parse_queue_delay_ms,
    parse_server_timing,
)
from edge_runtime.estimators import CloudEstimator, LinkEstimator, RttEstimator
from edge_runtime.estimators.transfer import INITIAL_WINDOW_BYTES, required_rate, wire_bytes
from edge_runtime.offload.transport import HttpResponse
from edge_runtime.policies.base import LinkOutlook

__all__ = ["Measurements"]

_MAX_WINDOW_BYTES = 1 << 20
_KNOWN_RTTS = 4


class Measurements:
    """The estimators, fed. Each is replaced whole, so that other threads may read it.

    Times are seconds of one monotonic clock.
    """

    def __init__(self, link_type: str) -> None:
        self.link_type = link_type
        self.link = LinkEstimator.prior(link_type)
        self.rtt = RttEstimator.prior(link_type)
        self.cloud = CloudEstimator()
        self._last_used_s: float | None = None
        self._window_bytes = float(INITIAL_WINDOW_BYTES)

    def on_link(self, link_type: str) -> None:
        """Another link type forgets the old link's samples; ``unknown`` changes nothing."""
        if link_type not in ("unknown", "none", self.link_type):
            self.link_type = link_type
            self.link = LinkEstimator.prior(link_type)
            self.rtt = RttEstimator.prior(link_type)

    def outlook(
        self, now_s: float, *, warm: bool, setup_round_trips: int, in_flight_bytes: int
    ) -> LinkOutlook:
        """The way to the broker as a policy sees it."""
        estimate = self.link.at(now_s)
        last = self._last_used_s
        return LinkOutlook(
            log_rate_mean=estimate.log_rate_mean,
            log_rate_deviation=estimate.log_rate_deviation,
            rtt_ms=self.rtt.srtt_ms,
            rtt_deviation_ms=self.rtt.deviation_ms,
            connection_open=warm,
            idle_ms=None if last is None else max(0.0, now_s - last) * 1e3,
            setup_round_trips=setup_round_trips,
            window_bytes=self.window_bytes(now_s) if warm else INITIAL_WINDOW_BYTES,
            in_flight_bytes=in_flight_bytes,
            samples=self.link.samples,
            rtt_nodes_ms=self.rtt.nodes_ms if self.rtt.samples >= _KNOWN_RTTS else (),
            outage=estimate.outage,
            fresh_share=estimate.fresh_share,
            long_run_mean=estimate.long_run_mean,
            long_run_deviation=estimate.long_run_deviation,
        )

    def window_bytes(self, now_s: float) -> float:
        """TCP's window on the warm connection.

        It grows by what was acknowledged, and is forgotten after an idle retransmission
        timeout (RFC 5681 sections 3.1 and 4.1).
        """
        last = self._last_used_s
        if last is None or (now_s - last) * 1e3 > self.rtt.rto_ms:
            return INITIAL_WINDOW_BYTES
        return self._window_bytes

    def used(self, now_s: float) -> None:
        """A byte went to or came from the broker."""
        self._last_used_s = now_s

    def learn(
        self, response: HttpResponse, body_bytes: int, window_bytes: float, now_s: float
    ) -> ServerTiming:
        """One answer to a request whose upload began with a window of ``window_bytes``."""
        timing = parse_server_timing(response.headers.get(SERVER_TIMING_HEADER.lower()))
        queue_delay_ms = parse_queue_delay_ms(response.headers.get(QUEUE_DELAY_HEADER.lower()))
        self.cloud = self.cloud.observe(
            timing, queue_delay_ms, now_s, answer_ms=response.body_ms if response.body else None
        )
        if response.connect_ms > 0:
            window_bytes = INITIAL_WINDOW_BYTES
        if timing.recv_ms is not None:
            self.link = self.link.observe_upload(
                body_bytes, timing.recv_ms, self.rtt.srtt_ms, now_s, window_bytes=window_bytes
            )
        known = (timing.recv_ms, timing.queue_ms, timing.inference_ms)
        if body_bytes == 0 or None not in known:
            server_ms = sum(part for part in known if part is not None)
            rtt_ms = response.first_byte_ms - response.connect_ms - server_ms
            if rtt_ms > 0:
                self.rtt = self.rtt.observe(rtt_ms)
        self._window_bytes = min(window_bytes + body_bytes, _MAX_WINDOW_BYTES)
        return timing

    def cut_off(
        self,
        body_bytes: int,
        elapsed_ms: float,
        *,
        round_trips: int,
        window_bytes: float,
        now_s: float,
    ) -> None:
        """An upload without an answer after ``elapsed_ms``: a bound on the rate, no sample.

        ``round_trips``: of the connection's set-up, if it had to be opened, and one for the
        answer.
        """
        cloud = self.cloud
        server_ms = cloud.queue_ms(now_s) + cloud.inference_mean_ms + cloud.answer_mean_ms
        budget_ms = elapsed_ms - server_ms - round_trips * self.rtt.srtt_ms
        bound = required_rate(wire_bytes(body_bytes), budget_ms, self.rtt.srtt_ms, window_bytes)
        self.link = self.link.observe_at_most(bound, now_s)
