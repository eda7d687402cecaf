"""The way of one device to the broker: radio, connection, TCP's rounds, and the broker.

Nothing here waits: an upload is planned from a state of the path to its answer, assuming
nobody interferes, and ``cancel`` says what is left when somebody does. States are values, so
a clairvoyant search and a counterfactual use the same functions as the device.

TCP sends a window, waits for the acknowledgement or the link, whichever is later, and
doubles the window (RFC 5681 slow start from RFC 6928's ten segments). A cancelled upload keeps
its framed session; what was handed to TCP and not yet acknowledged still crosses the link.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from edge_runtime.estimators.energy import RadioPower
from edge_runtime.simulation.world import World

__all__ = ["Path", "Ping", "Upload", "cancel", "fresh_path", "plan_ping", "plan_upload"]

_CONTROL_BYTES = 100.0
NEVER = math.inf


class Path(NamedTuple):
    """State of radio, link and connection; times are seconds of the run."""

    link_free_s: float
    """Until then earlier bytes occupy the link."""
    radio_until_s: float
    """Its last activity; the tail follows."""
    radio_ready_s: float
    connection_used_s: float
    """Last byte of the open connection; minus infinity: it is closed."""
    connection_ready_s: float
    window_bytes: float
    window_s: float
    """When the window was last used."""


def fresh_path() -> Path:
    """A sleeping radio and no connection."""
    return Path(0.0, -math.inf, 0.0, -math.inf, 0.0, 0.0, -math.inf)


class Upload(NamedTuple):
    """A planned upload, set-up and answer included."""

    submitted_s: float
    begin_s: float
    """The link is free: radio and connection are readied."""
    ready_s: float
    """The first byte of the body leaves."""
    up_end_s: float
    answer_s: float
    """Infinity: no answer will come."""
    failed_s: float
    """When the device learns that it failed; infinity: it does not."""
    rounds: tuple[tuple[float, float, float], ...]
    """``(start_s, end_s, bytes)`` of each."""
    wire_bytes: float
    setup_bytes: float
    most_bytes: float
    """What crosses the link at most: less than ``wire_bytes`` into a black hole."""
    window_bytes: float
    """At the start of the body."""
    promoted: bool
    queue_s: float
    service_s: float
    before: Path
    after: Path


class Ping(NamedTuple):
    """A planned keep-warm request."""

    begin_s: float
    sent_s: float
    answer_s: float
    failed_s: float
    wire_bytes: float
    promoted: bool
    round_trip_s: float
    """What the device measures."""
    after: Path


class _Ready(NamedTuple):
    begin_s: float
    ready_s: float
    promoted: bool
    opened: bool
    refused_s: float


def _open_at(world: World, path: Path, time_s: float) -> bool:
    kept_s = world.constants.tcp.connection_kept_s
    if time_s - path.connection_used_s > kept_s:
        return False
    if not world.outages:
        return True
    outage = world.outage_at(path.connection_used_s, time_s)
    return outage is None or not outage.refuses


def _prepare(world: World, path: Path, radio: RadioPower, now_s: float) -> _Ready:
    """Wake the radio and open the connection where needed."""
    begin_s = max(now_s, path.link_free_s)
    promoted = begin_s > path.radio_until_s + radio.tail_s
    ready_s = begin_s + radio.promotion_s if promoted else max(begin_s, path.radio_ready_s)
    if _open_at(world, path, begin_s):
        return _Ready(begin_s, max(ready_s, path.connection_ready_s), promoted, False, NEVER)
    refused_s = NEVER
    for _ in range(world.constants.tcp.handshake_round_trips):
        sent_s = world.capacity.drain(ready_s, _CONTROL_BYTES)
        if sent_s == NEVER:
            return _Ready(begin_s, NEVER, promoted, True, NEVER)
        ready_s = sent_s + world.round_trips.at(sent_s)
        outage = world.outage_at(sent_s, ready_s) if world.outages else None
        if outage is not None:
            refused_s = ready_s if outage.refuses else NEVER
            return _Ready(begin_s, NEVER, promoted, True, refused_s)
    return _Ready(begin_s, ready_s, promoted, True, refused_s)


def plan_upload(world: World, path: Path, now_s: float, index: int) -> Upload:
    """Upload image ``index``, submitted at ``now_s``."""
    tcp = world.constants.tcp
    radio = world.radio_power
    size = world.wire_bytes(index)
    ready = _prepare(world, path, radio, now_s)
    setup_bytes = tcp.handshake_bytes if ready.opened else 0.0
    radio_ready_s = ready.begin_s + radio.promotion_s if ready.promoted else path.radio_ready_s
    if ready.ready_s == NEVER:
        ended_s = ready.refused_s if ready.refused_s < NEVER else ready.begin_s
        after = path._replace(
            link_free_s=max(path.link_free_s, ready.begin_s),
            radio_until_s=max(path.radio_until_s, ended_s),
            radio_ready_s=radio_ready_s,
            connection_used_s=-math.inf,
        )
        return Upload(
            now_s, ready.begin_s, NEVER, NEVER, NEVER, ready.refused_s, (), size, setup_bytes,
            0.0, tcp.initial_window_bytes, ready.promoted, 0.0, 0.0, path, after,
        )  # fmt: skip
    kept = not ready.opened and ready.ready_s - path.window_s <= tcp.window_kept_s
    window = path.window_bytes if kept else tcp.initial_window_bytes
    rounds = []
    time_s, left, step = ready.ready_s, size, min(window, world.max_window_bytes(ready.ready_s))
    while True:
        part = min(step, left)
        drained_s = world.capacity.drain(time_s, part)
        left -= part
        last = left <= 0
        end_s = drained_s if last else max(drained_s, time_s + world.round_trips.at(time_s))
        rounds.append((time_s, end_s, part))
        time_s = end_s
        if last or time_s == NEVER:
            break
        step = min(2 * step, world.max_window_bytes(time_s))
    up_end_s = time_s
    if up_end_s == NEVER:
        after = path._replace(link_free_s=NEVER, connection_used_s=-math.inf)
        return Upload(
            now_s, ready.begin_s, ready.ready_s, NEVER, NEVER, NEVER, tuple(rounds), size,
            setup_bytes, size, window, ready.promoted, 0.0, 0.0, path, after,
        )  # fmt: skip
    round_trip_s = world.round_trips.at(up_end_s)
    arrived_s = up_end_s + round_trip_s / 2
    queue_s, service_s = world.queue_at(index, arrived_s), world.service_s[index]
    done_s = arrived_s + queue_s + service_s
    answer_s = done_s + world.round_trips.at(done_s) / 2
    failed_s, used_s, most, link_free_s = NEVER, answer_s, size, up_end_s
    outage = world.outage_at(ready.ready_s, answer_s) if world.outages else None
    if outage is not None:
        at_s = max(outage.start_s, ready.ready_s)
        sent = _crossed(world, tuple(rounds), at_s)
        answer_s, used_s = NEVER, -math.inf
        most = min(size, sent + window)
        link_free_s = min(up_end_s, max(at_s, world.capacity.drain(at_s, most - sent)))
        failed_s = at_s + round_trip_s if outage.refuses else NEVER
    after = Path(
        link_free_s,
        link_free_s if used_s < 0 else used_s,
        radio_ready_s,
        used_s,
        ready.ready_s,
        min(window + size, tcp.max_window_bytes),
        up_end_s + round_trip_s,
    )
    return Upload(
        now_s, ready.begin_s, ready.ready_s, up_end_s, answer_s, failed_s, tuple(rounds), size,
        setup_bytes, most, window, ready.promoted, queue_s, service_s, path, after,
    )  # fmt: skip


def _crossed(world: World, rounds: tuple[tuple[float, float, float], ...], time_s: float) -> float:
    total = 0.0
    for start_s, end_s, part in rounds:
        if time_s >= end_s:
            total += part
            continue
        if time_s > start_s:
            total += min(part, world.capacity.between(start_s, time_s))
        break
    return total


def crossed_bytes(world: World, upload: Upload, time_s: float) -> float:
    """Bytes of the body that have crossed the link by ``time_s``."""
    return min(_crossed(world, upload.rounds, time_s), upload.most_bytes)


def cancel(world: World, upload: Upload, now_s: float) -> tuple[Path, float]:
    """The path after an upload was cancelled at ``now_s``, and its bytes on the wire.

    The session stays; at most ``World.under_way_bytes`` still cross the link. Before it
    began, nothing has happened.
    """
    if now_s <= upload.begin_s:
        return upload.before, 0.0
    if upload.after.connection_used_s < 0:
        sent = crossed_bytes(world, upload, now_s)
        return upload.after._replace(
            link_free_s=min(upload.after.link_free_s, max(now_s, upload.before.link_free_s)),
            radio_until_s=max(upload.before.radio_until_s, now_s),
        ), upload.setup_bytes + sent
    tcp = world.constants.tcp
    if now_s <= upload.ready_s:
        return upload.after._replace(
            link_free_s=upload.before.link_free_s,
            radio_until_s=max(now_s, upload.ready_s),
            connection_used_s=upload.ready_s,
            window_bytes=upload.window_bytes,
            window_s=upload.before.window_s,
        ), upload.setup_bytes
    sent = crossed_bytes(world, upload, now_s)
    rest = min(world.under_way_bytes(now_s), upload.most_bytes - sent)
    free_s = min(world.capacity.drain(now_s, rest), upload.up_end_s)
    acknowledged_s = free_s + world.round_trips.at(free_s)
    return upload.after._replace(
        link_free_s=free_s,
        radio_until_s=acknowledged_s,
        connection_used_s=acknowledged_s,
        window_bytes=min(upload.window_bytes + sent, tcp.max_window_bytes),
        window_s=acknowledged_s,
    ), upload.setup_bytes + sent + rest


def plan_ping(world: World, path: Path, now_s: float) -> Ping:
    """A small request that wakes the radio, opens the connection and measures the way."""
    tcp = world.constants.tcp
    radio = world.radio_power
    ready = _prepare(world, path, radio, now_s)
    radio_ready_s = ready.begin_s + radio.promotion_s if ready.promoted else path.radio_ready_s
    wire_bytes = tcp.ping_bytes + (tcp.handshake_bytes if ready.opened else 0.0)
    sent_s = NEVER
    if ready.ready_s < NEVER:
        sent_s = world.capacity.drain(ready.ready_s, tcp.ping_bytes)
    outage = None
    if sent_s < NEVER:
        answer_s = sent_s + world.round_trips.at(sent_s)
        outage = world.outage_at(ready.ready_s, answer_s) if world.outages else None
    if sent_s == NEVER or outage is not None:
        failed_s = ready.refused_s
        if outage is not None and outage.refuses:
            failed_s = max(outage.start_s, ready.ready_s) + world.round_trips.at(sent_s)
        after = path._replace(
            radio_until_s=max(path.radio_until_s, ready.begin_s),
            radio_ready_s=radio_ready_s,
            connection_used_s=-math.inf,
        )
        return Ping(
            ready.begin_s, ready.begin_s, NEVER, failed_s, wire_bytes, ready.promoted, NEVER, after
        )
    after = Path(
        max(path.link_free_s, sent_s),
        max(path.radio_until_s, answer_s),
        radio_ready_s,
        answer_s,
        ready.ready_s,
        tcp.initial_window_bytes if ready.opened else path.window_bytes,
        -math.inf if ready.opened else path.window_s,
    )
    return Ping(
        ready.begin_s, sent_s, answer_s, NEVER, wire_bytes, ready.promoted,
        answer_s - ready.ready_s, after,
    )  # fmt: skip
