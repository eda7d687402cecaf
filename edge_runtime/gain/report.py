"""A gain for people: a few lines on the terminal, and a page with three pictures."""

from __future__ import annotations

from typing import Final

import msgspec

from edge_runtime.gain.model import GainFigures
from edge_runtime.gain.scores import Calibration
from edge_runtime.gain.store import GainRecord
from edge_runtime.page import Plot, linear_ticks, page, table, text

__all__ = ["describe", "to_document", "to_html"]

_FULL_BIN: Final = 10
"""Images of a bin that a line may go through: fewer say little."""


def to_document(record: GainRecord, path: str) -> dict[str, object]:
    """The record as JSON values, and where it was written."""
    return {"path": path, **msgspec.to_builtins(record)}


def describe(record: GainRecord) -> list[str]:
    """What was found, in lines of at most 80 columns where names are short."""
    provenance = record.provenance
    lines = [
        (
            f"{record.variant} of {record.bundle} and {record.cloud.name}@{record.cloud.version}, "
            f"{provenance.images} images"
        ),
    ]
    if record.cloud_right is not None:
        lines.append(
            f"  right          device {record.local_right:.1%}, cloud {record.cloud_right:.1%}, "
            f"same answer {record.agreement:.1%}"
        )
    else:
        lines.append(
            f"  agreement      {record.agreement:.1%} ({record.agreement_metric}); who is right is "
            "a prior"
        )
    if record.calibration is not None:
        lines += _calibration_lines(record.calibration)
    lines.append(f"  gain           {_gain_line(record)}")
    if record.held_out is not None and record.held_out_prior is not None:
        lines.append(
            f"  held-out error {record.held_out.error:.3f} "
            f"(the prior's: {record.held_out_prior.error:.3f})"
        )
        lines += _spending_lines(record.held_out, record.held_out_prior)
    return lines


def _calibration_lines(found: Calibration) -> list[str]:
    name = "isotonic"
    if found.temperature is not None:
        name = f"temperature {found.temperature:.2f}"
    before, after = found.before, found.after
    return [
        (
            f"  confidence     {name}: ECE {before.ece:.3f} -> {after.ece:.3f}, "
            f"Brier {before.brier:.3f} -> {after.brier:.3f} (held out)"
        )
    ]


def _gain_line(record: GainRecord) -> str:
    curve = record.curve
    if len(record.knots) == 1:
        return f"{curve.signed(0.5):+.3f} at any confidence"
    return ", ".join(f"{curve.signed(c):+.3f} at {c:g}" for c in (0.3, 0.5, 0.7, 0.9, 0.99))


def _spending_lines(curve: GainFigures, prior: GainFigures) -> list[str]:
    lines = ["  held out, uploading where the gain is above a price:"]
    lines.append("    price   by this curve             by the prior")
    for one, other in zip(curve.spending, prior.spending, strict=True):
        lines.append(
            f"    {one.price:<7g} {one.uploaded:6.1%} up, {one.right:6.1%} right   "
            f"{other.uploaded:6.1%} up, {other.right:6.1%} right"
        )
    return lines


def to_html(record: GainRecord) -> str:
    """A self-contained page."""
    parts = [f'<p class="big">{text(_verdict(record))}</p>']
    parts.append(f'<p class="soft">{text(_origin(record))}</p>')
    figures = [("What the cloud's answer is worth", _gain_chart(record))]
    figures.append(("How often each side is right", _right_chart(record)))
    if record.calibration is not None:
        figures.append(("What the confidence means", _reliability_chart(record.calibration)))
    if record.held_out is not None and record.held_out_prior is not None:
        chart = _spending_chart(record.held_out, record.held_out_prior, record.local_right)
        figures.append(("Right answers for uploads", chart))
    parts.append('<div class="grid">')
    parts += [f"<div><h2>{text(title)}</h2>{chart}</div>" for title, chart in figures]
    parts.append("</div>")
    if record.calibration is not None:
        parts.append(_calibration_table(record.calibration))
    if record.held_out is not None and record.held_out_prior is not None:
        parts.append(_spending_table(record.held_out, record.held_out_prior))
    title = f"{record.variant} and {record.cloud.name}@{record.cloud.version}"
    return page("nearfar gain", title, "\n".join(parts))


def _verdict(record: GainRecord) -> str:
    if record.cloud_right is None:
        return f"Both say the same in {record.agreement:.1%}; who is right is a prior."
    return (
        f"The device is right in {record.local_right:.1%}, the cloud in {record.cloud_right:.1%}."
    )


def _origin(record: GainRecord) -> str:
    provenance = record.provenance
    split = "" if provenance.split is None else f", split {provenance.split}"
    return (
        f"{provenance.images} images{split} ({provenance.skipped} unreadable), "
        f"{record.bundle}, {record.task}, {provenance.date}, nearfar {provenance.nearfar}. "
        f"Agreement: {record.agreement_metric}. Data {provenance.data_sha256[:12]}, variant "
        f"{record.variant_sha256[:12]}, cloud model {record.cloud.sha256[:12]}."
    )


