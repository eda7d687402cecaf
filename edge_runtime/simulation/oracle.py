"""The clairvoyant bound: a beam search that knows every future time.

Per request it chooses among

* drop: nothing (only where the local answer would be late anyway);
* local: the device alone;
* local and a keep-warm request;
* cloud: upload at arrival, no local run;
* both: upload at arrival with a local run, the better answer in time is delivered.

A beam of 24 states (radio, connection, window, link, local worker) is kept per request, so
the bound is what that search finds: a lower bound of the true optimum over these actions.
It opens no connection before the first request or between requests; where an app prewarms,
or where chance favors an upload that starts after the local answer, a policy may pass it.
``Oracle`` maximizes accuracy in deadline and breaks ties by net utility; ``Oracle:net`` and
``Oracle:saver`` maximize net utility at the balanced and at the saver's prices.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from edge_runtime.estimators.energy import RadioPower, radio_power
from edge_runtime.simulation.power import RadioMeter
from edge_runtime.simulation.records import ACTION_CODES
from edge_runtime.simulation.requests import Outcome
from edge_runtime.simulation.transport import (
    Path,
    Upload,
    fresh_path,
    plan_ping,
    plan_upload,
)
from edge_runtime.simulation.world import World

__all__ = ["BEAM", "run_oracle"]

BEAM: Final = 24

_WEIGHTS: Final[dict[str, tuple[float, float]]] = {
    # price of a megabyte and of a joule
    "Oracle": (1e-4, 1e-5),
    "Oracle:net": (0.05, 0.002),
    "Oracle:saver": (0.5, 0.01),
}


class _State(NamedTuple):
    score: float
    path: Path
    worker_free_s: float
    duty: float
    duty_s: float
    choice: _Choice | None


class _Choice(NamedTuple):
    """What was done with one request; linked to the one before."""

    before: _Choice | None
    action: str
    answer_s: float
    from_cloud: bool
    bytes_: float
    wasted: float
    local_s: float
    spans: tuple[tuple[float, float, float, float, bool], ...]


class _Search:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.per_byte = _WEIGHTS[name][0] / 1e6
        self.per_joule = _WEIGHTS[name][1]
        self.radio: RadioPower = radio_power(world.radio)

    def run(self) -> _Choice | None:
        """The choices of the best state after the last request."""
        arrived_s = [*self.world.arrived_s, math.inf]
        states = [_State(0.0, fresh_path(), 0.0, 0.0, 0.0, None)]
        for index in range(len(arrived_s) - 1):
            next_s = arrived_s[index + 1]
            grown: dict[tuple[object, ...], tuple[float, _State]] = {}
            for state in states:
                for child in self._children(state, index):
                    key, credit = self._look(child, next_s)
                    worth = child.score + credit
                    other = grown.get(key)
                    if other is None or worth > other[0]:
                        grown[key] = (worth, child)
            ranked = sorted(grown.items(), key=lambda item: -item[1][0])
            states = self._prune([(key[0] is True, found) for key, (_, found) in ranked])
        return states[0].choice

    def _look(self, state: _State, next_s: float) -> tuple[tuple[object, ...], float]:
        """What of a state still matters at the next arrival, and what it has paid ahead.

        States that look alike then are one. The tail is paid when an upload ends; the part
        that has not burned yet is credited, so that an awake radio is not ranked behind.
        """
        path, tcp = state.path, self.world.constants.tcp
        left_s = path.radio_until_s + self.radio.tail_s - next_s
        kept = next_s - path.window_s <= tcp.window_kept_s
        opened = next_s - path.connection_used_s <= tcp.connection_kept_s
        key = (
            left_s > 0 and opened,
            round(max(left_s, 0.0), 1),
            opened,
            round(path.window_bytes, -4) if kept else 0.0,
            round(max(path.link_free_s - next_s, 0.0), 2),
            round(max(state.worker_free_s - next_s, 0.0), 2),
            round(state.duty, 2),
        )
        tail = self.radio.tail
        burned_s = self.radio.tail_s - min(max(left_s, 0.0), self.radio.tail_s)
        unburned = self.radio.tail_joules(self.radio.tail_s) - self.radio.tail_joules(burned_s)
        return key, self.per_joule * unburned if tail else 0.0

    @staticmethod
    def _prune(ranked: list[tuple[bool, _State]]) -> list[_State]:
        """The best, half of the places kept for each of warm and cold paths."""
        half = BEAM // 2
        warm = [state for is_warm, state in ranked if is_warm]
        cold = [state for is_warm, state in ranked if not is_warm]
        room_warm = max(half, BEAM - len(cold))
        room_cold = max(half, BEAM - len(warm))
        taken = {id(state) for state in (*warm[:room_warm], *cold[:room_cold])}
        return [state for _, state in ranked if id(state) in taken]

    def _children(self, state: _State, index: int) -> list[_State]:
        world = self.world
        now = world.arrived_s[index]
        by = now + world.deadline_s
        confidence = world.confidence[index]
        cloud_right = world.cloud_correct(index)
        local = self._local(state, index, now)
        children = []
        local_in_time = local is not None and local[0] <= by
        if local is None or not local_in_time:
            children.append(self._child(state, index, now, None, "DROP", math.inf, False, 0.0))
        else:
            children.append(
                self._child(state, index, now, local, "LOCAL", local[0], False, confidence)
            )
        up = plan_upload(world, state.path, now, index)
        if up.answer_s <= by:
            children.append(
                self._child(
                    state, index, now, None, "CLOUD_FIRST", up.answer_s, True, cloud_right, up
                )
            )
        # an upload in time with the local answer delivered instead warms the path
        if up.answer_s < math.inf and local is not None and local_in_time:
            answer = local[0]
            children.append(
                self._child(state, index, now, local, "HEDGED", answer, False, confidence, up)
            )
        cold = now > state.path.radio_until_s + self.radio.tail_s or (
            now - state.path.connection_used_s > world.constants.tcp.connection_kept_s
        )
        if cold and local is not None and local_in_time:
            children.append(
                self._child(
                    state, index, now, local, "LOCAL", local[0], False, confidence, ping=True
                )
            )
        return children

    def _local(self, state: _State, index: int, now: float) -> tuple[float, float, float] | None:
        """``(end, start, duty at the end)`` of a local run; None: hopeless."""
        world = self.world
        thermal = world.constants.thermal
        start = max(now, state.worker_free_s)
        if start > now + world.deadline_s:
            return None
        duty = state.duty * math.exp(-(start - state.duty_s) / thermal.duty_tau_s)
        level = min(1.0, duty / thermal.full_duty)
        slow = 1.0 + (thermal.max_slowdown - 1.0) * level
        run_s = world.device.local_median_ms / 1e3 * world.local_factor[index] * slow
        keep = math.exp(-run_s / thermal.duty_tau_s)
        return start + run_s, start, duty * keep + 1.0 - keep

    def _child(
        self,
        state: _State,
        index: int,
        now: float,
        local: tuple[float, float, float] | None,
        action: str,
        answer_s: float,
        from_cloud: bool,
        right: float,
        upload: Upload | None = None,
        *,
        ping: bool = False,
    ) -> _State:
        path = state.path
        bytes_, joules, wasted, local_s = 0.0, 0.0, 0.0, 0.0
        spans: tuple[tuple[float, float, float, float, bool], ...] = ()
        if upload is not None:
            begin, sent, end = upload.begin_s, upload.up_end_s, upload.answer_s
            bytes_ = upload.wire_bytes + upload.setup_bytes
            promoted = upload.promoted
            spans = ((begin, sent, end, bytes_, promoted),)
            path = upload.after
            wasted = 0.0 if from_cloud else bytes_
        elif ping:
            sent_ping = plan_ping(self.world, path, now)
            bytes_, promoted = sent_ping.wire_bytes, sent_ping.promoted
            end = min(sent_ping.answer_s, sent_ping.sent_s + 3.0)
            spans = ((sent_ping.begin_s, sent_ping.sent_s, end, bytes_, promoted),)
            path = sent_ping.after
        for begin, sent, end, size, promoted in spans:
            silence = begin - state.path.radio_until_s
            joules += self.radio.transfer_joules(size, max(0.0, sent - begin))
            joules += self.radio.promotion_joules() if promoted else 0.0
            extension = min(max(silence, 0.0), self.radio.tail_s) + (end - begin)
            joules += self.radio.tail_joules(min(extension, self.radio.tail_s))
        worker_free_s, duty, duty_s = state.worker_free_s, state.duty, state.duty_s
        if local is not None:
            worker_free_s, start, duty = local
            duty_s = worker_free_s
            local_s = worker_free_s - start
            joules += local_s * self.world.device.local_watts
        score = state.score + right - self.per_byte * bytes_ - self.per_joule * joules
        choice = _Choice(state.choice, action, answer_s, from_cloud, bytes_, wasted, local_s, spans)
        return _State(score, path, worker_free_s, duty, duty_s, choice)


def run_oracle(world: World, name: str) -> tuple[list[Outcome], float]:
    """The best plan found: outcomes in order of arrival, and the joules of the run."""
    last = _Search(world, name).run()
    choices: list[_Choice] = []
    while last is not None:
        choices.append(last)
        last = last.before
    meter = RadioMeter(radio_power(world.radio))
    joules = 0.0
    outcomes = []
    for choice in reversed(choices):
        outcome = Outcome()
        outcome.answer_s = choice.answer_s
        outcome.from_cloud = choice.from_cloud
        outcome.offloaded = choice.action in ("CLOUD_FIRST", "HEDGED")
        outcome.uploaded_bytes = choice.bytes_
        outcome.wasted_bytes = choice.wasted
        outcome.action = ACTION_CODES[choice.action]
        joules += choice.local_s * world.device.local_watts
        for begin, sent, end, size, promoted in choice.spans:
            meter.used(begin, sent, end, size, promoted=promoted)
        outcomes.append(outcome)
    return outcomes, joules + meter.joules()
