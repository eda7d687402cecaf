"""Tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from edge_runtime.simulation.bootstrap import Estimate
from edge_runtime.simulation.report.cells import Cell, is_drawn
from edge_runtime.simulation.scores import PolicyScore
from edge_runtime.simulation.traces import TraceFolder

__all__ = [
    "DASH",
    "cells_table",
    "heat_table",
    "key",
    "policies_table",
    "skipped_table",
    "table",
    "traces_table",
]

DASH = "&ndash;"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], css_class: str = "") -> str:
    """A table that scrolls sideways by itself.

    Header and cells are markup; a cell may bring its own ``td``.
    """
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    kind = f' class="{css_class}"' if css_class else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>{body}</table></div>'


def _cell(markup: str) -> str:
    return markup if markup.startswith("<td") else f"<td>{markup}</td>"


def key(colors: Mapping[str, str]) -> str:
    """Which color is which policy; the gray ones share an entry."""
    entries = [
        f'<span><span class="swatch {css}"></span>{escape(policy)}</span>'
        for policy, css in colors.items()
        if css != "rest" and is_drawn(policy)
    ]
    rest = [policy for policy, css in colors.items() if css == "rest"]
    if rest:
        entries.append(f'<span><span class="swatch"></span>{escape(", ".join(rest))}</span>')
    return f'<p class="key soft">{"".join(entries)}</p>'


def policies_table(cell: Cell, colors: Mapping[str, str]) -> str:
    """Every policy's figures in one cell."""
    rows = [
        [
            f'<span class="swatch {colors[policy]}"></span>{escape(policy)}',
            _with_interval(found.gain_capture),
            _with_interval(found.net_gain_capture),
            _percent(found.net_gain_capture_saver.mean),
            f"{100 * found.accuracy_in_deadline:.2f}",
            f"{100 * found.miss_rate:.2f}",
            _number(found.mean_ms),
            _number(found.p95_ms),
            f"{found.kb_per_request:.1f}",
            f"{found.wasted_kb_per_request:.1f}",
            f"{found.joules_per_request:.2f}",
            f"{100 * found.offload_share:.1f}",
            _number(found.brier, 3),
            _number(found.decision_us, 1),
        ]
        for policy, found in cell.scores.items()
    ]
    header = [
        "policy", "gain<br>%", "net gain<br>%", "net, saver<br>%", "right<br>in time %",
        "late or<br>none %", "mean<br>ms", "p95<br>ms", "kB", "wasted<br>kB", "J",
        "offload<br>%", "Brier", "decision<br>p99 &micro;s",
    ]  # fmt: skip
    return table(header, rows)


def heat_table(scores: Mapping[str, PolicyScore], classes: Mapping[str, int]) -> str:
    """Gain capture by policy and class; where nothing can be gained, the bytes it cost."""
    rows = [
        [escape(policy), *(_heat_cell(found, group) for group in classes)]
        for policy, found in scores.items()
    ]
    header = ["policy", *(f"{escape(group)}<br>({count})" for group, count in classes.items())]
    return table(header, rows, "heat")


def _heat_cell(found: PolicyScore, group: str) -> str:
    """A cell whose background says how good it is."""
    figures = found.by_class[group]
    gain = figures.gain_capture
    if gain is None:
        return f"<small>{figures.kb_per_request:.1f} kB</small>"
    color, strength = ("up", gain) if gain >= 0 else ("down", -gain)
    alpha = round(min(max(strength, 0.0), 1.0) ** 2 * 0.62, 3)
    return f'<td style="background:rgba(var(--{color}),{alpha})">{100 * gain:.0f}</td>'


def cells_table(cells: Sequence[Cell], colors: Mapping[str, str], field: str) -> str:
    """One capture of each policy in each cell, and its least."""
    rows = []
    for policy, css in colors.items():
        found = [
            getattr(cell.scores[policy], field).mean if policy in cell.scores else None
            for cell in cells
        ]
        known = [value for value in found if value is not None]
        rows.append(
            [
                f'<span class="swatch {css}"></span>{escape(policy)}',
                *(_percent(value) for value in found),
                f"<b>{_percent(min(known))}</b>" if known else DASH,
            ]
        )
    header = [
        "policy",
        *("<br>".join(escape(word) for word in cell.name.split(", ")) for cell in cells),
        "worst",
    ]
    return table(header, rows)


def traces_table(folder: TraceFolder) -> str:
    """Where each trace came from."""
    rows = [
        [
            escape(source.name),
            escape(trace.group),
            escape(trace.radio),
            f"{source.seconds:.0f}",
            f"{source.median_mbps:g}",
            escape(source.file),
            escape(source.format),
            escape(source.direction),
            escape(source.rtt or "synthetic"),
            f'<td class="text">{escape("; ".join(source.notes)) or DASH}</td>',
        ]
        for trace, source in zip(folder.traces, folder.sources, strict=True)
    ]
    header = [
        "trace", "class", "radio", "seconds", "median Mbit/s", "file", "read as",
        "uplink says", "round trips", "notes",
    ]  # fmt: skip
    return table(header, rows)


def skipped_table(folder: TraceFolder) -> str:
    """What was not used, and why."""
    rows = [
        [escape(skipped.path), f'<td class="text">{escape(skipped.reason)}</td>']
        for skipped in folder.skipped
    ]
    return table(["file", "why not used"], rows)


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}"


def _number(value: float | None, digits: int = 0) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _with_interval(found: Estimate) -> str:
    if found.ci95 is None:
        return _percent(found.mean)
    low, high = found.ci95
    return f"{_percent(found.mean)}<small>{100 * low:.1f} to {100 * high:.1f}</small>"
