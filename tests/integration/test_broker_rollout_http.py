"""Versions, canaries and shadows of a real broker, over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from click.testing import CliRunner
from PIL import Image

from broker.accounts.keys import KeyFile
from broker.models_cli import models as models_command
from broker.server import RunningBroker
from edge_runtime.contract.frames import Hello
from tests.support import broker_images as images
from tests.support.broker import Reply, broker_here, predict, request, until
from tests.support.servables import (
    failing_net,
    manifest_sha256,
    renamed_servable,
    shared_servable,
    tiny_net,
    write_servable,
)
from tests.support.sessions import device

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OLD, NEW, OTHER = "1.0.0", "2.0.0", "3.0.0"
MIN_REQUESTS = 20
CALLERS = 4


def white_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stable version, one that raises on white images, one with other weights."""
    root = tmp_path_factory.mktemp("models")
    renamed_servable(shared_servable(), root / "tiny" / OLD, "tiny")
    write_servable(root / "tiny" / NEW, failing_net(), version=NEW)
    write_servable(root / "tiny" / OTHER, tiny_net(seed=1), version=OTHER)
    return root


class Guarded:
    """A broker with keys, and both sorts of them."""

    def __init__(self, running: RunningBroker, plain: str, admin: str) -> None:
        self.running, self.url = running, running.url
        self.plain = {"Authorization": f"Bearer {plain}"}
        self.admin = {"Authorization": f"Bearer {admin}"}

    async def change(self, action: str, **fields: Any) -> Reply:
        return await request(
            "POST", f"{self.url}/v1/models/tiny/routing", headers=self.admin,
            data=json.dumps({"action": action, **fields}),
        )  # fmt: skip

    async def routing(self) -> Any:
        url = f"{self.url}/v1/models/tiny/routing"
        return (await request("GET", url, headers=self.plain)).json

    async def predict(self, image: bytes, query: str = "", **options: Any) -> Reply:
        return await predict(self.url, image, query=query, headers=self.plain, **options)


@pytest_asyncio.fixture(loop_scope="module")
async def guarded(folder: Path, tmp_path: Path) -> AsyncIterator[Guarded]:
    keys = KeyFile(tmp_path / "keys.json")
    plain, admin = (keys.add("acme", admin=admin)[1] for admin in (False, True))
    routing = tmp_path / "routing.toml"
    routing.write_text(f'[models.tiny]\naliases = {{ stable = "{OLD}", next = "{NEW}" }}\n')
    settings = {"keys": str(keys.path), "routing": str(routing), "state": str(tmp_path / "s")}
    async with broker_here(folder, **settings) as running:
        yield Guarded(running, plain, admin)


async def settled(guarded: Guarded) -> None:
    """No copy waits or runs."""
    await until(lambda: not guarded.running.services.shadows._tasks)


def version_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json["model"]["version"])


async def test_each_way_in_names_versions_and_aliases_alike_and_the_answer_names_the_version(
    guarded: Guarded, folder: Path
):
    image = images.png()
    for asked, version in [(None, OLD), ("stable", OLD), ("next", NEW), (OTHER, OTHER)]:
        query = "" if asked is None else f"?version={asked}"
        reply = await guarded.predict(image, query)
        assert version_of(reply) == version
        assert reply.json["model"]["sha256"] == manifest_sha256(folder / "tiny" / version)
        shown = await request("GET", f"{guarded.url}/v1/models/tiny{query}", headers=guarded.plain)
        assert (shown.json["version"], shown.json["default"]) == (version, version == OLD)
        path = "" if asked is None else f"/versions/{asked}"
        raw = {"Inference-Header-Content-Length": "0"} | guarded.plain
        infer = await request(
            "POST", f"{guarded.url}/v2/models/tiny{path}/infer", data=image, headers=raw
        )
        head = infer.body[: int(infer.headers["Inference-Header-Content-Length"])]
        assert json.loads(head)["model_version"] == version
        metadata = await request(
            "GET", f"{guarded.url}/v2/models/tiny{path}", headers=guarded.plain
        )
        assert metadata.json["versions"] == [OTHER, NEW, OLD]
        job = await request(
            "POST", f"{guarded.url}/v1/models/tiny/jobs{query}", data=image,
            headers={"Content-Type": "image/png"} | guarded.plain,
        )  # fmt: skip
        where = guarded.url + job.headers["Location"]
        async with asyncio.timeout(10):
            while (await request("GET", where, headers=guarded.plain)).json["state"] != "done":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert version_of(await request("GET", f"{where}/result", headers=guarded.plain)) == version
        key = guarded.plain["Authorization"].removeprefix("Bearer ")
        async with device(guarded.url, Hello(api_key=key)) as one:
            fields = {} if asked is None else {"version": asked}
            number = await one.ask(image, model="tiny", deadline_ms=10_000, **fields)
            _, body = await one.answer(number)
            assert json.loads(body)["model"]["version"] == version


