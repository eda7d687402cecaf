"""Tables for the terminal.

Names and reasons may come from other people's files: they are printed as plain text, without
control characters, and never as the console's markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from converters.report.numbers import (
    BYTES,
    Column,
    agreement_title,
    clean,
    format_bytes,
    format_number,
    metric_columns,
)
from converters.verify.outcome import Report
from edge_runtime.contract.manifest import Manifest, MinOs, Variant
from edge_runtime.contract.preprocess import Preprocess, ResizeExact
from edge_runtime.contract.tasks import task_name
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["describe_preprocess", "print_manifest", "print_report"]


class _Column(NamedTuple):
    """A column of a table; the lower its rank, the narrower the terminal that shows it."""

    rank: int
    title: str
    cells: list[str | Text]
    right: bool = True


def _print_table(console: Console, title: str | None, columns: list[_Column]) -> None:
    """Columns that do not fit the terminal are left out, those of the highest rank first."""
    endless = console.options.update(max_width=10_000)  # else every table fits, cut off
    shown = list(columns)
    table = _build(title, shown)
    while len(shown) > 2 and Measurement.get(console, endless, table).maximum > console.width:
        shown.remove(max(shown, key=lambda column: column.rank))
        table = _build(title, shown)
    console.print(table)
    if len(shown) < len(columns):
        left_out = [column.title for column in columns if column not in shown]
        console.print(Text(f"no room for: {', '.join(left_out)}", style="dim"))


def _build(title: str | None, columns: list[_Column]) -> Table:
    table = Table(title=Text(title) if title else None, box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def print_report(
    report: Report, console: Console, seconds: Mapping[str, float] | None = None
) -> None:
    """Each variant and check of a proof; reasons below the table, each with its name."""
    inputs = "seeds" if report.task == "generation" else "images"
    variants = report.variants
    columns = [_Column(0, "variant", [clean(entry.id) for entry in variants], right=False)]
    columns += [
        _Column(rank, figure.title, [figure.show(entry) for entry in variants])
        for rank, figure in _figures(report, seconds)
        if any(figure.value(entry) is not None for entry in variants)
    ]
    columns.append(_Column(1, "gate", [_gate(entry.passed) for entry in variants], right=False))
    title = clean(f"{report.bundle} {report.version}: {report.images} {inputs}")
    _print_table(console, title, columns)
    for entry in variants:
        for finding in entry.findings:
            name = f"[{clean(finding.name)}] "
            where = (clean(entry.id) + " ", "red")
            console.print(Text.assemble(where, (name, "bold red"), clean(finding.detail)))
    for check in report.checks:
        mark = Text("ok", style="green") if check.passed else Text("FAILED", style="red")
        console.print(Text.assemble(check.name, ": ", mark, ": ", clean(check.detail)))
    if report.reference_accuracy is not None:
        console.print(f"accuracy of the fp32 reference: {report.reference_accuracy:.4f}")


def _gate(passed: bool) -> Text:
    return Text("passed", style="green") if passed else Text("FAILED", style="red")


def _figures(report: Report, seconds: Mapping[str, float] | None) -> list[tuple[int, Column]]:
    """Rank and figure, from left to right."""
    found = [
        (2, Column("size", BYTES, lambda v: v.size_bytes)),
        (7, Column("ratio", ".2f", lambda v: v.size_ratio)),
        (3, Column("SQNR dB", ".1f", lambda v: v.sqnr_db)),
    ]
    title = agreement_title(report.task)
    if title is not None:
        found.append((4, Column(title, ".1%", lambda v: v.agreement)))
    found += [(6, column) for column in metric_columns(report)]
    found += [
        (8, Column("worst dB", ".1f", lambda v: v.sqnr_db_min)),
        (10, Column("differ", "d", lambda v: v.disagreements)),
        (11, Column("RAM", BYTES, lambda v: v.peak_ram_bytes)),
        (9, Column("ms here", ".3g", lambda v: v.milliseconds)),
        (5, Column("accuracy", ".4f", lambda v: v.accuracy)),
    ]
    if seconds is not None:
        found.append((12, Column("made in s", ".1f", lambda v: seconds.get(v.id))))
    return found


def describe_preprocess(record: Preprocess) -> str:
    """One line: ``shorter side 256, center 224x224, RGB, (x/255 - mean) / std``."""
    parts = []
    if isinstance(record.resize, ResizeExact):
        parts.append(f"resize to {record.resize.height}x{record.resize.width}")
    else:
        parts.append(f"shorter side to {record.resize.size}")
    parts[-1] += f" ({record.resize.algorithm})"
    if record.crop is not None:
        parts.append(f"center {record.crop.height}x{record.crop.width}")
    if record.flip_horizontal:
        parts.append("mirrored")
    table = record.normalization
    parts.append(record.color)
    parts.append(f"(x/{table.scale:g} - {list(table.mean)}) / {list(table.std)}")
    return ", ".join(parts)


def print_manifest(manifest: Manifest, console: Console) -> None:
    """What is in a bundle."""
    console.print(Text(f"{manifest.name} {manifest.version}", style="bold"))
    labels = f", {manifest.labels.count} labels" if manifest.labels else ""
    console.print(Text(f"task: {task_name(manifest.task)}{labels}"))
    if manifest.preprocess is not None:
        console.print(Text(f"pre-processing: {describe_preprocess(manifest.preprocess)}"))
    origin = manifest.provenance
    made = f"from {origin.source}, weights {origin.weights}, nearfar {origin.nearfar}"
    console.print(Text(clean(made)))
    if origin.calibration is not None:
        used = origin.calibration
        console.print(Text(clean(f"calibrated on {used.images} {used.data}: {used.method}")))
    _print_table(console, None, _manifest_columns(manifest.variants))
    for variant in manifest.variants:
        for reason in variant.quality.reasons:
            console.print(Text.assemble((clean(variant.id), "red"), ": ", clean(reason)))
    shipped = sum(entry.size_bytes for entry in manifest.files if entry.ship)
    private = sum(entry.size_bytes for entry in manifest.files if not entry.ship)
    console.print(f"{format_bytes(shipped)} to ship, {format_bytes(private)} for verification only")


def _manifest_columns(variants: Sequence[Variant]) -> list[_Column]:
    yes, no = Text("yes", style="green"), Text("no", style="red")
    quality = [variant.quality for variant in variants]
    return [
        _Column(0, "variant", [clean(v.id) for v in variants], right=False),
        _Column(6, "input", [_tensor(v.inputs[0]) for v in variants], right=False),
        _Column(8, "runtime", [clean(v.min_runtime) for v in variants], right=False),
        _Column(5, "runs on", [_systems(v.min_os) for v in variants], right=False),
        _Column(2, "size", [format_bytes(v.size_bytes) for v in variants]),
        _Column(7, "RAM", [format_bytes(v.peak_ram_bytes) for v in variants]),
        _Column(3, "SQNR dB", [f"{q.sqnr_db_mean:.1f}" for q in quality]),
        _Column(4, "agree", [format_number(q.agreement, ".2%") for q in quality]),
        _Column(9, "judged on", [f"{q.images} {q.data}" for q in quality], right=False),
        _Column(1, "ships", [yes if v.ship else no for v in variants], right=False),
    ]


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.dtype} {'x'.join(map(str, spec.shape))} {spec.layout}"


def _systems(least: MinOs) -> str:
    parts = []
    if least.android_api is not None:
        parts.append(f"Android API {least.android_api}")
    if least.ios is not None:
        parts.append(f"iOS {least.ios}")
    return ", ".join(parts) or "-"
