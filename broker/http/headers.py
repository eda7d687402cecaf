"""Request headers of an upload, checked before its body is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import HttpVersion11, hdrs, web

from broker.scheduling.ticket import DEFAULT_PRIORITY
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageTooLarge,
    ImageUnreadable,
    LimitExceeded,
    MediaTypeUnsupported,
    NearfarError,
    WireError,
)
from edge_runtime.contract.imaging import ACCEPTED_MEDIA_TYPES
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    SegmentationTask,
    Task,
)
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, MAX_SEED_BODY_BYTES, PRIORITY_HEADER

__all__ = [
    "IMAGE",
    "SEED",
    "BodyKind",
    "Query",
    "announced_bytes",
    "body_kind",
    "check_top_k",
    "defer_continue",
    "known_media_type",
    "parse_priority",
    "parse_query",
    "require_known",
    "send_continue",
    "single_header",
    "upload_bound_bytes",
    "upload_media_type",
]


class BodyKind(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes as a body, and what is said about another one."""

    media_types: tuple[str, ...]
    max_bytes: int
    instead: str
    """What to send instead of another media type."""
    too_large: Callable[[], NearfarError]
    empty: Callable[[], NearfarError]


IMAGE: Final = BodyKind(
    media_types=ACCEPTED_MEDIA_TYPES,
    max_bytes=limits.MAX_IMAGE_BYTES,
    instead=f"send the image itself with Content-Type {', '.join(ACCEPTED_MEDIA_TYPES)}",
    too_large=lambda: ImageTooLarge(
        f"the body has more than {limits.MAX_IMAGE_BYTES} bytes: "
        "send a smaller or more strongly compressed image"
    ),
    empty=lambda: ImageUnreadable("the body is empty: send the encoded image in it"),
)
SEED: Final = BodyKind(
    media_types=(JSON_MEDIA_TYPE,),
    max_bytes=MAX_SEED_BODY_BYTES,
    instead=f'this model takes a seed: send {{"seed": 7}} with Content-Type {JSON_MEDIA_TYPE}',
    too_large=lambda: LimitExceeded(
        f'the body has more than {MAX_SEED_BODY_BYTES} bytes: send {{"seed": 7}} alone'
    ),
    empty=lambda: WireError('the body is empty: send {"seed": 7}'),
)


def body_kind(task: Task) -> BodyKind:
    """An image, or a seed for a model that generates."""
    return SEED if isinstance(task, GenerationTask) else IMAGE


def single_header(request: web.Request, name: str) -> str | None:
    """The value of a header; None when absent. Raises ``WireError`` when it is there twice."""
    values = request.headers.getall(name, [])
    if len(values) > 1:
        raise WireError(f"{name} is sent {len(values)} times: send it once")
    return values[0] if values else None


def upload_media_type(request: web.Request, kind: BodyKind) -> str:
    """The declared type. Raises ``MediaTypeUnsupported``, also for a coded body."""
    coding = single_header(request, hdrs.CONTENT_ENCODING)
    if coding is not None and coding.strip().lower() != "identity":
        raise MediaTypeUnsupported(
            "Content-Encoding is not taken: send the body as it is, images are compressed already"
        )
    return known_media_type(single_header(request, hdrs.CONTENT_TYPE) or "", kind)


def known_media_type(declared: str, kind: BodyKind) -> str:
    """``declared`` without parameters. Raises ``MediaTypeUnsupported``."""
    media_type = declared.partition(";")[0].strip().lower()
    if media_type not in kind.media_types:
        raise MediaTypeUnsupported(kind.instead)
    return media_type


def upload_bound_bytes(request: web.Request, kind: BodyKind) -> int:
    """The most bytes this body can have: what it announces, or our limit when chunked.

    Raises the errors of ``kind``.
    """
    if request.content_length is None:
        if not request.body_exists:
            raise kind.empty()
        return kind.max_bytes
    return announced_bytes(request.content_length, kind)


def announced_bytes(size_bytes: int, kind: BodyKind) -> int:
    """``size_bytes``, where a body may have so many. Raises the errors of ``kind``."""
    if size_bytes > kind.max_bytes:
        raise kind.too_large()
    if size_bytes == 0:
        raise kind.empty()
    return size_bytes


def parse_priority(request: web.Request) -> int:
    """The class that is asked for, 1 (highest) to 3. Raises ``WireError``."""
    said = single_header(request, PRIORITY_HEADER)
    if said is None:
        return DEFAULT_PRIORITY
    if said not in ("1", "2", "3"):
        raise WireError(f"{PRIORITY_HEADER} must be 1 (highest), 2 or 3")
    return int(said)


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a prediction."""

    top_k: int | None = None
    """None: the task's own number."""
    palette: bool = False
    """Give a mask colors, for people."""


def parse_query(request: web.Request, task: Task) -> Query:
    """``?top_k=`` where answers are lists, ``?palette=`` where they are masks.

    Raises ``WireError`` on anything else in the query, ``LimitExceeded`` above a limit.
    """
    require_known(set(request.query), task)
    return Query(
        top_k=_parse_top_k(request.query.getall("top_k", [])),
        palette=_parse_palette(request.query.getall("palette", [])),
    )


def require_known(names: set[str], task: Task) -> None:
    """Raise ``WireError`` where a parameter is none of this task's; all take ``version``."""
    known: tuple[str, ...] = ()
    if isinstance(task, ClassificationTask | DetectionTask):
        known = ("top_k",)
    elif isinstance(task, SegmentationTask):
        known = ("palette",)
    unknown = sorted(names - {*known, "version"})
    if unknown:
        allowed = f"only {known[0]} is known" if known else "this model takes none"
        raise WireError(f"unknown query parameter {unknown[0][:64]!r}: {allowed}")


def _parse_top_k(values: list[str]) -> int | None:
    if not values:
        return None
    if len(values) > 1 or not (values[0].isascii() and values[0].isdigit()):
        raise WireError("top_k must be one whole number, at least 1")
    if len(values[0]) > 9:
        raise LimitExceeded(f"top_k must be at most {limits.MAX_TOP_K}")
    return check_top_k(int(values[0]))


def check_top_k(top_k: int) -> int:
    """``top_k`` itself. Raises ``WireError`` below 1, ``LimitExceeded`` above the limit."""
    if top_k > limits.MAX_TOP_K:
        raise LimitExceeded(f"top_k must be at most {limits.MAX_TOP_K}")
    if top_k < 1:
        raise WireError("top_k must be at least 1")
    return top_k


def _parse_palette(values: list[str]) -> bool:
    if not values:
        return False
    if values not in (["true"], ["false"]):
        raise WireError("palette must be true or false")
    return values == ["true"]


async def defer_continue(request: web.Request) -> None:
    """Expect handler of every route: say nothing yet.

    aiohttp's own sends ``100 Continue`` before any of our code runs, and the client then
    uploads a body that may be refused.
    """


async def send_continue(request: web.Request) -> None:
    """Ask for the body, where the client waits to be asked. Raises ``HTTPExpectationFailed``."""
    expectation = request.headers.get(hdrs.EXPECT)
    if expectation is None or request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise web.HTTPExpectationFailed
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer proper has not begun
