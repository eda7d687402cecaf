"""Keys with a rate, a class and a weight; quotes and load; all over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker.accounts.keys import KeyFile
from broker.scheduling.ticket import Ticket
from broker.server import RunningBroker
from edge_runtime.offload.messages import Load, decode_load
from edge_runtime.offload.transport import HttpResponse
from tests.support import broker_images as images
from tests.support.broker import Reply, broker_here, predict, raw_exchange, request, until
from tests.support.servables import shared_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def keys(key_file: KeyFile) -> dict[str, str]:
    """``Authorization`` by name."""
    made = {
        "plain": key_file.add("acme"),
        "urgent": key_file.add("acme", max_priority=1),
        "background": key_file.add("batch", max_priority=3, weight=0.5),
        "rare": key_file.add("acme", rate_per_s=0.01, burst=1),
        "rare infer": key_file.add("acme", rate_per_s=0.01, burst=1),
    }
    return {name: f"Bearer {text}" for name, (_, text) in made.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(key_file: KeyFile, keys: dict[str, str]) -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable(), keys=str(key_file.path)) as running:
        yield running


@pytest.fixture
def admitted(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> list[Ticket]:
    """Every ticket that is given out."""
    seen: list[Ticket] = []
    scheduler = broker.services.scheduler
    admit = scheduler._admit

    def noted(*arguments: object) -> Ticket:
        seen.append(admit(*arguments))
        return seen[-1]

    monkeypatch.setattr(scheduler, "_admit", noted)
    return seen


async def test_a_key_that_asks_too_often_is_told_so_before_it_uploads(
    broker: RunningBroker, keys: dict[str, str]
):
    headers = {"Authorization": keys["rare"]}
    assert (await predict(broker.url, images.png(), headers=headers)).status == 200
    host = broker.url.removeprefix("http://")
    head = (
        f"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
        f"Authorization: {keys['rare']}\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n\r\n"
    )
    refused = await raw_exchange(broker.url, head.encode(), answers=1)
    assert refused.startswith(b"HTTP/1.1 429 ")
    assert b"100 Continue" not in refused
    retry_after = int(refused.lower().partition(b"\r\nretry-after: ")[2].partition(b"\r\n")[0])
    assert 90 <= retry_after <= 100
    assert b"\r\nX-Queue-Delay-Ms: " in refused
    problem = json.loads(refused.partition(b"\r\n\r\n")[2])
    assert problem["code"] == "rate_limited"
    assert problem["retryable"] is True


async def test_the_inference_protocol_is_held_to_the_same_rate(
    broker: RunningBroker, keys: dict[str, str]
):
    headers = {"Authorization": keys["rare infer"], "Inference-Header-Content-Length": "0"}
    url = f"{broker.url}/v2/models/tiny/infer"
    first = await request("POST", url, data=images.png(), headers=headers)
    second = await request("POST", url, data=images.png(), headers=headers)
    assert (first.status, second.status) == (200, 429)
    assert set(second.json) == {"error"}


@pytest.mark.parametrize("said", ["0", "4", "high", "1, 2", ""])
async def test_a_class_that_does_not_exist_is_refused(
    broker: RunningBroker, keys: dict[str, str], said: str
):
    headers = {"Authorization": keys["plain"], "X-Priority": said}
    reply = await predict(broker.url, images.png(), headers=headers)
    assert (reply.status, reply.code) == (400, "wire")


@pytest.mark.parametrize(
    ("key", "said", "given"),
    [
        ("plain", None, 2),
        ("plain", "1", 2),
        ("plain", "3", 3),
        ("urgent", "1", 1),
        ("urgent", None, 2),
        ("background", "1", 3),
    ],
)
async def test_the_class_is_the_one_asked_for_up_to_the_ceiling_of_the_key(
    broker: RunningBroker,
    keys: dict[str, str],
    admitted: list[Ticket],
    key: str,
    said: str | None,
    given: int,
):
    headers = {"Authorization": keys[key], "X-Tenant": "somebody-else"}
    if said is not None:
        headers["X-Priority"] = said
    assert (await predict(broker.url, images.png(), headers=headers)).status == 200
    caller = admitted[-1].caller
    assert caller.priority == given
    assert (caller.tenant, caller.weight) == (
        ("batch", 0.5) if key == "background" else ("acme", 1.0)
    )


@pytest.mark.parametrize(("said", "given"), [(1, 1), (0, 2), (3, 3), (9, 3)])
async def test_the_priority_of_an_inference_request_counts(
    broker: RunningBroker, keys: dict[str, str], admitted: list[Ticket], said: int, given: int
):
    asked = {
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32],
                    "data": [0.0] * 3072}],
        "parameters": {"priority": said},
    }  # fmt: skip
    headers = {"Authorization": keys["urgent"], "Content-Type": "application/json"}
    url = f"{broker.url}/v2/models/tiny/infer"
    reply = await request("POST", url, data=json.dumps(asked), headers=headers)
    assert reply.status == 200, reply.body
    assert admitted[-1].caller.priority == given


async def _quote(broker: RunningBroker, key: str, query: str, **headers: str) -> Reply:
    url = f"{broker.url}/v1/models/tiny/quote{query}"
    return await request("GET", url, headers={"Authorization": key, **headers})


async def test_a_quote_says_what_a_request_would_meet(broker: RunningBroker, keys: dict[str, str]):
    reply = await _quote(broker, keys["plain"], "?bytes=30000", **{"X-Deadline-Ms": "5000"})
    assert reply.status == 200
    said = reply.json
    assert said["admitted"] is True
    assert said["code"] is None
    assert said["finish_ms"] == pytest.approx(said["queue_delay_ms"] + said["inference_ms"])
    assert said["price_microusd"] == 0
    assert reply.headers["X-Queue-Delay-Ms"] == "0"
    assert broker.services.scheduler.queued(broker.services.repository.keys[0]) == 0


async def test_a_quote_names_the_error_that_a_request_would_get(
    broker: RunningBroker, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    lane = broker.services.scheduler._lanes[broker.services.repository.keys[0]]
    monkeypatch.setattr(lane.latency, "mean_ms", lambda _: 700.0)
    reply = await _quote(broker, keys["plain"], "?bytes=30000", **{"X-Deadline-Ms": "500"})
    assert reply.status == 200
    assert (reply.json["admitted"], reply.json["code"]) == (False, "deadline_exceeded")


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("?bytes=", 400),
        ("?bytes=-1", 400),
        ("?bytes=1&bytes=2", 400),
        ("?bytes=1&size=2", 400),
        ("?bytes=" + "9" * 5000, 400),
        ("?bytes=0", 422),
        ("?bytes=8388609", 413),
    ],
)
async def test_a_quote_for_a_senseless_body_is_refused(
    broker: RunningBroker, keys: dict[str, str], query: str, status: int
):
    assert (await _quote(broker, keys["plain"], query)).status == status


async def test_quotes_and_load_need_a_key(broker: RunningBroker):
    for path in ("/v1/models/tiny/quote?bytes=1", "/v1/load"):
        assert (await request("GET", broker.url + path)).status == 401


async def test_the_load_is_that_of_every_model(broker: RunningBroker, keys: dict[str, str]):
    reply = await request("GET", f"{broker.url}/v1/load", headers={"Authorization": keys["plain"]})
    assert reply.status == 200
    said = reply.json
    assert (said["ready"], said["draining"]) == (True, False)
    assert [model["name"] for model in said["models"]] == ["tiny"]
    assert said["models"][0]["queued"] == 0
    assert said["models"][0]["capacity_per_s"] > 0
    assert said["queue_delay_ms"] == said["models"][0]["queue_delay_ms"]
    read = decode_load(HttpResponse(status=200, headers={}, body=reply.body))
    assert read == Load(queue_delay_ms=said["queue_delay_ms"]), "the runtime reads it as it is"


async def test_work_of_a_client_that_left_never_reaches_the_device(
    broker: RunningBroker, keys: dict[str, str]
):
    scheduler = broker.services.scheduler
    model = broker.services.repository.keys[0]
    executor = broker.services.executor
    before = executor.stats().images
    run, gate = executor.run, asyncio.Event()

    async def gated(*arguments: object) -> object:
        await gate.wait()
        return await run(*arguments)  # type: ignore[arg-type]

    executor.run = gated  # type: ignore[method-assign]
    try:
        headers = {"Authorization": keys["plain"]}
        first = asyncio.create_task(predict(broker.url, images.png(), headers=headers))
        await until(lambda: scheduler._runs.running is not None)
        leaving = asyncio.create_task(predict(broker.url, images.png(), headers=headers))
        await until(lambda: scheduler.queued(model) == 1)
        leaving.cancel()  # closes its connection
        await until(lambda: scheduler.queued(model) == 0)
    finally:
        gate.set()
        executor.run = run  # type: ignore[method-assign]
    assert (await first).status == 200
    assert executor.stats().images == before + 1
    assert scheduler._shares.backlog_ms() == pytest.approx(0.0, abs=1e-6)


async def test_the_keys_command_sets_what_a_key_may(tmp_path: Path):
    from click.testing import CliRunner

    from broker.cli import keys as command

    path = str(tmp_path / "keys.json")
    add = ["add", "--file", path, "--tenant", "acme"]
    more = ["--weight", "3", "--max-priority", "1", "--rate", "20", "--burst", "50"]
    assert CliRunner().invoke(command, add + more).exit_code == 0
    key = KeyFile(Path(path)).read()[0]
    assert (key.weight, key.max_priority, key.rate_per_s, key.burst) == (3.0, 1, 20.0, 50)
    listed = CliRunner().invoke(command, ["list", "--file", path]).output
    assert "weight 3  priority 1  20/s, 50 at once" in listed
    for wrong in (["--weight", "0"], ["--max-priority", "4"], ["--rate", "-1"], ["--burst", "0"]):
        result = CliRunner().invoke(command, add + wrong)
        assert result.exit_code != 0, wrong
    assert len(KeyFile(Path(path)).read()) == 1
