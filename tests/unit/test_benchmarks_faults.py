"""When goodput counts as back, from records alone."""

from __future__ import annotations

from benchmarks.broker_faults import DEADLINE_MS, back_after, goodput
from benchmarks.serving.load import Record


def records(bad_from_s: float, bad_to_s: float, *, late: bool = False) -> list[Record]:
    """Ten seconds of a request each hundredth; those in between are refused, or late."""
    made = []
    for number in range(1000):
        at_s = number / 100
        bad = bad_from_s <= at_s < bad_to_s
        status = 503 if bad and not late else 200
        ms = DEADLINE_MS + 1.0 if bad and late else 20.0
        made.append(Record(at_s=at_s, kind=0, status=status, ms=ms, body_sent=True))
    return made


def test_late_answers_and_refusals_are_no_goodput() -> None:
    assert goodput(records(4.0, 6.0), 3.0, 7.0) == 0.5
    assert goodput(records(4.0, 6.0, late=True), 3.0, 7.0) == 0.5
    assert goodput([], 3.0, 7.0) == 0.0


def test_goodput_is_back_when_it_stays() -> None:
    assert back_after(records(4.0, 5.5), 4.0, 10.0) == 1.5
    assert back_after(records(9.0, 9.0), 4.0, 10.0) == 0.0


def test_a_moment_between_two_gaps_does_not_count() -> None:
    twice = [
        record if not 5.0 <= record.at_s < 6.0 else Record(record.at_s, 0, 200, 20.0, True)
        for record in records(4.0, 7.0)
    ]
    assert back_after(twice, 4.0, 10.0) == 3.0


def test_goodput_that_never_returns_has_no_time() -> None:
    assert back_after(records(4.0, 10.0), 4.0, 10.0) is None
