"""The emulated link: real sockets, real time, known sizes at known rates."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.capacity import Capacity
from edge_runtime.simulation.links import LinkSchedule, LinkSegment, steady
from edge_runtime.simulation.played import trace_schedule
from edge_runtime.simulation.relay import Relay
from edge_runtime.simulation.traces import Trace

_TOLERANCE = 0.15


def _segment(seconds: float, up: float, down: float, rtt_ms: float = 0.0) -> LinkSegment:
    return LinkSegment(duration_s=seconds, uplink_mbps=up, downlink_mbps=down, rtt_ms=rtt_ms)


@asynccontextmanager
async def _count_server() -> AsyncIterator[tuple[int, dict[str, float]]]:
    """Reads a 4-byte length and so many bytes, then answers one byte. Notes what it got."""
    seen = {"bytes": 0.0, "ended": 0.0}
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                while size:
                    data = await reader.read(min(size, 65536))
                    if not data:
                        return
                    size -= len(data)
                    seen["bytes"] += len(data)
                writer.write(b"k")
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            seen["ended"] += 1
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
    finally:
        server.close()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _source_server(size: int) -> AsyncIterator[int]:
    """Sends ``size`` bytes for each byte that it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readexactly(1):
                writer.write(b"x" * size)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, relay: Relay) -> _Client:
        return cls(*await asyncio.open_connection("127.0.0.1", relay.port))

    async def upload_s(self, size: int) -> float:
        """Seconds from the first byte sent to the server's one-byte answer."""
        start = time.perf_counter()
        self.writer.write(struct.pack(">I", size) + bytes(size))
        await self.writer.drain()
        assert await self.reader.readexactly(1) == b"k"
        return time.perf_counter() - start

    def reset(self) -> None:
        opened: socket.socket = self.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def _takes(relay: Relay, measure: Callable[[], Awaitable[float]], expected_s: float) -> None:
    """A stalled machine can only make it longer: one of three tries must be right."""
    for _ in range(3):
        relay.restart()
        measured_s = await measure()
        if measured_s == pytest.approx(expected_s, rel=_TOLERANCE, abs=0.015):
            return
    assert measured_s == pytest.approx(expected_s, rel=_TOLERANCE, abs=0.015)


@pytest.mark.parametrize(
    ("uplink_mbps", "size"),
    [(0.8, 30_000), (4.0, 200_000), (40.0, 2_000_000)],
)
async def test_an_upload_takes_its_size_over_the_rate(uplink_mbps: float, size: int) -> None:
    async with (
        _count_server() as (port, _),
        Relay("127.0.0.1", port, steady(uplink_mbps, 100.0, 0.0)) as relay,
    ):
        client = await _Client.open(relay)
        await client.upload_s(size)
        assert relay.stats().uplink_bytes == size + 4
        assert relay.stats().downlink_bytes == 1
        await _takes(relay, lambda: client.upload_s(size), size / (uplink_mbps * 125_000))
        await client.close()


async def test_a_download_takes_its_size_over_the_rate() -> None:
    size = 400_000
    async with (
        _source_server(size) as port,
        Relay("127.0.0.1", port, steady(100.0, 8.0, 0.0)) as relay,
    ):
        client = await _Client.open(relay)

        async def download_s() -> float:
            start = time.perf_counter()
            client.writer.write(b"!")
            assert len(await client.reader.readexactly(size)) == size
            return time.perf_counter() - start

        await download_s()
        assert relay.stats().downlink_bytes == size
        await _takes(relay, download_s, size / 1e6)
        await client.close()


async def test_a_rate_that_changes_on_the_way_is_integrated() -> None:
    schedule = LinkSchedule((_segment(0.2, 8.0, 50.0), _segment(9.0, 1.6, 50.0)))
    async with _count_server() as (port, _), Relay("127.0.0.1", port, schedule) as relay:
        client = await _Client.open(relay)
        # 200 kB in the first 0.2 s, 80 kB at 200 kB/s: 0.4 s more.
        await _takes(relay, lambda: client.upload_s(280_000), 0.6)
        await client.close()


async def test_every_exchange_costs_a_round_trip_and_the_first_one_two() -> None:
    async with (
        _count_server() as (port, _),
        Relay("127.0.0.1", port, steady(100.0, 100.0, 80.0)) as relay,
    ):
        clients = []

        async def first_s() -> float:
            clients.append(await _Client.open(relay))
            return await clients[-1].upload_s(10)

        await _takes(relay, first_s, 0.160)
        await _takes(relay, lambda: clients[-1].upload_s(10), 0.080)
        for client in clients:
            await client.close()


