"""The load of the serving benchmark: what it counts is what happened on the wire."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from benchmarks.serving.device import waited_share
from benchmarks.serving.figures.base import Bench
from benchmarks.serving.figures.capacity import predicted_per_s
from benchmarks.serving.load import ERROR, GAVE_UP, Kind, Load, Phase, Plan, Record
from benchmarks.serving.measure import quantile, summary
from benchmarks.serving.models import photo
from benchmarks.serving.peers import CONFIGURATIONS, PEERS, environment_of
from benchmarks.serving.processes import cpu_s, pss_bytes, tree
from benchmarks.serving.workload import Work, runner
from tests.support import broker_images
from tests.support.servables import shared_servable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno"


@asynccontextmanager
async def server(behavior: str) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Reads whole requests as ``behavior`` says; gives its port and the bodies that came."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"Content-Length: (\d+)", head)
                assert found is not None
                if behavior == "refuse":
                    writer.write(REFUSAL)
                    continue
                if b"100-continue" in head:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                bodies.append(await reader.readexactly(int(found[1])))
                if behavior == "hang":
                    await asyncio.sleep(60)
                if behavior == "break":
                    break
                chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"
                writer.write(chunked if behavior == "chunks" else ANSWER)
                if behavior == "chunks":
                    await asyncio.sleep(0.01)
                    writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], bodies
    finally:
        listening.close()


async def run(tmp_path: Path, port: int, *, give_up_ms: float = 5000.0, **kind: object) -> list:
    (tmp_path / "body").write_bytes(b"x" * 1000)
    head = "POST / HTTP/1.1\r\nContent-Length: 1000\r\n"
    head += "Expect: 100-continue\r\n\r\n" if kind.get("expect") else "\r\n"
    one = Kind(name="one", head=head, body_path=str(tmp_path / "body"), **kind)
    phases = (Phase(seconds=0.3, per_s=100),)
    return await Load(Plan(port=port, kinds=(one,), give_up_ms=give_up_ms, phases=phases)).run()


@pytest.mark.parametrize("behavior", ["answer", "chunks"])
@pytest.mark.parametrize("kind", [{}, {"expect": True}, {"body_after_ms": 1.0}])
async def test_every_request_is_sent_whole_and_answered(
    tmp_path: Path, behavior: str, kind: dict[str, object]
):
    async with server(behavior) as (port, bodies):
        records = await run(tmp_path, port, **kind)
    assert len(records) > 5
    assert all(record.status == 200 and record.body_sent for record in records)
    assert bodies == [b"x" * 1000] * len(records)


@pytest.mark.parametrize("kind", [{"expect": True}, {"body_after_ms": 500.0}])
async def test_a_refusal_on_the_headers_is_seen_before_the_body_goes(
    tmp_path: Path, kind: dict[str, object]
):
    async with server("refuse") as (port, bodies):
        records = await run(tmp_path, port, **kind)
    assert {(record.status, record.body_sent) for record in records} == {(503, False)}
    assert bodies == []


@pytest.mark.parametrize(("behavior", "status"), [("hang", GAVE_UP), ("break", ERROR)])
async def test_who_is_not_answered_is_counted_as_such(tmp_path: Path, behavior: str, status: int):
    async with server(behavior) as (port, _):
        records = await run(tmp_path, port, give_up_ms=50.0)
    assert {record.status for record in records} == {status}


def test_late_answers_broken_promises_and_those_who_left_are_not_good():
    records = [
        Record(at_s=1.0, kind=0, status=status, ms=ms, body_sent=True)
        for status, ms in [
            (200, 100),
            (200, 150),
            (200, 201),
            (504, 200),
            (503, 1),
            (GAVE_UP, 1000),
        ]
    ]
    outside = [Record(at_s=5.0, kind=0, status=200, ms=1, body_sent=True)]
    said = summary(records + outside, 200, 0.0, 2.0)
    assert said["good_per_s"] == 1.0
    assert said["accepted_late_share"] == 0.6
    assert said["refused_p50_ms"] == 200
    assert said["statuses"] == {"0": 1, "200": 3, "503": 1, "504": 1}


def test_a_quantile_of_nothing_is_nothing():
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_processor_time_and_memory_are_those_of_this_process():
    before_s = cpu_s(os.getpid())
    while cpu_s(os.getpid()) < before_s + 0.05:
        sum(range(10_000))
    assert os.getpid() in tree(os.getpid())
    assert 2**20 < pss_bytes(os.getpid()) < 2**34


def test_the_sleeping_device_takes_what_it_says():
    work = Work(kind="sleep", deadline_ms=200, fixed_ms=20, image_ms=5)
    assert work.capacity_per_s == pytest.approx(133.3, abs=0.1)
    assert runner(work)([b"ab", b"c"]) == [2, 1]


def test_a_device_says_how_long_it_waited_between_batches():
    assert waited_share("a\ndevice waited: 0.0123\nb") == 0.0123
    assert waited_share("a log of somebody else") is None


def test_the_capacity_of_a_device_is_that_of_batches_of_which_two_fit_into_the_deadline():
    work = Work(kind="sleep", deadline_ms=200, fixed_ms=20, image_ms=5)
    assert predicted_per_s(work) == pytest.approx(1000 * 8 / 60)
    short = msgspec.structs.replace(work, deadline_ms=100)
    assert predicted_per_s(short) == pytest.approx(1000 * 6 / 50)
    assert predicted_per_s(msgspec.structs.replace(work, deadline_ms=40)) == 0.0


def test_a_figure_takes_no_more_rounds_than_its_share_of_the_time(tmp_path: Path):
    fields = {"folder": tmp_path, "peers": (), "trivial": "", "resnet18": ""}
    bench = Bench(**fields, quick=False, photo=b"", tensor=b"")
    assert list(bench.turns()) == [0, 1, 2]
    bench.until_s = time.monotonic()
    assert list(bench.turns()) == [0]  # one it takes always
    bench.until_s = time.monotonic() + 3600
    assert list(bench.turns()) == [0, 1, 2]
    bench.quick = True
    assert list(bench.turns()) == [0]


def test_a_program_of_a_workload_runs_what_a_peer_is_given():
    work = Work(kind="program", deadline_ms=200, servable=str(shared_servable()))
    assert runner(work)([broker_images.png(0)]) == [len(broker_images.png(0))]


def test_the_photo_is_the_same_each_time_and_about_30_kb():
    assert photo() == photo()
    assert 20_000 < len(photo()) < 40_000


def test_every_peer_has_a_server_program_and_configurations():
    folder = Path(__file__).parents[2] / "benchmarks" / "serving" / "servers"
    for peer in PEERS:
        assert (folder / f"{peer}_server.py").is_file()
        assert CONFIGURATIONS[peer][0] == peer
    assert environment_of("no-such-peer") is None
