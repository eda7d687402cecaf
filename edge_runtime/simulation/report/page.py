"""The HTML page of a simulation: one file, no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

import msgspec

from edge_runtime.simulation.report.cells import Cell, Page, colors
from edge_runtime.simulation.report.charts import (
    latency_chart,
    reliability_chart,
    tradeoff_chart,
    utility_chart,
)
from edge_runtime.simulation.report.style import STYLE
from edge_runtime.simulation.report.tables import (
    cells_table,
    heat_table,
    key,
    policies_table,
    skipped_table,
    table,
    traces_table,
)
from edge_runtime.simulation.report.timeline import timeline_chart
from edge_runtime.simulation.scores import DEFINITIONS, LOCAL_ONLY, ORACLE, is_bound

__all__ = ["render_page"]

_CSP: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""A second wall behind the escaping: the page may run no script and load nothing."""
_SESSION_KEY: Final = (
    '<p class="key soft"><span><span class="swatch cloud"></span>answered in the cloud</span>'
    '<span><span class="swatch held"></span>uploaded, answered on the device</span>'
    '<span><span class="swatch device"></span>on the device alone</span>'
    '<span><span class="swatch wrong"></span>late or no answer</span></p>'
)


def _note(markup: str) -> str:
    return f'<p class="soft">{markup}</p>'


def render_page(page: Page) -> str:
    """The page as text."""
    shades = colors(page.cells)
    first = page.cells[0].result
    traces = len(first.traces)
    seeds = len(first.seeds)
    one = len(page.cells) == 1
    what = page.cells[0].name if one else f"{len(page.cells)} cells"
    parts = [
        f"<h1>Simulated offloading: {escape(what)}</h1>",
        _note(
            f"{traces} uplink traces, {seeds} {'seed' if seeds == 1 else 'seeds'}, {len(shades)} "
            "policies. Every policy meets the same requests on the same links. A figure is a mean "
            "over traces, each weighing the same; intervals are 95 %, over traces drawn again."
        ),
    ]
    parts.append(_verdict(page.cells))
    if not one:
        parts += _overview(page.cells, shades)
        parts.append("<h2>Each cell</h2>")
    for cell in page.cells:
        parts += _cell(cell, shades, single=one)
    if page.session is not None:
        parts += _session(page)
    parts += _appendix(page)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        f"<title>nearfar simulate: {escape(what)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(cells: Sequence[Cell]) -> str:
    """Which policy that a device can run is best, before and after prices, over all cells."""
    runnable = [policy for policy in cells[0].scores if not is_bound(policy)]

    def mean(policy: str, field: str) -> float:
        values: list[float] = [getattr(cell.scores[policy], field) for cell in cells]
        return sum(values) / len(values)

    right = max(runnable, key=lambda policy: mean(policy, "accuracy_in_deadline"))
    net = max(runnable, key=lambda policy: mean(policy, "net_utility"))
    where = "" if len(cells) == 1 else ", mean of the cells"
    return (
        f"<p>Most often right in time: <b>{escape(right)}</b> "
        f"({100 * mean(right, 'accuracy_in_deadline'):.1f} %{where}). Best after the price of "
        f"bytes and energy: <b>{escape(net)}</b>. The device alone is right in time in "
        f"{100 * mean(LOCAL_ONLY, 'accuracy_in_deadline'):.1f} %, a clairvoyant one in "
        f"{100 * mean(ORACLE, 'accuracy_in_deadline'):.1f} %.</p>"
    )


def _overview(cells: Sequence[Cell], shades: dict[str, str]) -> list[str]:
    parts = [
        "<h2>Gain capture in every cell, %</h2>",
        _note(
            "The share of the accuracy that a clairvoyant device would win over one that never "
            "offloads."
        ),
        cells_table(cells, shades, "gain_capture"),
        "<h2>Net gain capture in every cell, %</h2>",
        _note("The same, after the price of bytes and joules."),
        cells_table(cells, shades, "net_gain_capture"),
    ]
    families: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        families.setdefault((cell.result.device, cell.result.arrivals), []).append(cell)
    several = {
        family: found
        for family, found in families.items()
        if len({cell.result.deadline_ms for cell in found}) > 1
    }
    if several:
        parts.append("<h2>Net utility against the deadline</h2>")
        parts.append(
            _note(
                "Right in time, in points of a hundred, less the price of bytes and joules. Lines "
                "that leave the plot below do worse than a device that never offloads."
            )
        )
    for (device, arrivals), found in several.items():
        parts.append(f"<h3>{escape(device)}, {escape(arrivals)}</h3>")
        parts.append(f"<figure>{utility_chart(found, shades)}</figure>")
    if several:
        parts.append(key(shades))
    return parts


