"""What a person sees while the stages run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["StageBoard"]

_MESSAGE_CHARS = 60


class StageBoard:
    """Shows every stage with its time and what it does now. A context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._began = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.fields[stage]:<18}"),
            TimeElapsedColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False),
            console=console,
        )

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def start(self, stage: str) -> None:
        """A stage has started."""
        if self._live:
            self._tasks[stage] = self._bars.add_task("", total=None, stage=stage)
        else:
            self._print(f"{stage} ...")

    def say(self, stage: str, text: str) -> None:
        """What it does now; children that outlive their stage, as the broker, are not shown."""
        if stage in self._tasks and not self._bars.tasks[self._tasks[stage]].finished:
            self._bars.update(self._tasks[stage], description=text[:_MESSAGE_CHARS])

    def count(self, stage: str, done: int, total: int) -> None:
        """How far it is."""
        if stage in self._tasks:
            self._bars.update(self._tasks[stage], completed=done, total=total)

    def end(self, stage: str, seconds: float, note: str) -> None:
        """It has ended well."""
        if stage in self._tasks:
            self._bars.update(self._tasks[stage], description=note, total=1, completed=1)
        else:
            self._print(f"{stage}: {seconds:.1f} s{', ' if note else ''}{note}")

    def _print(self, text: str) -> None:
        elapsed = time.monotonic() - self._began
        print(f"[{elapsed:6.1f} s] {text}", file=sys.stderr, flush=True)  # noqa: T201
