"""The queue against the plainest model there is: a list, sorted anew each time."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from broker.scheduling.queue import EdfQueue, Place

PRIORITIES = st.integers(1, 3)
DEADLINES = st.floats(min_value=0, max_value=10, allow_nan=False)


class QueueAgainstList(RuleBasedStateMachine):
    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.queue: EdfQueue[int] = EdfQueue()
        self.model: list[tuple[Place, int]] = []
        self.entries = 0

    @rule(target=places, deadline_s=DEADLINES, priority=PRIORITIES)
    def push(self, deadline_s: float, priority: int) -> Place:
        self.entries += 1
        place = self.queue.push(deadline_s, self.entries, priority)
        self.model.append((place, self.entries))
        self.model.sort()
        return place

    @rule(place=places)
    def remove(self, place: Place) -> None:
        expected = any(known == place for known, _ in self.model)
        assert self.queue.remove(place) is expected
        self.model = [(known, entry) for known, entry in self.model if known != place]

    @rule()
    def pop(self) -> None:
        if self.model:
            assert self.queue.pop() == self.model.pop(0)[1]

    @rule(now_s=DEADLINES)
    def pop_expired(self, now_s: float) -> None:
        expired = [entry for place, entry in self.model if place.deadline_s <= now_s]
        assert self.queue.pop_expired(now_s) == expired
        self.model = [(place, entry) for place, entry in self.model if place.deadline_s > now_s]

    @rule(deadline_s=DEADLINES, priority=PRIORITIES)
    def count_before(self, deadline_s: float, priority: int) -> None:
        expected = sum(
            (place.priority, place.deadline_s) <= (priority, deadline_s) for place, _ in self.model
        )
        assert self.queue.count_before(deadline_s, priority) == expected

    @invariant()
    def holds_the_same_in_the_same_order(self) -> None:
        assert list(self.queue) == [entry for _, entry in self.model]
        assert len(self.queue) == len(self.model)
        assert self.queue.earliest() == (self.model[0] if self.model else None)


TestQueueAgainstList = QueueAgainstList.TestCase
TestQueueAgainstList.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
