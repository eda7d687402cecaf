"""Tables with a header: find the columns of time, uplink rate and round trip by their names."""

from __future__ import annotations

import csv
import math
import re
from datetime import UTC, datetime
from typing import Final

import msgspec
import numpy as np

from edge_runtime.contract.errors import ContractError, LimitExceeded
from edge_runtime.simulation.trace_names import (
    Direction,
    column_direction,
    name_words,
    rate_factor,
)
from edge_runtime.simulation.trace_series import (
    FloatArray,
    bins_of_samples,
    check_rtt,
    rtt_of_samples,
)

__all__ = ["Table", "read_table"]

_MAX_COLUMNS: Final = 512
_TIME: Final = frozenset(
    {"time", "timestamp", "timestamps", "seconds", "second", "secs", "sec", "elapsed", "epoch",
     "datetime", "ts", "t", "s", "ms", "us", "ns", "millis", "milliseconds", "msec"}
)  # fmt: skip
_TIME_UNITS: Final = {
    **dict.fromkeys(("seconds", "second", "secs", "sec", "s"), 1.0),
    **dict.fromkeys(("ms", "millis", "milliseconds", "msec"), 1e-3),
    **dict.fromkeys(("us", "micros", "microseconds", "usec"), 1e-6),
    **dict.fromkeys(("ns", "nanos", "nanoseconds"), 1e-9),
}
_RATE: Final = frozenset(
    {"throughput", "tput", "goodput", "rate", "bitrate", "bandwidth", "bw", "capacity"}
)
_RTT: Final = frozenset({"rtt", "ping", "pingavg", "latency"})
_DERIVED: Final = frozenset(
    {"rolled", "rolling", "smooth", "smoothed", "avg", "average", "mean", "median", "min", "max",
     "std", "stdev", "var", "target", "limit", "cumulative", "total", "sum", "loss"}
)  # fmt: skip
_EMPTY: Final = frozenset({"", "-", "n/a", "na", "null", "none"})
_DATE: Final = re.compile(
    r"(\d{4})[-./](\d{1,2})[-./](\d{1,2})[T _](\d{1,2})[:.](\d{1,2})[:.](\d{1,2})(\.\d{1,9})?Z?"
)
_EPOCHS: Final = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))


class Table(msgspec.Struct, kw_only=True, eq=False):
    """What a table holds; ``Recording`` says what the fields mean."""

    uplink_runs: list[FloatArray]
    rtt_ms: FloatArray | None
    direction: Direction | None
    notes: list[str]


class _Columns(msgspec.Struct, frozen=True, kw_only=True):
    time: int | None
    rate: int | None
    rate_direction: Direction | None
    rtt: int | None
    row_direction: int | None
    downlink_only: str | None


def read_table(lines: list[tuple[int, str]], given_factor: float | None) -> Table:
    """Read a table; ``given_factor`` is of rates whose column names no unit.

    Raises ``ContractError`` (no such columns, two that fit, no unit, a cell that is no
    number, with its line) and ``LimitExceeded``.
    """
    delimiter = next((mark for mark in ",;\t" if mark in lines[0][1]), " ")
    try:
        rows = list(
            csv.reader((text for _, text in lines), delimiter=delimiter, skipinitialspace=True)
        )
    except csv.Error as error:
        raise ContractError(f"it is no table: {error}") from None
    header = [cell.strip() for cell in rows[0]]
    if len(header) > _MAX_COLUMNS:
        raise LimitExceeded(f"it has more than {_MAX_COLUMNS} columns")
    columns = _find_columns(header)
    if columns.time is None:
        raise ContractError("no column of its header names a time")
    if columns.rate is None and columns.rtt is None:
        if columns.downlink_only is not None:
            raise ContractError(
                f"its only rate, {columns.downlink_only!r}, is a downlink's, never an uplink's"
            )
        raise ContractError("no column of its header names a rate or a round trip")
    numbers = [number for number, _ in lines]
    body = [
        (number, row)
        for number, row in zip(numbers[1:], rows[1:], strict=False)
        if len(row) == len(header)
    ]
    if len(body) < len(rows) - 1:
        short = next(n for n, row in zip(numbers[1:], rows[1:], strict=False)
                     if len(row) != len(header))  # fmt: skip
        raise ContractError(f"line {short} has another number of cells than the header")
    table = Table(uplink_runs=[], rtt_ms=None, direction=columns.rate_direction, notes=[])
    if columns.row_direction is not None and columns.rate is not None:
        body = _uplink_rows(body, columns.row_direction, table)
    if columns.rate is not None:
        name = header[columns.rate]
        factor = rate_factor(name) or given_factor
        if factor is None:
            raise ContractError(
                f"column {name!r} names no unit: call it {name + '_mbps'!r}, or pass --rate-unit"
            )
        times, values = _columns(body, header, columns.time, columns.rate)
        table.uplink_runs = bins_of_samples(times, values * factor)
        table.notes.append(f"column {name!r}")
    if columns.rtt is not None:
        _read_rtt(body, header, columns, table)
    return table


