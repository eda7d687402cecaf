"""What a policy sees and what it says: ``Situation`` in, ``Decision`` out.

A policy is a pure function of the situation: no clock, no randomness, no input or output.
The same situation gives the same decision, so every decision can be replayed
(``policy.decide(result.situation) == result.decision``).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

import msgspec

from edge_runtime.conditions import Conditions
from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.baselines import BaselineMemory
from edge_runtime.estimators.energy import RadioPower
from edge_runtime.estimators.transfer import INITIAL_WINDOW_BYTES

__all__ = [
    "Action",
    "BreakerState",
    "Budgets",
    "CloudOutlook",
    "Decision",
    "InferenceMode",
    "LinkOutlook",
    "LocalOutlook",
    "Policy",
    "Prices",
    "Situation",
    "UploadProgress",
]

BreakerState = Literal["CLOSED", "OPEN", "HALF_OPEN"]


class InferenceMode(StrEnum):
    """Names of the built-in policies: Firebase AI Logic's four, and ours."""

    ONLY_ON_DEVICE = "ONLY_ON_DEVICE"
    """Never the network."""
    PREFER_ON_DEVICE = "PREFER_ON_DEVICE"
    """The device; the cloud only when the device cannot run the model."""
    PREFER_IN_CLOUD = "PREFER_IN_CLOUD"
    """The cloud; the device in time when the cloud would be late or fails."""
    ONLY_IN_CLOUD = "ONLY_IN_CLOUD"
    """Never the device: an answer by the deadline or a typed error."""
    ADAPTIVE = "ADAPTIVE"
    """The device answers and holds; the cloud is asked when that is worth its price."""


class Action(StrEnum):
    """Where one request runs."""

    LOCAL = "LOCAL"
    """On the device; nothing is uploaded."""
    CASCADE = "CASCADE"
    """On the device first; the policy is asked again once the confidence is known. As the
    answer to that second question: upload now, hold the local answer meanwhile."""
    HEDGED = "HEDGED"
    """On both at once; the local answer is held until the cloud's comes or time is up."""
    CLOUD_FIRST = "CLOUD_FIRST"
    """In the cloud; the device starts late, just in time to hold an answer."""
    CLOUD_ONLY = "CLOUD_ONLY"
    """In the cloud; there is no local answer."""


class LocalOutlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The local model: measured quantiles of decode to answer, and the line before it."""

    p50_ms: float
    p95_ms: float
    queue_wait_ms: float = 0.0
    """Expected time until a run submitted now would start."""
    left_ms: float | None = None
    """Expected time until this request's own run ends; None: it was not submitted, or has
    ended."""
    watts: float = 2.0
    """Of the device while the local model runs."""
    reserved_ms: tuple[float, ...] = ()
    """When runs that other requests hold back will start, at the latest: from now, rising."""


class LinkOutlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The way to the broker."""

    log_rate_mean: float
    """Mean of the natural logarithm of the upload rate in bytes per second."""
    log_rate_deviation: float
    rtt_ms: float
    rtt_deviation_ms: float
    connection_open: bool
    idle_ms: float | None = None
    """Since the last byte to or from the broker; None: never yet."""
    setup_round_trips: int = 0
    """Before the upload can start: TCP, TLS, finding the model. 0 on a warm connection."""
    window_bytes: float = INITIAL_WINDOW_BYTES
    """What TCP sends before it waits for the first acknowledgement."""
    in_flight_bytes: int = 0
    """Other uploads of this runtime that share the link now."""
    samples: int = 0
    promotion_ms: float = 0.0
    """Until a sleeping radio carries data; 0: it is awake."""
    rtt_nodes_ms: tuple[float, ...] = ()
    """Equally likely round trips; empty: normal around ``rtt_ms``."""
    outage: float = 0.0
    """P(nothing passes just now)."""
    fresh_share: float = 0.0
    """P(the rate is a fresh draw of the long run), as after a hand-over or an outage."""
    long_run_mean: float = 0.0
    long_run_deviation: float = 1.0
    origin: str | None = None
    """What the belief began with: a code of ``reasons.py``; None: the link type's prior."""


class CloudOutlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The broker."""

    queue_ms: float
    inference_ms: float
    answer_ms: float = 0.0
    """Reading the answer's body: next to nothing for labels, not for an image."""
    breaker: BreakerState = "CLOSED"
    obstacle: str | None = None
    """Code of the error that stands in the way for now (``unauthorized``, ...)."""
    tail_ms: float = 0.0
    """Mean of an exponential part of queue and model on top of the two above."""


