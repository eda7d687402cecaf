"""The dropping rule of a video, under a clock that the test moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import ConfigError
from edge_runtime.video import NewestFrame

# The camera's next frame after so many ms, or the app takes one and answers it in so many.
offers = st.tuples(st.just("offer"), st.floats(0, 200))
takes = st.tuples(st.just("take"), st.floats(0, 400))


@settings(max_examples=40)
@given(
    st.lists(offers | takes, max_size=40), st.floats(1, 300), st.floats(0, 300), st.floats(0, 50)
)
def test_no_answer_is_later_than_the_deadline_if_answering_keeps_its_promise(
    events: list[tuple[str, float]], deadline_ms: float, needed_ms: float, delay_ms: float
) -> None:
    """``needed_ms`` is kept by every answer; frames reach the app ``delay_ms`` late."""
    slot, now_ms, offered = NewestFrame(deadline_ms), 0.0, -1
    taken: list[int] = []
    for kind, duration in events:
        if kind == "offer":
            now_ms += duration
            slot.offer(b"", (now_ms - delay_ms) / 1e3)
            offered += 1
            continue
        frame = slot.take(now_ms / 1e3, needed_ms)
        assert not slot.waiting
        if frame is not None:
            taken.append(frame.number)
            assert frame.number == offered, "the newest"
            now_ms += min(duration, needed_ms)
            latency_ms = now_ms - frame.captured_s * 1e3
            assert latency_ms <= deadline_ms + 1e-6
            assert slot.left_ms(frame, now_ms / 1e3) >= -1e-6
    counts = slot.counts
    assert taken == sorted(set(taken)), "no frame twice, none out of order"
    assert counts.taken == len(taken)
    assert counts.offered == offered + 1
    dropped = counts.replaced + counts.too_late
    assert counts.offered == counts.taken + dropped + slot.waiting


@settings(max_examples=10)
@given(st.integers(1, 20))
def test_of_frames_that_come_at_once_only_the_last_is_taken(count: int) -> None:
    slot = NewestFrame(100.0)
    for number in range(count):
        slot.offer(number.to_bytes(), 0.0)
    frame = slot.take(0.05, 50.0)
    assert frame is not None
    assert frame.image == (count - 1).to_bytes()
    assert slot.counts.replaced == count - 1
    assert slot.take(0.05, 0.0) is None
    slot.offer(b"", 0.0)
    assert slot.take(0.0501, 50.0) is None
    assert slot.counts.too_late == 1


@pytest.mark.parametrize("nonsense", [math.nan, math.inf])
def test_times_and_deadlines_that_make_no_sense_are_refused(nonsense: float) -> None:
    with pytest.raises(ConfigError, match="a finite number of seconds"):
        NewestFrame(100.0).offer(b"", nonsense)
    for deadline_ms in (nonsense, 0.0, -1.0):
        with pytest.raises(ConfigError, match="deadline_ms"):
            NewestFrame(deadline_ms)