async def test_unknown_versions_are_refused_alike(guarded: Guarded):
    assert (await guarded.predict(images.png(), "?version=9")).code == "model_not_found"
    for wrong in ("?version=", "?version=1&version=2"):
        assert (await guarded.predict(images.png(), wrong)).code == "wire"
    for path in ("jobs?version=9", "quote?bytes=10&version=9"):
        method = "POST" if "jobs" in path else "GET"
        reply = await request(
            method, f"{guarded.url}/v1/models/tiny/{path}",
            headers={"Content-Type": "image/png"} | guarded.plain,
        )  # fmt: skip
        assert reply.code == "model_not_found"


async def test_the_list_holds_every_version_the_default_first(guarded: Guarded):
    await guarded.change("set_canary", canary={"version": NEW, "percent": 20})
    listed = (await request("GET", f"{guarded.url}/v1/models", headers=guarded.plain)).json
    assert [
        (one["version"], one["default"], one["aliases"], one["percent"]) for one in listed["models"]
    ] == [(OLD, True, ["stable"], 80), (OTHER, False, [], 0), (NEW, False, ["next"], 20)]


async def test_only_an_admin_key_changes_the_routing(guarded: Guarded):
    url = f"{guarded.url}/v1/models/tiny/routing"
    body = b'{"action": "promote", "version": "2.0.0"}'
    for headers in ({}, guarded.plain):
        assert (await request("POST", url, data=body, headers=headers)).status == 401
    assert (await guarded.change("promote", version="9")).status == 404
    assert (await guarded.change("promote")).code == "request_rejected"
    assert (await guarded.change("promte")).code == "wire"
    large = await request("POST", url, data=b" " * 70_000, headers=guarded.admin)
    assert large.code == "limit_exceeded"
    assert (await guarded.routing())["default"] == OLD


async def test_a_canary_that_raises_is_rolled_back_before_clients_see_more_than_its_minimum(
    guarded: Guarded,
):
    canary = {"version": NEW, "percent": 30, "by": "request", "min_requests": MIN_REQUESTS}
    assert (await guarded.change("set_canary", canary=canary)).status == 200
    seen: Counter[int] = Counter()

    async def ask(count: int) -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(count):
                reply = await guarded.predict(white_png(), session=session)
                seen[reply.status] += 1

    await asyncio.gather(*(ask(60) for _ in range(CALLERS)))
    failures = seen[502]
    assert seen.total() == seen[200] + failures
    # The judgement comes with the answer that completes the minimum; others were under way.
    assert MIN_REQUESTS <= failures <= MIN_REQUESTS + CALLERS - 1
    routing = await guarded.routing()
    assert (routing["canary"], routing["default"]) == (None, OLD)
    assert routing["events"][-1]["event"] == "canary_rolled_back"
    text = (await request("GET", f"{guarded.url}/metrics", headers=guarded.plain)).body.decode()
    assert 'nearfar_rollbacks_total{model="tiny"} 1.0' in text
    assert f'nearfar_version_requests_total{{model="tiny",status="502",version="{NEW}"}}' in text
    for _ in range(20):
        assert version_of(await guarded.predict(white_png())) == OLD


async def test_a_retry_is_answered_by_the_version_of_its_first_try_after_the_split_changed(
    guarded: Guarded,
):
    headers = guarded.plain | {"Idempotency-Key": "one"}
    first = await predict(guarded.url, images.png(), headers=headers)
    await guarded.change("promote", version=OTHER)
    again = await predict(guarded.url, images.png(), headers=headers)
    assert (version_of(first), again.body) == (OLD, first.body)
    assert version_of(await guarded.predict(images.png())) == OTHER


