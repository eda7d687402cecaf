"""The device's state machine against a small broker: bytes are conserved, everything ends."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.frames import (
    Admit,
    Cancel,
    Data,
    Error,
    Frame,
    Hello,
    Ping,
    Pong,
    Progress,
    Reject,
    Request,
    Result,
)
from edge_runtime.offload.multiplexer import Answered, Multiplexer, Ponged, Refused, Sending

ASK = Request(id=1, model="m", media_type="image/png", size_bytes=1)


def ask(
    machine: Multiplexer,
    size: int,
    now_s: float = 0.0,
    *,
    priority: int = 3,
    deadline_ms: int = 10_000,
) -> Sending:
    request = Request(
        id=1,
        model="m",
        media_type="a",
        size_bytes=1,
        priority=priority,
        deadline_ms=deadline_ms,
    )
    return machine.request(request, bytes(size), now_s)


def frames(machine: Multiplexer, now_s: float = 0.0) -> list[Frame]:
    found = []
    while (frame := machine.next_frame(now_s)) is not None:
        found.append(frame)
    return found


def sent(found: list[Frame], request_id: int) -> int:
    return sum(len(f.data) for f in found if isinstance(f, Data) and f.id == request_id)


# Named promises ------------------------------------------------------------------------


def test_before_its_admission_an_upload_has_one_window_under_way() -> None:
    machine = Multiplexer()
    sending = ask(machine, 300_000)
    found = frames(machine)
    assert isinstance(found[0], Request)
    assert (found[0].id, found[0].size_bytes) == (1, 300_000)
    assert sent(found, 1) == sending.sent_bytes == limits.SESSION_WINDOW_BYTES


def test_an_admission_counts_for_the_next_upload_though_its_own_was_cancelled_meanwhile() -> None:
    machine = Multiplexer()
    machine.window.observe_round_trip(0.05, 0.0)
    sending = ask(machine, 300_000)
    frames(machine)
    machine.cancel(sending)
    assert machine.receive(Admit(id=1), 0.05) is None
    frames(machine)
    size = limits.SESSION_WINDOW_BYTES
    machine.receive(Progress(id=1, received_bytes=size, t_us=20_000), 0.05)
    ask(machine, 300_000, now_s=1.0)
    more = sent(frames(machine, 1.0), 2)
    assert more > size
    other = Multiplexer()
    cancelled = ask(other, 300_000)
    frames(other)
    other.cancel(cancelled)
    other.receive(Reject(id=1, code="overloaded", detail="", status=503), 0.05)
    frames(other)
    other.receive(Progress(id=1, received_bytes=size, t_us=20_000), 0.05)
    ask(other, 300_000, now_s=1.0)
    assert sent(frames(other, 1.0), 2) == size


def test_a_rejected_upload_stops_and_its_bytes_are_free_once_the_broker_says_so() -> None:
    machine = Multiplexer()
    ask(machine, 300_000)
    frames(machine)
    refused = machine.receive(Reject(id=1, code="overloaded", detail="", status=503), 0.1)
    assert isinstance(refused, Refused)
    assert frames(machine, 0.1) == [Cancel(id=1)]
    assert machine.window.in_flight_bytes == limits.SESSION_WINDOW_BYTES
    assert machine.receive(Cancel(id=1), 0.2) is None
    assert machine.window.in_flight_bytes == 0


def test_a_request_that_was_cancelled_before_it_was_written_never_leaves() -> None:
    machine = Multiplexer()
    machine.cancel(ask(machine, 10))
    assert frames(machine) == []
    assert machine.open == {}


def test_uploads_of_one_priority_take_turns_and_urgent_ones_go_first() -> None:
    machine = Multiplexer()
    for _ in range(2):
        ask(machine, 12_288)
    found = [frame.id for frame in frames(machine) if isinstance(frame, Data)]
    assert found == [1, 2, 1, 2, 1, 2]
    machine = Multiplexer()
    ask(machine, 8192)
    ask(machine, 8192, priority=0)
    found = [frame.id for frame in frames(machine) if isinstance(frame, Data)]
    assert found == [2, 2, 1, 1]


def test_of_those_short_of_time_the_earliest_deadline_goes_first() -> None:
    machine = Multiplexer()
    for _ in range(2):
        ask(machine, 12_288, deadline_ms=400)
    found = [frame.id for frame in frames(machine) if isinstance(frame, Data)]
    assert found == [1, 1, 1, 2, 2, 2]
    machine = Multiplexer()
    ask(machine, 8192)
    ask(machine, 4096, deadline_ms=900)
    ask(machine, 4096, deadline_ms=400)
    found = [frame.id for frame in frames(machine) if isinstance(frame, Data)]
    assert found == [3, 2, 1, 1]


def test_a_retry_whose_body_the_broker_has_sends_no_more_of_it() -> None:
    machine = Multiplexer()
    ask(machine, 300_000)
    frames(machine)
    machine.receive(Admit(id=1, received_bytes=300_000), 0.1)
    assert frames(machine, 0.1) == []
    answer = machine.receive(Result(id=1, media_type="a", size_bytes=2, data=b"ok"), 0.2)
    assert isinstance(answer, Answered)
    assert answer.body == b"ok"
    assert machine.window.in_flight_bytes == 0


def test_a_ping_measures_the_round_trip() -> None:
    machine = Multiplexer()
    machine.greet(Hello())
    number = machine.ping()
    assert frames(machine, 1.0) == [Hello(), Ping(id=number)]
    ponged = machine.receive(Pong(id=number, ready=True), 1.08)
    assert isinstance(ponged, Ponged)
    assert ponged.round_trip_s == pytest.approx(0.08)
    assert machine.receive(Pong(id=number, ready=True), 2.0) is None


@pytest.mark.parametrize(
    "frame",
    [
        Admit(id=2),
        Cancel(id=2),
        Progress(id=1, received_bytes=5000, t_us=1),
        Result(id=1, media_type="a", size_bytes=1, data=b"xx"),
        Data(id=1, offset=0, data=b"x"),
        Request(id=1, model="m", media_type="a", size_bytes=1),
        Hello(),
        Ping(id=1),
        Result(id=1, media_type="a", size_bytes=limits.MAX_ANSWER_BYTES + 1),
    ],
    ids=lambda frame: f"{type(frame).__name__}-{frame.__struct_fields__[-1]}",
)
def test_a_broker_that_breaks_the_rules_is_caught(frame: Frame) -> None:
    machine = Multiplexer()
    ask(machine, 4096)
    frames(machine)
    with pytest.raises((WireError, LimitExceeded)):
        machine.receive(frame, 0.1)


def test_acknowledgements_that_go_back_are_caught() -> None:
    machine = Multiplexer()
    ask(machine, 8192)
    frames(machine)
    machine.receive(Progress(id=1, received_bytes=8192, t_us=5), 0.1)
    with pytest.raises(WireError):
        machine.receive(Progress(id=1, received_bytes=4096, t_us=6), 0.2)


# Any order of events ----------------------------------------------------------------------


class Session(RuleBasedStateMachine):
    """A broker that takes frames in order and answers as it likes, after any delay."""

    @initialize()
    def begin(self) -> None:
        self.machine = Multiplexer()
        self.now = 0.0
        self.wire: deque[Frame] = deque()
        self.back: deque[Frame] = deque()
        self.sendings: dict[int, Sending] = {}
        self.ended: set[int] = set()
        self.received: dict[int, int] = {}
        self.live: set[int] = set()

    @rule(size=st.integers(1, 200_000), priority=st.integers(0, 7))
    def ask(self, size: int, priority: int) -> None:
        if len(self.machine.open) < 8:
            sending = ask(self.machine, size, self.now, priority=priority)
            self.sendings[sending.request.id] = sending

    @rule(pick=st.integers(0, 10**6))
    @precondition(lambda self: self.machine.open)
    def cancel(self, pick: int) -> None:
        number = sorted(self.machine.open)[pick % len(self.machine.open)]
        self.machine.cancel(self.sendings[number])
        self.ended.add(number)

    @rule()
    def write(self) -> None:
        self.wire.extend(frames(self.machine, self.now))

    @rule(count=st.integers(1, 20), admit=st.booleans())
    def broker_reads(self, count: int, admit: bool) -> None:
        for _ in range(min(count, len(self.wire))):
            frame = self.wire.popleft()
            if isinstance(frame, Request):
                self.received[frame.id] = 0
                if admit:
                    self.live.add(frame.id)
                    self.back.append(Admit(id=frame.id))
                else:
                    self.back.append(Reject(id=frame.id, code="x", detail="", status=503))
            elif isinstance(frame, Data):
                assert frame.offset == self.received[frame.id]
                self.received[frame.id] += len(frame.data)
                if frame.id in self.live:
                    progress = Progress(
                        id=frame.id,
                        received_bytes=self.received[frame.id],
                        t_us=int(self.now * 1e6),
                    )
                    self.back.append(progress)
                    self._answer_if_complete(frame.id)
            elif isinstance(frame, Cancel):
                self.live.discard(frame.id)
                self.back.append(Cancel(id=frame.id))

    def _answer_if_complete(self, number: int) -> None:
        if self.received[number] == self.sendings[number].size_bytes:
            self.live.discard(number)
            self.back.append(Result(id=number, media_type="a", size_bytes=2, data=b"o"))
            self.back.append(Data(id=number, offset=1, data=b"k"))

    @rule()
    @precondition(lambda self: self.live)
    def broker_fails(self) -> None:
        number = min(self.live)
        self.live.discard(number)
        self.back.append(Error(id=number, code="x", detail="", status=500))

    @rule(count=st.integers(1, 20), later_ms=st.integers(0, 200))
    def device_reads(self, count: int, later_ms: int) -> None:
        self.now += later_ms / 1e3
        for _ in range(min(count, len(self.back))):
            event = self.machine.receive(self.back.popleft(), self.now)
            if isinstance(event, Answered | Refused):
                number = event.sending.request.id
                assert number not in self.ended
                self.ended.add(number)
                if isinstance(event, Answered):
                    assert event.body == b"ok"

    @invariant()
    def bytes_under_way_are_those_on_the_wire_and_unacknowledged(self) -> None:
        if not hasattr(self, "machine"):
            return
        window = self.machine.window
        assert window.in_flight_bytes >= 0
        assert window.in_flight_bytes <= sum(s.under_way_bytes for s in self.sendings.values())
        for number, sending in self.sendings.items():
            on_wire = sum(len(f.data) for f in self.wire if isinstance(f, Data) and f.id == number)
            assert sending.sent_bytes == self.received.get(number, 0) + on_wire

    def teardown(self) -> None:
        """Left alone with a broker that answers, everything ends and nothing is under way."""
        if not hasattr(self, "machine"):
            return
        self.write()
        while self.wire or self.back:
            self.broker_reads(1000, admit=True)
            self.device_reads(1000, later_ms=10)
            self.write()
        assert self.machine.open == {}
        assert self.ended == set(self.sendings)
        assert self.machine.window.in_flight_bytes == 0


Session.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestSession = Session.TestCase
