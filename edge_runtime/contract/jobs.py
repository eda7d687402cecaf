"""What device and broker say to each other about jobs (``docs/jobs.md``)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import NearfarError, WireError, error_from_code

__all__ = [
    "ENDED_STATES",
    "EVENT_STREAM_MEDIA_TYPE",
    "JobFailure",
    "JobInfo",
    "JobState",
    "decode_job",
    "job_path",
    "jobs_path",
]

EVENT_STREAM_MEDIA_TYPE: Final = "text/event-stream"

JobState = Literal["queued", "running", "done", "failed", "canceled"]
ENDED_STATES: Final[frozenset[JobState]] = frozenset(("done", "failed", "canceled"))

JobId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]


class JobFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed: ``code`` and ``detail`` of ``contract/errors.py``."""

    code: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]
    detail: Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]

    def as_error(self) -> NearfarError:
        """The error itself."""
        return error_from_code(self.code, self.detail)


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One job at one moment; keys of later versions are ignored."""

    id: JobId
    model: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]
    state: JobState
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """1 when done. While it runs, an estimate: the time so far over the time that this model
    took before, and at most 0.99."""
    place: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """While it waits: how many jobs go first."""
    created: datetime
    """UTC."""
    expires: datetime | None = None
    """When an ended job is forgotten, at the latest; UTC."""
    failure: JobFailure | None = None
    """Of a job that failed."""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ENDED_STATES


_decoder = msgspec.json.Decoder(JobInfo)


def decode_job(data: bytes) -> JobInfo:
    """Decode a ``JobInfo``. Raises ``WireError``."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"what the broker says of the job makes no sense: {error}") from None


def jobs_path(model: str) -> str:
    """Where jobs of a model are submitted."""
    return f"/v1/models/{model}/jobs"


def job_path(job_id: str) -> str:
    """Where one job is; ``/result`` and ``/events`` are below it."""
    return f"/v1/jobs/{job_id}"
