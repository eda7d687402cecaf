"""One logged request for the terminal: 80 columns of plain ASCII."""

from __future__ import annotations

import datetime as dt
import textwrap
from typing import Final

from edge_runtime.log.entries import LogEntry, Step
from edge_runtime.log.reader import Numbered
from edge_runtime.log.timeline import (
    Quantiles,
    Timeline,
    drawable,
    elapsed_ms,
    numbers_of,
    timeline,
)
from edge_runtime.page import clean
from edge_runtime.policies.reasons import sentence
from edge_runtime.results import Timings

__all__ = ["explain_text", "given", "headline", "outcome_line"]

_WIDTH: Final = 80
_LABEL: Final = 12
_PLOT: Final = _WIDTH - _LABEL - 2
_KEY: Final = (
    "local: . waits, = runs to its median, - to its 95th percentile",
    "cloud: - from the 10 % to the 90 % quantile of its answer, o the median, > later",
    "| the deadline, * the answer or the error",
)


def headline(numbered: Numbered) -> list[str]:
    """Which request this is."""
    entry = numbered.entry
    try:
        moment = dt.datetime.fromtimestamp(entry.unix_s, dt.UTC)
        when = moment.isoformat(" ", "milliseconds").removesuffix("+00:00") + " UTC"
    except (ValueError, OverflowError, OSError):
        when = "at an impossible time"
    device = "no local model" if entry.variant is None else entry.variant
    return [
        f"request {clean(entry.request)} (line {numbered.line}), {when}",
        f"{clean(entry.bundle)}, {entry.task}, {clean(device)}, policy {clean(entry.policy.name)}",
    ]


def outcome_line(entry: LogEntry) -> str:
    """What came of it, as one sentence."""
    outcome, timings = entry.outcome, entry.outcome.timings
    if outcome.source is None:
        text = f"no answer after {timings.total_ms:.1f} ms: {outcome.error}"
    else:
        kept = "in time" if outcome.deadline_met else "LATE"
        text = f"{outcome.source.value} after {timings.total_ms:.1f} ms, {kept}"
    if outcome.cloud not in ("not_asked", "answered"):
        text += f"; the cloud: {outcome.cloud}"
    if outcome.other_error is not None:
        text += f" ({outcome.other_error})"
    if outcome.uploaded_bytes:
        text += f"; {outcome.uploaded_bytes} bytes handed to the network"
    return clean(text)


def given(step: Step) -> str:
    """What the decision was made from, in a sentence."""
    situation = step.situation
    confidence = "none" if situation.confidence is None else f"{situation.confidence:.3f}"
    if not situation.scored:
        confidence = "not given by this task"
    parts = [
        f"{situation.time_left_ms:.1f} of {situation.deadline_ms:.0f} ms left",
        f"confidence {confidence}",
        f"{situation.upload_bytes} bytes to upload",
    ]
    link = situation.link
    if link is not None:
        state = "warm" if link.setup_round_trips == 0 else "cold"
        parts.append(f"connection {state}, RTT {link.rtt_ms:.1f} ms")
    if situation.private:
        parts.append("private")
    return ", ".join(parts)


def explain_text(numbered: Numbered) -> list[str]:
    """Lines of at most 80 columns."""
    entry = numbered.entry
    lines = [line for text in headline(numbered) for line in _wrapped(text)]
    lines += _wrapped(outcome_line(entry))
    for number, (step, after_ms) in enumerate(zip(entry.steps, elapsed_ms(entry), strict=True), 1):
        lines += ["", *_step_lines(number, step, after_ms)]
    if entry.steps:
        lines += ["", "measured, from the call:"]
        lines += _measured_lines(entry.outcome.timings, entry.steps[0].situation.deadline_ms)
        lines += ["", *_KEY]
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent) or [""]


