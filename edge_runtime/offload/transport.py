"""What carries requests to a broker: one small Protocol.

``offload.client.AiohttpTransport`` is the real one; ``edge_runtime.testing`` has one that
tests script. All methods run on the runtime's network thread, in its event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Literal, Protocol, runtime_checkable

import msgspec

__all__ = [
    "HttpRequest",
    "HttpResponse",
    "PathListener",
    "ReportsPath",
    "Transport",
    "UploadReceipt",
]


class UploadReceipt:
    """How far one upload came; filled in by a transport that can tell.

    Without ``multiplexed`` nothing is known, and a cancelled upload has cost its connection.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Another try begins."""
        self.multiplexed = False
        """It shares a connection, which its cancelling leaves open."""
        self.sent_bytes = 0
        """Of the body, handed to the connection."""
        self.received_bytes = 0
        """Of the body, as the broker acknowledged."""
        self.elapsed_ms = 0.0
        """On the broker's clock, until the last acknowledgement."""
        self.rate_reported = False
        """The listener got samples of the rate while it went on."""


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request; ``path`` starts with ``/`` and is relative to the broker's URL."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    max_answer_bytes: int
    receipt: UploadReceipt | None = None


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
        """Connections open now, busy or idle. Called from any thread.

        One that carries many requests counts as many.
        """

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Send and read the whole answer, whatever its status.

        Cancelling closes the connection. Raises ``RemoteError`` when there is no answer
        and ``WireError`` when there is one that is no HTTP or too large; nothing else.
        """

    async def aclose(self) -> None:
        """Close every connection."""


@runtime_checkable
class StreamsAnswers(Protocol):
    """A transport that can hand on an answer while it comes."""

    def stream(self, request: HttpRequest) -> AsyncGenerator[bytes, None]:
        """The body of a 200 answer, piece by piece; ``max_answer_bytes`` bounds no piece.

        Closing the generator closes the connection. Raises ``RemoteError``, or
        ``WireError`` for any other status.
        """


class PathListener(Protocol):
    """Told what a transport learns beside its answers. Quick, and raises nothing."""

    def round_trip(self, rtt_ms: float) -> None:
        """A message went to the broker and back, past no queue of ours."""

    def rate(self, bytes_per_s: float) -> None:
        """What the broker received while bytes waited to be sent."""

    def queue_delay(self, delay_ms: float) -> None:
        """The broker announced the wait of a new request."""


@runtime_checkable
class ReportsPath(Protocol):
    """A transport that measures the path all the time."""

    def report_to(self, listener: PathListener) -> None:
        """Tell this one from now on."""

    async def path_changed(self) -> None:
        """The device is on another network: doubt the connections that are open."""
