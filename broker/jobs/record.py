"""One job as the broker keeps it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.jobs import ENDED_STATES, JobFailure, JobInfo, JobState
from edge_runtime.contract.wire import ModelRef, PictureType, Region, ServerTiming

__all__ = ["Job", "JobAnswer", "JobSpec"]

_MAX_EVENTS: Final = 32


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, its body aside."""

    model: str
    media_type: str
    """Of the body."""
    accept: str
    """Media type that the answer shall have."""
    top_k: int | None = None
    palette: bool = False
    version: str | None = None
    """Version or alias of the model; None: what is stable when the job runs."""

    @property
    def picture_type(self) -> PictureType:
        """How pixels are encoded."""
        return "image/jpeg" if self.accept == "image/jpeg" else "image/png"


class JobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a job, its body aside; encoded once."""

    media_type: str
    size_bytes: int
    model: ModelRef
    region: Region | None = None
    timing: ServerTiming = ServerTiming()


@dataclass(slots=True, eq=False)
class Job:
    """State in memory; bodies and answers are in the journal. Times are Unix seconds."""

    id: str
    number: int
    """Rising in the order of submission."""
    tenant: str
    key: str | None
    spec: JobSpec
    size_bytes: int
    """Of the body."""
    sha256: str
    """Of the body, so that a key cannot come to stand for another one."""
    created_s: float
    state: JobState = "queued"
    updated_s: float = 0.0
    attempts: int = 0
    progress: float = 0.0
    failure: JobFailure | None = None
    answer: JobAnswer | None = None
    events: list[tuple[int, str, JobInfo]] = field(default_factory=list)
    """Number, name (the state) and content of the last changes."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, at each event."""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ENDED_STATES

    def info(self, place: int | None) -> JobInfo:
        """As its owner sees it."""
        expires_s = self.updated_s + limits.JOB_RESULT_TTL_MS / 1e3
        return JobInfo(
            id=self.id,
            model=self.spec.model,
            state=self.state,
            progress=1.0 if self.state == "done" else self.progress,
            place=place if self.state == "queued" else None,
            created=datetime.fromtimestamp(self.created_s, UTC),
            expires=datetime.fromtimestamp(expires_s, UTC) if self.ended else None,
            failure=self.failure,
        )

    def tell(self, name: str, info: JobInfo, now_s: float) -> None:
        """Add an event; one of the same name as the last replaces it, under a new number.

        Numbers are milliseconds of the clock, made to rise. They go on rising after a
        restart, so ``Last-Event-ID`` of an earlier process is understood.
        """
        last = self.events[-1][0] if self.events else 0
        if self.events and self.events[-1][1] == name:
            self.events.pop()
        self.events.append((max(last + 1, int(now_s * 1e3)), name, info))
        del self.events[:-_MAX_EVENTS]
        self.changed.set()
        self.changed = asyncio.Event()