async def test_two_uploads_share_the_link() -> None:
    async with (
        _count_server() as (port, _),
        Relay("127.0.0.1", port, steady(4.0, 100.0, 0.0)) as relay,
    ):
        clients = [await _Client.open(relay) for _ in range(2)]

        async def both_s() -> float:
            start = time.perf_counter()
            await asyncio.gather(*(client.upload_s(100_000) for client in clients))
            return time.perf_counter() - start

        await _takes(relay, both_s, 0.4)
        for client in clients:
            await client.close()


@pytest.mark.slow
async def test_an_outage_blocks_and_then_everything_arrives() -> None:
    schedule = LinkSchedule(
        (_segment(0.2, 8.0, 50.0), _segment(0.6, 0.0, 0.0), _segment(9.0, 8.0, 50.0))
    )
    async with _count_server() as (port, seen), Relay("127.0.0.1", port, schedule) as relay:
        client = await _Client.open(relay)
        upload = asyncio.create_task(client.upload_s(400_000))
        await asyncio.sleep(0.4)
        before = seen["bytes"]
        await asyncio.sleep(0.3)
        assert seen["bytes"] == before
        assert 0 < before <= 200_000
        await upload
        assert seen["bytes"] == 400_000
        await _takes(relay, lambda: client.upload_s(400_000), 1.0)
        await client.close()


async def test_a_connection_opened_in_an_outage_waits_for_its_end() -> None:
    schedule = LinkSchedule((_segment(0.5, 0.0, 0.0), _segment(9.0, 50.0, 50.0)))
    async with _count_server() as (port, _), Relay("127.0.0.1", port, schedule) as relay:
        clients = []

        async def first_s() -> float:
            clients.append(await _Client.open(relay))
            return await clients[-1].upload_s(10)

        await _takes(relay, first_s, 0.5)
        for client in clients:
            await client.close()


async def test_an_early_cancel_saves_bytes() -> None:
    size = 1_000_000
    async with (
        _count_server() as (port, seen),
        Relay("127.0.0.1", port, steady(4.0, 50.0, 10.0)) as relay,
    ):
        client = await _Client.open(relay)
        client.writer.write(struct.pack(">I", size) + bytes(size))
        await asyncio.sleep(0.3)
        client.reset()
        await asyncio.sleep(0.05)
        crossed = relay.stats().uplink_bytes
        assert 0 < crossed < size / 2
        await asyncio.sleep(0.3)
        assert relay.stats().uplink_bytes == crossed
        assert seen["bytes"] < size
        assert seen["ended"] == 1
        assert relay.stats().discarded_bytes > 0


async def test_a_full_link_stops_the_sender() -> None:
    size = 16_000_000
    async with (
        _count_server() as (port, _),
        Relay("127.0.0.1", port, steady(0.8, 50.0, 0.0)) as relay,
    ):
        client = await _Client.open(relay)
        opened: socket.socket = client.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        client.writer.write(struct.pack(">I", size) + bytes(size))
        await asyncio.sleep(0.3)
        left = client.writer.transport.get_write_buffer_size()
        assert size - left < 1_000_000, "the relay took more than its buffer and the kernel's"
        client.reset()


async def test_a_dead_target_closes_the_connection() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with Relay("127.0.0.1", port, steady(50.0, 50.0, 20.0)) as relay:
            client = await _Client.open(relay)
            with pytest.raises(ConnectionError):
                await client.upload_s(10)


@pytest.mark.slow
async def test_restart_replays_the_schedule() -> None:
    schedule = LinkSchedule((_segment(0.4, 0.8, 50.0), _segment(9.0, 80.0, 50.0)))
    async with _count_server() as (port, _), Relay("127.0.0.1", port, schedule) as relay:
        client = await _Client.open(relay)
        for _ in range(2):
            await _takes(relay, lambda: client.upload_s(20_000), 0.2)
            await asyncio.sleep(0.4)
            assert await client.upload_s(20_000) < 0.15
        await client.close()


async def test_closing_leaves_no_task_and_no_socket() -> None:
    async with _count_server() as (port, _):
        before = asyncio.all_tasks()
        async with Relay("127.0.0.1", port, steady(0.1, 0.1, 500.0)) as relay:
            clients = [await _Client.open(relay) for _ in range(5)]
            for client in clients:
                client.writer.write(struct.pack(">I", 90_000) + bytes(90_000))
            await asyncio.sleep(0.1)
        after = {task for task in asyncio.all_tasks() if "_Pair" in repr(task)}
        assert not after - before
        for client in clients:
            client.writer.transport.abort()


async def test_a_taken_port_is_a_typed_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        relay = Relay("127.0.0.1", 1, steady(1, 1, 1), port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="choose another port"):
            await relay.__aenter__()