def _cell(cell: Cell, shades: dict[str, str], *, single: bool) -> list[str]:
    present = {policy: css for policy, css in shades.items() if policy in cell.scores}
    classes: dict[str, int] = {}
    for found in cell.scores.values():
        classes |= {group: figures.traces for group, figures in found.by_class.items()}
    parts = [
        "<h3>What each policy achieved</h3>",
        policies_table(cell, present),
        _note(
            "Gain: (right in time &minus; LocalOnly) / (Oracle &minus; LocalOnly). Net gain: the "
            "same less 0.05 per MB and 0.002 per joule; saver: 0.5 and 0.01."
        ),
    ]
    tradeoff = tradeoff_chart(cell, present)
    if tradeoff:
        parts += [
            "<h3>Gain, waiting and bytes</h3>",
            f"<figure>{tradeoff}</figure>",
            _note("A larger point uploads more. Up and left is better."),
        ]
    parts += [
        "<h3>How long answers take</h3>",
        f"<figure>{latency_chart(cell, present)}</figure>",
        key(present),
        "<h3>Gain capture by class of link, %</h3>",
        heat_table(cell.scores, classes),
        _note(
            "In parentheses: traces of the class. Where even the Oracle gains less than half a "
            "point there is no share to state; the bytes per request show the cost."
        ),
    ]
    if any(found.brier is not None for found in cell.scores.values()):
        parts += [
            "<h3>Is a predicted 80 % an 80 %?</h3>",
            f"<figure>{reliability_chart(cell.scores, present)}</figure>",
            key({name: css for name, css in present.items() if _predicts(cell, name)}),
            _note(
                "Each point is a tenth of the scale with at least 20 predictions; a larger one "
                "holds more. On the dotted line, predictions are kept exactly."
            ),
        ]
    if single:
        return parts
    return [f"<details><summary><b>{escape(cell.name)}</b></summary>", *parts, "</details>"]


def _predicts(cell: Cell, policy: str) -> bool:
    return cell.scores[policy].brier is not None and not is_bound(policy)


def _session(page: Page) -> list[str]:
    session = page.session
    assert session is not None  # noqa: S101  # checked by the caller
    return [
        f"<h2>A minute of {escape(session.run.policy)}</h2>",
        _note(
            f"{escape(page.cells[0].name)}; trace {escape(session.trace.name)} "
            f"({escape(session.trace.group)}), seed {session.run.seed}. The gray area is the "
            "uplink&rsquo;s capacity; a gap is an outage."
        ),
        f"<figure>{timeline_chart(session)}</figure>",
        _SESSION_KEY,
    ]


def _appendix(page: Page) -> list[str]:
    constants = msgspec.json.format(msgspec.json.encode(page.cells[0].result.constants), indent=2)
    machine = ", ".join(f"{name} {value}" for name, value in page.machine.items())
    parts = [
        "<h2>What was simulated</h2>",
        f"<details><summary>Traces used: {len(page.folder.traces)}</summary>",
        traces_table(page.folder),
        "</details>",
    ]
    if page.folder.skipped:
        parts += [
            f"<details><summary>Not used: {len(page.folder.skipped)}</summary>",
            skipped_table(page.folder),
            "</details>",
        ]
    rows = [
        [escape(name), f'<td class="text">{escape(text)}</td>']
        for name, text in DEFINITIONS.items()
    ]
    parts += [
        "<details><summary>What the figures mean</summary>",
        table(["figure", "meaning"], rows),
        "</details>",
        "<details><summary>Constants of the world</summary>",
        f"<pre>{escape(constants.decode())}</pre>",
        "</details>",
        _note(
            f"Run: {page.run_s:.0f} s. {escape(machine)}. The link is a fluid model of TCP over "
            "the recorded rates, and the models&rsquo; confidence is drawn, not measured: compare "
            "policies with each other, not with a phone."
        ),
    ]
    return parts
