"""Who may ask: keys, what they protect, and which web pages may call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker.accounts.keys import KeyFile
from broker.server import RunningBroker
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request, until
from tests.support.servables import shared_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = "https://app.example"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    file.add("acme")
    return file


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(key_file: KeyFile) -> AsyncIterator[RunningBroker]:
    async with broker_here(
        shared_servable(), keys=str(key_file.path), cors_origins=(PAGE,)
    ) as running:
        yield running


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Basic YWNtZTphY21l",
        "Bearer nf_aaaaaaaaaaaa." + "A" * 43,
        "Bearer nf_x",
        "Bearer " + "z" * 4000,
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/tiny:predict"),
        ("POST", "/v1/models/huge:predict"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
    ],
)
async def test_without_a_valid_key_nothing_is_told(
    broker: RunningBroker, method: str, path: str, authorization: str | None
):
    headers = {"Content-Type": "image/png"}
    if authorization is not None:
        headers["Authorization"] = authorization
    reply = await request(method, broker.url + path, headers=headers)
    assert (reply.status, reply.code) == (401, "unauthorized")
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert "acme" not in reply.body.decode()
    assert "tiny" not in reply.json["detail"]


async def test_the_inference_protocol_refuses_in_its_own_shape(broker: RunningBroker):
    reply = await request("GET", f"{broker.url}/v2/models/tiny")
    assert reply.status == 401
    assert list(reply.json) == ["error"]


async def test_probes_need_no_key_and_learn_nothing_more(broker: RunningBroker):
    assert (await request("GET", f"{broker.url}/v2/health/live")).json == {"live": True}
    assert (await request("GET", f"{broker.url}/v2/health/ready")).json == {"ready": True}


async def test_a_key_opens_every_route_and_its_tenant_is_logged(
    broker: RunningBroker, key_file: KeyFile, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="nearfar.broker")
    key, text = key_file.add("beta")
    await asyncio.sleep(0.6)  # the broker looks at the file twice a second
    headers = {"Authorization": f"Bearer {text}", "X-Tenant": "acme"}
    assert (await predict(broker.url, images.png(), headers=headers)).status == 200
    assert (await request("GET", f"{broker.url}/metrics", headers=headers)).status == 200
    await until(lambda: [record.msg for record in caplog.records].count("request") >= 2)
    fields = [record.fields for record in caplog.records if record.msg == "request"]
    assert {(line["tenant"], line["key"]) for line in fields} == {("beta", key.id)}
    assert text.partition(".")[2] not in caplog.text
    assert text.partition(".")[2] not in str(fields)


async def test_a_revoked_key_is_refused_within_a_second(broker: RunningBroker, key_file: KeyFile):
    key, text = key_file.add("gamma")
    headers = {"Authorization": f"Bearer {text}"}
    await asyncio.sleep(0.6)
    assert (await request("GET", f"{broker.url}/v1/models", headers=headers)).status == 200
    key_file.revoke(key.id)
    await asyncio.sleep(0.6)
    assert (await request("GET", f"{broker.url}/v1/models", headers=headers)).status == 401


async def test_a_refused_key_costs_no_upload(broker: RunningBroker):
    from tests.support.broker import raw_exchange

    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
    assert b" 401 " in (await raw_exchange(broker.url, head, answers=1))[:20]


async def test_a_named_page_may_call_and_read(broker: RunningBroker):
    preflight = await request(
        "OPTIONS",
        f"{broker.url}/v1/models/tiny:predict",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, x-deadline-ms",
        },
    )
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
    assert "X-Deadline-Ms" in preflight.headers["Access-Control-Allow-Headers"]
    refused = await request("GET", f"{broker.url}/v1/models", headers={"Origin": PAGE})
    assert refused.status == 401  # a page too needs a key, and may read why
    assert refused.headers["Access-Control-Allow-Origin"] == PAGE
    assert refused.headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", PAGE + ".evil.example"])
async def test_other_pages_get_no_permission(broker: RunningBroker, origin: str):
    for method, extra in [("GET", {}), ("OPTIONS", {"Access-Control-Request-Method": "POST"})]:
        reply = await request(method, f"{broker.url}/v1/models", headers={"Origin": origin} | extra)
        assert not any(name.startswith("Access-Control") for name in reply.headers)


async def test_without_origins_cors_is_off():
    async with broker_here(shared_servable()) as plain:
        reply = await request("GET", f"{plain.url}/v1/models", headers={"Origin": PAGE})
        assert reply.status == 200
        assert not any(name.startswith("Access-Control") for name in reply.headers)


async def test_a_broken_key_file_stops_the_start(tmp_path: Path):
    from edge_runtime.contract.errors import ConfigError

    file = KeyFile(tmp_path / "keys.json")
    file.add("acme")
    file.path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        async with broker_here(shared_servable(), keys=str(file.path)):
            pass


async def test_log_lines_cannot_be_forged_by_a_path(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
):
    from broker.log import _JsonLines

    caplog.set_level("INFO", logger="nearfar.broker")
    await request("GET", f"{broker.url}/a%0a%7b%22event%22:%22forged%22%7d/%1b[31m")
    await until(lambda: any(record.msg == "request" for record in caplog.records))
    lines = [_JsonLines().format(record) for record in caplog.records]
    assert all("\n" not in line and "\x1b" not in line for line in lines)
