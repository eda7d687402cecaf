"""The real transport: an aiohttp session with the traps taken out.

* ``keepalive_timeout`` is 300 s: aiohttp's default of 15 s makes every longer pause a cold
  path, which on a phone costs more than the upload.
* TCP_NODELAY is set on every socket, so that a head and a small body leave at once.
* TLS certificates are verified; redirects, proxies from the environment, cookies and
  compressed answers are not used.
* One attempt; an answer is read up to its bound and no further.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import aiohttp

from edge_runtime.contract.errors import WireError
from edge_runtime.offload.failures import translate
from edge_runtime.offload.resolver import DaemonResolver
from edge_runtime.offload.transport import HttpRequest, HttpResponse

__all__ = ["AiohttpTransport", "UpgradeRefused"]

_KEEPALIVE_S = 300.0
_MAX_CONNECTIONS = 8
_DNS_CACHE_S = 60
_CHUNK = 1 << 16


class UpgradeRefused(WireError):
    """HTTP works, WebSocket does not: an older broker, or a proxy in between."""


class AiohttpTransport:
    """HTTP/1.1 to one broker. The session is made on first use, inside the event loop."""

    def __init__(self, url: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._url = url.rstrip("/")
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._resolver = DaemonResolver()
        self._sockets: tuple[socket.socket, ...] = ()
        self.secure = self._url.startswith("https:")

    @property
    def open_connections(self) -> int:
        """Sockets that neither side has closed."""
        return sum(opened.fileno() != -1 for opened in self._sockets)

    async def send(self, request: HttpRequest) -> HttpResponse:
        """One exchange. Raises ``RemoteError`` or ``WireError``."""
        session = self._session or self._open()
        timing = SimpleNamespace(wait_since=None, connect_ms=0.0)
        started = time.perf_counter()
        try:
            async with session.request(
                request.method,
                self._url + request.path,
                headers=request.headers,
                data=io.BytesIO(request.body) if request.method == "POST" else None,
                allow_redirects=False,
                trace_request_ctx=timing,
            ) as response:
                first_byte_ms = (time.perf_counter() - started) * 1e3
                body = await self._read(response, request.max_answer_bytes)
                return HttpResponse(
                    status=response.status,
                    headers={name.lower(): value for name, value in response.headers.items()},
                    body=body,
                    connect_ms=timing.connect_ms,
                    first_byte_ms=first_byte_ms,
                    body_ms=(time.perf_counter() - started) * 1e3 - first_byte_ms,
                )
        except Exception as error:
            raise translate(error, self._url) from error

    async def stream(self, request: HttpRequest) -> AsyncGenerator[bytes, None]:
        """The body of a 200 answer as it comes. Raises ``RemoteError`` or ``WireError``."""
        session = self._session or self._open()
        try:
            async with session.request(
                request.method,
                self._url + request.path,
                headers=request.headers,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise WireError(f"{self._url} answered HTTP {response.status} to a stream")
                async for piece in response.content.iter_any():
                    yield piece
        except Exception as error:
            raise translate(error, self._url) from error

    async def open_websocket(
        self, path: str, *, protocol: str, max_frame_bytes: int, api_key: str | None = None
    ) -> aiohttp.ClientWebSocketResponse:
        """Upgrade a connection, an idle one if there is one.

        Raises ``UpgradeRefused`` when HTTP answered instead, else ``RemoteError`` or
        ``WireError``.
        """
        session = self._session or self._open()
        try:
            opened = await session.ws_connect(
                self._url + path,
                protocols=(protocol,),
                headers=None if api_key is None else {"Authorization": f"Bearer {api_key}"},
                compress=0,
                max_msg_size=max_frame_bytes,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
            )
        except aiohttp.WSServerHandshakeError as error:
            raise UpgradeRefused(
                f"{self._url} answered HTTP {error.status} to the upgrade: POST is used instead"
            ) from error
        except Exception as error:
            raise translate(error, self._url) from error
        if opened.protocol != protocol:
            await opened.close()
            raise UpgradeRefused(f"{self._url} does not speak {protocol}: POST is used instead")
        return opened

    async def _read(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            body += chunk
            if len(body) > max_bytes:
                raise WireError(
                    f"the answer of {self._url} has more than {max_bytes} bytes: is a broker there?"
                )
        return bytes(body)

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=_MAX_CONNECTIONS,
            keepalive_timeout=_KEEPALIVE_S,
            ttl_dns_cache=_DNS_CACHE_S,
            resolver=self._resolver,
            ssl=self._tls or True,
            socket_factory=self._socket,
        )
        trace = aiohttp.TraceConfig()
        trace.on_connection_queued_start.append(_wait_starts)
        trace.on_connection_queued_end.append(_wait_ends)
        trace.on_connection_create_start.append(_wait_starts)
        trace.on_connection_create_end.append(_wait_ends)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "nearfar-edge"},
            trace_configs=[trace],
        )
        return self._session

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, _ = address
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        alive = (known for known in self._sockets if known.fileno() != -1)
        self._sockets = (*alive, opened)  # replaced whole: other threads count them
        return opened

    async def aclose(self) -> None:
        """Close the session and every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
            await self._resolver.close()


async def _wait_starts(_session: Any, context: Any, _params: Any) -> None:
    if context.trace_request_ctx is None:
        return  # an upgrade
    context.trace_request_ctx.wait_since = time.perf_counter()


async def _wait_ends(_session: Any, context: Any, _params: Any) -> None:
    timing = context.trace_request_ctx
    if timing is None:
        return
    timing.connect_ms += (time.perf_counter() - timing.wait_since) * 1e3
