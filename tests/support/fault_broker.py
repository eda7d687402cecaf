"""A broker that misbehaves on request: a real asyncio server on a real socket.

It speaks just enough HTTP/1.1 to be a sound broker (fault ``ok``), and fails in the ways
that networks, proxies and brokers do. ``fault`` may be changed while it runs; ``scope``
says whether health and discovery fail too or only predictions.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Any, Literal

from edge_runtime.contract.manifest import labels_digest
from tests.support.bundles import LABELS

Scope = Literal["predict", "all"]

FAULTS = (
    "refuse",
    "black_hole",
    "silent_after_head",
    "drip",
    "slow",
    "reset_on_request",
    "reset_mid_upload",
    "reset_mid_answer",
    "short_body",
    "garbage",
    "html",
    "endless",
    "endless_header",
    "wrong_labels",
    "wrong_class",
    "wrong_model",
    "redirect",
    "gzip",
    "status_400",
    "status_401",
    "status_404",
    "status_408",
    "status_413",
    "status_429",
    "status_500",
    "status_503",
    "status_503_proxy",
    "status_504",
)

_STATUS_CODES = {
    400: "image_unreadable",
    401: "unauthorized",
    404: "model_not_found",
    408: "deadline_exceeded",
    413: "image_too_large",
    429: "overloaded",
    500: "broker_fault",
    503: "overloaded",
    504: "deadline_exceeded",
}


class FaultBroker:
    """``with FaultBroker() as broker: ... broker.url``; binds 127.0.0.1 on a free port."""

    def __init__(
        self,
        fault: str = "ok",
        *,
        scope: Scope = "predict",
        label: str | Callable[[bytes], str] = "jay",
        delay_ms: float = 0.0,
        recv_ms: float | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.fault = fault
        self.scope = scope
        self.label = label
        self.delay_ms = delay_ms
        self.recv_ms = recv_ms
        self.labels_sha256 = labels_digest(LABELS)
        self.models = ["cloud"]
        self.requests: list[tuple[str, str, dict[str, str], int]] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-broker")
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultBroker:
        self._thread.start()
        self._call(self._listen())
        if self.fault == "refuse":
            self.stop_listening()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.requests]

    def stop_listening(self) -> None:
        """From now on connections are refused; open ones are cut."""
        self._call(self._close())

    def listen_again(self) -> None:
        self._call(self._listen())

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self._tls, limit=1 << 20
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if self.fault == "black_hole" and self.scope == "all":
                await asyncio.sleep(3600)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, path, _ = head.split("\r\n", 1)[0].split(" ")
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
                if name
            }
            length = int(headers.get("content-length", "0"))
            self.requests.append((method, path, headers, length))
            faulty = self.scope == "all" or path.endswith(":predict")
            fault = self.fault if faulty else "ok"
            if fault in ("black_hole", "silent_after_head"):
                await asyncio.sleep(3600)
            if fault == "reset_on_request":
                return _reset(writer)
            if fault == "reset_mid_upload":
                await reader.readexactly(min(length, 1000))
                return _reset(writer)
            body = await reader.readexactly(length)
            self.bodies.append(body)
            if await self._answer(writer, fault, path, body):
                return None

    async def _answer(
        self, writer: asyncio.StreamWriter, fault: str, path: str, body: bytes
    ) -> bool:
        """Whether the connection ends with this answer."""
        sound = self._sound_body(path, body)
        if fault == "ok":
            if path.endswith(":predict"):
                await asyncio.sleep(self.delay_ms / 1e3)
                writer.write(_response(200, sound, self._timing(len(body))))
            else:
                writer.write(_response(200, sound))
            return False
        if fault == "slow":
            await asyncio.sleep(2.0)
            writer.write(_response(200, sound))
            return False
        if fault == "drip":
            for byte in _response(200, sound):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
            return False
        if fault == "reset_mid_answer":
            writer.write(_response(200, sound)[:-20])
            await writer.drain()
            await asyncio.sleep(0.02)
            _reset(writer)
            return True
        special: dict[str, Callable[[], bytes]] = {
            "short_body": lambda: _response(200, sound)[:-20],
            "garbage": lambda: b"\x00\xff\x13garbage, no HTTP at all\r\n\r\n" * 4,
            "html": lambda: _response(200, b"<html>Log in to the WiFi</html>"),
            "redirect": lambda: _response(302, b"", {"Location": "http://192.0.2.1/"}),
            "gzip": lambda: _response(200, b"\x1f\x8b" + bytes(64), {"Content-Encoding": "gzip"}),
            "wrong_labels": lambda: _response(200, self._sound_body(path, body, labels="0" * 64)),
            "wrong_class": lambda: _response(200, sound.replace(b'"index": ', b'"index": 4')),
            "wrong_model": lambda: _response(200, sound.replace(b'"cloud"', b'"other"')),
            "status_503_proxy": lambda: _response(503, b"<html>no upstream</html>"),
        }
        if fault in special:
            writer.write(special[fault]())
            await writer.drain()
            return True
        if fault in ("endless", "endless_header"):
            head = (
                "HTTP/1.1 200 OK\r\nX-Pad: "
                if fault == "endless_header"
                else ("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            )
            writer.write(head.encode())
            while True:
                writer.write(b"[" * 65536)
                await writer.drain()
                await asyncio.sleep(0)
        status = int(fault.removeprefix("status_"))
        extra = {"Retry-After": "1"} if status in (429, 503) else {}
        writer.write(_response(status, _problem(status), extra))
        await writer.drain()
        return False

    def _timing(self, length: int) -> dict[str, str]:
        recv_ms = self.recv_ms if self.recv_ms is not None else length / 5000
        return {
            "Server-Timing": f"recv;dur={recv_ms:.3f}, q;dur=0.5, inf;dur={self.delay_ms:.3f}",
            "X-Queue-Delay-Ms": "0",
        }

    def _sound_body(self, path: str, body: bytes, *, labels: str | None = None) -> bytes:
        digest = labels or self.labels_sha256
        if path == "/v1/models":
            models = [
                {
                    "name": name,
                    "version": "1",
                    "sha256": hashlib.sha256(name.encode()).hexdigest(),
                    "labels_sha256": digest,
                    "task": "classification",
                    "classes": len(LABELS),
                }
                for name in self.models
            ]
            return json.dumps({"models": models}).encode()
        if path.startswith("/v2/"):
            return b"{}"
        reference = {
            "name": path.rpartition("/")[2].partition(":")[0],
            "version": "1",
            "sha256": hashlib.sha256(b"cloud").hexdigest(),
            "labels_sha256": digest,
        }
        label = self.label if isinstance(self.label, str) else self.label(body)
        ranked = [{"index": LABELS.index(label), "label": label, "score": 0.98}]
        return json.dumps({"model": reference, "predictions": ranked}).encode()


def _response(status: int, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _problem(status: int) -> bytes:
    return json.dumps(
        {
            "title": "scripted",
            "status": status,
            "detail": "scripted",
            "code": _STATUS_CODES[status],
            "retryable": False,
        }
    ).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
