"""What a person sees while child processes work."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["JobProgress"]


class JobProgress:
    """A bar for each job on a terminal; one line at its start and end elsewhere.

    Use it as a context manager and pass ``update`` as the supervisor's listener.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._messages: dict[str, str] = {}
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[job]:<18}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[memory]:>8}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
        )

    def __enter__(self) -> JobProgress:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            with self._lock:
                for task in self._tasks.values():
                    self._bars.update(task, total=1, completed=1)
            self._bars.stop()

    def update(self, name: str, message: str, done: int, total: int, resident: int) -> None:
        """One tick of one job: what it does, how far it is, how much memory it holds."""
        if self._quiet:
            return
        with self._lock:
            if self._live:
                self._draw(name, message, done, total, resident)
            elif self._messages.get(name) != message:
                self._started.setdefault(name, time.monotonic())
                self._messages[name] = message
                elapsed = time.monotonic() - self._started[name]
                print(f"[{elapsed:6.1f} s] {name}: {message}", file=sys.stderr, flush=True)  # noqa: T201

    def _draw(self, name: str, message: str, done: int, total: int, resident: int) -> None:
        memory = f"{resident / 2**20:.0f} MB" if resident else ""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(message, total=None, job=name, memory=memory)
        task = self._tasks[name]
        # A child that has ended holds no memory: its bar is full.
        if not resident and self._bars.tasks[task].elapsed:
            self._bars.update(task, description="done", total=1, completed=1)
            self._bars.stop_task(task)
            return
        self._bars.update(
            task, description=message, total=total or None, completed=done, memory=memory
        )
