"""Rules of the literature that pick one side and wait for it.

Each learns from its own uploads only (``BaselineMemory``), as published: none holds a local
answer, models the cold path, or knows the confidence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from edge_runtime.policies.base import Action, Decision, Situation
from edge_runtime.policies.constraints import cloud_obstacle
from edge_runtime.policies.statics import local_ms, stay_local

__all__ = ["HarmonicMean", "LinUCB", "MinLatency", "Quantile", "features"]

_START_RATE = 1.25e6
"""Bytes per second before the first sample: 10 Mbit/s."""


def features(situation: Situation) -> tuple[float, ...]:
    """LinUCB's view of one upload: 1, size, log rate, idle time, round trip; all about 1."""
    memory, link = situation.memory, situation.link
    rate = (memory.ewma_rate if memory is not None else None) or _START_RATE
    idle_ms = 10_000.0 if link is None or link.idle_ms is None else link.idle_ms
    rtt_ms = 100.0 if link is None else link.rtt_ms
    return (
        1.0,
        situation.upload_bytes / 1e5,
        math.log(rate / _START_RATE),
        min(idle_ms, 10_000.0) / 1e4,
        min(rtt_ms, 1000.0) / 100.0,
    )


def _transfer_ms(situation: Situation, rate: float | None) -> float:
    """Size over rate, one round trip, and the broker's own time."""
    cloud, link = situation.cloud, situation.link
    server_ms = 0.0 if cloud is None else cloud.queue_ms + cloud.inference_ms
    rtt_ms = 0.0 if link is None else link.rtt_ms
    return 1e3 * situation.upload_bytes / (rate or _START_RATE) + rtt_ms + server_ms


class _Picks(ABC):
    """Local or cloud, whichever ``_prefers_cloud`` says; then waits for it."""

    uses_local = True
    uses_cloud = True
    prewarms = True
    learns = True
    """Feeds on ``Situation.memory``."""
    name = ""

    def decide(self, situation: Situation) -> Decision:
        """CLOUD_ONLY or LOCAL."""
        obstacle = cloud_obstacle(situation)
        if obstacle is not None or situation.local is None:
            return stay_local(situation, obstacle or "no_local_model")
        predicted_ms = self._predict_ms(situation)
        cloud = self._prefers_cloud(situation, predicted_ms)
        return Decision(
            action=Action.CLOUD_ONLY if cloud else Action.LOCAL,
            reason="predicted_better" if cloud else "predicted_worse",
            predicted_local_ms=local_ms(situation),
            predicted_cloud_ms=predicted_ms,
        )

    def _predict_ms(self, situation: Situation) -> float:
        memory = situation.memory
        return _transfer_ms(situation, None if memory is None else memory.ewma_rate)

    @abstractmethod
    def _prefers_cloud(self, situation: Situation, predicted_ms: float) -> bool:
        """Whether to ask the cloud, which is predicted to take ``predicted_ms``."""


class MinLatency(_Picks):
    """The faster side (Kang et al., Neurosurgeon, ASPLOS 2017), with an EWMA of the rate."""

    name = "MinLatency"

    def _prefers_cloud(self, situation: Situation, predicted_ms: float) -> bool:
        return predicted_ms < (local_ms(situation) or 0.0)


class HarmonicMean(_Picks):
    """The cloud if RobustMPC's rate (Yin et al., SIGCOMM 2015) says it makes the deadline."""

    name = "HarmonicMean"

    def _predict_ms(self, situation: Situation) -> float:
        memory = situation.memory
        return _transfer_ms(situation, None if memory is None else memory.harmonic_rate())

    def _prefers_cloud(self, situation: Situation, predicted_ms: float) -> bool:
        return predicted_ms <= situation.time_left_ms


class Quantile(_Picks):
    """The cloud if the conformal upper bound of its time makes the deadline.

    The bound is the prediction times the ``q`` quantile of the last fifty ratios of observed
    to predicted time (Vovk et al., split conformal prediction).
    """

    name = "Quantile"

    def __init__(self, q: float = 0.9) -> None:
        self.q = q

    def _prefers_cloud(self, situation: Situation, predicted_ms: float) -> bool:
        ratios = () if situation.memory is None else situation.memory.ratios
        bound = 1.0
        if ratios:
            ordered = sorted(ratios)
            bound = ordered[min(len(ordered), math.ceil(self.q * (len(ordered) + 1))) - 1]
        return predicted_ms * bound <= situation.time_left_ms


class LinUCB(_Picks):
    """A linear bandit on "in time" with forced sampling (Zhang et al., ANS, WWW 2021).

    The cloud if the upper bound of its expected right answers beats the local model's. After
    each ``forced`` local answers one upload is made anyway: without, choosing the device ends
    all learning.
    """

    name = "LinUCB"

    def __init__(
        self,
        width: float = 0.5,
        forced: int = 20,
        cloud_right: float = 0.81,
        local_right: float = 0.70,
    ) -> None:
        self.width = width
        self.forced = forced
        self.cloud_right = cloud_right
        self.local_right = local_right

    def _prefers_cloud(self, situation: Situation, predicted_ms: float) -> bool:
        memory = situation.memory
        if memory is None:
            return False
        if memory.rounds >= self.forced:
            return True
        bound = memory.upper_bound(features(situation), self.width)
        return self.cloud_right * min(bound, 1.0) > self.local_right
