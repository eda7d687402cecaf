"""Reading a body within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    DeadlineExceeded,
    NearfarError,
    UploadStalled,
)

__all__ = ["read_body"]


async def read_body(
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
