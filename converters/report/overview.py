"""The HTML page's charts: size against quality, and time."""

from __future__ import annotations

from collections.abc import Callable

from converters.report.charts import Bar, Point, bar_chart, scatter_chart
from converters.report.markup import FORMATS, format_class, text
from converters.report.numbers import agreement_title, format_bytes
from converters.verify.outcome import Report, VariantReport

__all__ = ["charts_section"]


def charts_section(report: Report) -> str:
    """Size against quality, and the time of one inference."""
    charts = []
    for title, label, unit, points, ceiling in _qualities(report):
        if points:
            drawn = scatter_chart(title, points, label + unit, ceiling=ceiling)
            charts.append(_chart(title, drawn))
    costs: list[tuple[str, Callable[[VariantReport], float | None], Callable[[float], str]]] = [
        (
            "Time of one inference on this machine, one thread",
            lambda v: v.milliseconds,
            lambda value: f"{value:.3g} ms",
        ),
        (
            "Memory for loading and one inference",
            lambda v: None if v.peak_ram_bytes is None else float(v.peak_ram_bytes),
            lambda value: format_bytes(int(value)),
        ),
    ]
    for title, cost, show in costs:
        bars = _bars(report, cost, show)
        if bars:
            charts.append(_chart(title, bar_chart(title, bars)))
    if not charts:
        return ""
    silent = [entry.id for entry in report.variants if entry.milliseconds is None]
    note = f'<p class="soft">Did not run: {text(", ".join(silent))}.</p>' if silent else ""
    return (
        "<h2>Size, quality and cost</h2>"
        '<p class="soft">Up and to the left is better. A ring is a variant that failed. '
        "Time and memory are of this machine: they compare files, they do not foretell a "
        "phone.</p>"
        f'<div class="grid">{"".join(charts)}</div>{_legend(report)}{note}'
    )


def _bars(
    report: Report,
    cost: Callable[[VariantReport], float | None],
    show: Callable[[float], str],
) -> list[Bar]:
    found = [(entry, cost(entry)) for entry in report.variants]
    return [
        Bar(label=entry.id, value=value, figure=show(value), kind=format_class(entry.format))
        for entry, value in found
        if value is not None
    ]


def _chart(title: str, svg: str) -> str:
    return f'<figure class="card"><h3>{text(title)}</h3>{svg}</figure>'


def _qualities(report: Report) -> list[tuple[str, str, str, list[Point], float | None]]:
    """Title, axis, unit, points and upper end: SQNR, and what the task itself measures."""
    found = [
        ("Size against SQNR", "SQNR", ", dB", _points(report, lambda v: v.sqnr_db, " dB"), None)
    ]
    if report.reference_accuracy is not None:
        title = f"Size against accuracy (fp32 model: {100 * report.reference_accuracy:.1f} %)"
        points = _points(report, lambda v: _percent(v.accuracy), " %")
        return [*found, (title, "accuracy", ", %", points, 100.0)]
    if agreement_title(report.task) is not None:
        what = {"detection": "boxes found again", "segmentation": "pixels with the same class"}
        title = f"Size against {what.get(report.task, 'agreement')}"
        points = _points(report, lambda v: _percent(v.agreement), " %")
        return [*found, (title, "agreement", ", %", points, 100.0)]
    points = _points(report, lambda v: v.metrics.get("psnr_db"), " dB")
    return [*found, ("Size against PSNR", "PSNR", ", dB", points, None)]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _points(
    report: Report, value: Callable[[VariantReport], float | None], unit: str
) -> list[Point]:
    points = []
    for entry in report.variants:
        figure = value(entry)
        if figure is None:
            continue
        points.append(
            Point(
                x=float(max(1, entry.size_bytes)),
                y=figure,
                label=entry.precision,
                kind=format_class(entry.format),
                failed=not entry.passed,
                tooltip=f"{entry.id}: {format_bytes(entry.size_bytes)}, {figure:.1f}{unit}"
                + ("" if entry.passed else ", failed"),
            )
        )
    return points


def _legend(report: Report) -> str:
    present = [name for name in FORMATS if any(v.format == name for v in report.variants)]
    keys = [
        f'<span><svg viewBox="0 0 12 12" aria-hidden="true"><circle class="{name}" cx="6" cy="6" '
        f'r="6"/></svg>{name}</span>'
        for name in present
    ]
    return f'<p class="key soft">{"".join(keys)}</p>'
