"""Structured logs: one JSON object a line, on standard error."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

__all__ = ["EVENTS", "configure_logging", "log_event"]

EVENTS = logging.getLogger("nearfar.broker")
"""Where the broker's own events go."""

_MAX_TEXT_CHARS = 4096


def log_event(name: str, fields: Mapping[str, object] | None = None) -> None:
    """Write one event with its fields. Values are escaped by JSON: one event, one line."""
    if not EVENTS.isEnabledFor(logging.INFO):
        return
    # Not EVENTS.info, which would look through the stack for a line number that nobody reads.
    record = logging.LogRecord(EVENTS.name, logging.INFO, "", 0, name, None, None)
    record.__dict__["fields"] = dict(fields or {})
    EVENTS.handle(record)


def configure_logging() -> None:
    """Send every log record of this process to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    # Lines show neither; each would ask the system for it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    EVENTS.setLevel(logging.INFO)
    logging.getLogger("aiohttp.server").addFilter(_without_client_noise)


class _JsonLines(logging.Formatter):
    """``{"time", "level", "event", ...}``; a traceback is one string in ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            line |= {"event": "log", "logger": record.name}
            line["message"] = _plain(record.getMessage()[:_MAX_TEXT_CHARS])
        else:
            line["event"] = record.msg
            line |= {
                key: _plain(value) if isinstance(value, str) else value
                for key, value in fields.items()
            }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = _plain("".join(traceback.format_exception(*record.exc_info)))
        return msgspec.json.encode(line, enc_hook=str).decode()


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
