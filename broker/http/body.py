"""Reading a body within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    DeadlineExceeded,
    NearfarError,
    UploadStalled,
    WireError,
)

__all__ = ["arrived_body", "collect_body", "read_body", "request_pieces"]


async def read_body(
    request: web.Request,
    *,
    max_bytes: int,
    too_large: Callable[[], NearfarError],
    deadline_s: float,
) -> bytes:
    """The whole body of an HTTP request: ``collect_body`` of its ``request_pieces``."""
    whole = arrived_body(request, max_bytes)
    if whole is not None:
        return whole
    return await collect_body(
        request_pieces(request), max_bytes=max_bytes, too_large=too_large, deadline_s=deadline_s
    )


def request_pieces(request: web.Request) -> Callable[[], Awaitable[bytes]]:
    """Reads the next bytes of a body, none at its end; ``WireError`` for broken chunks."""

    async def read_piece() -> bytes:
        try:
            return await request.content.readany()
        except web.RequestPayloadError:
            raise WireError("the chunks of the body make no sense: send it again") from None

    return read_piece


def arrived_body(request: web.Request, max_bytes: int) -> bytes | None:
    """The whole body where it came with its headers; None: it must be waited for.

    Small bodies on fast links do, and then need no clocks to watch them.
    """
    content = request.content
    if not content.is_eof() or content.exception() is not None:
        return None
    if content.total_bytes > max_bytes:
        return None
    return content.read_nowait(-1)


async def collect_body(
    read_piece: Callable[[], Awaitable[bytes]],
    *,
    max_bytes: int,
    too_large: Callable[[], NearfarError],
    deadline_s: float,
) -> bytes:
    """The whole body, at most ``max_bytes``; ``deadline_s`` is on the event loop's clock.

    ``read_piece`` waits for the next bytes and gives none at the end. Raises
    ``DeadlineExceeded``, ``UploadStalled`` (``limits.MAX_BODY_MS`` in all,
    ``limits.MAX_BODY_IDLE_MS`` between two pieces), what ``too_large`` gives, and what
    ``read_piece`` raises.
    """
    loop = asyncio.get_running_loop()
    end_s = min(deadline_s, loop.time() + limits.MAX_BODY_MS / 1e3)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout_at(end_s) as limit:
            while True:
                limit.reschedule(min(end_s, loop.time() + limits.MAX_BODY_IDLE_MS / 1e3))
                piece = await read_piece()
                if not piece:
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
                size += len(piece)
                if size > max_bytes:
                    raise too_large()
                pieces.append(piece)
    except TimeoutError:
        if loop.time() >= deadline_s:
            raise DeadlineExceeded(
                f"the deadline passed after {size} bytes of the body: send a smaller image, "
                "or allow more time"
            ) from None
        raise UploadStalled(
            f"the body stopped arriving after {size} bytes: send it again"
        ) from None
