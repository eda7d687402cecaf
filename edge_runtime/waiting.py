"""Wait for a request: its caller's thread, or event loop, is also its alarm clock."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

from edge_runtime.request import Request
from edge_runtime.results import Result

__all__ = ["wait", "wait_async"]


def wait(request: Request) -> Result:
    """Its result; raises its error. Whatever else ends the waiting abandons the request."""
    woken = threading.Event()
    try:
        request.on_change(woken.set)
        while not request.done.done():
            woken.wait(_sleep_s(request))
            woken.clear()
            _ring(request)
    except BaseException:
        request.abandon()
        raise
    return request.done.result()


async def wait_async(request: Request) -> Result:
    """``wait`` in an event loop; cancelling it abandons the request."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(woken.set)

    try:
        request.on_change(wake)
        while not request.done.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(_sleep_s(request)):
                    await woken.wait()
            woken.clear()
            _ring(request)
    except BaseException:
        request.abandon()
        raise
    return request.done.result()


def _sleep_s(request: Request) -> float | None:
    """Until its next alarm; None: until it is woken."""
    alarm_s = request.next_alarm_s()
    return None if alarm_s is None else max(0.0, alarm_s - time.monotonic())


def _ring(request: Request) -> None:
    """Let it do what is due, unless it ended."""
    alarm_s = request.next_alarm_s()
    if alarm_s is not None and time.monotonic() >= alarm_s and not request.done.done():
        request.on_alarm()
