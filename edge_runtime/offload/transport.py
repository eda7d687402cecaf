"""What carries requests to a broker: one small Protocol.

``offload.client.AiohttpTransport`` is the real one; ``edge_runtime.testing`` has one that
tests script. All methods run on the runtime's network thread, in its event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import msgspec

__all__ = ["HttpRequest", "HttpResponse", "Transport"]


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request; ``path`` starts with ``/`` and is relative to the broker's URL."""

    method: Literal["GET", "POST"]
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    max_answer_bytes: int


class HttpResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, read whole. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    connect_ms: float = 0.0
    """Waiting for and opening a connection; 0: a warm one was used."""
    first_byte_ms: float = 0.0
    """From the call until the head of the answer was there, ``connect_ms`` included."""
    body_ms: float = 0.0
    """From the head of the answer to its end."""


@runtime_checkable
class Transport(Protocol):
    """Sends requests; one attempt each, no retries, no redirects followed."""

    @property
    def secure(self) -> bool:
        """Whether opening a connection costs a TLS handshake."""

    @property
    def open_connections(self) -> int:
        """Connections open now, busy or idle. Called from any thread."""

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Send and read the whole answer, whatever its status.

        Cancelling closes the connection. Raises ``RemoteError`` when there is no answer
        and ``WireError`` when there is one that is no HTTP or too large; nothing else.
        """

    async def aclose(self) -> None:
        """Close every connection."""
