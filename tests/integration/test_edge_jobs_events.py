"""A job is followed by its event stream; polling is for where there is none."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from edge_runtime import Bundle, EdgeRuntime, Result
from tests.support.broker import broker_here, until
from tests.support.bundles import photo, servable, tiny_bundle
from tests.support.sessions import held

pytestmark = pytest.mark.slow

BUNDLE = Bundle.open(tiny_bundle())


@pytest.mark.parametrize("session", [True, False])
async def test_three_jobs_make_two_streams_and_the_third_is_polled(
    tmp_path: Path, session: bool
) -> None:
    async with broker_here(servable(tmp_path / "same")) as broker:
        routes: Counter[str] = Counter()
        answered = broker.services.telemetry.request_answered

        def count(route: str, status: int, seconds: float) -> None:
            routes[route] += 1
            answered(route, status, seconds)

        broker.services.telemetry.request_answered = count  # type: ignore[method-assign]

        def work(started: asyncio.Event, loop: asyncio.AbstractEventLoop) -> list[Result]:
            with EdgeRuntime(BUNDLE, broker.url, "ONLY_IN_CLOUD", session=session) as runtime:
                jobs = [runtime.submit(photo(seed)) for seed in range(3)]
                loop.call_soon_threadsafe(started.set)
                return [job.result(30) for job in jobs]

        started = asyncio.Event()
        with held(broker) as gate:
            working = asyncio.create_task(
                asyncio.to_thread(work, started, asyncio.get_running_loop())
            )
            await started.wait()
            await until(lambda: len(broker.services.jobs._by_id) == 3)
            await until(lambda: routes["job"] >= 2)
            gate.set()
            results = await working
        assert len(results) == 3
        assert routes["job_submit"] == 3
        assert routes["job_result"] == 3
        assert 2 <= routes["job_events"] <= 4
