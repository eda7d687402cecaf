"""Recognize what a text file holds by what is in it, and read it.

Known are: mahimahi (a time in ms a line, each one chance to send 1500 bytes), pairs of
"seconds Mbit/s", tables with a header that names time and rate, lists of values under
"Run k" lines, round trips in ms (one a line), and what ``ping`` prints. A file's path is
only a hint where the numbers alone could be rates as well as round trips.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np

from edge_runtime.contract.errors import ContractError, LimitExceeded
from edge_runtime.simulation.trace_names import Direction, Kind
from edge_runtime.simulation.trace_series import (
    BIN_MS,
    LOST_RTT_MS,
    RTT_STEP_MS,
    FloatArray,
    bins_of_opportunities,
    bins_of_samples,
    rtt_of_samples,
)
from edge_runtime.simulation.trace_tables import read_table

__all__ = ["MAX_FILE_BYTES", "Recording", "read_recording"]

MAX_FILE_BYTES: Final = 64 * 2**20
MAX_LINES: Final = 4_000_000
_MAX_RUNS: Final = 256
_JOIN_BELOW_S: Final = 60.0
_HEAD: Final = 200
_MAX_PING_CHARS: Final = 512
_RUN: Final = re.compile(r"run\s*#?\d{1,6}\s*:?", re.IGNORECASE)
_REPLY: Final = re.compile(r"\btime\s?[=<]\s?(\d{1,7}(?:\.\d{1,6})?)\s?ms", re.IGNORECASE)
_SEQUENCE: Final = re.compile(r"\bicmp_seq[= ](\d{1,9})")
_STAMP: Final = re.compile(r"^\[(\d{1,12}\.\d{1,9})\]")
_TOTAL: Final = re.compile(r"(\d{1,9}) packets transmitted.*\btime (\d{1,12})\s?ms")
_SILENCE: Final = re.compile(r"no answer yet|request timed? ?out|timeout", re.IGNORECASE)


class Recording(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What one file holds."""

    format: str
    uplink_runs: tuple[FloatArray, ...] = ()
    """Mbit/s per 100 ms, not yet checked; empty: it holds round trips alone."""
    rtt_ms: FloatArray | None = None
    """One per 200 ms, not yet checked."""
    direction: Direction | None = None
    """What the content itself says; None: nothing."""
    notes: tuple[str, ...] = ()
    """How it was read, where that could be asked."""


def read_recording(data: bytes, *, hint: Kind | None, rate_factor: float | None) -> Recording:
    """Read a file's bytes.

    ``hint``: whether its path speaks of rates or round trips. ``rate_factor``: what rates
    without a unit are multiplied by to give Mbit/s; None: pairs of numbers are seconds and
    Mbit/s, and a table must name its unit. Raises ``ContractError`` or ``LimitExceeded``
    with what is wrong, the line included.
    """
    lines = _lines(data)
    if not lines:
        raise ContractError("it is empty")
    first = lines[0][1]
    if any(_RUN.fullmatch(text) for _, text in lines[:_HEAD]):
        return _read_run_lists(lines, hint, rate_factor)
    if any(_REPLY.search(text[:_MAX_PING_CHARS]) for _, text in lines[:_HEAD]):
        return _read_ping(lines)
    cells = split_cells(first)
    if not all(is_number(cell) for cell in cells):
        table = read_table(lines, rate_factor)
        return Recording(
            format="table",
            uplink_runs=tuple(table.uplink_runs),
            rtt_ms=table.rtt_ms,
            direction=table.direction,
            notes=tuple(table.notes),
        )
    if len(cells) == 1:
        return _read_column(lines, hint)
    if len(cells) == 2:
        return _read_pairs(lines, hint, rate_factor)
    raise ContractError(f"it has {len(cells)} columns and no header that names them")