def _step_lines(number: int, step: Step, after_ms: float) -> list[str]:
    decision = step.decision
    why = sentence(decision.reason)
    lines = _wrapped(clean(f"{number}. {decision.action.value} ({decision.reason}): {why}"))
    if after_ms > 0:
        lines.append(f"   asked {after_ms:.1f} ms after the first question")
    if step.done is not None:
        lines += _wrapped(
            clean(f"done instead: {step.done.action.value} ({step.done.reason}): "
                  f"{sentence(step.done.reason)}"),
            "   ",
        )  # fmt: skip
    lines += _wrapped(f"given: {given(step)}", "   ")
    lines += _drawn(timeline(step))
    shown = [f"{name} {value:.6g}" for name, value in numbers_of(step)]
    lines += _wrapped(clean("numbers: " + ", ".join(shown)), "   ")
    return lines


def _drawn(found: Timeline) -> list[str]:
    """A row for each side under a common axis from 0 ms."""
    ends = [found.deadline_ms]
    if found.local_ms is not None:
        ends.append(found.local_ms[2])
    if found.cloud is not None:
        ends += [value for value in found.cloud if value is not None]
    span = _span(min(max(ends), 2.0 * max(found.deadline_ms, 1.0)))
    rows = []
    if found.local_ms is not None:
        start, median, late = found.local_ms
        row = _Row(span)
        row.fill(0.0, start, ".")
        row.fill(median, late, "-")
        row.fill(start, median, "=")
        rows.append(row.text("local", found.deadline_ms))
    if found.cloud is not None:
        rows.append(_cloud_row(found.cloud, span).text("cloud", found.deadline_ms))
    return [*rows, _axis(span, found.deadline_ms)]


def _cloud_row(quantiles: Quantiles, span: float) -> _Row:
    early, median, late = quantiles
    row = _Row(span)
    if early is not None:
        row.fill(early, span if late is None else late, "-")
        if late is None or late > span:
            row.put(span, ">")
    else:
        row.put(span, ">")
    if median is not None and median <= span:
        row.put(median, "o")
    return row


def _measured_lines(timings: Timings, deadline_ms: float) -> list[str]:
    total_ms, deadline_ms = drawable(timings.total_ms), drawable(deadline_ms)
    span = _span(max(deadline_ms, total_ms))
    rows = []
    if timings.local_ms is not None:
        wait_ms = drawable(timings.local_wait_ms)
        row = _Row(span)
        row.fill(0.0, wait_ms, ".")
        row.fill(wait_ms, wait_ms + drawable(timings.local_ms), "=")
        rows.append(row.text("local", deadline_ms))
    if timings.cloud_ms is not None:
        row = _Row(span)
        row.fill(max(total_ms - drawable(timings.cloud_ms), 0.0), total_ms, "=")
        rows.append(row.text("cloud", deadline_ms))
    row = _Row(span)
    row.put(total_ms, "*")
    return [*rows, row.text("answer", deadline_ms), _axis(span, deadline_ms)]


class _Row:
    """Characters over time."""

    def __init__(self, span: float) -> None:
        self._span = span
        self._cells = [" "] * _PLOT

    def _column(self, time_ms: float) -> int:
        share = min(max(time_ms / self._span, 0.0), 1.0)
        return min(int(share * _PLOT), _PLOT - 1)

    def put(self, time_ms: float, mark: str) -> None:
        self._cells[self._column(time_ms)] = mark

    def fill(self, low_ms: float, high_ms: float, mark: str) -> None:
        """From ``low_ms`` on, at least one cell, unless it is no time at all."""
        if high_ms <= low_ms:
            return
        start, end = self._column(low_ms), self._column(high_ms)
        for column in range(start, max(end, start + 1)):
            self._cells[column] = mark

    def text(self, label: str, deadline_ms: float) -> str:
        column = self._column(deadline_ms)
        if self._cells[column] in " -=.":
            self._cells[column] = "|"
        return f"   {label:<{_LABEL - 3}}{''.join(self._cells)}".rstrip()


def _span(longest_ms: float) -> float:
    return max(longest_ms * 1.04, 1e-6)


def _axis(span: float, deadline_ms: float) -> str:
    column = min(int(min(max(deadline_ms / span, 0.0), 1.0) * _PLOT), _PLOT - 1)
    said = f"{deadline_ms:.0f} ms"
    start = min(max(column - len(said) // 2, 6), _PLOT - len(said))
    return f"   {'':<{_LABEL - 3}}{'0 ms':<{start}}{said}"
