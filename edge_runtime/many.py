"""Many images through one runtime: in order, a few at a time, errors as values."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
)
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.photo import ImageInput
from edge_runtime.request import Request
from edge_runtime.results import Result

__all__ = ["MAX_CONCURRENCY", "answer_many", "answer_many_async", "check_concurrency"]

MAX_CONCURRENCY = 64


def check_concurrency(concurrency: int) -> int:
    """``concurrency`` itself. Raises ``ConfigError`` unless it is 1 to 64."""
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"concurrency must be 1 to {MAX_CONCURRENCY}, not {concurrency}")
    return concurrency


def answer_many(
    images: Iterable[ImageInput],
    begin: Callable[[ImageInput], Request],
    wait: Callable[[Request], Result],
    concurrency: int,
) -> Generator[Result | NearfarError, None, None]:
    """The answer to each image, in the images' order; an image that fails gives its error.

    At most ``concurrency`` images are taken from ``images`` beyond those whose answer was
    given out. ``begin`` and ``wait`` are called in threads of this iterator, so that
    deadlines hold even while nobody asks for the next answer. Closing the iterator ends
    what is under way.
    """
    source = iter(images)
    waiting: deque[tuple[_Slot, Future[Result | NearfarError]]] = deque()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="nearfar-many")
    try:
        more = True
        while more or waiting:
            while more and len(waiting) < concurrency:
                try:
                    image = next(source)
                except StopIteration:
                    more = False
                    break
                slot = _Slot(begin, wait)
                waiting.append((slot, pool.submit(slot.answer, image)))
            if waiting:
                answer = waiting[0][1].result()
                waiting.popleft()
                yield answer
    finally:
        for slot, future in waiting:
            future.cancel()
            slot.abandon()
        pool.shutdown()


class _Slot:
    """One image on its way, which another thread may abandon."""

    def __init__(
        self, begin: Callable[[ImageInput], Request], wait: Callable[[Request], Result]
    ) -> None:
        self._begin = begin
        self._wait = wait
        self._request: Request | None = None
        self._abandoned = False

    def answer(self, image: ImageInput) -> Result | NearfarError:
        try:
            self._request = self._begin(image)
            if self._abandoned:
                self._request.abandon()
            return self._wait(self._request)
        except NearfarError as error:
            return error

    def abandon(self) -> None:
        self._abandoned = True
        if self._request is not None:
            self._request.abandon()


async def answer_many_async(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
    run: Callable[[ImageInput], Coroutine[Any, Any, Result]],
    concurrency: int,
) -> AsyncGenerator[Result | NearfarError, None]:
    """``answer_many`` for event loops; ``images`` may be asynchronous too."""
    source = _ahead(images)
    waiting: deque[asyncio.Task[Result | NearfarError]] = deque()

    async def answer(image: ImageInput) -> Result | NearfarError:
        try:
            return await run(image)
        except NearfarError as error:
            return error

    try:
        more = True
        while more or waiting:
            while more and len(waiting) < concurrency:
                try:
                    image = await anext(source)
                except StopAsyncIteration:
                    more = False
                    break
                waiting.append(asyncio.create_task(answer(image)))
                await asyncio.sleep(0)  # set off before the next image is waited for
            if waiting:
                yield await waiting[0]
                waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _ahead(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
) -> AsyncIterator[ImageInput]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
