"""What a log holds: one entry for each request, and the lines of its file.

A line is one JSON object with a ``kind``. ``policy`` names a policy and its parameters once
a file; ``request`` refers to it. ``resumed`` says that a writer found the line before it torn
by a crash, ``lost`` how many entries could not be written.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.tasks import TaskName
from edge_runtime.policies.base import Decision, Situation
from edge_runtime.results import InferenceSource, Timings

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_STEPS",
    "SCHEMA_VERSION",
    "CloudOutcome",
    "LogEntry",
    "Outcome",
    "PolicyRecord",
    "Step",
]

SCHEMA_VERSION: Final = 1
MAX_LINE_BYTES: Final = 2**20
MAX_STEPS: Final = 64
"""Decisions of one request that are kept: the first ones."""

Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
RequestId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$(?!\n)")]

CloudOutcome = Literal["not_asked", "answered", "failed", "late", "cancelled"]
"""``late``: time was up before its answer came. ``cancelled``: the request ended otherwise
while it was still under way."""


class PolicyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A policy by name, and the arguments it was made with."""

    name: Text
    parameters: dict[str, Any] = {}
    """By the name of the argument; a struct as an object with its ``type``."""
    complete: bool = True
    """False: some argument cannot be written down, so the policy cannot be made again."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the policy."""

    situation: Situation
    decision: Decision
    """As the policy gave it."""
    done: Decision | None = None
    """What the runtime made of it, where the request did not allow it as it was."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    source: InferenceSource | None
    """None: no answer."""
    error: Text | None = None
    """Code of the error that the caller got."""
    other_error: Text | None = None
    """Code of the side that failed while the other one answered."""
    deadline_met: bool | None = None
    """None: no answer."""
    timings: Timings
    confidence: float | None = None
    """Of the local answer, where there was one."""
    cloud: CloudOutcome = "not_asked"
    cloud_model: Text | None = None
    """``name@version`` of the one that answered."""
    cloud_sha256: Text | None = None
    uploaded_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    """Size of the body that was handed to the network, whether or not all of it left."""
    label: Text | None = None
    """Of the answer; only where the log was asked to keep labels."""


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One request. No image, no name of a file; a label only where it was asked for."""

    schema_version: Literal[1] = 1
    nearfar: Annotated[str, msgspec.Meta(max_length=64)]
    request: RequestId
    unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    """Wall time of the call."""
    task: TaskName
    bundle: Text
    variant: Text | None
    """Id of the local variant; None: there is no local model."""
    policy: PolicyRecord
    steps: Annotated[tuple[Step, ...], msgspec.Meta(max_length=MAX_STEPS)]
    """At least one, but where the request failed before anything was decided."""
    outcome: Outcome

    @property
    def action(self) -> str:
        """What was done in the end."""
        last = self.last
        return "NONE" if last is None else last.action.value

    @property
    def last(self) -> Decision | None:
        """The last decision as carried out."""
        if not self.steps:
            return None
        step = self.steps[-1]
        return step.decision if step.done is None else step.done
