"""An event loop in a thread of its own, for code that may or may not have one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class LoopThread:
    """Runs coroutines in a background thread; idle, it sleeps in the selector.

    The thread is a daemon: a program that forgets ``close`` still ends.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine; cancelling the future cancels it.

        Raises ``RuntimeError`` once ``close`` was called.
        """
        with self._lock:
            if self._closing:
                work.close()
                raise RuntimeError("the event loop is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel every task, run ``finish()``, stop the thread and wait for it.

        A second call does nothing.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        try:
            asyncio.run_coroutine_threadsafe(self._wind_up(finish), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _wind_up(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await finish()
        await asyncio.sleep(0)  # transports close their sockets in the next turn
        await asyncio.sleep(0)
