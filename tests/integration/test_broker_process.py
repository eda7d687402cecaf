"""``nearfar serve`` as a user runs it: ready, answering, drained, gone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from broker.accounts.keys import KeyFile
from edge_runtime.contract.errors import ModelLoadError
from tests.support import broker_images as images
from tests.support.broker import (
    broker_process,
    is_running,
    predict,
    request,
    stopped,
    until,
    wait_until_gone,
)
from tests.support.servables import shared_servable

pytestmark = pytest.mark.slow

EVERYWHERE = "0.0.0.0"  # noqa: S104


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def test_it_answers_and_its_front_process_never_loads_torch(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        reply = await predict(broker.url, images.png())
        assert reply.status == 200
        assert "libtorch" in mapped_files(broker.worker_pid())
        assert "libtorch" not in mapped_files(broker.process.pid)
        (line,) = broker.logged("request")
        events = [json.loads(line) for line in broker.log_path.read_text().splitlines()]
        assert {"event", "time", "level"} <= set.intersection(*(set(e) for e in events))
        assert line["status"] == 200
        assert line["model"] == "tiny"
        assert line["upload_bytes"] == len(images.png())


async def test_a_termination_answers_what_is_in_flight_and_exits_0(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        worker_pid = broker.worker_pid()
        with stopped(worker_pid):
            asking = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=30_000))
            await asyncio.sleep(0.3)
            broker.process.send_signal(signal.SIGTERM)
            await until(lambda: broker.events("draining"))
            assert broker.events("draining")[0]["in_flight"] == 1
            with pytest.raises(aiohttp.ClientConnectionError):
                await predict(broker.url, images.png())
            assert broker.process.poll() is None
        assert (await asking).status == 200
        assert await asyncio.to_thread(broker.process.wait, 20) == 0
        assert not is_running(worker_pid)


async def test_a_drain_is_bounded_and_the_rest_is_told_503(tmp_path: Path):
    with broker_process(
        tmp_path, "--models", str(shared_servable()), "--drain-timeout", "0.5"
    ) as broker:
        worker_pid = broker.worker_pid()
        with stopped(worker_pid):
            asking = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=30_000))
            await asyncio.sleep(0.3)
            started = time.monotonic()
            broker.process.send_signal(signal.SIGINT)
            reply = await asking
            assert (reply.status, reply.code) == (503, "overloaded")
            assert await asyncio.to_thread(broker.process.wait, 20) == 0
            assert time.monotonic() - started < 10
        assert not is_running(worker_pid)


async def test_a_second_signal_exits_at_once(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        worker_pid = broker.worker_pid()
        with stopped(worker_pid):
            asking = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=30_000))
            await asyncio.sleep(0.3)
            broker.process.send_signal(signal.SIGTERM)
            await until(lambda: broker.events("draining"))
            broker.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(broker.process.wait, 5) == 128 + signal.SIGTERM
            with pytest.raises(aiohttp.ClientError):
                await asking
        assert await asyncio.to_thread(wait_until_gone, worker_pid, 10)


async def test_a_killed_broker_leaves_no_worker(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        worker_pid = broker.worker_pid()
        broker.process.kill()
        assert await asyncio.to_thread(wait_until_gone, worker_pid, 10)


async def test_a_request_whose_worker_is_lost_is_answered_by_the_next_one(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        worker_pid = broker.worker_pid()
        with stopped(worker_pid):
            asking = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=60_000))
            await asyncio.sleep(0.3)
            os.kill(worker_pid, signal.SIGKILL)
            assert (await asking).status == 200
        metrics = (await request("GET", f"{broker.url}/metrics")).body.decode()
        assert "nearfar_executor_restarts 1.0" in metrics


async def test_while_no_worker_can_start_a_broker_lives_and_says_no_at_once(tmp_path: Path):
    folder = Path(shutil.copytree(shared_servable(), tmp_path / "tiny"))
    with broker_process(tmp_path, "--models", str(folder)) as broker:
        (folder / "model.pt2").write_bytes(b"junk")
        worker_pid = broker.worker_pid()
        with stopped(worker_pid):
            asking = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=60_000))
            await asyncio.sleep(0.3)
            os.kill(worker_pid, signal.SIGKILL)
            lost = await asking
        assert (lost.status, lost.code) == (503, "worker_lost")
        assert lost.json["retryable"] is True
        assert int(lost.headers["Retry-After"]) >= 1
        # Not ready, and what cannot wait is refused at once.
        assert (await request("GET", f"{broker.url}/v2/health/ready")).status == 503
        assert (await request("GET", f"{broker.url}/v2/health/live")).status == 200
        hasty = await predict(broker.url, images.png(), deadline_ms=100)
        assert (hasty.status, hasty.code) == (503, "overloaded")
        # What can wait is answered once a worker starts again.
        waiting = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=120_000))
        shutil.copyfile(shared_servable() / "model.pt2", folder / "model.pt2")
        end_s = time.monotonic() + 60.0
        while (await waiting).status != 200:  # it may have been refused: no worker in sight
            assert time.monotonic() < end_s
            await asyncio.sleep(0.2)
            waiting = asyncio.create_task(predict(broker.url, images.png(), deadline_ms=120_000))


async def test_keys_are_asked_for_off_loopback(tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    _, text = file.add("acme")
    arguments = ["--models", str(shared_servable()), "--executor", "inline"]
    with broker_process(
        tmp_path,
        *arguments,
        "--host",
        EVERYWHERE,
        "--keys",
        str(file.path),
    ) as broker:
        url = broker.url.replace(EVERYWHERE, "127.0.0.1")
        assert (await predict(url, images.png())).status == 401
        headers = {"Authorization": f"Bearer {text}"}
        assert (await predict(url, images.png(), headers=headers)).status == 200


def serve(*arguments: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", "serve", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_a_taken_port_is_told_before_models_load(tmp_path: Path):
    with broker_process(
        tmp_path, "--models", str(shared_servable()), "--executor", "inline"
    ) as broker:
        port = broker.url.rpartition(":")[2]
        done = serve("--models", str(shared_servable()), "--port", port)
    assert done.returncode == 2
    assert last_line(done).startswith("error [config]: cannot bind 127.0.0.1 port")
    assert "worker" not in done.stderr


def test_a_spec_that_cannot_be_exported_says_why():
    done = serve("--models", "zoo:no-such-model", "--port", "0")
    assert done.returncode == 2
    assert last_line(done).startswith(
        f"error [{ModelLoadError.code}]: cannot export 'zoo:no-such-model': "
    )
    assert "Traceback" not in last_line(done)


def test_an_unknown_executor_names_the_ones_there_are():
    done = serve("--models", str(shared_servable()), "--executor", "magic", "--port", "0")
    assert done.returncode == 2
    assert last_line(done).endswith("there are: inline, oip, ray, worker")


def test_a_termination_while_models_load_exits_0():
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "edge_runtime", "serve", "--port", "0"),
            *("--models", str(shared_servable())),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end_s = time.monotonic() + 60
    while not children.read_text() and time.monotonic() < end_s:  # its worker: it is loading now
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert stdout == b""