def _gain_chart(record: GainRecord) -> str:
    curve, prior = record.curve, record.prior
    steps = [number / 100 for number in range(101)]
    highest = max(max(curve.signed(c) for c in steps), max(prior.signed(c) for c in steps), 0.1)
    lowest = min(min(curve.signed(c) for c in steps), min(prior.signed(c) for c in steps), -0.05)
    plot = Plot("gain by confidence", (0, 1), (1.1 * lowest, 1.1 * highest))
    plot.axes(
        "confidence of the local answer",
        linear_ticks(0, 1),
        "cloud right - device right",
        linear_ticks(1.1 * lowest, 1.1 * highest),
    )
    plot.curve([(0, 0), (1, 0)], "even")
    plot.curve([(c, prior.signed(c)) for c in steps], "faint")
    plot.curve([(c, curve.signed(c)) for c in steps], "adaptive")
    for position, value in record.knots:
        plot.dot(position, value, "adaptive", f"{value:+.3f} at {position:.3f}", 3)
    return (
        f"<figure>{plot.svg()}<figcaption class='key'><span class='adaptive'></span>this pair"
        "<span class='faint'></span>the prior</figcaption></figure>"
    )


def _right_chart(record: GainRecord) -> str:
    curve, steps = record.curve, [number / 100 for number in range(101)]
    plot = Plot("share of right answers of both sides by confidence", (0, 1), (0, 1))
    ticks = linear_ticks(0, 1)
    plot.axes("confidence of the local answer", ticks, "share that is right", ticks)
    plot.curve([(0, 0), (1, 1)], "even")
    plot.curve([(c, curve.local(c)) for c in steps], "device")
    plot.curve([(c, curve.cloud(c)) for c in steps], "cloud")
    row = plot.row(0.05)
    for node in curve.nodes:
        plot.dot(node, 0.03, "faint", f"an eighth of the images lies around {node:.3f}", 3)
    if curve.nodes:
        plot.label(plot.column(curve.nodes[0]), row - 8, "an eighth of the images each")
    return (
        f"<figure>{plot.svg()}<figcaption class='key'><span class='device'></span>device"
        "<span class='cloud'></span>cloud</figcaption></figure>"
    )


def _reliability_chart(found: Calibration) -> str:
    plot = Plot("share of right answers by confidence", (0, 1), (0, 1))
    ticks = linear_ticks(0, 1)
    plot.axes("confidence", ticks, "share that is right", ticks)
    plot.curve([(0, 0), (1, 1)], "even")
    for bins, kind in ((found.before.bins, "device"), (found.after.bins, "adaptive")):
        full = [(one.confidence, one.right) for one in bins if one.images >= _FULL_BIN]
        if len(full) > 1:
            plot.curve(full, kind)
        for one in bins:
            tooltip = f"{one.images} images: {one.confidence:.3f} confident, {one.right:.3f} right"
            radius = 2.5 + min(one.images, 400) ** 0.5 / 5
            plot.dot(one.confidence, one.right, kind, tooltip, radius)
    return (
        f"<figure>{plot.svg()}<figcaption class='key'><span class='device'></span>as reported"
        "<span class='adaptive'></span>calibrated on the other half; the line leaves out bins of "
        f"fewer than {_FULL_BIN} images</figcaption></figure>"
    )


def _spending_chart(curve: GainFigures, prior: GainFigures, local_right: float) -> str:
    every = [*curve.spending, *prior.spending]
    low = min(local_right, *(one.right for one in every)) * 100
    high = max(one.right for one in every) * 100
    margin = max(0.15 * (high - low), 0.5)
    bounds = (max(0.0, low - margin), min(100.0, high + margin))
    widest = min(100.0, max(10.0, 115.0 * max(one.uploaded for one in every)))
    plot = Plot("right answers for uploads", (0, widest), bounds)
    plot.axes("images uploaded, %", linear_ticks(0, widest), "right, %", linear_ticks(*bounds))
    for figures, kind in ((prior, "faint"), (curve, "adaptive")):
        points = sorted((one.uploaded, one.right, one.price) for one in figures.spending)
        plot.curve([(0.0, 100 * local_right), *((100 * u, 100 * r) for u, r, _ in points)], kind)
        for uploaded, right, price in points:
            tooltip = f"price {price:g}: {uploaded:.1%} uploaded, {right:.1%} right"
            plot.dot(100 * uploaded, 100 * right, kind, tooltip)
    return (
        f"<figure>{plot.svg()}<figcaption class='key'><span class='adaptive'></span>this pair, "
        "held out<span class='faint'></span>the prior; a dot for each price</figcaption></figure>"
    )


def _calibration_table(found: Calibration) -> str:
    name: str = found.method
    if found.temperature is not None:
        name = f"temperature {found.temperature:.3f}"
    rows = [
        [label, f"{one.ece:.4f}", f"{one.brier:.4f}", f"{one.nll:.4f}"]
        for label, one in (("as reported", found.before), (f"{name}, held out", found.after))
    ]
    return "<h2>Calibration</h2>" + table(["confidence", "ECE", "Brier", "log loss"], rows)


def _spending_table(curve: GainFigures, prior: GainFigures) -> str:
    rows = [
        [
            f"{one.price:g}",
            f"{one.uploaded:.1%}",
            f"{one.right:.1%}",
            f"{other.uploaded:.1%}",
            f"{other.right:.1%}",
        ]
        for one, other in zip(curve.spending, prior.spending, strict=True)
    ]
    header = ["price of an upload", "uploaded", "right", "uploaded (prior)", "right (prior)"]
    return "<h2>On images it has not seen</h2>" + table(header, rows)
