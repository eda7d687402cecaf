"""One device under one policy in one world, event by event.

It does what ``EdgeRuntime`` does: builds a ``Situation`` from what it has observed, asks the
policy, runs the local model, uploads, holds answers, cancels. It never looks at the world's
future; only ``cloud_in_time``, which is scored and not shown to the policy, does.
"""

from __future__ import annotations

import heapq
import math
import time

from edge_runtime.contract.wire import ServerTiming
from edge_runtime.policies.base import (
    Action,
    Decision,
    Policy,
)
from edge_runtime.policies.learned import features
from edge_runtime.simulation.records import ACTION_CODES
from edge_runtime.simulation.requests import Outcome, Request
from edge_runtime.simulation.transport import (
    Path,
    Upload,
    cancel,
    crossed_bytes,
    plan_upload,
)
from edge_runtime.simulation.watch import BrokerWatch
from edge_runtime.simulation.world import World

__all__ = ["DeviceRun"]

_MIN_WAIT_MS = 5.0
_START_RATIO = 0.25  # quantile of the local latency that must fit for a run to start


class DeviceRun(BrokerWatch):
    """Runs ``policy`` through ``world``.

    ``timeline``: also keep a list of events. ``path``: radio and connection at the start; None:
    asleep and closed.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        *,
        timeline: bool = False,
        path: Path | None = None,
    ) -> None:
        super().__init__(world, path, timeline=timeline)
        self._policy = policy
        self._learns = bool(getattr(policy, "learns", False))

    # The clock ----------------------------------------------------------------------

    def run(self) -> list[Outcome]:
        """Every request's outcome, in order of arrival."""
        for index, arrived_s in enumerate(self._world.arrived_s):
            self._at(arrived_s, self._arrive, index)
        while self._heap:
            self._now, _, handle, arguments = heapq.heappop(self._heap)
            handle(*arguments)
        return [request.outcome for request in self._requests]

    @property
    def joules(self) -> float:
        """Of local model and radio."""
        return self._worker.joules + self.meter.joules()

    # Decisions ------------------------------------------------------------------------

    def _decide(self, request: Request, confidence: float | None) -> Decision:
        situation = self._situation(request, confidence)
        started = time.thread_time()
        decision = self._policy.decide(situation)
        outcome = request.outcome
        outcome.decision_s += time.thread_time() - started
        outcome.decisions += 1
        if self._learns and request.plan is None:
            request.features = features(situation)
            request.predicted_ms = decision.predicted_cloud_ms
            self._memory = self._memory.decided()
        uploads_now = decision.action in (Action.HEDGED, Action.CLOUD_FIRST)
        asked_after_local = confidence is not None
        if (
            request.plan is None
            and decision.predicted_upload_ms is not None
            and (decision.action is not Action.CASCADE or asked_after_local)
        ):
            outcome.p_cloud = decision.p_cloud_in_deadline
            plan = plan_upload(self._world, self._path, self._now, request.index)
            outcome.cloud_in_time = plan.answer_s <= request.answer_by_s
        if request.plan is None:
            if asked_after_local and decision.action is Action.LOCAL:
                outcome.action = ACTION_CODES["LOCAL"]
            elif uploads_now or not asked_after_local:
                outcome.action = ACTION_CODES[decision.action.value]
        if decision.warm_up:
            self._warm()
        if self._timeline:
            self._note("decision", request.index, f"{decision.action.value} {decision.reason}")
        request.decision = decision
        return decision

    def _arrive(self, index: int) -> None:
        request = Request(index, self._now, self._world.deadline_s - self._world.guard_s)
        self._requests.append(request)
        self._note("arrival", index)
        if self._policy.uses_cloud:
            self._probe()
        self._arrivals = self._arrivals.observe(self._now)
        decision = self._decide(request, None)
        action = decision.action
        if action is Action.CLOUD_ONLY:
            if self._breaker.state != "CLOSED":
                self._fall_back(request)
                return
            self._upload(request)
            self._at(self._now + self._world.constants.run.http_timeout_s, self._give_up, request)
            return
        if action in (Action.LOCAL, Action.CASCADE, Action.HEDGED):
            self._submit_local(request)
        else:
            self._hold_local(request, decision.local_start_ms)
        if action is Action.HEDGED and decision.cloud_start_ms > 0:
            self._at(self._now + decision.cloud_start_ms / 1e3, self._late_cloud, request)
        elif action in (Action.HEDGED, Action.CLOUD_FIRST):
            self._upload(request)
        self._at(request.answer_by_s, self._deadline, request)

    # The local side -------------------------------------------------------------------

    def _submit_local(self, request: Request) -> None:
        if request.local_submitted or request.done:
            return
        request.local_submitted = True
        self._worker.submit(request.index)
        self._next_local()

    def _hold_local(self, request: Request, wait_ms: float) -> None:
        """Start the local run only then."""
        start_s = self._now + wait_ms / 1e3
        self._worker.held[request.index] = start_s
        self._at(start_s, self._late_local, request)

    def _late_local(self, request: Request) -> None:
        """Time for the local run, unless the policy, asked again, sees no need."""
        if request.done or request.local_submitted:
            return
        asks = request.decision.ask_again and not request.cut and not request.cloud_over
        if not asks or request.plan is None:
            self._submit_local(request)
            return
        self._follow(request, self._decide(request, None))

    def _follow(self, request: Request, decision: Decision) -> None:
        """Do what was decided about an upload under way."""
        if decision.action is Action.LOCAL:
            self._cut(request)
            request.cloud_over = True
            if request.held:
                self._finish(request, self._now, from_cloud=False)
            else:
                self._submit_local(request)
        elif decision.action is Action.CLOUD_FIRST and not request.local_submitted:
            if decision.local_start_ms <= 0.0:
                self._submit_local(request)
            else:
                self._hold_local(request, max(decision.local_start_ms, _MIN_WAIT_MS))

    def _late_cloud(self, request: Request) -> None:
        if not request.done:
            self._upload(request)

    def _next_local(self) -> None:
        worker = self._worker
        long_s = self._latency_ms[1] / 1e3
        while worker.running is None and worker.line:
            index = worker.line[0]
            for other in worker.locked_out(index, self._now + long_s):
                self._requests[other].local_submitted = True
                worker.submit(other)
            index = worker.line.pop(0)
            request = self._requests[index]
            if request.done:
                continue
            if request.decision.local_expires:
                fastest_s = self._local.recent_quantile_ms(_START_RATIO) / 1e3
                if self._now + fastest_s > request.answer_by_s:
                    self._note("local_expired", index)
                    self._expire(request)
                    continue
            ends_s = worker.start(index, self._now)
            self._note("local_start", index)
            self._at(ends_s, self._local_ends, request, ends_s)

    def _expire(self, request: Request) -> None:
        """No local answer will come in time; without an upload under way, none at all."""
        if request.plan is None or request.cloud_over:
            self._finish(request, math.inf, from_cloud=False)

    def _local_ends(self, request: Request, ends_s: float) -> None:
        worker = self._worker
        if worker.running != request.index or worker.ends_s != ends_s:
            return
        run_ms = (self._now - worker.started_s) * 1e3
        worker.stop(self._now)
        self._local = self._local.observe(run_ms)
        self._latency_ms = (
            self._local.recent_quantile_ms(0.5),
            self._local.recent_quantile_ms(0.95),
        )
        self._note("local_end", request.index)
        self._next_local()
        if not request.done:
            self._local_came(request)

    def _local_came(self, request: Request) -> None:
        request.held = True
        late = self._now > request.answer_by_s
        decision = request.decision
        if late or decision.action is Action.LOCAL:
            self._finish(request, self._now, from_cloud=False)
            return
        confidence = self._world.confidence[request.index]
        if decision.action is Action.CASCADE and request.plan is None:
            if self._decide(request, confidence).action is Action.LOCAL:
                self._finish(request, self._now, from_cloud=False)
                return
            self._upload(request)
            return
        if request.cloud_over:
            self._finish(request, self._now, from_cloud=False)
            return
        if decision.ask_again or request.cloud_held:
            local = self._decide(request, confidence).action is Action.LOCAL
            if local or request.cloud_held:
                self._finish(request, self._now, from_cloud=not local)

    # The cloud side -------------------------------------------------------------------

    def _upload(self, request: Request) -> None:
        request.submitted_s = self._now
        request.outcome.offloaded = True
        self._note("upload_start", request.index)
        self._waits(request)
        self._active.append(request)
        self._plan(request)
        self._review_later(request)

    def _review_later(self, request: Request) -> None:
        review_ms = request.decision.review_ms
        if review_ms is not None:
            at_s = self._now + review_ms / 1e3
            if at_s < request.answer_by_s:
                self._at(at_s, self._review, request)

    def _plan(self, request: Request) -> None:
        before = self._path
        plan = plan_upload(self._world, before, max(self._now, request.submitted_s), request.index)
        request.plan = plan
        request.version += 1
        self._path = plan.after
        self._at(plan.answer_s, self._cloud_came, request, request.version)
        self._at(plan.failed_s, self._cloud_failed, request, request.version)

    def _bill(self, request: Request, used_bytes: float, until_s: float) -> None:
        plan = request.plan
        assert plan is not None  # noqa: S101
        if used_bytes > 0 or plan.begin_s < self._now:
            sent_s = min(plan.up_end_s, until_s)
            self.meter.used(plan.begin_s, sent_s, until_s, used_bytes, promoted=plan.promoted)
        request.outcome.uploaded_bytes += used_bytes

    def _cloud_came(self, request: Request, version: int) -> None:
        plan = request.plan
        if request.version != version or request.cut or plan is None:
            return
        self._active.remove(request)
        self._bill(request, plan.wire_bytes + plan.setup_bytes, self._now)
        self._learn(request, plan)
        self._breaker.succeed()
        self._heard()
        self._note("answer", request.index)
        if request.done:
            request.cut = True
            request.outcome.wasted_bytes += plan.wire_bytes + plan.setup_bytes
            return
        if not request.held and request.decision.await_local and request.local_submitted:
            request.cloud_held = True
            return
        self._finish(request, self._now, from_cloud=True)

    def _learn(self, request: Request, plan: Upload) -> None:
        timing = ServerTiming(
            recv_ms=(plan.up_end_s - plan.ready_s) * 1e3,
            queue_ms=plan.queue_s * 1e3,
            inference_ms=plan.service_s * 1e3,
        )
        self._estimates = self._estimates.answered(
            self._world.body_bytes[request.index],
            timing,
            (self._now - plan.ready_s) * 1e3,
            window_bytes=plan.window_bytes,
            now_s=self._now,
        )
        if self._learns:
            self._memory = self._memory.uploaded(
                plan.wire_bytes,
                (self._now - request.submitted_s) * 1e3,
                request.predicted_ms,
                request.features,
                in_time=self._now <= request.answer_by_s,
            )

    def _cloud_failed(self, request: Request, version: int) -> None:
        plan = request.plan
        if request.version != version or request.cut or plan is None:
            return
        self._active.remove(request)
        used = plan.setup_bytes + min(plan.most_bytes, crossed_bytes(self._world, plan, self._now))
        self._bill(request, used, self._now)
        request.outcome.wasted_bytes += used
        request.cut = True
        request.cloud_over = True
        self._breaker.fail(self._now)
        self._memory = self._memory.failed()
        self._note("upload_end", request.index, "refused")
        if request.done:
            return
        if request.decision.action is Action.CLOUD_ONLY:
            self._fall_back(request)
        elif request.held:
            self._finish(request, self._now, from_cloud=False)
        elif not request.local_submitted:
            self._submit_local(request)

    def _fall_back(self, request: Request) -> None:
        """A policy that held no local answer makes one now, late as it may be."""
        request.decision = Decision(action=Action.LOCAL, reason="local_fallback")
        if self._policy.uses_local:
            self._submit_local(request)
        else:
            self._finish(request, math.inf, from_cloud=False)

    def _give_up(self, request: Request) -> None:
        if request.done or request.cloud_over:
            return
        self._cut(request)
        request.cloud_over = True
        self._fall_back(request)

    def _review(self, request: Request) -> None:
        plan = request.plan
        if request.done or request.cut or request.cloud_over or plan is None:
            return
        if request.cloud_held:
            return
        confidence = self._world.confidence[request.index] if request.held else None
        self._follow(request, self._decide(request, confidence))
        if not request.done and not request.cut:
            self._review_later(request)

    def _cut(self, request: Request) -> None:
        """Cancel the upload; those behind it move up."""
        plan = request.plan
        if plan is None or request.cut or request not in self._active:
            return
        place = self._active.index(request)
        behind = self._active[place + 1 :]
        del self._active[place:]
        request.cut = True
        self._path, used = cancel(self._world, plan, self._now)
        self._note("abort", request.index)
        self._bill(request, used, max(self._path.radio_until_s, self._now) if used else self._now)
        request.outcome.wasted_bytes += used
        self._was_cut(request)
        if self._now > plan.ready_s:
            rtt_s = self._world.round_trips.at(self._now)
            acknowledged = crossed_bytes(self._world, plan, self._now - rtt_s)
            self._estimates = self._estimates.progressed(
                acknowledged,
                (self._now - rtt_s - plan.ready_s) * 1e3,
                body_bytes=self._world.body_bytes[request.index],
                window_bytes=plan.window_bytes,
                now_s=self._now,
            ).cut(acknowledged, window_bytes=plan.window_bytes, now_s=self._now)
            free_s = self._path.link_free_s
            rest = used - plan.setup_bytes - crossed_bytes(self._world, plan, self._now)
            if rest > 0 and self._path.connection_used_s > self._now:
                self._at(self._path.connection_used_s, self._drained, rest, self._now, free_s)
        if self._learns:
            self._memory = self._memory.uploaded(
                plan.wire_bytes,
                (self._now - request.submitted_s) * 1e3,
                request.predicted_ms,
                request.features,
                in_time=False,
            )
        for other in behind:
            self._active.append(other)
            self._plan(other)

    def _drained(self, size_bytes: float, cut_s: float, _free_s: float) -> None:
        self._estimates = self._estimates.drained(size_bytes, (self._now - cut_s) * 1e3, self._now)
        self._heard()

    # The end --------------------------------------------------------------------------

    def _deadline(self, request: Request) -> None:
        if request.done:
            return
        if request.cloud_held and not request.held:
            self._finish(request, self._now, from_cloud=True)
        elif request.held:
            self._finish(request, self._now, from_cloud=False)
        elif not request.local_submitted or (
            request.decision.local_expires and request.index in self._worker.line
        ):
            self._finish(request, math.inf, from_cloud=False)
        else:
            self._cut(request)
            request.cloud_over = True

    def _finish(self, request: Request, answer_s: float, *, from_cloud: bool) -> None:
        request.done = True
        outcome = request.outcome
        outcome.answer_s = answer_s
        outcome.from_cloud = from_cloud
        if not from_cloud and request.cloud_held and request.plan is not None:
            outcome.wasted_bytes += request.plan.wire_bytes
        if not from_cloud:
            self._cut(request)
        worker = self._worker
        if worker.running == request.index:
            worker.stop(self._now)
            self._next_local()
        else:
            worker.leave(request.index)