@pytest.mark.parametrize("target", ["nonsense", "127.0.0.1:", "127.0.0.1:99999", ":80"])
async def test_standalone_refuses_a_target_that_makes_no_sense(target: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_runtime.simulation.relay", "--target", target,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await child.communicate()
    assert child.returncode == 2
    assert out == b""
    assert b"write HOST:PORT" in err
    assert b"Traceback" not in err


async def test_standalone_relays_answers_its_control_port_and_ends_on_sigterm() -> None:
    async with _count_server() as (port, _):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "edge_runtime.simulation.relay",
            "--target", f"127.0.0.1:{port}", "--schedule", "wifi", "--seed", "3",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            ready = json.loads(await child.stdout.readline())
            assert ready["schedule"] == "wifi"
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(ready["url"].rpartition(":")[2])
            )
            client = _Client(reader, writer)
            await client.upload_s(1000)
            asked, ask = await asyncio.open_connection("127.0.0.1", ready["control_port"])
            ask.write(b"stats\nnonsense\nrestart\n")
            stats = json.loads(await asked.readline())
            assert stats["uplink_bytes"] == 1004
            assert stats["downlink_bytes"] == 1
            assert "error" in json.loads(await asked.readline())
            assert json.loads(await asked.readline())["elapsed_s"] < stats["elapsed_s"]
            ask.close()
            await client.close()
        finally:
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), 10) == 0


_BINS = [8.0, 1.6, 0.0, 4.0, 12.0, 0.8, 2.4, 6.0] * 4


def _trace(rtt_ms: float = 0.0) -> Trace:
    return Trace(
        name="bins",
        group="LTE",
        radio="lte",
        uplink_mbps=np.array(_BINS),
        rtt_ms=np.full(len(_BINS) // 2, rtt_ms),
    )


@pytest.mark.slow
@pytest.mark.parametrize("offset_s", [0.0, 0.6])
async def test_a_played_trace_passes_what_the_trace_holds(offset_s: float) -> None:
    """Bytes that crossed at a time are its integral: no sooner, and no later but by a stall."""
    trace = _trace()
    schedule = trace_schedule(trace, offset_s=offset_s, seconds=30.0)
    capacity = Capacity(trace.uplink_mbps, offset_s)
    size = 900_000
    async with _count_server() as (port, _), Relay("127.0.0.1", port, schedule) as relay:
        client = await _Client.open(relay)
        await client.upload_s(10)
        relay.restart()
        before = relay.stats().uplink_bytes
        upload = asyncio.create_task(client.upload_s(size))
        for _ in range(10):
            await asyncio.sleep(0.11)
            stats = relay.stats()
            crossed = stats.uplink_bytes - before
            assert crossed <= capacity.between(0.0, stats.elapsed_s) + 1448
        await upload
        expected_s = capacity.drain(0.0, size + 4)
        await _takes(relay, lambda: client.upload_s(size), expected_s)
        await client.close()


async def test_standalone_plays_a_trace_of_a_folder_on_the_address_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "index.csv").write_text(
        "name,class,radio,uplink,rtt\nwalk,LTE,lte,walk.txt,rtt.txt\n"
    )
    (tmp_path / "walk.txt").write_text("".join(f"{i / 10:.1f} 50.0\n" for i in range(200)))
    (tmp_path / "rtt.txt").write_text("20.0\n" * 100)
    arguments = ("--host", "127.0.0.2", "--traces", str(tmp_path), "--offset-s", "1.2")
    async with _count_server() as (port, _):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "edge_runtime.simulation.relay",
            "--target", f"127.0.0.1:{port}", *arguments, "--trace", "walk", "--seconds", "90",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            ready = json.loads(await child.stdout.readline())
            assert (ready["schedule"], round(ready["period_s"])) == ("walk", 90)
            assert ready["url"].startswith("http://127.0.0.2:")
            reader, writer = await asyncio.open_connection(
                "127.0.0.2", int(ready["url"].rpartition(":")[2])
            )
            client = _Client(reader, writer)
            await client.upload_s(1000)
            await client.close()
        finally:
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), 10) == 0
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "edge_runtime.simulation.relay",
            "--target", f"127.0.0.1:{port}", *arguments, "--trace", "run",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, err = await child.communicate()
        assert child.returncode == 2
        assert b"no trace 'run'" in err


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"offset_s": 0.1}, "multiple of 0.2"),
        ({"offset_s": -0.2}, "multiple of 0.2"),
        ({"seconds": 0.0}, "up to 3600 s"),
        ({"seconds": 1e9}, "up to 3600 s"),
    ],
)
def test_a_trace_that_cannot_be_played_is_refused(changes: dict[str, float], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        trace_schedule(_trace(), **({"offset_s": 0.0, "seconds": 10.0} | changes))
    without = Trace(
        name="x", group="LTE", radio="lte", uplink_mbps=np.array([1.0] * 100), rtt_ms=None
    )
    with pytest.raises(ConfigError, match="no round trips"):
        trace_schedule(without, offset_s=0.0, seconds=10.0)
