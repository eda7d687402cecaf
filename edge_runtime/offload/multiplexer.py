"""The device's end of a session as a state machine: frames in, frames out, no I/O.

A request::

    OPEN ── REQUEST, ADMIT, DATA as the window allows, PROGRESS ──▶ RESULT, REJECT or ERROR
    OPEN ── given up, or refused with a part of its body unsent ──▶ LEAVING: CANCEL
    LEAVING ── CANCEL comes back ──▶ gone

Bytes count as under way until PROGRESS names them or the broker says CANCEL back. Times are
seconds of any monotonic clock, passed in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.frames import (
    MAX_ID,
    Admit,
    Cancel,
    Data,
    Error,
    Frame,
    Hint,
    Ping,
    Pong,
    Progress,
    Reject,
    Request,
    Result,
    Welcome,
)
from edge_runtime.offload.window import Arrival, SendWindow

__all__ = [
    "Answered",
    "Event",
    "Hinted",
    "Multiplexer",
    "Ponged",
    "Refused",
    "Sending",
    "SessionOver",
]

_SHORT_OF_TIME_S: Final = 1.0
_TRUST_S: Final = 5.0
"""How long the last ADMIT lets the next upload begin with what the link is known to hold."""


class Sending:
    """One request on its way. Read by whoever asked; changed by the multiplexer alone."""

    def __init__(self, request: Request, body: bytes, now_s: float, delivered_bytes: int) -> None:
        self.request = request
        self.size_bytes = len(body)
        self.sent_bytes = 0
        self.received_bytes = 0
        self.elapsed_ms = 0.0
        """On the broker's clock, from REQUEST to the last PROGRESS."""
        self.admitted = False
        self.opened_s = now_s
        self.first_byte_s: float | None = None
        self.body = memoryview(body)
        self.requested_s: float | None = None
        self.first_in_line = False
        """Nothing was under way when it was sent."""
        self.marks: deque[tuple[int, float]] = deque()
        """``(end in the body, when sent)`` of DATA frames without a PROGRESS."""
        self.arrivals: deque[Arrival] = deque()
        self.delivered_at_start = delivered_bytes
        self.result: Result | None = None
        self.answer = bytearray()

    @property
    def to_send_bytes(self) -> int:
        """What of the body is left."""
        return self.size_bytes - self.sent_bytes

    @property
    def under_way_bytes(self) -> int:
        """Sent, and not known to have come."""
        return self.sent_bytes - self.received_bytes


