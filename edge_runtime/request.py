"""One image or seed on its way to an answer: a small state machine.

Three kinds of events move it, each from a thread of its own: the local model is done (its
thread), the cloud is done (the network thread), an alarm is due (the caller, who waits).
So one piece of code serves ``run`` and ``arun``, and no answer waits for a busy network
thread. ``done`` ends exactly once; whatever is still under way then is cancelled.

The policy is asked at the start and, as its decision says, again: when the local answer is
there, and while an upload goes on.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from edge_runtime.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    ImageError,
    NearfarError,
    NetworkUnreachable,
)
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import ModelRef
from edge_runtime.engine import Engine
from edge_runtime.feasible import feasible
from edge_runtime.local import LocalAnswer
from edge_runtime.local_queue import Ticket
from edge_runtime.observation import Asked, OwnUpload, observe
from edge_runtime.offload.uplink import CloudAnswer
from edge_runtime.photo import Photo
from edge_runtime.policies.base import Action, Decision, Situation
from edge_runtime.policies.constraints import cloud_obstacle
from edge_runtime.policies.learned import features
from edge_runtime.results import InferenceSource, Result, Timings, make_result
from edge_runtime.seed import Seed

__all__ = ["Request"]

_MIN_REVIEW_MS = 10.0


class Request:
    """Answers one image or seed.

    Args:
        engine: shared parts.
        asked: the image or seed.
        started_s: when the caller asked, on ``time.monotonic``.
        deadline_ms: from ``started_s`` on.
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
        top_k: int | None,
        private: bool,
    ) -> None:
        self.done: Future[Result] = Future()
        self.done.set_running_or_notify_cancel()  # only this object ends it
        self._engine = engine = engine.for_request()
        guard_ms = engine.punctuality.guard_ms(deadline_ms)
        self._asked = Asked(
            image=asked,
            started_s=started_s,
            deadline_ms=deadline_ms,
            answer_by_s=started_s + (deadline_ms - guard_ms) / 1e3,
            private=private,
        )
        self._top_k = top_k
        uplink = engine.uplink
        self._policy, self._gain_reason = engine.policies.now(
            None if uplink is None else uplink.model_sha256
        )
        self._lock = threading.RLock()
        self._wake: Callable[[], None] = _nobody_waits
        self._situation: Situation
        self._decision: Decision
        # Alarms; None: not set.
        self._answer_by_s: float | None = self._asked.answer_by_s
        self._local_start_s: float | None = None
        self._cloud_start_s: float | None = None
        self._review_s: float | None = None
        # The local side.
        self._ticket: Ticket[LocalAnswer] | None = None
        self._local: LocalAnswer | None = None
        self._local_error: NearfarError | None = None
        # The cloud side.
        self._cloud_asked = False
        self._upload: OwnUpload | None = None
        self._cloud_future: Future[CloudAnswer] | None = None
        self._cloud: CloudAnswer | None = None
        """Held until the local answer is there as well."""
        self._withdrawn = False
        """The policy gave the upload up."""
        self._cloud_error: NearfarError | None = None
        self._trace = (
            None if engine.recorder is None else engine.recorder.trace(started_s, self._policy)
        )

    # Called by who waits ------------------------------------------------------------

    def start(self) -> None:
        """Decide and set off. Errors end ``done``."""
        try:
            self._engine.history.arrived(self._asked.started_s)
            decision = self._decide(None)
            self._engine.history.decided()
            action, now_s = decision.action, time.monotonic()
            late = action is Action.HEDGED and decision.cloud_start_ms > 0
            both = (Action.HEDGED, Action.CLOUD_FIRST, Action.CLOUD_ONLY)
            asks_cloud = action in both and not late
            with self._lock:
                self._cloud_asked = asks_cloud
                if action in (Action.LOCAL, Action.CASCADE, Action.HEDGED):
                    self._start_local()
                elif action is Action.CLOUD_FIRST:
                    self._hold_local(_after(now_s, decision.local_start_ms))
                else:
                    self._answer_by_s = self._asked.deadline_s
                if late:
                    self._cloud_start_s = _after(now_s, decision.cloud_start_ms)
            if asks_cloud:
                self._start_cloud()
        except Exception as error:
            self._fail(error)
        except BaseException:  # interrupted: nobody will wait
            self.abandon()
            raise

    def on_change(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when ``done`` ends, or ``next_alarm_s`` came nearer.

        It is called in any thread and must be quick. Look at both once more after this call.
        """
        self._wake = wake
        self.done.add_done_callback(lambda _: wake())

    def next_alarm_s(self) -> float | None:
        """When ``on_alarm`` wants to be called next; None: only an event can help."""
        with self._lock:
            alarms = (
                self._local_start_s, self._cloud_start_s, self._review_s, self._answer_by_s,
            )  # fmt: skip
            return min((at_s for at_s in alarms if at_s is not None), default=None)

    def on_alarm(self) -> None:
        """Do what is due: a late start, a review of the upload, or the held answer."""
        try:
            now_s, due_s = time.monotonic(), self.next_alarm_s()
            if due_s is not None and now_s >= due_s:
                self._engine.punctuality.rang((now_s - due_s) * 1e3)
            with self._lock:
                if _due(self._local_start_s, now_s):
                    self._local_start_s = None
                    self._start_local()
                late = _due(self._answer_by_s, now_s)
                starts = _due(self._cloud_start_s, now_s) and not late
                reviews = _due(self._review_s, now_s) and not late
                if starts:
                    self._cloud_start_s, self._cloud_asked = None, True
                if reviews:
                    self._review_s = None
            if starts:
                self._start_cloud()
            if reviews:
                self._review()
            self._give_in_time(now_s)
        except Exception as error:  # a policy's own
            self._fail(error)

    def _give_in_time(self, now_s: float) -> None:
        """Time is up: what is held is the answer."""
        with self._lock:
            if not _due(self._answer_by_s, now_s) or self.done.done():
                return
            self._answer_by_s = self._cloud_start_s = self._review_s = None
            if self._cloud is not None:  # waited for the local one in vain
                self._give_cloud(self._cloud)
                return
            late = DeadlineExceeded(
                f"no answer of the broker within {self._asked.deadline_ms:.0f} ms: allow more "
                "time, or use a policy that holds a local answer"
            )
            if self._cloud_asked and self._cloud_error is None and not self._withdrawn:
                self._cloud_error = late
            if self._local is not None:
                self._give_local()
            elif self._ticket is None or self._local_error is not None:
                self._fail(self._local_error or late)
            elif self._cloud_future is not None:
                self._cloud_future.cancel()  # too late as well; the local answer comes first

    def abandon(self) -> None:
        """The caller does not wait any longer."""
        self._fail(ConfigError("the request was abandoned"), abandoned=True)

    # Decisions ----------------------------------------------------------------------

    def _decide(self, confidence: float | None) -> Decision:
        """Ask the policy, and keep its answer within what can be done at all."""
        engine = self._engine
        with self._lock:
            upload = None if self._cloud_over else self._upload
            ticket, answered = self._ticket, self._cloud is not None
        situation, conditions = observe(
            engine,
            self._asked,
            confidence=confidence,
            ticket=ticket,
            upload=upload,
            answered=answered,
            gain_reason=self._gain_reason,
        )
        chosen = self._policy.decide(situation)
        decision = feasible(chosen, situation, engine)
        with self._lock:
            if self._trace is not None:
                self._trace.decided(situation, chosen, decision)
            if not self.done.done():
                self._situation, self._decision = situation, decision
        if engine.uplink is not None and not self._asked.private:
            cloud = situation.cloud
            wanted = decision.warm_up or (cloud is not None and cloud.breaker == "OPEN")
            if wanted and conditions.data_saver is not True:
                engine.uplink.prewarm()
        return decision

    @property
    def _cloud_over(self) -> bool:
        """Nothing more will come of the upload."""
        return self._withdrawn or self._cloud_error is not None

    def _review(self) -> None:
        """An upload is under way: is it still worth it?"""
        with self._lock:
            if self.done.done() or self._cloud is not None or self._cloud_over:
                return
            confidence = None if self._local is None else self._local.confidence
        decision = self._decide(confidence)
        with self._lock:
            if self.done.done() or self._cloud is not None or self._cloud_over:
                return
            if decision.action is not Action.LOCAL:
                self._plan_turns(decision)
                return
            self._withdraw()
            if self._local is not None:
                self._give_local()
            elif self._ticket is None:
                self._local_start_s = None
                self._start_local()

    def _plan_turns(self, decision: Decision) -> None:
        """When to look at the upload again, and when to start a late local run."""
        now_s, before_s = time.monotonic(), self.next_alarm_s()
        if decision.review_ms is not None:
            self._review_s = _after(now_s, max(decision.review_ms, _MIN_REVIEW_MS))
        if decision.action is Action.CLOUD_FIRST and self._ticket is None:
            self._hold_local(_after(now_s, decision.local_start_ms))
        next_s = self.next_alarm_s()
        if next_s is not None and (before_s is None or next_s < before_s):
            self._wake()  # the caller sleeps until ``before_s``

    def _withdraw(self) -> None:
        self._withdrawn, self._review_s = True, None
        if self._cloud_future is not None:
            self._cloud_future.cancel()

    # The local side -----------------------------------------------------------------

    def _hold_local(self, start_s: float | None) -> None:
        """The local run starts then, or when another would lock it out; None: not needed."""
        self._local_start_s = start_s
        local = self._engine.local
        assert local is not None  # noqa: S101  # feasible() made sure
        if start_s is None:
            local.release(id(self._asked))
        elif not self.done.done():
            local.hold(id(self._asked), start_s, self._asked.answer_by_s, self._start_held)

    def _start_held(self) -> None:
        """Called by the local model's thread: now, or too late."""
        try:
            with self._lock:
                if not self.done.done() and self._local_start_s is not None:
                    self._local_start_s = None
                    self._start_local()
        except Exception as error:  # closed meanwhile
            self._fail(error)

    def _start_local(self) -> None:
        local = self._engine.local
        assert local is not None  # noqa: S101  # feasible() made sure
        local.release(id(self._asked))
        ticket = local.submit(
            self._asked.image,
            self._top_k,
            self._asked.answer_by_s,
            expires=self._decision.local_expires,
        )
        self._ticket = ticket
        ticket.future.add_done_callback(self._on_local)

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
            decision = self._decision
            over = self._answer_by_s is None or decision.action is Action.LOCAL
            if over or self._cloud_over:
                self._give_local()
                return
            cascade = decision.action is Action.CASCADE and not self._cloud_asked
            if not cascade and not decision.ask_again and self._cloud is None:
                return  # the cloud's answer, or time, ends it
        decision = self._decide(answer.confidence)
        with self._lock:
            if self.done.done():
                return
            if decision.action is Action.LOCAL:
                self._withdraw()
                self._give_local()
                return
            if self._cloud is not None:
                self._give_cloud(self._cloud)
                return
            if not cascade:
                self._plan_turns(decision)
                return
            self._cloud_asked = True
        self._start_cloud()

    def _local_failed(self, error: NearfarError) -> None:
        """An unusable image is the caller's; a broken model lets the cloud step in."""
        with self._lock:
            self._local_error = error
            if self._cloud is not None:
                self._give_cloud(self._cloud)
                return
            too_late = self._answer_by_s is None
            if isinstance(error, ImageError) or self._cloud_over or too_late:
                self._fail(error)
                return
            if not self._cloud_asked and not self._may_upload():
                self._fail(error)
                return
            self._answer_by_s = self._asked.deadline_s  # nothing is held: wait to the end
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
        """Nobody forbade it: a budget that is spent binds a broken model too."""
        obstacle = cloud_obstacle(self._situation)
        return self._engine.policy.uses_cloud and obstacle in (None, "circuit_open")

    # The cloud side -----------------------------------------------------------------

    def _start_cloud(self) -> None:
        """Make the body (outside the lock: an array is encoded here) and hand it over."""
        uplink = self._engine.uplink
        assert uplink is not None  # noqa: S101  # feasible() made sure
        try:
            body, media_type = self._asked.image.upload()
        except ImageError as error:
            self._cloud_failed(error)
            return
        with self._lock:
            if self.done.done() or self._cloud_over:
                return
            upload = OwnUpload(len(body), time.monotonic(), self._situation.link)
            upload.features = features(self._situation)
            upload.predicted_ms = self._decision.predicted_cloud_ms
            future = uplink.submit(body, media_type, self._asked.deadline_s, upload.receipt)
            self._upload, self._cloud_future = upload, future
            self._engine.history.uploading(len(body), self._situation.conditions)
            self._plan_turns(self._decision)
            if self._trace is not None:
                self._trace.uploading(len(body))
        future.add_done_callback(self._on_cloud)

    def _on_cloud(self, future: Future[CloudAnswer]) -> None:
        try:
            self._remember(future)
            if future.cancelled():
                self._cloud_failed(NetworkUnreachable("the upload was cancelled"))
                return
            error = future.exception()
            if error is None:
                self._cloud_came(future.result())
            elif isinstance(error, NearfarError):
                self._cloud_failed(error)
            else:
                self._fail(error)
        except Exception as error:
            self._fail(error)

    def _remember(self, future: Future[CloudAnswer]) -> None:
        """What learning policies learn from an upload that ended."""
        upload, history = self._upload, self._engine.history
        assert upload is not None  # noqa: S101  # it was submitted
        cut = future.cancelled() or isinstance(future.exception(), DeadlineExceeded)
        if not cut and future.exception() is not None:
            history.failed()
            return
        now_s = time.monotonic()
        history.uploaded(
            upload.body_bytes,
            (now_s - upload.submitted_s) * 1e3,
            upload.predicted_ms,
            upload.features,
            in_time=not cut and now_s <= self._asked.deadline_s,
        )

    def _cloud_came(self, answer: CloudAnswer) -> None:
        with self._lock:
            self._review_s = None
            running = self._ticket is not None and self._local_error is None
            holds = self._decision.await_local and self._answer_by_s is not None
            if holds and running and self._local is None:
                self._cloud = answer
                return
        self._give_cloud(answer)

    def _cloud_failed(self, error: NearfarError) -> None:
        with self._lock:
            if self.done.done() or self._withdrawn:
                return
            self._cloud_error = self._cloud_error or error
            self._review_s = None
            if self._local is not None:
                self._give_local()
            elif self._ticket is None and self._engine.local is not None and self._holds_local:
                self._local_start_s = None
                self._start_local()
            elif self._ticket is None or self._local_error is not None:
                self._fail(self._local_error or self._cloud_error)

    @property
    def _holds_local(self) -> bool:
        """Whether the decision was to have a local answer as well."""
        return self._decision.action is not Action.CLOUD_ONLY

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
            result = make_result(
                self._engine.task,
                answer,
                source,
                model,
                top_k=self._top_k,
                deadline_ms=self._asked.deadline_ms,
                timings=_timings(time.monotonic() - self._asked.started_s, self._local, cloud),
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
            total_ms = (time.monotonic() - self._asked.started_s) * 1e3
            self._trace.failed(
                error, self._local, self._cloud_error, abandoned=abandoned, total_ms=total_ms
            )

    def _cancel_rest(self) -> None:
        if self._engine.local is not None:
            self._engine.local.release(id(self._asked))
        if self._ticket is not None:
            self._ticket.future.cancel()
        if self._cloud_future is not None:
            self._cloud_future.cancel()


def _timings(total_s: float, local: LocalAnswer | None, cloud: CloudAnswer | None) -> Timings:
    return Timings(
        total_ms=total_s * 1e3,
        local_wait_ms=None if local is None else local.wait_ms,
        local_ms=None if local is None else local.run_ms,
        cloud_ms=None if cloud is None else cloud.total_ms,
        upload_ms=None if cloud is None else cloud.timing.recv_ms,
        server_queue_ms=None if cloud is None else cloud.timing.queue_ms,
        server_inference_ms=None if cloud is None else cloud.timing.inference_ms,
    )


def _nobody_waits() -> None:
    """The caller has not begun to wait, and will look at the alarms when it does."""


def _after(now_s: float, wait_ms: float) -> float | None:
    """When an alarm is due; None: never."""
    return now_s + wait_ms / 1e3 if math.isfinite(wait_ms) else None


def _due(at_s: float | None, now_s: float) -> bool:
    return at_s is not None and now_s >= at_s
