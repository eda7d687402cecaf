"""What a person sees in a terminal: the traces, how far the run is, and the table at its end."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Final, Self

from edge_runtime.simulation.scores import PolicyScore
from edge_runtime.simulation.trace_index import INDEX_NAME
from edge_runtime.simulation.traces import TraceFolder, TraceSource

__all__ = ["RunProgress", "cells_text", "scores_text", "traces_text"]

_NAME_CHARS: Final = 24
_MAX_LINES: Final = 50
_MAX_REASONS: Final = 20
_MAX_EXAMPLES: Final = 3
_SAY_EVERY_S: Final = 10.0


def traces_text(folder: TraceFolder) -> str:
    """Which traces are used and read from what; what is skipped, by reason."""
    groups = collections.Counter(trace.group for trace in folder.traces)
    counted = ", ".join(f"{group} {count}" for group, count in groups.items())
    lines = [f"{len(folder.traces)} traces used ({counted}):"]
    for trace, source in list(zip(folder.traces, folder.sources, strict=True))[:_MAX_LINES]:
        lines.append(
            f"  {trace.name}: {trace.radio}, {source.seconds:.0f} s, median "
            f"{source.median_mbps:g} Mbit/s"
        )
        if source.direction != INDEX_NAME:
            lines.append(f"    {_how_read(source)}")
    if len(folder.traces) > _MAX_LINES:
        lines.append(f"  and {len(folder.traces) - _MAX_LINES} more (all in --json and --html)")
    reasons: dict[str, list[str]] = {}
    for skipped in folder.skipped:
        reasons.setdefault(skipped.reason, []).append(skipped.path)
    if reasons:
        lines.append(f"{len(folder.skipped)} skipped:")
    for reason, paths in list(reasons.items())[:_MAX_REASONS]:
        more = len(paths) - _MAX_EXAMPLES
        named = ", ".join(paths[:_MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"  {named}: {reason}")
    if len(reasons) > _MAX_REASONS:
        lines.append(f"  and {len(reasons) - _MAX_REASONS} more reasons (all in --json and --html)")
    return "\n".join(lines)


def _how_read(source: TraceSource) -> str:
    """What was found out about a file, for a person to check."""
    facts = [source.format, f"uplink by {source.direction}", *source.notes]
    return f"{', '.join(facts)}; round trips: {source.rtt or 'synthetic'}"


def scores_text(title: str, scores: Mapping[str, PolicyScore]) -> str:
    """One cell's table, 80 columns wide."""
    header = (
        f"{'policy':<{_NAME_CHARS}}{'gain %':>7}{'95 %':>12}{'net %':>7}{'right':>7}"
        f"{'late':>6}{'ms':>6}{'kB':>6}{'J':>5}"
    )
    lines = [title, header, "-" * len(header)]
    for policy, found in scores.items():
        interval = found.gain_capture.ci95
        between = "" if interval is None else "..".join(f"{round(100 * v)}" for v in interval)
        lines.append(
            f"{_short(policy):<{_NAME_CHARS}}{_percent(found.gain_capture.mean, 6):>7}"
            f"{between:>12}{_percent(found.net_gain_capture.mean, 6):>7}"
            f"{100 * found.accuracy_in_deadline:>7.2f}{100 * found.miss_rate:>6.1f}"
            f"{_whole(found.mean_ms):>6}{found.kb_per_request:>6.1f}"
            f"{found.joules_per_request:>5.2f}"
        )
    return "\n".join(line.rstrip() for line in lines)


def cells_text(title: str, cells: Sequence[tuple[str, Mapping[str, PolicyScore]]]) -> str:
    """Gain capture by policy and cell, 80 columns for up to ten cells.

    ``cells``: names of three words (device, deadline, arrivals), and scores.
    """
    words = [name.replace(" ms", "").split(", ") for name, _ in cells]
    header = [
        f"{'policy' if row == 2 else '':<{_NAME_CHARS}}"
        + "".join(f"{word[row][:4]:>5}" for word in words)
        + (f"{'worst':>6}" if row == 2 else "")
        for row in range(3)
    ]
    lines = [title, *header, "-" * len(header[2])]
    for policy in dict.fromkeys(policy for _, scores in cells for policy in scores):
        found = [scores[policy].gain_capture.mean if policy in scores else None
                 for _, scores in cells]  # fmt: skip
        known = [value for value in found if value is not None]
        row = "".join(f"{_percent(value, 4):>5}" for value in found)
        worst = _percent(min(known), 5) if known else "-"
        lines.append(f"{_short(policy):<{_NAME_CHARS}}{row}{worst:>6}")
    return "\n".join(line.rstrip() for line in lines)


def _short(policy: str) -> str:
    return policy if len(policy) <= _NAME_CHARS else policy[: _NAME_CHARS - 1] + "…"


def _percent(share: float | None, chars: int) -> str:
    """With a decimal where that fits."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    return text if len(text) <= chars else f"{100 * share:.0f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


class RunProgress:
    """A bar on a terminal; elsewhere a line every ten seconds. A context manager."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._began_s = time.monotonic()
        self._said_s = self._began_s
        self._label = ""
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                Remaining(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, label: str) -> None:
        """A cell begins."""
        self._label = label
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=1)

    def update(self, done: int, total: int) -> None:
        """How many worlds (a trace with a seed) of the cell are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now_s = time.monotonic()
        if not self._quiet and (now_s - self._said_s >= _SAY_EVERY_S or done == total):
            self._said_s = now_s
            elapsed_s = now_s - self._began_s
            print(  # noqa: T201
                f"[{elapsed_s:6.1f} s] {self._label}: {done} of {total} worlds",
                file=sys.stderr,
                flush=True,
            )
