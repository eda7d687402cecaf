"""``nearfar simulate``: policies over recorded uplinks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.cells import (
    ARRIVALS,
    DEVICES,
    MAX_DEADLINE_MS,
    MIN_DEADLINE_MS,
    CellSpec,
    parse_cells,
)

__all__ = ["simulate"]

_INTERRUPTED = 130
_MAX_SEEDS = 100
_CELL_OPTIONS = ("device", "deadline_ms", "arrivals")


@click.command(
    epilog="""\b
Examples:
  nearfar simulate --traces traces/
  nearfar simulate --traces traces/ --device pi --deadline-ms 600 --arrivals bursty
  nearfar simulate --traces traces/ --policies ADAPTIVE,Hedged --seeds 1 --json -
  nearfar simulate --traces traces/ --cells ten --json ten.json --html ten.html
  nearfar simulate --traces logs/ --assume-uplink --rate-unit kbps

\b
Formats, the simulated world and its limits: docs/simulation.md.
Exit status: 0 simulated; 2 bad input: no usable trace, or an option.
"""
)
@click.option(
    "--traces", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="Folder of uplink traces, with an index.csv or recognized by content.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(DEVICES), default="mid", show_default=True,
    help="How fast the local model is: about 60, 15 and 250 ms.",
)  # fmt: skip
@click.option(
    "--deadline-ms", type=click.FloatRange(MIN_DEADLINE_MS, MAX_DEADLINE_MS), default=400.0,
    show_default=True, help="Time for each answer, in milliseconds.",
)  # fmt: skip
@click.option(
    "--arrivals", type=click.Choice(ARRIVALS), default="poisson", show_default=True,
    help="When photos are taken.",
)  # fmt: skip
@click.option(
    "--policies", default="all", show_default=True, metavar="NAME,...",
    help="Policies to run; LocalOnly and the Oracle, which gain is measured by, always do.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1, _MAX_SEEDS), default=5, show_default=True,
    help="Worlds drawn for each trace.",
)  # fmt: skip
@click.option(
    "--cells", metavar="CELLS",
    help="Several cells instead of one: 'ten', or DEVICE:DEADLINE_MS:ARRIVALS,...",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1, 256), metavar="N", help="Processes; default: one per CPU."
)
@click.option("--assume-uplink", is_flag=True, help="Use rates whose direction is not stated.")
@click.option(
    "--rate-unit", type=click.Choice(("mbps", "kbps", "bps", "bytes")),
    help="Unit of rates that name none (bytes: per second).",
)  # fmt: skip
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="F", help="Write every figure; '-': print it instead of the table.",
)  # fmt: skip
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), metavar="F",
    help="Write a page with charts.",
)  # fmt: skip
@click.option(
    "--constants", type=click.Path(path_type=Path, dir_okay=False), metavar="F",
    help="TOML file whose entries replace those of the simulated world.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No list of traces, no progress.")
@click.pass_context
def simulate(
    ctx: click.Context,
    folder: Path,
    device: str,
    deadline_ms: float,
    arrivals: str,
    policies: str,
    seeds: int,
    cells: str | None,
    jobs: int | None,
    assume_uplink: bool,
    rate_unit: str | None,
    json_path: Path | None,
    html_path: Path | None,
    constants: Path | None,
    quiet: bool,
) -> None:
    """Compare offload policies over recorded uplinks, against a clairvoyant bound.

    Every policy meets the same photos, deadlines, links and broker troubles, in a simulated
    world whose only measured part is the traces. The same seeds give the same figures.
    """
    specs = _specs(ctx, cells, CellSpec(device, deadline_ms, arrivals))
    for path in (json_path, html_path):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {path.absolute().parent} to write {path.name}")
    from edge_runtime.simulation.session import Request, run_cells

    request = Request(
        folder=folder,
        specs=specs,
        policies=policies,
        seeds=seeds,
        jobs=jobs or os.cpu_count() or 1,
        assume_uplink=assume_uplink,
        rate_unit=rate_unit,
        constants=constants,
        with_timeline=html_path is not None,
    )
    try:
        outcome = run_cells(request, quiet=quiet)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
    _report(outcome, json_path, html_path)


def _specs(ctx: click.Context, cells: str | None, single: CellSpec) -> tuple[CellSpec, ...]:
    if cells is None:
        return (single,)
    given = [
        name
        for name in _CELL_OPTIONS
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise click.UsageError(f"--cells names the cells: leave {option} out")
    return parse_cells(cells)


def _report(outcome: Any, json_path: Path | None, html_path: Path | None) -> None:
    from edge_runtime.simulation.report.output import document, summary, write_text
    from edge_runtime.simulation.report.page import render_page

    text = json.dumps(document(outcome), indent=1, allow_nan=False) + "\n"
    if str(json_path) == "-":
        click.echo(text, nl=False)
    else:
        click.echo(summary(outcome))
        if json_path is not None:
            write_text(json_path, text)
            click.echo(f"figures: {json_path}")
    if html_path is not None:
        write_text(html_path, render_page(outcome))
        click.echo(f"page: {html_path}", err=str(json_path) == "-")
