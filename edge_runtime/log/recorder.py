"""From a request under way to its entry: notes on the way, one entry at the end.

Nothing here decides or waits. A sink that fails is logged once and costs no answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import msgspec

from edge_runtime.contract.errors import DeadlineExceeded, NearfarError
from edge_runtime.contract.tasks import Task, task_name
from edge_runtime.contract.wire import ModelRef
from edge_runtime.log.entries import (
    MAX_STEPS,
    CloudOutcome,
    LogEntry,
    Outcome,
    PolicyRecord,
    Step,
)
from edge_runtime.log.parameters import describe_policy
from edge_runtime.policies.base import Decision, Policy, Situation
from edge_runtime.results import Result, Timings
from edge_runtime.runtimes.base import installed_version

if TYPE_CHECKING:
    from edge_runtime.local import LocalAnswer

__all__ = ["LogSink", "Recorder", "Trace"]

_log = logging.getLogger(__name__)

LogSink = Callable[[LogEntry], None]
"""Takes each request's entry, in the thread that ended it: it must be quick. An attribute
``labels`` that is true asks for the label of each answer."""

_CALLER_LEFT: Final = "abandoned"
"""In place of an error's code: the caller did not wait for the end."""


class Recorder:
    """What all entries of one runtime share, and where they go."""

    def __init__(self, sink: LogSink, *, task: Task, bundle: str, variant: str | None) -> None:
        self._sink = sink
        self._labels = bool(getattr(sink, "labels", False))
        self._described: tuple[Policy | None, PolicyRecord] = (None, PolicyRecord(name=""))
        self._task, self._bundle, self._variant = task_name(task), bundle, variant
        self._nearfar = installed_version("nearfar")
        self._failed = False

    def trace(self, started_s: float, policy: Policy) -> Trace:
        """For one request that ``policy`` decides; ``started_s`` as in ``Request``."""
        known, record = self._described  # replaced whole: any thread may
        if known is not policy:
            record = describe_policy(policy)
            self._described = (policy, record)
        return Trace(self, time.time() - (time.monotonic() - started_s), record)

    def record(
        self,
        unix_s: float,
        request: str,
        policy: PolicyRecord,
        steps: list[Step],
        outcome: Outcome,
        label: str | None,
    ) -> None:
        """Make the entry and hand it over."""
        if self._labels and label is not None:
            outcome = msgspec.structs.replace(outcome, label=label)
        try:
            self._sink(
                LogEntry(
                    nearfar=self._nearfar,
                    request=request,
                    unix_s=unix_s,
                    task=self._task,
                    bundle=self._bundle,
                    variant=self._variant,
                    policy=policy,
                    steps=tuple(steps),
                    outcome=outcome,
                )
            )
        except Exception:  # the user's own
            if not self._failed:
                _log.exception("the log's sink failed; further failures are not reported")
            self._failed = True


class Trace:
    """Notes of one request. Calls come from several threads, under the request's lock."""

    def __init__(self, recorder: Recorder, unix_s: float, policy: PolicyRecord) -> None:
        self._recorder = recorder
        self._policy = policy
        self._unix_s = unix_s
        self._steps: list[Step] = []
        self._uploaded_bytes = 0
        self._asked = False

    def decided(self, situation: Situation, decision: Decision, done: Decision) -> None:
        """The policy was asked; ``done``: what the request allows of its answer."""
        if len(self._steps) < MAX_STEPS:
            changed = None if done is decision or done == decision else done
            self._steps.append(Step(situation=situation, decision=decision, done=changed))

    def redirected(self, done: Decision) -> None:
        """The last decision was overtaken by events."""
        if self._steps:
            self._steps[-1] = msgspec.structs.replace(self._steps[-1], done=done)

    def uploading(self, size_bytes: int) -> None:
        """A body was handed to the network."""
        self._asked = True
        self._uploaded_bytes += size_bytes

    def answered(
        self, result: Result, local: LocalAnswer | None, cloud_error: NearfarError | None
    ) -> None:
        """The request ended with an answer."""
        model = result.model if isinstance(result.model, ModelRef) else None
        outcome = Outcome(
            source=result.inference_source,
            other_error=result.error,
            deadline_met=result.deadline_met,
            timings=result.timings,
            confidence=None if local is None else local.confidence,
            cloud="answered" if model is not None else self._cloud(cloud_error),
            cloud_model=None if model is None else f"{model.name}@{model.version}",
            cloud_sha256=None if model is None else model.sha256,
            uploaded_bytes=self._uploaded_bytes,
        )
        self._end(outcome, result.label)

    def failed(
        self,
        error: BaseException,
        local: LocalAnswer | None,
        cloud_error: NearfarError | None,
        *,
        abandoned: bool,
        total_ms: float,
    ) -> None:
        """The request ended without one."""
        code = error.code if isinstance(error, NearfarError) else type(error).__name__
        outcome = Outcome(
            source=None,
            error=_CALLER_LEFT if abandoned else code,
            timings=Timings(
                total_ms=total_ms,
                local_wait_ms=None if local is None else local.wait_ms,
                local_ms=None if local is None else local.run_ms,
            ),
            confidence=None if local is None else local.confidence,
            cloud=self._cloud(cloud_error),
            uploaded_bytes=self._uploaded_bytes,
        )
        self._end(outcome, None)

    def _cloud(self, error: NearfarError | None) -> CloudOutcome:
        if isinstance(error, DeadlineExceeded):
            return "late"
        if error is not None:
            return "failed"
        return "cancelled" if self._asked else "not_asked"

    def _end(self, outcome: Outcome, label: str | None) -> None:
        self._recorder.record(self._unix_s, uuid4().hex, self._policy, self._steps, outcome, label)
