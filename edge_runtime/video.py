"""Answer a video: always the newest frame, never one that would be late.

    with EdgeRuntime("digits.bundle", broker=URL) as runtime:
        frames = ((time.monotonic(), frame) for frame in camera)
        for answer in answer_video(runtime, frames, deadline_ms=150):
            show(answer.result)

A camera does not wait. While one frame is answered others arrive; each replaces the one
before it, and a frame that has grown too old to be answered in time is dropped unasked.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator
from types import TracebackType
from typing import Self

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.photo import ImageInput
from edge_runtime.results import Result
from edge_runtime.runtime import EdgeRuntime

__all__ = [
    "AsyncVideo",
    "Frame",
    "NewestFrame",
    "Video",
    "VideoAnswer",
    "VideoCounts",
    "answer_video",
    "answer_video_async",
]

_MAX_NEEDED_SHARE = 0.9
"""A model slower than the deadline still gets frames that are this fresh: otherwise one slow
spell would end the video, for what is never run is never found to be fast again."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One picture of the video."""

    number: int
    """From 0, dropped ones counted too."""
    captured_s: float
    image: ImageInput


class VideoCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the frames. ``offered`` is the sum of the others and of one waiting."""

    offered: int = 0
    taken: int = 0
    """Given to the runtime."""
    replaced: int = 0
    """Dropped: a newer one came first."""
    too_late: int = 0
    """Dropped: no answer could come in time any more."""


class NewestFrame:
    """The dropping rule: a place for one frame. It knows no clock and no thread.

    A frame that ``take`` gives out was the newest one offered, and at that moment at least
    ``needed_ms`` were left of its deadline. So if answering takes no longer than
    ``needed_ms``, no answer is ever later than ``deadline_ms`` after its capture.
    """

    def __init__(self, deadline_ms: float) -> None:
        if not 1 <= deadline_ms <= limits.MAX_DEADLINE_MS:
            raise ConfigError(f"deadline_ms must be 1 to {limits.MAX_DEADLINE_MS}")
        self._deadline_ms = deadline_ms
        self._waiting: Frame | None = None
        self._counts = VideoCounts()

    @property
    def counts(self) -> VideoCounts:
        """So far."""
        return self._counts

    @property
    def waiting(self) -> bool:
        """Whether a frame is there."""
        return self._waiting is not None

    def offer(self, image: ImageInput, captured_s: float) -> None:
        """A new frame; one that still waits is dropped. Raises ``ConfigError`` on NaN."""
        if not math.isfinite(captured_s):
            raise ConfigError(f"a frame's time must be a finite number of seconds: {captured_s}")
        counts = self._counts
        replaced = counts.replaced + (self._waiting is not None)
        self._waiting = Frame(number=counts.offered, captured_s=captured_s, image=image)
        self._counts = msgspec.structs.replace(
            counts, offered=counts.offered + 1, replaced=replaced
        )

    def left_ms(self, frame: Frame, now_s: float) -> float:
        """Of the frame's deadline."""
        return self._deadline_ms - (now_s - frame.captured_s) * 1e3

    def take(self, now_s: float, needed_ms: float) -> Frame | None:
        """The waiting frame, if ``needed_ms`` are left of its deadline; else it is dropped."""
        frame, self._waiting = self._waiting, None
        if frame is None:
            return None
        counts = self._counts
        if self.left_ms(frame, now_s) < needed_ms:
            self._counts = msgspec.structs.replace(counts, too_late=counts.too_late + 1)
            return None
        self._counts = msgspec.structs.replace(counts, taken=counts.taken + 1)
        return frame


class VideoAnswer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One frame's answer."""

    number: int
    captured_s: float
    latency_ms: float
    """From its capture to its answer."""
    result: Result | None
    error: NearfarError | None
    """Why there is no result."""


def answer_video(
    runtime: EdgeRuntime, frames: Iterable[tuple[float, ImageInput]], *, deadline_ms: float
) -> Video:
    """Answers to ``frames`` as they come; see ``Video``. Raises ``ConfigError``."""
    return Video(runtime, frames, deadline_ms=deadline_ms)


def answer_video_async(
    runtime: EdgeRuntime, frames: AsyncIterable[tuple[float, ImageInput]], *, deadline_ms: float
) -> AsyncVideo:
    """The same for event loops. Raises ``ConfigError``."""
    return AsyncVideo(runtime, frames, deadline_ms=deadline_ms)


