"""Logs: one event, one line, whatever is in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import pytest

from broker.log import _event_line, _JsonLines, _Lines

NASTY = 'a\nb\r\x1b[31m"\\\u2028 \ud800 \x00'


def line_of(**fields: object) -> str:
    return _event_line("request", fields, 1e9).decode()


def test_a_value_cannot_start_a_line_or_color_a_terminal():
    line = line_of(path=NASTY)
    assert "\n" not in line
    assert "\r" not in line
    assert "\x1b" not in line
    assert json.loads(line)["path"].startswith("a\nb\r\x1b[31m")


def test_an_event_has_time_level_name_and_fields():
    event = json.loads(line_of(status=200, ms=1.5))
    assert event.pop("time") == "2001-09-09T01:46:40.000Z"
    assert event == {"level": "info", "event": "request", "status": 200, "ms": 1.5}


def test_a_traceback_is_one_string_of_one_line():
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "failed %s", ("here",), (ValueError, error, None)
        )
    line = _JsonLines().format(record)
    assert "\n" not in line
    event = json.loads(line)
    assert event["message"] == "failed here"
    assert "ValueError" in event["traceback"]


@pytest.mark.parametrize("value", [{"a": [1]}, None, 3, object()])
def test_any_value_can_be_logged(value: object):
    assert json.loads(line_of(value=value))["event"] == "request"


def test_events_of_one_turn_of_the_loop_leave_together_and_in_order():
    writes: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    lines = _Lines(Stream())
    lines.setFormatter(_JsonLines())

    async def answer() -> None:
        lines.event("first", {})
        lines.event("second", {})
        assert writes == []
        await asyncio.sleep(0)
        lines.event("third", {})
        lines.emit(logging.LogRecord("x", logging.ERROR, "f", 1, "fourth", None, None))

    asyncio.run(answer())
    assert [json.loads(line)["event"] for line in writes[0].splitlines()] == ["first", "second"]
    text = "".join(writes[1:]).splitlines()
    assert [json.loads(line)["event"] for line in text] == ["third", "log"]


def test_an_event_outside_of_a_loop_is_written_at_once():
    stream = io.StringIO()
    _Lines(stream).event("signal", {"name": "SIGTERM"})
    assert json.loads(stream.getvalue())["name"] == "SIGTERM"


class Broken(io.StringIO):
    """Standard error whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def test_a_log_that_nobody_reads_stops_no_request():
    _Lines(Broken()).event("request", {})
