"""Where each file loses its accuracy: a table of layers for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from converters.report.numbers import clean
from converters.verify.outcome import Report

__all__ = ["print_layers"]

_SHOWN = 12


def print_layers(report: Report, console: Console) -> None:
    """The layers that lose most, in the model's order, one column a variant."""
    ids = sorted(report.layers)
    if not ids:
        console.print("no layer could be compared: bisection reads tflite and coreml files")
        return
    order: dict[str, str] = {}
    for name in ids:
        for row in report.layers[name]:
            order.setdefault(row.name, row.op)
    figures = {name: {row.name: row.sqnr_db for row in report.layers[name]} for name in ids}
    worst = sorted(order, key=lambda layer: min(figures[name].get(layer, 1e9) for name in ids))
    shown = set(worst[:_SHOWN])
    table = Table(title=f"SQNR in dB of the {len(shown)} layers that lose most", box=SIMPLE)
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    for name in ids:
        table.add_column(name, justify="right")
    for layer, op in order.items():
        if layer in shown:
            cells = [
                f"{figures[name][layer]:.1f}" if layer in figures[name] else "-" for name in ids
            ]
            table.add_row(Text(clean(layer)), Text(clean(op)), *cells)
    console.print(table)