class Video:
    """An iterator of ``VideoAnswer``; ends with its frames.

    Args:
        runtime: answers the frames; it is not closed here.
        frames: (time of capture in seconds of ``time.monotonic``, image), read in a thread of
            its own at the pace they come. A time in the future counts as now.
        deadline_ms: from a frame's capture to its answer.

    ``close`` (or leaving a ``with`` block) stops the reading at the next frame. An error of
    ``frames`` is raised when the frames before it are through.
    """

    def __init__(
        self,
        runtime: EdgeRuntime,
        frames: Iterable[tuple[float, ImageInput]],
        *,
        deadline_ms: float,
    ) -> None:
        self._runtime = runtime
        self._deadline_ms = deadline_ms
        self._slot = NewestFrame(deadline_ms)
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._read, args=(iter(frames),), name="nearfar-frames", daemon=True
        )
        self._thread.start()

    @property
    def counts(self) -> VideoCounts:
        """What became of the frames so far."""
        with self._changed:
            return self._slot.counts

    def close(self) -> None:
        """Read no further frame. Again: nothing happens."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read(self, frames: Iterator[tuple[float, ImageInput]]) -> None:
        try:
            for captured_s, image in frames:
                with self._changed:
                    if self._ended:
                        return
                    self._slot.offer(image, min(captured_s, time.monotonic()))
                    self._changed.notify_all()
        except BaseException as error:  # raised where the answers are read
            self._error = error
        finally:
            self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> VideoAnswer:
        """Wait for a frame that can be answered in time, and answer it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._slot.waiting or self._ended)
                if not self._slot.waiting:
                    error, self._error = self._error, None
                    raise StopIteration if error is None else error
                needed_ms = _needed_ms(self._runtime, self._deadline_ms)
                frame = self._slot.take(time.monotonic(), needed_ms)
            if frame is not None:
                return self._answer(frame)

    def _answer(self, frame: Frame) -> VideoAnswer:
        left_ms = self._slot.left_ms(frame, time.monotonic())
        result, error = None, None
        try:
            result = self._runtime.run(frame.image, deadline_ms=max(left_ms, 1.0))
        except NearfarError as failed:
            error = failed
        return _answered(frame, result, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncVideo:
    """``Video`` for event loops: an asynchronous iterator, ``async with`` to end it early."""

    def __init__(
        self,
        runtime: EdgeRuntime,
        frames: AsyncIterable[tuple[float, ImageInput]],
        *,
        deadline_ms: float,
    ) -> None:
        self._runtime = runtime
        self._deadline_ms = deadline_ms
        self._slot = NewestFrame(deadline_ms)
        self._answers = self._generate(frames)

    @property
    def counts(self) -> VideoCounts:
        """What became of the frames so far."""
        return self._slot.counts

    async def aclose(self) -> None:
        """Stop reading frames, and cancel an answer under way."""
        await self._answers.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VideoAnswer:
        """Wait for a frame that can be answered in time, and answer it."""
        return await anext(self._answers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _generate(
        self, frames: AsyncIterable[tuple[float, ImageInput]]
    ) -> AsyncGenerator[VideoAnswer, None]:
        changed = asyncio.Event()

        async def read() -> None:
            try:
                async for captured_s, image in frames:
                    self._slot.offer(image, min(captured_s, time.monotonic()))
                    changed.set()
            finally:
                changed.set()

        reader = asyncio.create_task(read())
        try:
            while True:
                while not self._slot.waiting:
                    if reader.done():
                        reader.result()  # raises what the frames raised
                        return
                    changed.clear()
                    await changed.wait()
                needed_ms = _needed_ms(self._runtime, self._deadline_ms)
                frame = self._slot.take(time.monotonic(), needed_ms)
                if frame is not None:
                    yield await self._answer(frame)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _answer(self, frame: Frame) -> VideoAnswer:
        left_ms = self._slot.left_ms(frame, time.monotonic())
        result, error = None, None
        try:
            result = await self._runtime.arun(frame.image, deadline_ms=max(left_ms, 1.0))
        except NearfarError as failed:
            error = failed
        return _answered(frame, result, error)


def _needed_ms(runtime: EdgeRuntime, deadline_ms: float) -> float:
    """What the local model is expected to take at most, its queue included."""
    local = runtime.status().variant
    expected_ms = 1.0 if local is None else local.p95_ms + local.pending * local.p50_ms
    return min(expected_ms, _MAX_NEEDED_SHARE * deadline_ms)


def _answered(frame: Frame, result: Result | None, error: NearfarError | None) -> VideoAnswer:
    return VideoAnswer(
        number=frame.number,
        captured_s=frame.captured_s,
        latency_ms=(time.monotonic() - frame.captured_s) * 1e3,
        result=result,
        error=error,
    )
