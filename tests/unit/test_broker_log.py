"""Logs: one event, one line, whatever is in it."""

from __future__ import annotations

import json
import logging

import pytest

from broker.log import _JsonLines

NASTY = 'a\nb\r\x1b[31m"\\\u2028 \ud800 \x00'


def line_of(**fields: object) -> str:
    record = logging.LogRecord("nearfar.broker", logging.INFO, "f", 1, "request", None, None)
    record.fields = fields
    return _JsonLines().format(record)


def test_a_value_cannot_start_a_line_or_color_a_terminal():
    line = line_of(path=NASTY)
    assert "\n" not in line
    assert "\r" not in line
    assert "\x1b" not in line
    assert json.loads(line)["path"].startswith("a\nb\r\x1b[31m")


def test_an_event_has_time_level_name_and_fields():
    event = json.loads(line_of(status=200, ms=1.5))
    assert event.pop("time").endswith("Z")
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
