"""A broker with room for two of its three models, and models that come and go under load."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from broker.accounts.keys import KeyFile
from broker.models.servable import open_servable
from edge_runtime.contract.errors import ConfigError
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request, until
from tests.support.servables import renamed_servable, shared_servable

pytestmark = pytest.mark.slow

NAMES = ("one", "three", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        renamed_servable(shared_servable(), root / name, name)
    return root


def budget_mb(models: float) -> float:
    return open_servable(shared_servable()).program_bytes * models / 1e6


async def in_memory(url: str) -> set[str]:
    listed = (await request("GET", f"{url}/v1/models")).json["models"]
    return {one["name"] for one in listed if one["runtime"] is not None}


@pytest.mark.parametrize("executor", ["inline", "worker"])
async def test_an_evicted_model_comes_back_and_every_request_is_answered(
    folder: Path, executor: str
):
    settings = {"executor": executor, "memory_budget_mb": budget_mb(2.5)}
    async with broker_here(folder, **settings) as broker:
        assert len(await in_memory(broker.url)) == 2
        for name in (*NAMES, *NAMES):
            reply = await predict(broker.url, images.png(), model=name, deadline_ms=60_000)
            assert (reply.status, reply.json["model"]["name"]) == (200, name)
            assert name in await in_memory(broker.url)
            assert len(await in_memory(broker.url)) == 2
        everyone = await asyncio.gather(
            *(
                predict(broker.url, images.png(seed), model=name, deadline_ms=60_000)
                for seed, name in enumerate(NAMES * 6)
            )
        )
        assert [reply.status for reply in everyone] == [200] * 18
        text = (await request("GET", f"{broker.url}/metrics")).body.decode()
        values = dict(line.split() for line in text.splitlines() if line.startswith("nearfar_me"))
        used = float(values["nearfar_memory_used_bytes"])
        assert used <= float(values["nearfar_memory_budget_bytes"])
        # Three at the start; then each in turn finds the other two there.
        assert float(text.split("\nnearfar_model_loads ")[1].split()[0]) >= 6


async def test_a_request_that_cannot_wait_for_a_load_is_refused_and_the_next_one_is_not(
    folder: Path,
):
    async with broker_here(folder, memory_budget_mb=budget_mb(1.2)) as broker:
        (held,) = await in_memory(broker.url)
        cold = next(name for name in NAMES if name != held)
        residency = broker.services.residency
        assert residency is not None
        key = broker.services.repository.key_of(cold)
        residency._load_ms[key] = 5_000.0
        refused = await predict(broker.url, images.png(), model=cold, deadline_ms=2_000)
        assert (refused.status, refused.code) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) >= 5
        residency._load_ms[key] = 10.0
        await until(lambda: residency.resident(key) and residency._loading is None)
        again = await predict(broker.url, images.png(), model=cold, deadline_ms=2_000)
        assert again.status == 200


async def test_a_budget_that_no_model_fits_into_is_told_at_the_start(folder: Path):
    with pytest.raises(ConfigError, match="raise --memory-budget"):
        async with broker_here(folder, memory_budget_mb=0.001):
            pass
    with pytest.raises(ConfigError, match="its server has its own"):
        async with broker_here(folder, executor="oip", memory_budget_mb=100):
            pass


@pytest.mark.parametrize("budget", [None, 2.5])
async def test_models_that_come_and_go_under_load_cost_no_admitted_request(
    folder: Path, tmp_path: Path, budget: float | None
):
    keys = KeyFile(tmp_path / "keys.json")
    admin = {"Authorization": f"Bearer {keys.add('acme', admin=True)[1]}"}
    settings = {} if budget is None else {"memory_budget_mb": budget_mb(budget)}
    async with broker_here(folder, executor="worker", keys=str(keys.path), **settings) as broker:
        seen: Counter[tuple[str, str]] = Counter()
        over = asyncio.Event()

        async def ask(name: str) -> None:
            async with aiohttp.ClientSession() as session:
                for seed in itertools.count():
                    if over.is_set():
                        return
                    reply = await predict(
                        broker.url, images.png(seed % 7), model=name, deadline_ms=60_000,
                        headers=admin, session=session,
                    )  # fmt: skip
                    seen[name, "answered" if reply.status == 200 else reply.code] += 1

        async def come_and_go() -> None:
            url = f"{broker.url}/v2/repository/models/two"
            for _ in range(8):
                for what in ("unload", "load"):
                    assert (await request("POST", f"{url}/{what}", headers=admin)).status == 200
                    await asyncio.sleep(0.05)
            over.set()

        await asyncio.gather(ask("one"), ask("one"), ask("two"), ask("two"), come_and_go())
        assert seen.keys() <= {
            ("one", "answered"), ("two", "answered"), ("two", "model_not_found"),
        }, json.dumps({str(key): count for key, count in seen.items()})  # fmt: skip
        assert seen["one", "answered"] > 10
        assert seen["two", "answered"] > 0
        assert (await predict(broker.url, images.png(), model="two", headers=admin)).status == 200


async def test_cold_models_neither_hold_up_jobs_nor_make_the_broker_look_busy(folder: Path):
    async with broker_here(folder, memory_budget_mb=budget_mb(1.2)) as broker:
        (held,) = await in_memory(broker.url)
        residency = broker.services.residency
        assert residency is not None
        for key in broker.services.repository.keys:
            residency._load_ms[key] = 60_000.0
        load = (await request("GET", f"{broker.url}/v1/load")).json
        delays = {one["name"]: one["queue_delay_ms"] for one in load["models"]}
        assert {name: delay >= 60_000 for name, delay in delays.items()} == {
            name: name != held for name in NAMES
        }
        assert load["queue_delay_ms"] < 1_000
        assert broker.services.scheduler.idle
        job = await request(
            "POST", f"{broker.url}/v1/models/{held}/jobs", data=images.png(),
            headers={"Content-Type": "image/png"},
        )  # fmt: skip
        where = broker.url + job.headers["Location"]
        async with asyncio.timeout(4):  # less than it waits for a quiet moment at most
            while (await request("GET", where)).json["state"] != "done":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
