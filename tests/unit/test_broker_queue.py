"""The queue orders by deadline, then by arrival, and lets go of what is late."""

import pytest

from broker.scheduling.queue import EdfQueue


def test_an_empty_queue_has_no_earliest_and_cannot_pop():
    queue: EdfQueue[str] = EdfQueue()
    assert queue.earliest() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_removing_twice_changes_nothing_the_second_time():
    queue: EdfQueue[str] = EdfQueue()
    place = queue.push(1.0, "a")
    queue.push(2.0, "b")
    assert queue.remove(place) is True
    assert queue.remove(place) is False
    assert list(queue) == ["b"]


def test_a_deadline_of_now_is_expired_and_one_just_after_is_not():
    queue: EdfQueue[str] = EdfQueue()
    queue.push(1.0, "now")
    queue.push(1.0000001, "later")
    assert queue.pop_expired(1.0) == ["now"]
    assert list(queue) == ["later"]


def test_earlier_deadlines_overtake_and_equal_ones_keep_their_turn():
    queue: EdfQueue[str] = EdfQueue()
    for deadline_s, name in [(3.0, "c"), (1.0, "a1"), (2.0, "b"), (1.0, "a2")]:
        queue.push(deadline_s, name)
    assert [queue.pop() for _ in range(4)] == ["a1", "a2", "b", "c"]


def test_equal_deadlines_count_as_going_first():
    queue: EdfQueue[str] = EdfQueue()
    queue.push(1.0, "a")
    queue.push(2.0, "b")
    assert queue.count_before(0.5) == 0
    assert queue.count_before(1.0) == 1
    assert queue.count_before(9.0) == 2