class Answered(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request has its whole answer."""

    sending: Sending
    result: Result
    body: bytes


class Refused(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request ended in REJECT or ERROR."""

    sending: Sending
    why: Reject | Error


class Hinted(msgspec.Struct, frozen=True, kw_only=True):
    """The broker said how long a new request would wait, or that it ends."""

    queue_delay_ms: int | None
    draining: bool = False
    round_trip_s: float | None = None
    """From REQUEST to ADMIT, where nothing was under way before it."""


class Ponged(msgspec.Struct, frozen=True, kw_only=True):
    """A PING came back."""

    id: int
    pong: Pong
    round_trip_s: float


class SessionOver(msgspec.Struct, frozen=True, kw_only=True):
    """The broker ends the session, and says why."""

    why: Error


Event = Answered | Refused | Hinted | Ponged | SessionOver


def _rank(sending: Sending, turn: int, now_s: float) -> tuple[int, float, int]:
    """Least first: the priority class; then what is short of time, by deadline; then by turns.

    Two photos that share a slow link by turns are both late, and one after the other the first
    is in time (Liu and Layland, JACM 20(1), 1973, on earliest deadline first). What has time
    takes turns, so that nothing small waits behind something large.
    """
    request = sending.request
    due_s = sending.opened_s + request.deadline_ms / 1e3
    if due_s - now_s <= _SHORT_OF_TIME_S:
        return request.priority, due_s, request.id
    return request.priority, math.inf, turn


class Multiplexer:
    """Of one connection."""

    def __init__(self) -> None:
        self.window = SendWindow()
        self._frames: deque[Frame] = deque()
        self._open: dict[int, Sending] = {}
        self._turns: deque[int] = deque()
        self._leaving: dict[int, Sending] = {}
        self._pings: dict[int, float] = {}
        self._last_id = 0
        self._last_ping = 0
        self._admitted_s = float("-inf")

    @property
    def open(self) -> Mapping[int, Sending]:
        """Requests without an outcome, by id."""
        return self._open

    @property
    def uploading(self) -> bool:
        """Whether bytes wait to be sent."""
        return any(sending.to_send_bytes for sending in self._open.values())

    @property
    def exhausted(self) -> bool:
        """Whether no id is left: open another session."""
        return self._last_id >= MAX_ID

    # What the device wants -------------------------------------------------------------

    def request(self, request: Request, body: bytes, now_s: float) -> Sending:
        """Ask for an answer; ``request`` gets the next id. ``body`` must not be empty."""
        self._last_id += 1
        numbered = msgspec.structs.replace(request, id=self._last_id, size_bytes=len(body))
        sending = Sending(numbered, body, now_s, self.window.delivered_bytes)
        self._open[self._last_id] = sending
        self._turns.append(self._last_id)
        self._frames.append(numbered)
        return sending

    def cancel(self, sending: Sending) -> None:
        """Send no further byte of it, and tell the broker. Harmless after its end."""
        request_id = sending.request.id
        if self._open.pop(request_id, None) is None:
            return
        if sending.requested_s is None:  # the broker never heard of it
            self._frames = deque(frame for frame in self._frames if frame is not sending.request)
            return
        self._leave(sending)

    def ping(self) -> int:
        """Ask whether the broker is there; ``Ponged`` with this id follows."""
        self._last_ping = (self._last_ping + 1) & MAX_ID
        self._frames.append(Ping(id=self._last_ping))
        return self._last_ping

    def greet(self, frame: Frame) -> None:
        """Send HELLO, before everything else."""
        self._frames.appendleft(frame)

    # What goes out ---------------------------------------------------------------------

    def next_frame(self, now_s: float, *, data: bool = True) -> Frame | None:
        """The next frame to write, as written now; None: wait for something to happen.

        ``data=False``: the connection is full, only small frames may go.
        """
        if self._frames:
            frame = self._frames.popleft()
            if isinstance(frame, Request):
                asked = self._open[frame.id]
                asked.requested_s = now_s
                asked.first_in_line = self.window.in_flight_bytes == 0
            elif isinstance(frame, Ping):
                self._pings[frame.id] = now_s
            return frame
        return self._next_data(now_s) if data else None

    def _next_data(self, now_s: float) -> Data | None:
        room = self.window.room_bytes(now_s)
        if room <= 0:
            return None
        chunk_bytes = self.window.chunk_bytes(now_s)
        chosen, least = None, (0, 0.0, 0)
        for number, request_id in enumerate(tuple(self._turns)):
            sending = self._open.get(request_id)
            if sending is None or not sending.to_send_bytes:
                self._turns.remove(request_id)
                continue
            rank = _rank(sending, number, now_s)
            if (chosen is None or rank < least) and self._allowance(sending, now_s) > 0:
                chosen, least = sending, rank
        if chosen is None:
            return None
        size = min(chunk_bytes, chosen.to_send_bytes)
        if size > min(room, self._allowance(chosen, now_s)):
            return None  # a whole piece soon, rather than crumbs now
        self._turns.remove(chosen.request.id)
        self._turns.append(chosen.request.id)
        start = chosen.sent_bytes
        chosen.sent_bytes += size
        chosen.marks.append((chosen.sent_bytes, now_s))
        self.window.sent(size)
        data = bytes(chosen.body[start : start + size])
        return Data(id=chosen.request.id, offset=start, data=data)

    def _allowance(self, sending: Sending, now_s: float) -> int:
        """What this upload alone may have under way: little, until it is known to be wanted.

        A broker that admitted the last request lately is trusted to admit this one.
        """
        if sending.admitted or now_s - self._admitted_s <= _TRUST_S:
            return limits.MAX_IMAGE_BYTES
        return limits.SESSION_WINDOW_BYTES - sending.sent_bytes

    # What comes in ---------------------------------------------------------------------

    def receive(self, frame: Frame, now_s: float) -> Event | None:
        """Take a frame in. Raises ``WireError`` or ``LimitExceeded``: the session is broken."""
        if isinstance(frame, Welcome):
            return None
        if isinstance(frame, Hint):
            return Hinted(queue_delay_ms=frame.queue_delay_ms, draining=frame.draining)
        if isinstance(frame, Pong):
            return self._pong(frame, now_s)
        if isinstance(frame, Error) and frame.id == 0:
            return SessionOver(why=frame)
        if not isinstance(frame, Admit | Progress | Reject | Error | Result | Data | Cancel):
            raise WireError(f"{type(frame).__name__.upper()} is not for a device")
        if frame.id > self._last_id:
            raise WireError(f"the broker speaks of request {frame.id}, which was never made")
        if isinstance(frame, Cancel):
            self._gone(frame.id)
            return None
        sending = self._open.get(frame.id)
        if isinstance(frame, Progress):
            self._progress(frame, now_s)
            return None
        if sending is None:  # cancelled while this was under way
            if isinstance(frame, Admit):  # which tells as much of the next one
                self._admitted_s = now_s
            elif isinstance(frame, Reject):
                self._admitted_s = float("-inf")
            return None
        if isinstance(frame, Admit):
            return self._admit(frame, sending, now_s)
        if isinstance(frame, Reject | Error):
            self._admitted_s = float("-inf")
            self._end(sending)
            return Refused(sending=sending, why=frame)
        return self._collect(frame, sending, now_s)

    def _admit(self, frame: Admit, sending: Sending, now_s: float) -> Hinted:
        sending.admitted = True
        self._admitted_s = now_s
        round_trip_s = None
        if sending.requested_s is not None:
            waited_s = now_s - sending.requested_s
            self.window.observe_round_trip(waited_s, now_s)
            round_trip_s = waited_s if sending.first_in_line else None
        if frame.received_bytes:  # a retry: the broker has the body from the first try
            sending.size_bytes = sending.sent_bytes
        return Hinted(queue_delay_ms=frame.queue_delay_ms, round_trip_s=round_trip_s)

    def _progress(self, frame: Progress, now_s: float) -> None:
        sending = self._open.get(frame.id) or self._leaving.get(frame.id)
        if sending is None:
            return
        if not sending.received_bytes <= frame.received_bytes <= sending.sent_bytes:
            raise WireError("PROGRESS acknowledges bytes twice, or bytes that were never sent")
        self.window.delivered(frame.received_bytes - sending.received_bytes)
        sending.received_bytes = frame.received_bytes
        sending.elapsed_ms = frame.t_us / 1e3
        sent_s = sending.requested_s or sending.opened_s
        if not sending.arrivals:
            sending.arrivals.append(Arrival(0.0, sent_s, sending.delivered_at_start))
        acknowledged = False
        while sending.marks and sending.marks[0][0] <= frame.received_bytes:
            sent_s = sending.marks.popleft()[1]
            acknowledged = True
        if acknowledged:
            self.window.observe_round_trip(now_s - sent_s, now_s)
            delivered = self.window.delivered_bytes
            sending.arrivals.append(Arrival(frame.t_us / 1e6, sent_s, delivered))
            self.window.observe_arrivals(sending.arrivals, now_s)

    def _collect(self, frame: Result | Data, sending: Sending, now_s: float) -> Answered | None:
        if isinstance(frame, Result):
            if sending.result is not None:
                raise WireError("a request got two answers")
            if frame.size_bytes > limits.MAX_ANSWER_BYTES:
                raise LimitExceeded(f"the answer has more than {limits.MAX_ANSWER_BYTES} bytes")
            sending.result = frame
            sending.first_byte_s = now_s
        elif sending.result is None or frame.offset != len(sending.answer):
            raise WireError("a piece of an answer came out of order")
        sending.answer += frame.data
        assert sending.result is not None  # noqa: S101
        missing = sending.result.size_bytes - len(sending.answer)
        if missing < 0:
            raise WireError("an answer is longer than it was said to be")
        if missing:
            return None
        self._end(sending)
        return Answered(sending=sending, result=sending.result, body=bytes(sending.answer))

    def _pong(self, frame: Pong, now_s: float) -> Ponged | None:
        asked_s = self._pings.pop(frame.id, None)
        if asked_s is None:
            return None
        self.window.observe_round_trip(now_s - asked_s, now_s)
        return Ponged(id=frame.id, pong=frame, round_trip_s=now_s - asked_s)

    # Ends ------------------------------------------------------------------------------

    def _end(self, sending: Sending) -> None:
        """It has its outcome; of a body that was under way, no more goes out."""
        del self._open[sending.request.id]
        if sending.to_send_bytes:
            self._leave(sending)
            return
        self.window.delivered(sending.under_way_bytes)
        sending.received_bytes = sending.sent_bytes

    def _leave(self, sending: Sending) -> None:
        self._leaving[sending.request.id] = sending
        self._frames.append(Cancel(id=sending.request.id))

    def _gone(self, request_id: int) -> None:
        sending = self._leaving.pop(request_id, None)
        if sending is not None:
            self.window.delivered(sending.under_way_bytes)
