"""What a terminal shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.serving.figures.base import Finding

__all__ = ["print_finding", "print_verdict"]


def print_finding(finding: Finding) -> None:
    """One figure as a table: a row a server and round."""
    print(f"\n{finding.title}", flush=True)
    columns = list(dict.fromkeys(key for row in finding.rows for key in row if key != "server"))
    table = [["server", *columns]]
    table += [
        [str(row["server"]), *(_cell(row.get(column)) for column in columns)]
        for row in finding.rows
    ]
    widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(cells).rstrip(), flush=True)
    if finding.note:
        print(f"  {finding.note}", flush=True)
    for demand, met in finding.passed.items():
        print(f"  {'met    ' if met else 'NOT MET'} {demand}", flush=True)


def print_verdict(
    passed: Mapping[str, bool], skipped: Mapping[str, str], left_out: Sequence[str], path: Path
) -> None:
    """The last lines."""
    failed = [demand for demand, met in passed.items() if not met]
    print(f"\n{len(passed) - len(failed)} of {len(passed)} demands met; {path}")
    for demand in failed:
        print(f"  not met: {demand}")
    if left_out:
        print(f"  no time for: {', '.join(left_out)}")
    if skipped:
        print(f"  skipped: {', '.join(f'{peer} ({why})' for peer, why in skipped.items())}")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{count}" for key, count in value.items())
    return str(value)
