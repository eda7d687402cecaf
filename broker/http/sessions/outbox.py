"""What a session still has to write: small frames first, then the answers in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import web

from broker.telemetry import Telemetry
from edge_runtime.contract import limits
from edge_runtime.contract.errors import Overloaded
from edge_runtime.contract.frames import Data, Frame, Progress, Result, encode_frame

__all__ = ["Outbox", "SlowReader"]

_MAX_FRAMES: Final = 4096
_PIECE_BYTES: Final = 16 * 1024
"""Of an answer, in one frame: what else is to be said goes between two of them."""


class SlowReader(Overloaded):
    """A device takes less than it asks for."""


@dataclass(slots=True)
class _Answer:
    head: Result
    body: memoryview
    priority: int
    written: int = 0
    begun: bool = False


class Outbox:
    """Frames for one device. ``run`` writes them; everything else only queues.

    Answers of the most urgent priority take turns, one frame each. A PROGRESS that was not
    written yet is replaced by the next one of its request.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._frames: deque[Frame] = deque()
        self._progress: dict[int, Progress] = {}
        self._answers: deque[_Answer] = deque()
        self._answer_bytes = 0
        self._filled = asyncio.Event()

    @property
    def empty(self) -> bool:
        """Whether everything was handed to the connection."""
        return not (self._frames or self._progress or self._answers)

    def add(self, frame: Frame) -> None:
        """A small frame. Raises ``SlowReader`` when too many wait."""
        if len(self._frames) >= _MAX_FRAMES:
            raise SlowReader("this session does not read what it is told: it is closed")
        self._frames.append(frame)
        self._filled.set()

    def add_progress(self, frame: Progress) -> None:
        """How far an upload is."""
        self._progress[frame.id] = frame
        self._filled.set()

    def add_answer(self, head: Result, body: bytes, priority: int) -> None:
        """An answer: ``head`` without data, and all of its body. Raises ``SlowReader``."""
        self._answer_bytes += len(body)
        if self._answer_bytes > limits.MAX_SESSION_ANSWER_BYTES:
            raise SlowReader("too many bytes of answers wait to be read: the session is closed")
        self._answers.append(_Answer(head, memoryview(body), priority))
        self._filled.set()

    def drop(self, request_id: int) -> None:
        """Nobody wants this request's progress and answer any more."""
        self._progress.pop(request_id, None)
        for answer in tuple(self._answers):
            if answer.head.id == request_id:
                self._answers.remove(answer)
                self._answer_bytes -= len(answer.body)

    async def run(self, connection: web.WebSocketResponse) -> None:
        """Write until canceled. Raises ``TimeoutError`` when the device stops reading."""
        while True:
            frame = self._next()
            if frame is None:
                self._filled.clear()
                await self._filled.wait()
                continue
            async with asyncio.timeout(limits.MAX_SESSION_WRITE_MS / 1e3):
                await connection.send_bytes(encode_frame(frame))
            self._telemetry.session_frame("out", type(frame).__name__.lower())

    def _next(self) -> Frame | None:
        if self._frames:
            return self._frames.popleft()
        if self._progress:
            return self._progress.pop(next(iter(self._progress)))
        if not self._answers:
            return None
        answer = min(self._answers, key=lambda waiting: waiting.priority)  # the first of these
        self._answers.remove(answer)
        start = answer.written
        data = bytes(answer.body[start : start + _PIECE_BYTES])
        answer.written += len(data)
        if answer.written < len(answer.body):
            self._answers.append(answer)
        else:
            self._answer_bytes -= len(answer.body)
        if answer.begun:
            return Data(id=answer.head.id, offset=start, data=data)
        answer.begun = True
        return msgspec.structs.replace(answer.head, data=data)
