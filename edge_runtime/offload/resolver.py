"""Look host names up without ever holding up the end of the program.

``getaddrinfo`` cannot be interrupted and may hang for half a minute when the network is
gone. aiohttp's own resolver runs it in an executor whose threads Python waits for at exit;
here it runs in a daemon thread per lookup, and ``close`` waits for none that hangs.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["DaemonResolver"]

_JOIN_S = 0.2


class DaemonResolver(AbstractResolver):
    """``getaddrinfo`` in daemon threads."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of ``host``. Raises ``OSError``."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()

        def settle(result: list[Any] | OSError) -> None:
            self._threads.discard(thread)
            if answer.done():
                return
            if isinstance(result, OSError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        def look_up() -> None:
            result: list[Any] | OSError
            try:
                result = socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG
                )
            except OSError as error:
                result = error
            except UnicodeError as error:  # a label that IDNA refuses
                result = OSError(str(error))
            try:
                loop.call_soon_threadsafe(settle, result)
            except RuntimeError:
                return  # the loop was closed while the lookup hung

        thread = threading.Thread(target=look_up, name="nearfar-dns", daemon=True)
        self._threads.add(thread)
        thread.start()
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=found,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for found, _, proto, _, address in await answer
        ]

    async def close(self) -> None:
        """Wait a moment for lookups that are about to end."""
        for thread in tuple(self._threads):
            thread.join(_JOIN_S)
