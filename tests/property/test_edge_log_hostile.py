"""A log of absurd numbers is shown or refused in words: never a crash, never a line too long."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import NearfarError
from edge_runtime.log.entries import LogEntry
from edge_runtime.log.lines import PolicyLine, decode_line, encode
from edge_runtime.log.reader import LogFile, Numbered
from edge_runtime.log.replay import compare, replay
from edge_runtime.log.report import explain_html, replay_html
from edge_runtime.log.terminal import explain_text
from edge_runtime.policies import find_policy
from edge_runtime.policies.adaptive import GainPrior
from tests.support.log_entries import ADAPTIVE, entry

_T = TypeVar("_T")
CLOUD = find_policy("PREFER_IN_CLOUD")
numbers = st.sampled_from(
    [0.0, -0.0, -1.0, 1.0, 1e-320, 1e9, -1e9, 1e300, -1e300, math.inf, -math.inf, math.nan]
)


def _numbers_replaced(value: object, draw: st.DrawFn) -> object:
    if isinstance(value, dict):
        return {key: _numbers_replaced(item, draw) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_replaced(item, draw) for item in value]
    if isinstance(value, float) and draw(st.integers(0, 3)) == 0:
        return draw(numbers)
    return value


@st.composite
def absurd(draw: st.DrawFn) -> LogEntry:
    """An entry as it could stand in a file, some of its floats replaced."""
    plain = msgspec.to_builtins(entry("r", confidence=draw(st.floats(0, 1))))
    changed = {**plain, "steps": _numbers_replaced(plain["steps"], draw)}
    timings = _numbers_replaced(plain["outcome"]["timings"], draw)
    changed["outcome"] = {**plain["outcome"], "timings": timings}
    return msgspec.convert(changed, LogEntry)


@settings(max_examples=12)
@given(absurd())
def test_absurd_numbers_are_shown_or_refused(given_entry: LogEntry) -> None:
    line = decode_line(encode(given_entry).rstrip(b"\n"))
    found = line.resolve(PolicyLine.of(given_entry.policy).policy)  # type: ignore[union-attr]
    assert repr(found) == repr(given_entry)
    numbered = Numbered(2, found)
    assert max(map(len, explain_text(numbered))) <= 80
    assert explain_html(numbered).endswith("</html>\n")
    log = LogFile(entries=(numbered,), notices=())
    again = _outcome(lambda: replay(log))
    other = _outcome(lambda: compare(log, CLOUD, GainPrior()))
    page = replay_html(
        log,
        None if isinstance(again, NearfarError) else again,
        None if isinstance(other, NearfarError) else other,
    )
    assert page.endswith("</html>\n")
    for outcome in (again, other, _outcome(lambda: compare(log, ADAPTIVE, GainPrior()))):
        assert not isinstance(outcome, NearfarError) or "line 2" in outcome.detail


def _outcome(act: Callable[[], _T]) -> _T | NearfarError:
    try:
        return act()
    except NearfarError as error:
        return error
