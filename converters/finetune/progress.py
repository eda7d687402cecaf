"""What a person sees while a net trains."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from converters.finetune.settings import EpochReport, FinetuneReport

__all__ = ["TrainingProgress", "print_report"]


class TrainingProgress:
    """A bar for the whole run on a terminal, and a line for every epoch everywhere.

    Everything goes to stderr. Use it as a context manager.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        if not self._console.is_terminal:
            self._console.width = 160  # a log file has room for a line
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._last = ""
        self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[figure]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("starting", total=None, figure="")

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.stop()

    def phase(self, message: str, done: int, total: int) -> None:
        """Something other than an epoch."""
        if self._quiet:
            return
        if self._live:
            self._bar.update(
                self._task, description=message, completed=done, total=total, figure=""
            )
        elif message != self._last:
            self._last = message
            self._console.print(message)

    def step(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        """One optimizer step."""
        if self._live:
            self._bar.update(
                self._task,
                description=f"epoch {epoch} of {epochs}",
                completed=(epoch - 1) * steps + step,
                total=epochs * steps,
                figure=f"loss {loss:.4f}",
            )

    def epoch(self, report: EpochReport, epochs: int) -> None:
        """One epoch is over."""
        if not self._quiet:
            self._console.print(_line(report, epochs))


def _line(report: EpochReport, epochs: int) -> str:
    train = "      -" if report.train_loss is None else f"{report.train_loss:7.4f}"
    parts = [f"epoch {report.epoch:3d}/{epochs}", f"train {train}", f"held out {report.loss:7.4f}"]
    if report.top1 is not None:
        parts.append(f"top-1 {report.top1:6.2%}")
    if report.agreement is not None:
        parts.append(f"agrees with fp32 {report.agreement:6.2%}")
    parts.append(f"{report.seconds:.1f} s")
    return "  ".join(parts) + ("  *" if report.improved else "")


def print_report(report: FinetuneReport, console: Console) -> None:
    """Start against best, and what comes next."""
    head = report.head
    verb = "replaced" if head.replaced else "kept"
    console.print(
        f"classifier layer {head.name} ({head.kind}): {verb}, {head.reason} "
        f"({head.classes_before} -> {head.classes})",
        highlight=False,
    )
    table = Table()
    for column in ("", "epoch", "loss", "top-1", "agrees with fp32"):
        table.add_column(column)
    for name, row in (
        ("start", report.epochs[0]),
        ("best", report.epochs[report.best_epoch]),
        ("last", report.epochs[-1]),
    ):
        table.add_row(
            name, str(row.epoch), f"{row.loss:.4f}", _share(row.top1), _share(row.agreement)
        )
    console.print(table)
    data = report.data
    console.print(
        f"{data.heldout} held-out images (split: {data.split}), {data.train} to train on; "
        f"stopped by {report.stopped} after {report.seconds:.0f} s",
        highlight=False,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
