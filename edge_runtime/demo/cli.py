"""``nearfar demo``: the command and the table at its end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from edge_runtime.contract.errors import BackendUnavailable

__all__ = ["demo"]

_NEEDED = ("rich", "torch", "tensorflow", "coremltools", "sklearn", "aiohttp", "ai_edge_litert")
_INTERRUPTED = 130


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar demo\n"
    "  nearfar demo --kill-broker\n"
    "  nearfar demo --requests 600 --seed 7 --output /tmp/demo --json\n"
    "\b\nExit status: 0 everything went as promised; 1 something did not, and it says what;\n"
    "2 a stage failed."
)
@click.option(
    "--requests", type=click.IntRange(10, 10_000), default=300, show_default=True,
    help="Photos to answer in each mode.",
)  # fmt: skip
@click.option(
    "--kill-broker", is_flag=True,
    help="Kill the broker in the middle of the ADAPTIVE run: every request must still be "
    "answered in its deadline.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/demo"), show_default=True, help="Where the reports go.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=1, show_default=True,
    help="Of the emulated link and the order of the photos.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of a table.")
def demo(requests: int, kill_broker: bool, output: Path, seed: int, as_json: bool) -> None:
    """Show everything at work, from training to answered requests.

    Trains two digit models (once), converts the small one to every format, proves each
    variant, serves the large one, and answers photos on an emulated phone in three modes
    over an emulated mobile link. Writes report.json and report.html. Nothing is downloaded;
    it takes about four minutes on two cores.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"the demo needs {', '.join(missing)}: pip install 'nearfar[all]'")
    from edge_runtime.demo.pipeline import Settings
    from edge_runtime.demo.report import broken_promises, build_report, write_reports

    settings = Settings(output=output, requests=requests, seed=seed, kill_broker=kill_broker)
    for name in ("report.json", "report.html", "requests.jsonl"):
        (output / name).unlink(missing_ok=True)
    started_s = time.monotonic()
    outcome = _run(settings)
    report = build_report(outcome, time.monotonic() - started_s)
    write_reports(outcome, report, output)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_table(report)
        click.echo(f"report: {output / 'report.html'}")
    broken = broken_promises(outcome)
    for text in broken:
        click.echo(f"not as promised: {text}", err=True)
    sys.exit(1 if broken else 0)


def _run(settings: Any) -> Any:
    """Run the stages; Ctrl-C and SIGTERM stop every child, then the command."""
    from edge_runtime.demo.pipeline import run_stages
    from edge_runtime.demo.progress import StageBoard

    async def staged() -> Any:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with StageBoard() as board:
            return await run_stages(settings, board)

    try:
        return asyncio.run(staged())
    except asyncio.CancelledError:
        click.echo("interrupted: every child process was stopped", err=True)
        sys.exit(_INTERRUPTED)


def _print_table(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"right within {report['deadline_ms']:g} ms, and what it took", box=SIMPLE_HEAD
    )
    table.add_column("mode", no_wrap=True)
    for column in ("right\nin time", "in time", "p50\nms", "p95\nms", "off-\nloaded", "MB\nup"):
        table.add_column(column, justify="right", vertical="bottom")
    table.add_column("answered", justify="right", no_wrap=True)
    for mode, score in report["modes"].items():
        table.add_row(
            mode,
            f"{score['accuracy_in_deadline']:.1%}",
            f"{score['in_deadline_share']:.1%}",
            *("-" if score[key] is None else f"{score[key]:.0f}" for key in ("p50_ms", "p95_ms")),
            f"{score['offloaded_share']:.1%}",
            f"{score['uploaded_bytes'] / 1e6:.2f}",
            f"{score['answered']}/{score['requests']}",
        )
    console = Console()
    console.print(table)
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["stages_s"].items())
    install = "not measured" if report["install_s"] is None else f"{report['install_s']:.0f} s"
    console.print(f"run: {report['run_s']:.0f} s ({stages}); install: {install}", highlight=False)
