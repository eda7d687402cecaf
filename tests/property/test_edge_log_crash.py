"""A log cut off anywhere loses at most its last line, and says so."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.log import DecisionLog, read_log
from edge_runtime.log.lines import PolicyLine, encode
from tests.support.log_entries import entry

ENTRIES = [entry(f"r{number}", confidence=number / 5) for number in range(5)]
WHOLE = encode(PolicyLine.of(ENTRIES[0].policy)) + b"".join(encode(one) for one in ENTRIES)


@settings(max_examples=25)
@given(st.integers(0, len(WHOLE)))
def test_any_crash_loses_at_most_the_line_being_written(length: int) -> None:
    kept = WHOLE[:length]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_bytes(kept)
        log = read_log(path)
        assert len(log.entries) >= max(kept.count(b"\n") - 1, 0)
        assert [one.entry for one in log.entries] == ENTRIES[: len(log.entries)]
        assert len(log.notices) <= 1
        writer = DecisionLog(path)
        writer(entry("after"))
        writer.close()
        again = read_log(path)
        assert again.entries[-1].entry.request == "after"
        before = [one.entry for one in again.entries[:-1]]
        assert before == ENTRIES[: len(before)]
        assert len(before) >= max(kept.count(b"\n") - 1, 0)
