"""What the exchanges with one broker have taught about link, round trip and broker."""

from __future__ import annotations

import math
import time

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.wire import (
    QUEUE_DELAY_HEADER,
    SERVER_TIMING_HEADER,
    ServerTiming,
    parse_queue_delay_ms,
    parse_server_timing,
)
from edge_runtime.estimators import LinkEstimator
from edge_runtime.estimators.energy import RADIO_POWER
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.transfer import (
    INITIAL_WINDOW_BYTES,
    required_rate,
    upload_ms,
    wire_bytes,
)
from edge_runtime.memory import Memory
from edge_runtime.offload.transport import HttpResponse, UploadReceipt
from edge_runtime.policies.base import CloudOutlook, LinkOutlook

__all__ = ["Measurements", "PathReports"]

_MIN_MEASURED_BYTES = limits.PROGRESS_EVERY_BYTES
"""Of a cancelled upload: less than one acknowledgement says nothing but "slow"."""
_HINT_TAU_S = 5.0
_STALL_MS = 50.0
_KNOWN_RTTS = 4
"""From so many samples on, they say more than a normal distribution around the mean."""


class Measurements:
    """The path's estimators, fed. The state is replaced whole: other threads may read it.

    Times are seconds of one monotonic clock.
    """

    def __init__(
        self,
        link_type: str,
        network_id: str | None = None,
        *,
        memory: Memory | None = None,
        broker: str = "",
    ) -> None:
        self._memory = memory
        self._broker = broker
        self._network_id = network_id
        self.recalled = False
        """The belief began with what the network taught earlier."""
        self.path = self._begin(link_type)

    def on_link(self, link_type: str, network_id: str | None = None) -> bool:
        """Another link type, or network, has its own samples; ``unknown`` changes nothing.

        Returns whether it is another one.
        """
        if link_type in ("unknown", "none"):
            return False
        known = network_id is not None and self._network_id is not None
        if link_type == self.path.link_type and (not known or network_id == self._network_id):
            self._network_id = network_id or self._network_id
            return False
        self.keep()
        self._network_id = network_id
        self.path = msgspec.structs.replace(self._begin(link_type), cloud=self.path.cloud)
        return True

    def keep(self) -> None:
        """Put what this network taught into the memory."""
        if self._memory is not None:
            self._memory.learned(self.path, time.monotonic(), self._network_id, self._broker)

    def _begin(self, link_type: str) -> PathEstimator:
        memory = self._memory
        known = memory and memory.recall(link_type, self._network_id, self._broker)
        self.recalled = known is not None
        return known or PathEstimator.prior(link_type)

    @property
    def origin(self) -> str | None:
        """A reason code: what the belief began with; None: no memory is kept."""
        if self._memory is None:
            return None
        return "network_remembered" if self.recalled else self._memory.fault or "network_new"

    def outlook(
        self, now_s: float, *, warm: bool, setup_round_trips: int, in_flight_bytes: int
    ) -> LinkOutlook:
        """The way to the broker as a policy sees it."""
        path = self.path
        belief, round_trip = path.link.at(now_s), path.round_trip(now_s)
        idle_s = math.inf if path.used_s is None else max(0.0, now_s - path.used_s)
        radio = RADIO_POWER.get(path.link_type)
        asleep = radio is not None and idle_s > radio.tail_s and not in_flight_bytes
        return LinkOutlook(
            log_rate_mean=belief.log_rate_mean,
            log_rate_deviation=belief.log_rate_deviation,
            rtt_ms=round_trip.srtt_ms,
            rtt_deviation_ms=round_trip.deviation_ms,
            rtt_nodes_ms=round_trip.nodes_ms if round_trip.samples >= _KNOWN_RTTS else (),
            connection_open=warm,
            idle_ms=None if path.used_s is None else idle_s * 1e3,
            setup_round_trips=setup_round_trips,
            window_bytes=path.window(now_s) if warm else INITIAL_WINDOW_BYTES,
            in_flight_bytes=in_flight_bytes,
            samples=path.link.samples,
            promotion_ms=radio.promotion_s * 1e3 if radio is not None and asleep else 0.0,
            outage=belief.outage,
            fresh_share=belief.fresh_share,
            long_run_mean=belief.long_run_mean,
            long_run_deviation=belief.long_run_deviation,
            origin=self.origin,
        )

    def cloud_outlook(self, now_s: float) -> CloudOutlook:
        """The broker as a policy sees it; breaker and obstacle are not known here.

        What the broker announced holds for seconds; then its queue is a matter of chance.
        """
        cloud = self.path.cloud
        trust = 0.0
        if cloud.hint_ms is not None:
            trust = math.exp(-max(0.0, now_s - cloud.hint_at_s) / _HINT_TAU_S)
        return CloudOutlook(
            queue_ms=trust * (cloud.hint_ms or 0.0),
            tail_ms=(1.0 - trust) * cloud.recent_at(now_s),
            inference_ms=cloud.inference_mean_ms,
            answer_ms=cloud.answer_mean_ms,
        )

    def window_bytes(self, now_s: float) -> float:
        """TCP's window on the warm connection."""
        return self.path.window(now_s)

    def used(self, now_s: float) -> None:
        """A byte went to or came from the broker."""
        self.path = self.path.used(now_s)

    def learn(
        self,
        response: HttpResponse,
        body_bytes: int,
        window_bytes: float,
        now_s: float,
        *,
        receipt: UploadReceipt | None = None,
    ) -> ServerTiming:
        """One answer to a request whose upload began with a window of ``window_bytes``."""
        timing = parse_server_timing(response.headers.get(SERVER_TIMING_HEADER.lower()))
        queue_delay_ms = parse_queue_delay_ms(response.headers.get(QUEUE_DELAY_HEADER.lower()))
        total_ms = response.first_byte_ms - response.connect_ms
        if response.connect_ms > 0:
            window_bytes = INITIAL_WINDOW_BYTES
        if body_bytes == 0:
            known = (timing.recv_ms, timing.queue_ms, timing.inference_ms)
            server_ms = sum(part for part in known if part is not None)
            path = self.path.pinged(total_ms - server_ms, now_s)
            cloud = path.cloud.observe(timing, queue_delay_ms, now_s)
            self.path = msgspec.structs.replace(path, cloud=cloud)
            return timing
        self.path = self.path.answered(
            body_bytes,
            timing,
            total_ms,
            window_bytes=window_bytes,
            queue_delay_ms=queue_delay_ms,
            answer_ms=response.body_ms if response.body else None,
            rated=receipt is not None and receipt.rate_reported,
            now_s=now_s,
        )
        return timing

    def cut_off(
        self,
        body_bytes: int,
        elapsed_ms: float,
        *,
        round_trips: int,
        window_bytes: float,
        now_s: float,
        receipt: UploadReceipt | None = None,
    ) -> None:
        """An upload without an answer after ``elapsed_ms``: somebody is slow.

        The broker, for the time since it had the whole body, or the link, if it did not have
        it (``_cut_short``); over plain HTTP the link's usual rate tells which. ``round_trips``:
        of the connection's set-up, if it had to be opened, and one for the answer.
        """
        if receipt is not None and receipt.multiplexed:
            self._cut_short(receipt, body_bytes, elapsed_ms, window_bytes, now_s)
            return
        path = self.path
        waited_ms = self._broker_waited_ms(body_bytes, elapsed_ms, round_trips, window_bytes, now_s)
        if waited_ms > 0.0:
            cloud = path.cloud.unanswered(waited_ms, now_s)
            path = self.path = msgspec.structs.replace(path, cloud=cloud)
        cloud = path.cloud
        server_ms = cloud.queue_ms(now_s) + cloud.inference_mean_ms + cloud.answer_mean_ms
        budget_ms = elapsed_ms - server_ms - round_trips * path.rtt.srtt_ms
        bound = required_rate(wire_bytes(body_bytes), budget_ms, path.rtt.srtt_ms, window_bytes)
        self._learned(path.link.observe_at_most(bound, now_s))

    def _broker_waited_ms(
        self,
        body_bytes: int,
        elapsed_ms: float,
        round_trips: int,
        window_bytes: float,
        now_s: float,
    ) -> float:
        path = self.path
        rate, rtt_ms = path.link.at(now_s).median_rate, path.rtt.srtt_ms
        sent_ms = upload_ms(wire_bytes(body_bytes), rate, rtt_ms, window_bytes)
        return elapsed_ms - round_trips * rtt_ms - sent_ms

    def _learned(self, link: LinkEstimator) -> None:
        self.path = msgspec.structs.replace(self.path, link=link)

    def _cut_short(
        self,
        receipt: UploadReceipt,
        body_bytes: int,
        elapsed_ms: float,
        window_bytes: float,
        now_s: float,
    ) -> None:
        """A request of a session without an answer: whose fault was it?

        What arrived is a sample of the rate. If all of it did, the broker has been at it
        since. If a part did and then nothing, the link has stalled: its rate is at most what
        arrived over all the time.
        """
        if not receipt.sent_bytes:
            return  # it waited its turn on this device
        link, rtt_ms, received = self.path.link, self.path.rtt.srtt_ms, receipt.received_bytes
        silent_ms = elapsed_ms - rtt_ms - receipt.elapsed_ms
        if received >= _MIN_MEASURED_BYTES and not receipt.rate_reported:
            link = link.observe_upload(
                received, receipt.elapsed_ms, rtt_ms, now_s, window_bytes=window_bytes
            )
        if received == body_bytes:
            cloud = self.path.cloud.unanswered(silent_ms, now_s)
            self.path = msgspec.structs.replace(self.path, cloud=cloud)
        elif silent_ms > _STALL_MS + receipt.elapsed_ms / 2:
            most_bytes = wire_bytes(min(received + _MIN_MEASURED_BYTES, body_bytes))
            bound = required_rate(most_bytes, elapsed_ms - rtt_ms, rtt_ms, window_bytes)
            link = link.observe_at_most(bound, now_s)
        self._learned(link)


class PathReports:
    """Feeds what a session measures between its answers."""

    def __init__(self, measured: Measurements) -> None:
        self._measured = measured

    def round_trip(self, rtt_ms: float) -> None:
        """A ping came back."""
        self._measured.path = self._measured.path.pinged(rtt_ms, time.monotonic())

    def rate(self, bytes_per_s: float) -> None:
        """The broker received so fast."""
        path, now_s = self._measured.path, time.monotonic()
        self._measured.path = msgspec.structs.replace(
            path, link=path.link.observe(bytes_per_s, now_s), used_s=now_s
        )

    def queue_delay(self, delay_ms: float) -> None:
        """The broker announced the wait of a new request."""
        path = self._measured.path
        cloud = path.cloud.observe(ServerTiming(), delay_ms, time.monotonic())
        self._measured.path = msgspec.structs.replace(path, cloud=cloud)
