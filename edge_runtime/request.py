"""One image or seed on its way to an answer: a small state machine.

Three kinds of events move it, each from a thread of its own: the local model is done (its
thread), the cloud is done (the network thread), an alarm is due (the caller, who waits).
So one piece of code serves ``run`` and ``arun``, and no answer waits for a busy network
thread. ``done`` ends exactly once; whatever is still under way then is cancelled.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import msgspec

from edge_runtime.conditions import read_conditions
from edge_runtime.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    ImageError,
    NearfarError,
    NetworkUnreachable,
)
from edge_runtime.contract.tasks import Box, Prediction, task_name
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import ModelRef
from edge_runtime.engine import Engine
from edge_runtime.local import LocalAnswer
from edge_runtime.offload.uplink import CloudAnswer
from edge_runtime.photo import Photo
from edge_runtime.policies.base import Action, Decision, Situation
from edge_runtime.results import InferenceSource, Result, Timings
from edge_runtime.seed import Seed

__all__ = ["Request"]


class Request:
    """Answers one image or seed.

    Args:
        engine: shared parts.
        asked: the image or seed.
        started_s: when the caller asked, on ``time.monotonic``.
        deadline_ms: from ``started_s`` on.
        guard_ms: how long before the deadline a held answer leaves.
        top_k: at most so many predictions or boxes; None: all.
        private: nothing is uploaded.
    """

    def __init__(
        self,
        engine: Engine,
        asked: Photo | Seed,
        *,
        started_s: float,
        deadline_ms: float,
        guard_ms: float,
        top_k: int | None,
        private: bool,
    ) -> None:
        self.done: Future[Result] = Future()
        self.done.set_running_or_notify_cancel()  # only this object ends it
        self._engine = engine
        self._asked = asked
        self._started_s = started_s
        self._deadline_ms = deadline_ms
        self._deadline_s = started_s + deadline_ms / 1e3
        self._answer_by_s: float | None = self._deadline_s - guard_ms / 1e3
        self._top_k = top_k
        self._private = private
        self._lock = threading.RLock()
        self._situation: Situation
        self._decision: Decision
        self._local_start_s: float | None = None
        self._local_future: Future[LocalAnswer] | None = None
        self._local: LocalAnswer | None = None
        self._local_error: NearfarError | None = None
        self._cloud_asked = False
        self._cloud_future: Future[CloudAnswer] | None = None
        self._cloud_error: NearfarError | None = None
        self._trace = None if engine.recorder is None else engine.recorder.trace(started_s)

    # Called by who waits ------------------------------------------------------------

    def start(self) -> None:
        """Decide and set off. Errors end ``done``."""
        try:
            self._situation, self._decision = self._decide(None)
            action = self._decision.action
            asks_cloud = action in (Action.HEDGED, Action.CLOUD_FIRST, Action.CLOUD_ONLY)
            with self._lock:
                self._cloud_asked = asks_cloud
                if action in (Action.LOCAL, Action.CASCADE, Action.HEDGED):
                    self._start_local()
                elif action is Action.CLOUD_FIRST:
                    self._local_start_s = time.monotonic() + self._decision.local_start_ms / 1e3
                else:
                    self._answer_by_s = self._deadline_s
            if asks_cloud:
                self._start_cloud()
        except Exception as error:
            self._fail(error)

    def next_alarm_s(self) -> float | None:
        """When ``on_alarm`` wants to be called next; None: only an event can help."""
        with self._lock:
            alarms = [at for at in (self._local_start_s, self._answer_by_s) if at is not None]
            return min(alarms, default=None)

    def on_alarm(self) -> None:
        """Start a late local run, or give the held answer because time is up."""
        now = time.monotonic()
        with self._lock:
            if self._local_start_s is not None and now >= self._local_start_s:
                self._local_start_s = None
                self._start_local()
            if self._answer_by_s is None or now < self._answer_by_s or self.done.done():
                return
            self._answer_by_s = None
            late = DeadlineExceeded(
                f"no answer of the broker within {self._deadline_ms:.0f} ms: allow more time, "
                "or use a policy that holds a local answer"
            )
            if self._cloud_asked and self._cloud_error is None:
                self._cloud_error = late
            if self._local is not None:
                self._give_local()
            elif self._local_future is None or self._local_error is not None:
                self._fail(self._local_error or late)
            elif self._cloud_future is not None:
                self._cloud_future.cancel()  # too late as well; the local answer comes first

    def abandon(self) -> None:
        """The caller does not wait any longer."""
        self._fail(ConfigError("the request was abandoned"), abandoned=True)

    # Decisions ----------------------------------------------------------------------

    def _decide(self, confidence: float | None) -> tuple[Situation, Decision]:
        """Ask the policy, and keep its answer within what can be done at all."""
        engine = self._engine
        conditions = read_conditions(engine.conditions)
        link = cloud = None
        if engine.uplink is not None:
            link, cloud = engine.uplink.outlook(conditions.link_type)
        answer_by_s = self._answer_by_s or self._deadline_s
        situation = Situation(
            upload_bytes=self._asked.upload_bytes,
            deadline_ms=self._deadline_ms,
            time_left_ms=(answer_by_s - time.monotonic()) * 1e3,
            local=None if engine.local is None else engine.local.outlook(),
            link=link,
            cloud=cloud,
            confidence=confidence,
            scored=engine.local is None or engine.local.scored,
            private=self._private,
            conditions=conditions,
            prices=engine.prices,
        )
        chosen = engine.policy.decide(situation)
        decision = self._feasible(chosen, situation)
        if self._trace is not None:
            self._trace.decided(situation, chosen, decision)
        if engine.uplink is not None and not self._private:
            asked = decision.warm_up or (cloud is not None and cloud.breaker == "OPEN")
            if asked and conditions.data_saver is not True:
                engine.uplink.prewarm()
        return situation, decision

    def _feasible(self, decision: Decision, situation: Situation) -> Decision:
        """The decision itself, or the nearest one that this request allows."""
        if not isinstance(decision, Decision):
            raise ConfigError(f"the policy {self._engine.policy.name} gave no Decision")
        needs_cloud = decision.action is not Action.LOCAL
        if needs_cloud and (situation.cloud is None or situation.private):
            if situation.local is None:
                raise self._engine.local_error or ConfigError(
                    "there is neither a local model nor a broker: pass broker=, or use a "
                    "policy that runs on the device"
                )
            reason = "private" if situation.private else "no_broker"
            return Decision(
                action=Action.LOCAL, reason=reason, predicted_local_ms=decision.predicted_local_ms
            )
        if decision.action is not Action.CLOUD_ONLY and situation.local is None:
            if situation.cloud is None or situation.private:
                raise self._engine.local_error or ConfigError("there is no local model")
            return msgspec.structs.replace(
                decision, action=Action.CLOUD_ONLY, reason="no_local_model"
            )
        return decision

    # The local side -----------------------------------------------------------------

    def _start_local(self) -> None:
        local = self._engine.local
        assert local is not None  # noqa: S101  # _feasible made sure
        self._local_future = local.submit(self._asked, self._top_k)
        self._local_future.add_done_callback(self._on_local)

    def _on_local(self, future: Future[LocalAnswer]) -> None:
        try:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self._local_came(future.result())
            elif isinstance(error, NearfarError):
                self._local_failed(error)
            else:
                self._fail(error)
        except Exception as error:  # a policy's own
            self._fail(error)

    def _local_came(self, answer: LocalAnswer) -> None:
        with self._lock:
            self._local = answer
            if self.done.done():
                return
            if self._answer_by_s is None or self._decision.action is Action.LOCAL:
                self._give_local()
                return
            cascade = self._decision.action is Action.CASCADE
            if not cascade and self._cloud_error is not None:
                self._give_local()
        if cascade:
            situation, decision = self._decide(answer.confidence)
            with self._lock:
                if self.done.done():
                    return
                self._situation, self._decision = situation, decision
                self._cloud_asked = decision.action is not Action.LOCAL
                if decision.action is Action.LOCAL:
                    self._give_local()
                    return
            self._start_cloud()

    def _local_failed(self, error: NearfarError) -> None:
        """An unusable image is the caller's; a broken model lets the cloud step in."""
        with self._lock:
            self._local_error = error
            too_late = self._answer_by_s is None
            if isinstance(error, ImageError) or self._cloud_error is not None or too_late:
                self._fail(error)
                return
            if not self._cloud_asked and not self._may_upload():
                self._fail(error)
                return
            self._answer_by_s = self._deadline_s  # nothing is held: wait to the end
            if self._cloud_asked:
                return
            self._cloud_asked = True
            self._decision = msgspec.structs.replace(
                self._decision, action=Action.CLOUD_ONLY, reason="local_failed"
            )
            if self._trace is not None:
                self._trace.redirected(self._decision)
        self._start_cloud()

    def _may_upload(self) -> bool:
        engine = self._engine
        return engine.uplink is not None and engine.policy.uses_cloud and not self._private

    # The cloud side -----------------------------------------------------------------

    def _start_cloud(self) -> None:
        """Make the body (outside the lock: an array is encoded here) and hand it over."""
        uplink = self._engine.uplink
        assert uplink is not None  # noqa: S101  # _feasible made sure
        try:
            body, media_type = self._asked.upload()
        except ImageError as error:
            self._cloud_failed(error)
            return
        with self._lock:
            if self.done.done():
                return
            future = uplink.submit(body, media_type, self._deadline_s)
            self._cloud_future = future
            if self._trace is not None:
                self._trace.uploading(len(body))
        future.add_done_callback(self._on_cloud)

    def _on_cloud(self, future: Future[CloudAnswer]) -> None:
        try:
            if future.cancelled():
                self._cloud_failed(NetworkUnreachable("the upload was cancelled"))
                return
            error = future.exception()
            if error is None:
                self._give_cloud(future.result())
            elif isinstance(error, NearfarError):
                self._cloud_failed(error)
            else:
                self._fail(error)
        except Exception as error:
            self._fail(error)

    def _cloud_failed(self, error: NearfarError) -> None:
        with self._lock:
            if self.done.done():
                return
            self._cloud_error = self._cloud_error or error
            if self._local is not None:
                self._give_local()
            elif self._local_start_s is not None:
                self._local_start_s = None
                self._start_local()
            elif self._local_future is None or self._local_error is not None:
                self._fail(self._local_error or self._cloud_error)

    # The end ------------------------------------------------------------------------

    def _give_local(self) -> None:
        answer = self._local
        assert answer is not None  # noqa: S101  # callers hold it
        local = self._engine.local
        assert local is not None  # noqa: S101  # it answered
        self._give(
            answer.answer,
            InferenceSource.ON_DEVICE,
            local.variant.id,
            None,
            None if self._cloud_error is None else self._cloud_error.code,
        )

    def _give_cloud(self, answer: CloudAnswer) -> None:
        with self._lock:
            error = self._local_error
        self._give(
            answer.answer,
            InferenceSource.IN_CLOUD,
            answer.model,
            answer,
            None if error is None else error.code,
        )

    def _give(
        self,
        answer: Answer,
        source: InferenceSource,
        model: str | ModelRef,
        cloud: CloudAnswer | None,
        error: str | None,
    ) -> None:
        with self._lock:
            if self.done.done():
                return
            local = self._local
            predictions = (answer.predictions or ())[: self._top_k]
            boxes = (answer.boxes or ())[: self._top_k]
            first: Prediction | Box | None = None
            if predictions or boxes:
                first = predictions[0] if predictions else boxes[0]
            total_ms = (time.monotonic() - self._started_s) * 1e3
            result = Result(
                task=task_name(self._engine.task),
                label=None if first is None else first.label,
                score=None if first is None else first.score,
                predictions=predictions,
                boxes=boxes,
                class_map=answer.class_map,
                image=answer.image,
                region=answer.region,
                inference_source=source,
                model=model,
                deadline_met=total_ms <= self._deadline_ms,
                timings=Timings(
                    total_ms=total_ms,
                    local_wait_ms=None if local is None else local.wait_ms,
                    local_ms=None if local is None else local.run_ms,
                    cloud_ms=None if cloud is None else cloud.total_ms,
                    upload_ms=None if cloud is None else cloud.timing.recv_ms,
                    server_queue_ms=None if cloud is None else cloud.timing.queue_ms,
                    server_inference_ms=None if cloud is None else cloud.timing.inference_ms,
                ),
                decision=self._decision,
                situation=self._situation,
                error=error,
            )
            self.done.set_result(result)
        self._cancel_rest()
        if self._trace is not None:
            self._trace.answered(result, self._local, self._cloud_error)

    def _fail(self, error: BaseException, *, abandoned: bool = False) -> None:
        with self._lock:
            if self.done.done():
                return
            self.done.set_exception(error)
        self._cancel_rest()
        if self._trace is not None:
            total_ms = (time.monotonic() - self._started_s) * 1e3
            self._trace.failed(
                error, self._local, self._cloud_error, abandoned=abandoned, total_ms=total_ms
            )

    def _cancel_rest(self) -> None:
        for future in (self._local_future, self._cloud_future):
            if future is not None:
                future.cancel()
