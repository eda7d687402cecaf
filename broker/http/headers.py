"""Request headers of an upload, checked before its body is read."""

from __future__ import annotations

from aiohttp import HttpVersion11, hdrs, web

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageTooLarge,
    ImageUnreadable,
    LimitExceeded,
    MediaTypeUnsupported,
    WireError,
)
from edge_runtime.contract.imaging import ACCEPTED_MEDIA_TYPES

__all__ = [
    "defer_continue",
    "parse_top_k",
    "send_continue",
    "single_header",
    "upload_bound_bytes",
    "upload_media_type",
]


def single_header(request: web.Request, name: str) -> str | None:
    """The value of a header; None when absent. Raises ``WireError`` when it is there twice."""
    values = request.headers.getall(name, [])
    if len(values) > 1:
        raise WireError(f"{name} is sent {len(values)} times: send it once")
    return values[0] if values else None


def upload_media_type(request: web.Request) -> str:
    """The declared image type. Raises ``MediaTypeUnsupported``, also for a coded body."""
    coding = single_header(request, hdrs.CONTENT_ENCODING)
    if coding is not None and coding.strip().lower() != "identity":
        raise MediaTypeUnsupported(
            "Content-Encoding is not taken: images are compressed already, send them as they are"
        )
    declared = single_header(request, hdrs.CONTENT_TYPE) or ""
    media_type = declared.partition(";")[0].strip().lower()
    if media_type not in ACCEPTED_MEDIA_TYPES:
        raise MediaTypeUnsupported(
            f"send the image itself with Content-Type {', '.join(ACCEPTED_MEDIA_TYPES)}"
        )
    return media_type


def upload_bound_bytes(request: web.Request) -> int:
    """The most bytes this body can have: what it announces, or our limit when chunked.

    Raises ``ImageTooLarge`` or, for an empty body, ``ImageUnreadable``.
    """
    if request.content_length is None:
        if not request.body_exists:
            raise ImageUnreadable("the body is empty: send the encoded image in it")
        return limits.MAX_IMAGE_BYTES
    if request.content_length > limits.MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"the body announces {request.content_length} bytes, more than "
            f"{limits.MAX_IMAGE_BYTES}: send a smaller or more strongly compressed image"
        )
    if request.content_length == 0:
        raise ImageUnreadable("the body is empty: send the encoded image in it")
    return request.content_length


def parse_top_k(request: web.Request) -> int | None:
    """``?top_k=``, the only parameter there is; None when absent.

    Raises ``WireError`` on anything else in the query, ``LimitExceeded`` above the limit.
    """
    unknown = sorted(set(request.query) - {"top_k"})
    if unknown:
        raise WireError(f"unknown query parameter {unknown[0][:64]!r}: only top_k is known")
    values = request.query.getall("top_k", [])
    if not values:
        return None
    if len(values) > 1 or not (values[0].isascii() and values[0].isdigit()):
        raise WireError("top_k must be one whole number, at least 1")
    if len(values[0]) > 9 or int(values[0]) > limits.MAX_TOP_K:
        raise LimitExceeded(f"top_k must be at most {limits.MAX_TOP_K}")
    if int(values[0]) < 1:
        raise WireError("top_k must be at least 1")
    return int(values[0])


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
