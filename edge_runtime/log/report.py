"""Replays and explained decisions as pages, with pictures."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from edge_runtime.log.entries import LogEntry, Step
from edge_runtime.log.reader import LogFile, Numbered
from edge_runtime.log.replay import Replay, WhatIf
from edge_runtime.log.terminal import given, headline, outcome_line
from edge_runtime.log.timeline import Timeline, drawable, elapsed_ms, numbers_of, timeline
from edge_runtime.page import Plot, linear_ticks, page, table, text
from edge_runtime.policies.reasons import sentence

__all__ = ["explain_html", "replay_html", "what_if_rows"]

_MOST_BARS: Final = 12


def explain_html(numbered: Numbered) -> str:
    """One request: a picture for each decision, then what was measured."""
    entry = numbered.entry
    parts = [f'<p class="big">{text(outcome_line(entry))}</p>']
    parts += [f'<p class="soft">{text(line)}</p>' for line in headline(numbered)]
    for number, (step, after_ms) in enumerate(zip(entry.steps, elapsed_ms(entry), strict=True), 1):
        decision = step.decision
        parts.append(f"<h2>{number}. {text(decision.action.value)}</h2>")
        parts.append(
            f"<p>{text(sentence(decision.reason))} (<code>{text(decision.reason)}</code>)"
            f"{f', asked {after_ms:.1f} ms after the first question' if after_ms > 0 else ''}.</p>"
        )
        if step.done is not None:
            parts.append(
                f'<p class="bad">Done instead: {text(step.done.action.value)}, '
                f"{text(sentence(step.done.reason))}.</p>"
            )
        parts.append(f'<p class="soft">{text(given(step))}</p>')
        parts.append(_expected_chart(timeline(step)))
        parts.append(_worth_chart(step))
        rows = [(name, f"{value:.6g}") for name, value in numbers_of(step)]
        parts.append(_details("All numbers of the decision", table(["number", "value"], rows)))
        situation = msgspec.to_builtins(step.situation)
        facts = [(name, msgspec.json.encode(value).decode()) for name, value in situation.items()]
        facts = [(name, value[:2000]) for name, value in facts]
        parts.append(_details("What it was made from", table(["field", "value"], facts, words=1)))
    if entry.steps:
        parts.append("<h2>What was measured</h2>")
        parts.append(_measured_chart(entry))
    return page("nearfar decision", f"Request {entry.request}", "\n".join(parts))


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{text(title)}</summary>{inside}</details>"


def _expected_chart(found: Timeline) -> str:
    ends = [found.deadline_ms]
    if found.local_ms is not None:
        ends.append(found.local_ms[2])
    if found.cloud is not None:
        ends += [value for value in found.cloud if value is not None]
    span = 1.06 * max(min(max(ends), 2.0 * max(found.deadline_ms, 1.0)), 1e-3)
    plot = Plot("what was expected of each side", (0, span), (0, 3), width=540, height=150, left=56)
    plot.axes("milliseconds after the question", linear_ticks(0, span))
    if found.local_ms is not None:
        start, median, late = found.local_ms
        plot.label(50, plot.row(2) + 4, "device", anchor="end", kind="label")
        plot.bar(0.0, start, 2, "faint", height=6)
        plot.bar(start, late, 2, "wait")
        plot.bar(start, median, 2, "device")
    if found.cloud is not None:
        plot.label(50, plot.row(1) + 4, "cloud", anchor="end", kind="label")
        early, middle, late_q = found.cloud
        if found.upload_ms is not None:
            plot.bar(0.0, found.upload_ms, 1, "faint", height=6)
        if early is not None and early < span:
            plot.bar(early, min(span if late_q is None else late_q, span), 1, "pale")
        if middle is not None and middle < span:
            plot.bar(middle, middle, 1, "cloud", height=18)
        if late_q is None or late_q > span:
            plot.label(plot.column(span), plot.row(1) - 14, "and later", anchor="end")
    _deadline(plot, found.deadline_ms)
    return (
        f"<figure class='lane'>{plot.svg()}<figcaption>Device: the line before it, its run to "
        "the median and to the 95th percentile. Cloud: the upload at the median rate, and when "
        "the answer was expected: 10 % to 90 %, the bar is the median.</figcaption></figure>"
    )


def _worth_chart(step: Step) -> str:
    """What was weighed: gain, price and its parts, and any table of numbers there is."""
    numbers = dict(numbers_of(step))
    shown = [name for name in ("expected_gain", "price") if numbers.get(name)]
    shown += [name for name in numbers if name.startswith("price_") and numbers[name]]
    shown += [name for name in numbers if "." in name]
    shown = shown[:_MOST_BARS]
    if not shown:
        return ""
    low = min(0.0, *(numbers[name] for name in shown))
    high = max(0.0, *(numbers[name] for name in shown))
    if not math.isfinite(high - low) or high == low:
        return ""
    margin = 0.17 * (high - low)  # for the figures
    high, low = high + margin, low - (margin if low < 0 else 0.0)
    height = 70 + 22 * len(shown)
    plot = Plot("what was weighed", (low, high), (0, len(shown)), width=540, height=height,
                left=150)  # fmt: skip
    plot.axes("right answers expected", linear_ticks(low, high))
    for number, name in enumerate(shown):
        row = len(shown) - number - 0.5
        value = numbers[name]
        kind = "adaptive" if name == "expected_gain" else "faint"
        plot.label(143, plot.row(row) + 4, name.replace("_", " "), anchor="end", kind="label")
        plot.bar(min(value, 0.0), max(value, 0.0), row, kind)
        plot.label(plot.column(max(value, 0.0)) + 5, plot.row(row) + 4, f"{value:.4g}")
    return f"<figure class='lane'>{plot.svg()}</figure>"


def _measured_chart(entry: LogEntry) -> str:
    timings = entry.outcome.timings
    deadline_ms = drawable(entry.steps[0].situation.deadline_ms)
    total_ms = drawable(timings.total_ms)
    span = 1.06 * max(deadline_ms, total_ms, 1e-3)
    plot = Plot("what was measured", (0, span), (0, 3), width=540, height=150, left=56)
    plot.axes("milliseconds after the call", linear_ticks(0, span))
    if timings.local_ms is not None:
        wait_ms = drawable(timings.local_wait_ms)
        plot.label(50, plot.row(2) + 4, "device", anchor="end", kind="label")
        plot.bar(0.0, wait_ms, 2, "faint", height=6)
        plot.bar(wait_ms, wait_ms + drawable(timings.local_ms), 2, "device")
    if timings.cloud_ms is not None:
        plot.label(50, plot.row(1) + 4, "cloud", anchor="end", kind="label")
        plot.bar(max(total_ms - drawable(timings.cloud_ms), 0.0), total_ms, 1, "cloud")
    kind = "adaptive" if entry.outcome.source is not None else "bad"
    plot.bar(total_ms, total_ms, 1.5, kind, height=60)
    _deadline(plot, deadline_ms)
    return (
        f"<figure class='lane'>{plot.svg()}<figcaption>The tall bar is the moment of the answer, "
        "or of the error.</figcaption></figure>"
    )


def _deadline(plot: Plot, deadline_ms: float) -> None:
    x = plot.column(deadline_ms)
    plot.add(f'<line class="deadline" x1="{x}" x2="{x}" y1="14" y2="{plot.floor}"/>')
    plot.label(x - 4, 24, "deadline", anchor="end")


# Replay ---------------------------------------------------------------------------------


def what_if_rows(found: WhatIf) -> list[tuple[str, str, str]]:
    """Figure, as logged, by the other policy."""
    one, other = found.logged, found.other

    def row(name: str, form: str, *values: float) -> tuple[str, str, str]:
        first, second = (format(value, form) for value in values)
        return name, first, second

    return [
        row("answered on the device alone", "d", one.local, other.local),
        row("uploads", "d", one.uploads, other.uploads),
        row("uploaded MB", ".3f", one.upload_bytes / 1e6, other.upload_bytes / 1e6),
        row("expected gain, right answers", ".3f", one.expected_gain, other.expected_gain),
        row("price, right answers", ".3f", one.price, other.price),
        row("expected to answer in time", ".1f", one.in_time, other.in_time),
    ]


def replay_html(log: LogFile, again: Replay | None, other: WhatIf | None) -> str:
    """The outcome of ``nearfar replay`` as a page."""
    parts = [f'<p class="soft">{text(notice)}</p>' for notice in log.notices]
    if again is not None:
        parts += _replay_parts(again)
    if other is not None:
        parts += _what_if_parts(other)
    title = f"{len(log.entries)} requests"
    return page("nearfar replay", title, "\n".join(parts))


def _replay_parts(found: Replay) -> list[str]:
    if found.mismatched == 0:
        return [
            (
                f'<p class="big good">All {found.decisions} decisions of {found.requests} requests '
                f"come out as logged, bit for bit ({text(', '.join(found.policies))}).</p>"
            )
        ]
    rows = [
        (one.line, one.request, one.step + 1, "; ".join(one.fields)) for one in found.mismatches
    ]
    return [
        (
            f'<p class="big bad">{found.mismatched} of {found.decisions} decisions come out '
            "otherwise.</p>"
        ),
        table(["line", "request", "step", "difference"], rows, words=1),
    ]


def _what_if_parts(found: WhatIf) -> list[str]:
    changes = [
        (before, after, count, f"{count / max(found.requests, 1):.1%}")
        for before, after, count in found.changes
    ]
    verdict = (
        f"{found.policy} would have ended otherwise for {found.changed} of {found.requests} "
        "requests."
    )
    note = (
        "Prices and chances are what each policy itself predicted, and one gain judges both; what "
        f"the network would have done is not in the log. {found.unanswerable} requests lack the "
        "local answer that the other policy would have waited for."
    )
    return [
        f'<p class="big">{text(verdict)}</p>',
        table(["figure", "as logged", found.policy], what_if_rows(found)),
        f'<p class="soft">{text(note)}</p>',
        "<h2>Actions</h2>",
        table(["as logged", found.policy, "requests", "share"], changes),
    ]