def _read_rtt(
    body: list[tuple[int, list[str]]], header: list[str], columns: _Columns, table: Table
) -> None:
    """Round trips beside a rate are welcome, not needed: what is wrong becomes a note."""
    assert columns.time is not None  # noqa: S101  # checked by the caller
    assert columns.rtt is not None  # noqa: S101
    name = header[columns.rtt]
    try:
        times, values = _columns(body, header, columns.time, columns.rtt)
        table.rtt_ms = check_rtt(rtt_of_samples(times - times[0], values))
    except ContractError as error:
        if not table.uplink_runs:
            raise
        table.notes.append(f"column {name!r} not used: {error.detail}")
        return
    table.notes.append(f"round trips of column {name!r}")


def _find_columns(header: list[str]) -> _Columns:
    words = [set(name_words(name)) for name in header]
    rtts = [i for i, found in enumerate(words) if found & _RTT and not found & (_DERIVED - {"avg"})]
    times = [
        i
        for i, found in enumerate(words)
        if found & _TIME and not found & (_RTT | _RATE) and rate_factor(header[i]) is None
    ]
    directions = [i for i, found in enumerate(words) if found in ({"direction"}, {"dir"}, {"link"})]
    rates: dict[Direction | None, list[int]] = {"uplink": [], "downlink": [], None: []}
    for i, (name, found) in enumerate(zip(header, words, strict=True)):
        direction = column_direction(name)
        is_rate = found & _RATE or rate_factor(name) is not None
        is_bare = direction is not None and len(found) == 1
        if (is_rate or is_bare) and not found & _DERIVED and i not in rtts:
            rates[direction].append(i)
    rate, direction = None, None
    for wanted in ("uplink", None):
        candidates = _with_unit(rates[wanted], header)
        if len(candidates) > 1:
            names = ", ".join(repr(header[i]) for i in candidates[:4])
            raise ContractError(f"several columns may be the uplink's rate: {names}")
        # Beside a downlink's column, one that says nothing is as likely a downlink's.
        if candidates and (wanted or not rates["downlink"]):
            rate, direction = candidates[0], wanted
            break
    rtt = rtts[0] if len(rtts) == 1 else None
    clocks = [i for i in times if i not in (rate, rtt)]
    return _Columns(
        time=clocks[0] if clocks else None,
        rate=rate,
        rate_direction=direction,
        rtt=rtt,
        row_direction=directions[0] if len(directions) == 1 else None,
        downlink_only=header[rates["downlink"][0]] if rates["downlink"] else None,
    )


def _with_unit(candidates: list[int], header: list[str]) -> list[int]:
    """Those that name a unit, if any does."""
    named = [i for i in candidates if rate_factor(header[i]) is not None]
    return named or candidates


def _uplink_rows(
    body: list[tuple[int, list[str]]], column: int, table: Table
) -> list[tuple[int, list[str]]]:
    """Rows measured while an uplink was loaded.

    While a downlink is, the uplink carries acknowledgments, which say nothing about it.
    """
    kept = [(n, row) for n, row in body if column_direction(row[column]) == "uplink"]
    if not kept:
        raise ContractError("no row of its direction column says uplink")
    table.direction = "uplink"
    if len(kept) < len(body):
        table.notes.append(f"{len(body) - len(kept)} rows of another direction left out")
    return kept


def _columns(
    body: list[tuple[int, list[str]]], header: list[str], time: int, value: int
) -> tuple[FloatArray, FloatArray]:
    """Times in seconds and values, of the rows that have one."""
    rows = [(n, row) for n, row in body if row[value].strip().lower() not in _EMPTY]
    if not rows:
        raise ContractError(f"column {header[value]!r} has no value")
    times = np.asarray([_time(row[time].strip(), n) for n, row in rows], np.float64)
    values = np.asarray([_cell(row[value].strip(), n) for n, row in rows], np.float64)
    words = name_words(header[time])
    units = [_TIME_UNITS[word] for word in words if word in _TIME_UNITS]
    largest = float(np.abs(times).max())
    # A bare "timestamp" counts from 1970 or from the start; its size tells in what.
    guessed = next((factor for least, factor in _EPOCHS if largest > least), 1.0)
    return times * (units[-1] if units else guessed), values


def _cell(text: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        raise ContractError(f"line {line}: {text[:40]!r} is not a finite number")
    return value


def _time(text: str, line: int) -> float:
    """Seconds of a number, or since 1970 of a date with a time of day."""
    found = _DATE.fullmatch(text)
    if found is None:
        return _cell(text, line)
    try:
        day = datetime(*(int(part) for part in found.groups()[:6]), tzinfo=UTC)  # type: ignore[misc,arg-type]
    except ValueError:
        raise ContractError(f"line {line}: {text[:40]!r} is no date") from None
    return day.timestamp() + float(found[7] or 0)