async def test_a_shadow_computes_beside_and_changes_no_answer(guarded: Guarded):
    for version, result in [(OTHER, "differed"), (NEW, "agreed")]:
        change = await guarded.change("set_shadow", shadow={"version": version, "percent": 100})
        assert change.json["shadow"]["version"] == version
        for seed in range(6):
            assert version_of(await guarded.predict(images.png(seed))) == OLD
            await settled(guarded)
        shadow = (await guarded.routing())["shadow"]
        assert sum(shadow[name] for name in ("agreed", "differed")) == 6
        assert shadow["failed"] == shadow["skipped"] == 0
        if result == "agreed":  # the same weights
            assert (shadow["agreed"], shadow["max_difference"]) == (6, pytest.approx(0, abs=1e-6))
        else:
            assert shadow["mean_difference"] > 1e-4
    text = (await request("GET", f"{guarded.url}/metrics", headers=guarded.plain)).body.decode()
    assert f'nearfar_shadows_total{{model="tiny",result="agreed",version="{NEW}"}} 6.0' in text


async def test_a_shadow_that_fails_is_counted_and_nobody_hears_of_it(guarded: Guarded):
    await guarded.change("set_shadow", shadow={"version": NEW, "percent": 100})
    assert version_of(await guarded.predict(white_png())) == OLD
    await settled(guarded)
    assert (await guarded.routing())["shadow"]["failed"] == 1
    text = (await request("GET", f"{guarded.url}/metrics", headers=guarded.plain)).body.decode()
    assert 'nearfar_errors_total{code="inference"}' not in text


async def test_one_version_leaves_service_and_comes_back(guarded: Guarded):
    url = f"{guarded.url}/v2/repository/models/tiny"
    body = json.dumps({"parameters": {"version": "next"}})
    headers = guarded.admin
    assert (await request("POST", f"{url}/unload", data=body, headers=headers)).status == 200
    assert (await guarded.predict(images.png(), "?version=next")).code == "model_not_found"
    assert version_of(await guarded.predict(images.png())) == OLD
    index = await request("POST", f"{guarded.url}/v2/repository/index", headers=guarded.plain)
    assert [(one["version"], one["state"]) for one in index.json] == [
        (OTHER, "READY"), (NEW, "UNAVAILABLE"), (OLD, "READY"),
    ]  # fmt: skip
    assert (await request("POST", f"{url}/load", data=body, headers=headers)).status == 200
    assert version_of(await guarded.predict(images.png(), "?version=next")) == NEW
    wrong = json.dumps({"parameters": {"version": 2}})
    assert (await request("POST", f"{url}/load", data=wrong, headers=headers)).status == 400


async def test_the_command_lists_starts_promotes_and_rolls_back(guarded: Guarded, tmp_path: Path):
    for name, headers in (("plain", guarded.plain), ("admin", guarded.admin)):
        (tmp_path / name).write_text(headers["Authorization"].removeprefix("Bearer ") + "\n")

    async def run(*arguments: str, key: str = "admin") -> Any:
        told = [*arguments, "--broker", guarded.url, "--api-key-file", str(tmp_path / key)]
        return await asyncio.to_thread(CliRunner().invoke, models_command, told)

    listed = await run("list", key="plain")
    assert listed.output.splitlines()[0] == f"tiny  {OLD}  100 %  eager fp32  stable"
    begun = await run("canary", "tiny", NEW, "--percent", "5", "--json")
    assert json.loads(begun.output)["canary"]["canary"]["percent"] == 5
    assert "canary  2.0.0  5 %" in (await run("show", "tiny", key="plain")).output
    refused = await run("promote", "tiny", key="plain")
    assert type(refused.exception).__name__ == "Unauthorized"
    assert (await run("promote", "tiny")).output.startswith(f"tiny  default {NEW}\n")
    assert (await run("rollback", "tiny")).output.startswith(f"tiny  default {OLD}\n")
    assert "alias  staging  3.0.0" in (await run("alias", "tiny", "staging", OTHER)).output
    assert "staging" not in (await run("alias", "tiny", "staging")).output.split("T", 1)[0]
    assert "shadow  3.0.0" in (await run("shadow", "tiny", OTHER, "--percent", "1")).output
    assert json.loads((await run("shadow", "tiny", "--json")).output)["shadow"] is None
    for wrong in (
        ["list", "--broker", "ftp://x"],
        ["shadow", "tiny", OTHER, "--broker", "http://x"],
    ):
        failed = CliRunner().invoke(models_command, wrong)
        assert type(failed.exception).__name__ == "ConfigError"
    nobody = ["list", "--broker", "http://127.0.0.1:9"]
    gone = await asyncio.to_thread(CliRunner().invoke, models_command, nobody)
    assert "no answer from" in str(gone.exception)
