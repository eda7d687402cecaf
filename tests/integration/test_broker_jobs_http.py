"""Jobs over HTTP, against a real broker: whose they are, how they end, what their events say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from broker.accounts.keys import KeyFile
from broker.server import RunningBroker
from edge_runtime.contract.jobs import decode_job
from tests.support import broker_images as images
from tests.support.broker import Reply, broker_here, broker_process, predict, request, until
from tests.support.servables import shared_servable
from tests.support.sessions import held

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable(), cors_origins=("https://app.example",)) as running:
        yield running


async def submit(url: str, body: bytes | None = None, **headers: str) -> Reply:
    sent = {"Content-Type": "image/png"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    data = images.png() if body is None else body
    return await request("POST", f"{url}/v1/models/tiny/jobs", data=data, headers=sent)


async def job_state(url: str, job: str) -> str:
    return str((await request("GET", f"{url}/v1/jobs/{job}")).json["state"])


async def done(url: str, job: str) -> None:
    async with asyncio.timeout(10):
        while await job_state(url, job) in ("queued", "running"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def read_events(response: aiohttp.ClientResponse, count: int) -> list[dict[str, Any]]:
    """The next events; comments and the retry line are passed over."""
    found, event = [], {}
    async for line in response.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if not line.strip():
            if "event" in event:
                found.append(event)
                if len(found) == count:
                    return found
            event = {}
        elif name in ("id", "event", "data"):
            event[name] = json.loads(value) if name == "data" else value
    return found


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"body": b"junk"}, 422, "image_unreadable"),
        ({"body": b""}, 422, "image_unreadable"),
        ({"Content_Type": "text/plain"}, 415, "media_type_unsupported"),
        ({"Content_Type": "image/jpeg"}, 415, "media_type_unsupported"),
        ({"Idempotency_Key": "not a key"}, 400, "wire"),
        ({"Accept": "image/png"}, 400, "wire"),
    ],
)
async def test_a_bad_submission_makes_no_job(
    broker: RunningBroker, change: dict[str, Any], status: int, code: str
):
    before = len(broker.services.jobs._by_id)
    reply = await submit(broker.url, **change)
    assert (reply.status, reply.code) == (status, code)
    assert len(broker.services.jobs._by_id) == before


async def test_jobs_of_no_model_and_no_job_are_not_found(broker: RunningBroker):
    reply = await request("POST", f"{broker.url}/v1/models/huge/jobs", data=b"x")
    assert (reply.status, reply.code) == (404, "model_not_found")
    for method, path in [("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", "")]:
        reply = await request(method, f"{broker.url}/v1/jobs/none{path}")
        assert (reply.status, reply.code) == (404, "job_not_found")
    reply = await request("GET", f"{broker.url}/v1/jobs/{'x' * 65}")
    assert reply.status == 404


async def test_a_job_ends_in_the_answer_that_predict_gives(broker: RunningBroker):
    reply = await submit(broker.url, images.png(3), Idempotency_Key="same")
    assert reply.status == 202
    job = decode_job(reply.body)
    assert reply.headers["Location"] == f"/v1/jobs/{job.id}"
    again = await submit(broker.url, images.png(3), Idempotency_Key="same")
    assert (again.status, again.json["id"]) == (202, job.id)
    other = await submit(broker.url, images.png(4), Idempotency_Key="same")
    assert (other.status, other.code) == (400, "wire")
    await done(broker.url, job.id)
    result = await request("GET", f"{broker.url}/v1/jobs/{job.id}/result")
    direct = await predict(broker.url, images.png(3))
    assert result.status == 200
    assert result.json == direct.json
    assert "inf;dur=" in result.headers["Server-Timing"]


async def test_a_result_that_is_not_there_yet_says_when_to_ask(broker: RunningBroker):
    with held(broker):
        job = (await submit(broker.url)).json["id"]
        reply = await request("GET", f"{broker.url}/v1/jobs/{job}/result")
        assert (reply.status, reply.code) == (409, "job_not_ready")
        assert reply.json["retryable"] is True
        assert reply.headers["Retry-After"] == "1"
    await done(broker.url, job)


async def test_a_failed_job_gives_its_own_error(broker: RunningBroker):
    job = (await submit(broker.url, images.png()[:80])).json["id"]
    await done(broker.url, job)
    shown = await request("GET", f"{broker.url}/v1/jobs/{job}")
    assert shown.json["state"] == "failed"
    assert shown.json["failure"]["code"] == "image_unreadable"
    reply = await request("GET", f"{broker.url}/v1/jobs/{job}/result")
    assert (reply.status, reply.code) == (422, "image_unreadable")


async def test_a_canceled_job_is_gone_and_a_second_delete_forgets_it(broker: RunningBroker):
    with held(broker):
        first = (await submit(broker.url)).json["id"]
        await until(lambda: broker.services.jobs._running is not None)
        second = (await submit(broker.url)).json["id"]
        assert (await request("GET", f"{broker.url}/v1/jobs/{second}")).json["place"] == 1
        for job in (first, second):
            assert (await request("DELETE", f"{broker.url}/v1/jobs/{job}")).status == 204
            reply = await request("GET", f"{broker.url}/v1/jobs/{job}/result")
            assert (reply.status, reply.code) == (410, "job_canceled")
            assert (await request("DELETE", f"{broker.url}/v1/jobs/{job}")).status == 204
            assert (await request("GET", f"{broker.url}/v1/jobs/{job}")).status == 404


async def test_a_scrape_tells_the_jobs_that_wait_and_how_others_ended(broker: RunningBroker):
    async def scraped() -> str:
        return (await request("GET", f"{broker.url}/metrics")).body.decode()

    with held(broker):
        first = (await submit(broker.url)).json["id"]
        await until(lambda: broker.services.jobs._running is not None)
        second = (await submit(broker.url)).json["id"]
        text = await scraped()
        assert 'nearfar_jobs{state="queued"} 1.0' in text
        assert 'nearfar_jobs{state="running"} 1.0' in text
        before = broker.services.jobs.ended["tiny", "canceled"]
        await request("DELETE", f"{broker.url}/v1/jobs/{second}")
    await done(broker.url, first)
    text = await scraped()
    assert 'nearfar_jobs{state="queued"} 0.0' in text
    canceled = f'nearfar_jobs_ended_total{{model="tiny",state="canceled"}} {before + 1:.1f}'
    assert canceled in text


async def test_events_come_until_the_end_and_resume_where_they_broke_off(broker: RunningBroker):
    async with aiohttp.ClientSession() as session:
        with held(broker) as gate:
            job = (await submit(broker.url)).json["id"]
            url = f"{broker.url}/v1/jobs/{job}/events"
            headers = {"Origin": "https://app.example", "Last-Event-ID": "0"}
            await until(lambda: broker.services.jobs._running is not None)
            async with session.get(url, headers=headers) as response:
                assert response.content_type == "text/event-stream"
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
                seen = await read_events(response, 2)
            assert [event["event"] for event in seen] == ["queued", "running"]
            async with session.get(url, headers={"Last-Event-ID": seen[-1]["id"]}) as response:
                gate.set()
                rest = await read_events(response, 9)
        assert [event["event"] for event in rest][-1:] == ["done"]
        assert rest[-1]["data"]["progress"] == 1.0
        assert int(rest[-1]["id"]) > int(seen[-1]["id"])
        async with session.get(url, headers={"Last-Event-ID": "no number"}) as response:
            assert response.status == 400
        async with session.get(url) as response:
            assert [event["event"] for event in await read_events(response, 9)][-1:] == ["done"]


async def test_a_silent_stream_is_kept_alive(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_runtime.contract.limits.JOB_HEARTBEAT_MS", 20)
    async with aiohttp.ClientSession() as session:
        with held(broker):
            job = (await submit(broker.url)).json["id"]
            async with (
                asyncio.timeout(10),
                session.get(f"{broker.url}/v1/jobs/{job}/events") as response,
            ):
                async for line in response.content:
                    if line == b":\n":
                        break
    await done(broker.url, job)


async def test_a_request_with_a_deadline_goes_before_jobs_that_wait(broker: RunningBroker):
    order: list[str] = []
    with held(broker) as gate:
        jobs = [(await submit(broker.url, images.png(seed))).json["id"] for seed in range(3)]
        await until(lambda: broker.services.jobs._running is not None)
        asked = asyncio.create_task(predict(broker.url, images.png(9)))
        asked.add_done_callback(lambda _: order.append("request"))
        model = broker.services.repository.keys[0]
        await until(lambda: broker.services.scheduler.queued(model) == 1)
        gate.set()
        assert (await asked).status == 200
        order += [await job_state(broker.url, job) for job in jobs]
    assert order[0] == "request"
    for job in jobs:
        await done(broker.url, job)


async def test_jobs_belong_to_the_tenant_of_their_key(tmp_path: Path):
    keys = {tenant: KeyFile(tmp_path / "keys.json").add(tenant)[1] for tenant in ("a", "b")}
    async with broker_here(shared_servable(), keys=str(tmp_path / "keys.json")) as own:
        headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        assert (await submit(own.url)).status == 401
        job = (await submit(own.url, **headers["a"])).json["id"]
        for path in ("", "/result", "/events"):
            reply = await request("GET", f"{own.url}/v1/jobs/{job}{path}", headers=headers["b"])
            assert (reply.status, reply.code) == (404, "job_not_found")
        reply = await request("DELETE", f"{own.url}/v1/jobs/{job}", headers=headers["b"])
        assert reply.status == 404
        reply = await request("GET", f"{own.url}/v1/jobs/{job}", headers=headers["a"])
        assert reply.status == 200


async def test_jobs_cannot_get_around_the_rate_of_a_key(tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    key = file.add("a", rate_per_s=0.01, burst=1)[1]
    async with broker_here(shared_servable(), keys=str(file.path)) as own:
        sent = {"Authorization": f"Bearer {key}", "Idempotency_Key": "one"}
        job = (await submit(own.url, **sent)).json["id"]
        assert (await submit(own.url, **sent)).json["id"] == job  # the same job costs nothing
        reply = await submit(own.url, **sent | {"Idempotency_Key": "two"})
        assert (reply.status, reply.code) == (429, "rate_limited")
        assert int(reply.headers["Retry-After"]) > 1
        assert len(own.services.jobs._by_id) == 1


async def test_a_shutdown_ends_event_streams_and_keeps_the_job(tmp_path: Path):
    settings = {"jobs": str(tmp_path / "jobs"), "drain_timeout_s": 0.3}
    async with aiohttp.ClientSession() as session:
        async with broker_here(shared_servable(), **settings) as own:
            with held(own):
                job = (await submit(own.url)).json["id"]
                await until(lambda: own.services.jobs._running is not None)
                url, headers = f"{own.url}/v1/jobs/{job}/events", {"Last-Event-ID": "0"}
                response = await session.get(url, headers=headers)
                assert [e["event"] for e in await read_events(response, 2)] == ["queued", "running"]
                own.services.jobs.drain()
                assert await read_events(response, 9) == []
                response.release()
                await own.services.scheduler.close()
        async with broker_here(shared_servable(), **settings) as own:
            await done(own.url, job)
            assert (await request("GET", f"{own.url}/v1/jobs/{job}/result")).status == 200


@pytest.mark.slow
async def test_a_killed_broker_finds_its_jobs_again(tmp_path: Path):
    arguments = ("--models", str(shared_servable()), "--jobs", str(tmp_path / "jobs"))
    keys = [f"key-{number}" for number in range(20)]
    with broker_process(tmp_path, *arguments) as first:
        made = [(await submit(first.url, Idempotency_Key=key)).json["id"] for key in keys]
        first.process.kill()
    with broker_process(tmp_path, *arguments) as second:
        again = [(await submit(second.url, Idempotency_Key=key)).json["id"] for key in keys]
        assert again == made
        for job in made:
            await done(second.url, job)
            assert (await request("GET", f"{second.url}/v1/jobs/{job}/result")).status == 200
