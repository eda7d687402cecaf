"""Ctrl-C and SIGTERM end a run with all its processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["children_end_with_us"]


@contextlib.contextmanager
def children_end_with_us() -> Iterator[None]:
    """While in the block, SIGINT and SIGTERM stop every worker, then raise ``KeyboardInterrupt``.

    Otherwise a pool would first finish all that it was given, or, when only this process is
    ended, its workers would wait for work for ever. A signal that was ignored stays ignored.
    Only the main thread may set handlers; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        raise KeyboardInterrupt

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
