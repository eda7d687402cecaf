"""Which media type an answer gets: the ``Accept`` header (RFC 9110 section 12.5.1)."""

from __future__ import annotations

import re
from typing import Final, Literal

from edge_runtime.contract.errors import WireError
from edge_runtime.contract.tasks import ClassificationTask, DetectionTask, SegmentationTask, Task
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, PictureType

__all__ = ["AnswerType", "answer_types", "negotiate"]

AnswerType = Literal["application/json"] | PictureType

_QUALITY: Final = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)\Z")
_MAX_RANGES: Final = 32


def answer_types(task: Task) -> tuple[AnswerType, ...]:
    """What an answer of this task may be; JSON is the default."""
    if isinstance(task, ClassificationTask | DetectionTask):
        return (JSON_MEDIA_TYPE,)
    if isinstance(task, SegmentationTask):
        return (JSON_MEDIA_TYPE, "image/png")
    return (JSON_MEDIA_TYPE, "image/png", "image/jpeg")


def negotiate(accept: str | None, offered: tuple[AnswerType, ...]) -> AnswerType:
    """The offered type that the client likes best; without a header the first one.

    Of equal ones the one that the header names first, then the one offered first. Raises
    ``WireError`` when the client takes none of them, or the header makes no sense.
    """
    if accept is None:
        return offered[0]
    ranges = [_parse(part) for part in accept.split(",") if part.strip()]
    if len(ranges) > _MAX_RANGES:
        raise WireError(f"Accept names more than {_MAX_RANGES} media types")
    best: tuple[float, int] | None = None
    chosen: AnswerType | None = None
    for media_type in offered:
        rank = _rank(media_type, ranges)
        if rank is not None and (best is None or rank > best):
            best, chosen = rank, media_type
    if chosen is None:
        raise WireError(f"Accept takes nothing that this model answers: {', '.join(offered)}")
    return chosen


def _parse(part: str) -> tuple[str, float]:
    """One media range, lower case and without parameters, and its quality."""
    name, *parameters = (piece.strip() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            if not _QUALITY.match(value.strip()):
                raise WireError("a quality in Accept must be 0 to 1 with at most three digits")
            quality = float(value)
    if name.count("/") != 1:
        raise WireError("Accept must be a list of media types such as image/png")
    return name.lower(), quality


def _rank(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int] | None:
    """Quality and minus the place of the most specific range that matches."""
    kind = media_type.partition("/")[0]
    for pattern in (media_type, f"{kind}/*", "*/*"):
        for place, (name, quality) in enumerate(ranges):
            if name == pattern:
                return (quality, -place) if quality > 0 else None
    return None