class UploadProgress(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """This request's own upload, under way or answered."""

    elapsed_ms: float
    """Since it was submitted."""
    wire_bytes: float
    acknowledged_bytes: float = 0.0
    """Of the body, as the receiver reported."""
    sending: bool = True
    """False: it still waits for the radio, the connection or an earlier upload."""
    answered: bool = False
    """The cloud's answer is there and held."""


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What an upload costs, in expected right answers (1.0: one answer that is right).

    The defaults: 20 MB must bring one more right answer, 2 MB when metered; so must 500 J,
    and 50 s of predicted waiting.
    """

    per_request: float = 0.0
    per_megabyte: float = 0.05
    per_metered_megabyte: float = 0.5
    per_joule: float = 0.002
    per_second: float = 0.02

    def upload(
        self, size_bytes: float, wait_ms: float, *, metered: bool, joules: float = 0.0
    ) -> float:
        """Price of uploading ``size_bytes`` and of the time until the cloud answers.

        A megabyte is 10^6 bytes; ``wait_ms`` is the prediction at the median rate, not cut
        at the deadline, so that more time never makes an upload dearer.
        """
        rate = self.per_metered_megabyte if metered else self.per_megabyte
        return (
            self.per_request
            + rate * size_bytes / 1e6
            + self.per_joule * joules
            + self.per_second * wait_ms / 1e3
        )


class Budgets(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that no gain outweighs; None: there is none."""

    metered_bytes_left: float | None = None
    """Of the user's allowance while ``Conditions.metered``."""
    saver_bytes_left: float | None = None
    """While ``Conditions.data_saver``."""
    min_battery_percent: float | None = None
    """Below it, and not charging, nothing is uploaded."""
    max_thermal: Literal["fair", "serious", "critical"] | None = None
    """Hotter than this, nothing is uploaded (the radio heats too)."""
    max_price_microusd: float | None = None
    """Per request."""
    min_confidence: float | None = None
    """A local answer below it is asked of the cloud whatever the price, budgets kept."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one decision is made from."""

    upload_bytes: int
    """Size of the body to upload; an estimate for pixels that are not yet encoded."""
    deadline_ms: float
    """As asked for by the caller."""
    time_left_ms: float
    """Until the answer must leave the runtime."""
    local: LocalOutlook | None
    """None: this runtime holds no local model."""
    link: LinkOutlook | None
    """None, as is ``cloud``: no broker is configured."""
    cloud: CloudOutlook | None
    confidence: float | None = None
    """Of the local answer in itself, in [0, 1] (``edge_runtime/confidence.py``); None: not
    yet known (the first question), or never."""
    scored: bool = True
    """False: answers of this task carry no score, so there is no confidence to wait for."""
    private: bool = False
    conditions: Conditions = Conditions()
    prices: Prices = Prices()
    budgets: Budgets = Budgets()
    gain_reason: str | None = None
    """Where the policy's gain comes from: a code of ``edge_runtime.gain``; None: from its
    caller, or it has none."""
    upload: UploadProgress | None = None
    """None: nothing of this request was submitted."""
    cloud_price_microusd: float | None = None
    """What the broker charges for one answer, if it says so."""
    radio: RadioPower | None = None
    """None: the table's entry for ``conditions.link_type``."""
    arrivals: ArrivalEstimator | None = None
    """The rhythm of this app's requests so far; None: not known."""
    memory: BaselineMemory | None = None
    """What the policies of the literature have learned."""


class Decision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where one request runs, why, and the numbers that led there."""

    action: Action
    reason: str
    """A stable code; ``policies/reasons.py`` lists those of the built-in policies."""
    p_cloud_in_deadline: float = 0.0
    """Probability that a cloud answer arrives in the time left."""
    predicted_local_ms: float | None = None
    """Queue and run, median."""
    predicted_cloud_ms: float | None = None
    """Set-up, upload, queue, model and way back, at the median rate."""
    predicted_upload_ms: float | None = None
    expected_gain: float = 0.0
    """Expected right answers won by asking the cloud, the price not yet taken off."""
    price: float = 0.0
    local_start_ms: float = 0.0
    """CLOUD_FIRST: when to start the local model, in milliseconds from now."""
    warm_up: bool = False
    """Open a connection now, so that later requests find it warm."""
    cloud_start_ms: float = 0.0
    """HEDGED: when to upload, in milliseconds from now (gRPC's ``hedging_delay``)."""
    ask_again: bool = False
    """HEDGED, CLOUD_FIRST: ask again, with ``confidence`` and ``upload``, when the local
    answer comes. LOCAL then cancels the upload and gives the local answer."""
    review_ms: float | None = None
    """Ask again after so long, should the upload still be under way. LOCAL then cancels it."""
    await_local: bool = False
    """A cloud answer that comes first is held until the local one is there, or time is up;
    the policy is asked again then. Only with ``ask_again``."""
    local_expires: bool = False
    """Do not start the local run once it can no longer end in time."""
    price_bytes: float = 0.0
    price_energy: float = 0.0
    price_time: float = 0.0
    """Parts of ``price``."""


@runtime_checkable
class Policy(Protocol):
    """Decides where requests run. Implementations must be pure and thread-safe."""

    @property
    def name(self) -> str:
        """What ``status()`` shows."""

    @property
    def uses_local(self) -> bool:
        """False: no local model is loaded."""

    @property
    def uses_cloud(self) -> bool:
        """False: no network thread is started and no socket is ever opened."""

    @property
    def prewarms(self) -> bool:
        """Whether to open a connection to the broker as soon as the runtime is made."""

    def decide(self, situation: Situation) -> Decision:
        """Where to run. Asked again with ``confidence`` set after ``Action.CASCADE``."""