def _lines(data: bytes) -> list[tuple[int, str]]:
    """Lines with their numbers, without empty ones and comments."""
    if len(data) > MAX_FILE_BYTES:
        raise LimitExceeded(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    if data.count(b"\n") > MAX_LINES:
        raise LimitExceeded(f"it has more than {MAX_LINES} lines")
    if data[:2] == b"\x1f\x8b":
        raise ContractError("it is compressed: unpack it")
    if b"\0" in data:
        raise ContractError("it is no text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContractError(f"it is not UTF-8 text (byte {error.start})") from None
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]


def split_cells(line: str) -> list[str]:
    """The cells of a line: parted by commas, semicolons or tabs, else by spaces."""
    for mark in ",;\t":
        if mark in line:
            return [cell.strip() for cell in line.split(mark)]
    return line.split()


def is_number(text: str) -> bool:
    """Whether a text is a number, NaN and infinity included."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _number(text: str, line: int) -> float:
    value = float(text) if is_number(text) else math.nan
    if not math.isfinite(value):
        raise ContractError(f"line {line}: {text[:40]!r} is not a finite number")
    return value


def _read_column(lines: list[tuple[int, str]], hint: Kind | None) -> Recording:
    """A list of mahimahi's, or round trips."""
    values = [_number(text, number) for number, text in lines]
    whole = all(value.is_integer() for value in values)
    back = next((i for i, (a, b) in enumerate(pairwise(values)) if b < a), None)
    spans = max(values) - min(values) >= 1e3
    if whole and back is None and spans and hint != "rtt":
        if max(values) > 1e15:
            raise LimitExceeded(f"a time of {max(values):.3g} ms is not plausible")
        return Recording(
            format="mahimahi",
            uplink_runs=(bins_of_opportunities(np.asarray(values, np.int64)),),
        )
    if hint == "rate":
        if whole and spans and back is not None:
            raise ContractError(
                f"line {lines[back + 1][0]}: the time goes back; mahimahi's list never does"
            )
        raise ContractError(
            "one number a line is either mahimahi's whole milliseconds, which never go back, or "
            "round trips; rates need their times: 'seconds Mbit/s'"
        )
    return Recording(format="round trips", rtt_ms=np.asarray(values, np.float64))


def _read_pairs(
    lines: list[tuple[int, str]], hint: Kind | None, rate_factor: float | None
) -> Recording:
    """Times in seconds with rates (or, where the path says so, round trips in ms)."""
    times, values = [], []
    for number, text in lines:
        cells = split_cells(text)
        if len(cells) != 2:
            raise ContractError(f"line {number} has {len(cells)} numbers, the first line 2")
        times.append(_number(cells[0], number))
        values.append(_number(cells[1], number))
    if hint == "rtt":
        return Recording(format="seconds, round trips", rtt_ms=rtt_of_samples(times, values))
    factor = 1.0 if rate_factor is None else rate_factor
    runs = bins_of_samples(np.asarray(times, np.float64), np.asarray(values, np.float64) * factor)
    return Recording(format="seconds Mbit/s", uplink_runs=tuple(runs))


def _read_run_lists(
    lines: list[tuple[int, str]], hint: Kind | None, rate_factor: float | None
) -> Recording:
    """Lists of values under "Run k" lines: one list per run, or times and then rates."""
    runs: list[list[list[float]]] = []
    count = 0
    for number, text in lines:
        if _RUN.fullmatch(text):
            runs.append([])
            continue
        if not runs:
            raise ContractError(f"line {number}: values before the first run's line")
        cells = text.rstrip(",").split(",")
        count += len(cells)
        if count > MAX_LINES:
            raise LimitExceeded(f"it has more than {MAX_LINES} values")
        runs[-1].append([_number(cell.strip(), number) for cell in cells])
    filled = [run for run in runs if run]
    if not filled:
        raise ContractError("no run has values")
    if len(filled) > _MAX_RUNS:
        raise LimitExceeded(f"it has more than {_MAX_RUNS} runs")
    if all(len(run) == 1 for run in filled):
        return _plain_runs([run[0] for run in filled], hint, rate_factor)
    return _timed_runs(filled, rate_factor)


def _plain_runs(runs: list[list[float]], hint: Kind | None, rate_factor: float | None) -> Recording:
    if hint is None:
        raise ContractError(
            "its lists may be rates or round trips: put 'throughput' or 'ping' into its name or "
            "its folder's"
        )
    arrays = [np.asarray(run, np.float64) for run in runs]
    if hint == "rtt":
        joined = np.concatenate(arrays)
        return Recording(
            format="lists of round trips",
            rtt_ms=joined,
            notes=(f"taken as {RTT_STEP_MS:g} ms apart",),
        )
    factor = 1.0 if rate_factor is None else rate_factor
    return Recording(
        format="lists of rates",
        uplink_runs=_join_short([run * factor for run in arrays]),
        notes=(f"taken as Mbit/s, {BIN_MS:g} ms apart",),
    )


def _timed_runs(runs: list[list[list[float]]], rate_factor: float | None) -> Recording:
    factor = 1.0 if rate_factor is None else rate_factor
    found: list[FloatArray] = []
    for number, run in enumerate(runs, 1):
        if len(run) < 2 or len(run[0]) != len(run[1]):
            raise ContractError(f"run {number}: a list of times and one of rates do not fit")
        if any(b < a for a, b in pairwise(run[0])):
            raise ContractError(f"run {number}: the first of its lists is no list of times")
        times, rates = np.asarray(run[0], np.float64), np.asarray(run[1], np.float64)
        found += bins_of_samples(times, rates * factor)
    notes = ["taken as seconds and Mbit/s"]
    if any(len(run) > 2 for run in runs):
        notes.append("lists after a run's first two were not read")
    return Recording(
        format="lists of times and rates", uplink_runs=_join_short(found), notes=tuple(notes)
    )


def _join_short(runs: Iterable[FloatArray]) -> tuple[FloatArray, ...]:
    """Runs of a minute or more stay as they are; shorter ones become one, end to end."""
    found = list(runs)
    least = _JOIN_BELOW_S * 1e3 / BIN_MS
    long = [run for run in found if run.size >= least]
    short = [run for run in found if run.size < least]
    return (*long, *((np.concatenate(short),) if short else ()))


def _read_ping(lines: list[tuple[int, str]]) -> Recording:
    """What ``ping`` printed; replies that never came count as 2 s.

    A reply's time is its stamp (``ping -D``), else its number times the interval, which is
    taken from the summary at the end, else 1 s.
    """
    interval_s = 1.0
    replies: dict[int, tuple[float | None, float]] = {}
    order = 0
    for _, whole in lines:
        text = whole[:_MAX_PING_CHARS]
        total = _TOTAL.search(text)
        if total is not None and int(total[1]) > 1:
            interval_s = max(int(total[2]) / 1e3 / (int(total[1]) - 1), 1e-3)
        reply, sequence = _REPLY.search(text), _SEQUENCE.search(text)
        if reply is None and not _SILENCE.search(text):
            continue
        order = int(sequence[1]) if sequence else order + 1
        stamp = _STAMP.search(text)
        rtt_ms = float(reply[1]) if reply else LOST_RTT_MS
        if reply or order not in replies:
            replies[order] = (float(stamp[1]) if stamp else None, max(rtt_ms, 0.05))
    numbers = sorted(replies)
    if len(numbers) < 2:
        raise ContractError("it has fewer than two replies")
    if numbers[-1] - numbers[0] > MAX_LINES:
        raise LimitExceeded(f"it counts more than {MAX_LINES} echo requests")
    stamps = [replies[number][0] for number in numbers]
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(numbers):
        interval_s = max((known[-1] - known[0]) / (numbers[-1] - numbers[0]), 1e-3)
    values = [
        replies[number][1] if number in replies else LOST_RTT_MS
        for number in range(numbers[0], numbers[-1] + 1)
    ]
    return Recording(
        format="ping output",
        rtt_ms=rtt_of_samples([i * interval_s for i in range(len(values))], values),
        notes=(f"one reply every {interval_s:.3g} s",),
    )
