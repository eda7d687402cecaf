"""Structured logs: one JSON object a line, on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import TextIO

import msgspec

__all__ = ["EVENTS", "configure_logging", "log_event"]

EVENTS = logging.getLogger("nearfar.broker")
"""Where the broker's own events go."""

_MAX_TEXT_CHARS = 4096
_encoder = msgspec.json.Encoder(enc_hook=str)


def log_event(name: str, fields: Mapping[str, object] | None = None) -> None:
    """Write one event with its fields. Values are escaped by JSON: one event, one line."""
    if not EVENTS.isEnabledFor(logging.INFO):
        return
    if EVENTS.handlers and isinstance(handler := EVENTS.handlers[0], _Lines):
        handler.event(name, fields or {})  # each request is one: a LogRecord would cost more
        return
    EVENTS.info(name, extra={"fields": dict(fields or {})})


def configure_logging() -> None:
    """Send every log record of this process to standard error as JSON lines."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(_JsonLines())
    # Lines show neither; each would ask the system for it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    EVENTS.setLevel(logging.INFO)
    EVENTS.handlers[:] = [handler]
    EVENTS.propagate = False
    logging.getLogger("aiohttp.server").addFilter(_without_client_noise)


class _Lines(logging.StreamHandler[TextIO]):
    """Lines of one turn of the event loop leave together: answers come in batches."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[bytes] = []

    def event(self, name: str, fields: Mapping[str, object]) -> None:
        """One line, in its turn."""
        line = _event_line(name, fields, time.time())
        with self.lock or contextlib.nullcontext():  # threads log too
            self._waiting.append(line)
            if len(self._waiting) > 1:
                return  # its turn's end is planned
        try:
            asyncio.get_running_loop().call_soon(self.flush)
        except RuntimeError:  # no loop, or a thread beside it
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """A record of logging proper, after what came before it."""
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Write what waits."""
        # Nobody may read the log any more (OSError), or it is closed at the end (ValueError): a
        # request is answered all the same.
        with self.lock or contextlib.nullcontext(), contextlib.suppress(OSError, ValueError):
            lines, self._waiting = self._waiting, []
            if lines:
                self.stream.write(b"\n".join([*lines, b""]).decode())
            self.stream.flush()


def _event_line(name: str, fields: Mapping[str, object], now_s: float) -> bytes:
    """``{"time", "level", "event", ...}``, values escaped: no line break is in it."""
    line = {"time": _utc(now_s), "level": "info", "event": name, **fields}
    try:
        return _encoder.encode(line)
    except UnicodeEncodeError:
        plain = {key: _plain(one) if isinstance(one, str) else one for key, one in line.items()}
        return _encoder.encode(plain)


class _JsonLines(logging.Formatter):
    """The same shape for records of logging; a traceback is one string in ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "event": "log",
            "logger": record.name,
            "message": _plain(record.getMessage()[:_MAX_TEXT_CHARS]),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = _plain("".join(traceback.format_exception(*record.exc_info)))
        return _encoder.encode(line).decode()


def _plain(text: str) -> str:
    """Without lone surrogates, which no UTF-8 writer takes."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _utc(created_s: float) -> str:
    return f"{_second(int(created_s))}.{int(created_s % 1 * 1000):03d}Z"


@lru_cache(maxsize=2)
def _second(whole_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole_s))


def _without_client_noise(record: logging.LogRecord) -> bool:
    """Aiohttp logs a traceback when a client goes away or sends garbage: not our news.

    What handlers raise never gets there, the error middleware answers it. A malformed
    request is logged once, as one line, by ``http/protocol.py``.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, ConnectionError | asyncio.CancelledError)
