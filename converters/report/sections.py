"""The parts of the HTML page that speak in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.report.charts import layer_chart
from converters.report.markup import DASH, tag, text
from converters.report.numbers import (
    BYTES,
    Column,
    agreement_title,
    format_number,
    metric_columns,
)
from converters.report.records import LayerRow
from converters.verify.gates import Gate, Gates
from converters.verify.outcome import Report, VariantReport

__all__ = ["checks_section", "layers_section", "variants_section", "verdict_section"]

_WORST_LAYERS = 5


# The verdict ---------------------------------------------------------------------------


def verdict_section(report: Report) -> str:
    """The answer in one sentence, with every reason; the page begins with it."""
    total = len(report.variants)
    missing = [entry for entry in report.variants if entry.backend_missing]
    failed = [entry for entry in report.variants if not entry.passed and not entry.backend_missing]
    checks = [check for check in report.checks if not check.passed]
    reasons = [
        f"<li><b>{text(entry.id)}</b> {tag(finding.name)} {text(finding.detail)}</li>"
        for entry in (*failed, *missing)
        for finding in entry.findings
    ]
    reasons += [f"<li>{tag(check.name)} {text(check.detail)}</li>" for check in checks]
    kind = "failed-box" if failed or checks else "missing-box" if missing else "passed"
    parts = []
    if failed:
        parts.append(f"{len(failed)} of {total} variants failed and must not ship")
    if checks:
        parts.append(
            "a check of the bundle failed" if len(checks) == 1 else f"{len(checks)} checks failed"
        )
    if missing:
        parts.append(f"{len(missing)} of {total} could not be run: no interpreter is installed")
    sentence = "; ".join(parts) or (
        "The variant passed its gate" if total == 1 else f"All {total} variants passed their gates"
    )
    sentence = sentence[0].upper() + sentence[1:] + "."
    listed = f"<ul>{''.join(reasons)}</ul>" if reasons else ""
    return f'<div class="verdict {kind}"><p class="big">{text(sentence)}</p>{listed}</div>'


# The variants --------------------------------------------------------------------------


def variants_section(
    report: Report, seconds: Mapping[str, float] | None, gates: Gates | None
) -> str:
    """A row a variant, each bound under the figure that it bounds; findings below."""
    columns = _columns(report, seconds)
    head = "".join(
        f"<th>{text(title)}</th>" for title in ("variant", "gate", *(c.title for c in columns))
    )
    rows = []
    for entry in report.variants:
        gate = gates.get(entry.precision) if gates is not None else None  # type: ignore[call-overload]
        cells = "".join(_cell(column, entry, gate) for column in columns)
        rows.append(f"<tr><td><b>{text(entry.id)}</b></td><td>{_gate(entry)}</td>{cells}</tr>")
        if entry.findings:
            reasons = "".join(
                f"<p>{tag(finding.name)} {text(finding.detail)}</p>" for finding in entry.findings
            )
            rows.append(f'<tr class="why"><td colspan="{len(columns) + 2}">{reasons}</td></tr>')
    inputs = "seeds" if report.task == "generation" else "images"
    return (
        "<h2>Variants</h2>"
        f'<p class="soft">Each saved file was loaded by the interpreter that serves it and '
        f"compared with the fp32 model on {report.images} {inputs}.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _gate(entry: VariantReport) -> str:
    if entry.passed:
        return '<span class="good">passed</span>'
    if entry.backend_missing:
        return '<span class="warn">not run</span>'
    return '<span class="bad">failed</span>'


def _columns(report: Report, seconds: Mapping[str, float] | None) -> list[Column]:
    """Every figure that some variant has."""
    columns = [
        Column("size", BYTES, lambda v: v.size_bytes),
        Column("of fp32 size", ".2f", lambda v: v.size_ratio),
        Column("SQNR dB", ".1f", lambda v: v.sqnr_db),
        Column("worst dB", ".1f", lambda v: v.sqnr_db_min),
    ]
    title = agreement_title(report.task)
    if title is not None:
        columns.append(Column(title, ".1%", lambda v: v.agreement))
        columns.append(Column("where sure", ".1%", lambda v: v.confident_agreement))
    columns += metric_columns(report)
    columns += [
        Column("accuracy", ".1%", lambda v: v.accuracy),
        Column("in 8 bits", ".0%", lambda v: v.quantized_share),
        Column("ms here", ".3g", lambda v: v.milliseconds),
    ]
    if seconds is not None:
        columns.append(Column("made in s", ".1f", lambda v: seconds.get(v.id)))
    columns.append(Column("RAM", BYTES, lambda v: v.peak_ram_bytes))
    return [c for c in columns if any(c.value(entry) is not None for entry in report.variants)]


# Column title -> the field of ``Gate`` that bounds it.
_BOUNDS = {
    "of fp32 size": "size_ratio",
    "SQNR dB": "sqnr_db_mean",
    "worst dB": "sqnr_db_min",
    "agree": "agreement",
    "boxes": "agreement",
    "pixels": "agreement",
    "where sure": "confident_agreement",
    "PSNR dB": "psnr_db",
    "in 8 bits": "quantized_share",
}


def _cell(column: Column, entry: VariantReport, gate: Gate | None) -> str:
    value = column.value(entry)
    shown = DASH if value is None else text(column.show(entry))
    limit = getattr(gate, _BOUNDS[column.title]) if gate and column.title in _BOUNDS else None
    if limit is None or (column.title == "in 8 bits" and limit == 0.0):
        return f"<td>{shown}</td>"
    at_most = column.title == "of fp32 size"
    over = value is not None and (value > limit if at_most else value < limit)
    # A variant may pass a hair below a bound: some disagreements are allowed however few images.
    kind = ' class="missed"' if over and not entry.passed else ""
    bound = (
        f"{'&le;' if at_most else '&ge;'} {text(format_number(limit, _plain(column.form, limit)))}"
    )
    return f"<td{kind}>{shown}<small>{bound}</small></td>"


def _plain(form: str, limit: float) -> str:
    """Bounds are round numbers: no more digits than they have."""
    if form.endswith("%"):
        return ".0%" if round(100 * limit, 6) % 1 == 0 else ".1%"
    return "g"


def checks_section(report: Report) -> str:
    """What was asked of the bundle as a whole."""
    rows = "".join(
        f"<tr><td><b>{text(check.name)}</b></td>"
        f'<td><span class="{"good" if check.passed else "bad"}">'
        f"{'ok' if check.passed else 'failed'}</span></td>"
        f'<td class="text">{text(check.detail)}</td></tr>'
        for check in report.checks
    )
    if not rows:
        return ""
    return (
        "<h2>Checks of the bundle</h2>"
        f'<div class="scroll"><table class="list"><tbody>{rows}</tbody></table></div>'
    )


# Layers --------------------------------------------------------------------------------


def layers_section(report: Report, layers: Mapping[str, Sequence[LayerRow]]) -> str:
    """SQNR of each layer; variants that failed are open, worst first."""
    known = [entry for entry in report.variants if layers.get(entry.id)]
    if not known:
        return ""
    known.sort(key=lambda entry: (entry.passed, min(row.sqnr_db for row in layers[entry.id])))
    blocks = []
    for number, entry in enumerate(known):
        rows = layers[entry.id]
        count = min(_WORST_LAYERS, 1 + len(rows) // 4)
        order = sorted(range(len(rows)), key=lambda k: rows[k].sqnr_db)[:count]
        listed = "".join(
            f"<li><code>{text(rows[k].name)}</code> ({text(rows[k].op)}): "
            f"{rows[k].sqnr_db:.1f} dB</li>"
            for k in order
        )
        chart = layer_chart(f"SQNR of each layer of {entry.id}", rows, order)
        is_open = " open" if number == 0 or not entry.passed else ""
        worst = rows[order[0]]
        blocks.append(
            f"<details{is_open}><summary>{text(entry.id)} <span>worst layer "
            f"{worst.sqnr_db:.1f} dB: {text(worst.name)}</span></summary>"
            f'<div class="layers"><figure>{chart}</figure><ol>{listed}</ol></div></details>'
        )
    return (
        "<h2>Where the precision goes</h2>"
        '<p class="soft">Each layer&rsquo;s output in the converted model against the same '
        "layer of the fp32 model; the least close are red and listed.</p>" + "".join(blocks)
    )
