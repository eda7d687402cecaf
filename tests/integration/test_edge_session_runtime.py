"""A runtime whose images go over a session: real broker, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime import Bundle, DeadlineExceeded, EdgeRuntime, InferenceSource, Overloaded
from edge_runtime.conditions import Conditions
from edge_runtime.contract import limits
from edge_runtime.offload.session_transport import SessionTransport
from tests.support.broker import broker_here, until
from tests.support.bundles import photo, servable, tiny_bundle
from tests.support.sessions import held, linked, metric, noise

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def matching(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    async with broker_here(servable(tmp_path_factory.mktemp("servable") / "same")) as running:
        yield running


def runtime(url: str, **options: Any) -> EdgeRuntime:
    bundle = Bundle.open(tiny_bundle())
    return EdgeRuntime(bundle, url, "ONLY_IN_CLOUD", variant="tflite-fp32", **options)


async def session_of(device: EdgeRuntime) -> SessionTransport:
    transport = device._engine.uplink._transport
    assert isinstance(transport, SessionTransport)
    await asyncio.to_thread(device.prewarm, wait_ms=3000)
    await until(lambda: transport.session_open)
    return transport


async def test_a_runtime_answers_over_its_session(matching: RunningBroker):
    before = metric(matching, "nearfar_session_frames_total", direction="in", frame="request")
    async with runtime(matching.url) as device:
        await session_of(device)
        for seed in range(3):
            result = await device.arun(photo(seed), deadline_ms=5000)
            assert result.inference_source is InferenceSource.IN_CLOUD
            assert result.timings.upload_ms is not None
            assert result.timings.server_inference_ms is not None
        status = device.status()
    frames = metric(matching, "nearfar_session_frames_total", direction="in", frame="request")
    assert frames == before + 3
    assert status.broker is not None
    assert status.broker.rate_samples == 3
    assert status.broker.connection_open
    assert status.counts.uploaded_bytes == sum(len(photo(seed)) for seed in range(3))


class Moving:
    """A device whose link type a test sets."""

    link_type = "wifi"

    def read(self) -> Conditions:
        return Conditions(link_type=self.link_type)


async def test_a_runtime_that_changes_networks_asks_its_session_first(matching: RunningBroker):
    pings = {"direction": "in", "frame": "ping"}
    moving = Moving()
    async with runtime(matching.url, conditions=moving) as device:
        transport = await session_of(device)
        before = metric(matching, "nearfar_session_frames_total", **pings)
        moving.link_type = "lte"
        result = await device.arun(photo(0), deadline_ms=5000)
        assert result.inference_source is InferenceSource.IN_CLOUD
        await until(lambda: transport.session_open)
    assert metric(matching, "nearfar_session_frames_total", **pings) == before + 1


async def test_a_runtime_without_a_session_posts(matching: RunningBroker):
    before = metric(matching, "nearfar_session_frames_total", direction="in", frame="request")
    async with runtime(matching.url, session=False) as device:
        await asyncio.to_thread(device.prewarm, wait_ms=3000)
        result = await device.arun(photo(0), deadline_ms=5000)
    assert result.inference_source is InferenceSource.IN_CLOUD
    frames = metric(matching, "nearfar_session_frames_total", direction="in", frame="request")
    assert frames == before


async def test_a_runtimes_missed_deadline_counts_only_what_was_sent(matching: RunningBroker):
    async with linked(matching, 0.4, 20.0) as relay, runtime(relay.url) as device:
        transport = await session_of(device)
        first = transport._session
        body = noise(200_000)
        with pytest.raises(DeadlineExceeded):
            await device.arun(body, deadline_ms=700)
        # The network thread withdraws it while the caller has its error already.
        await until(lambda: device.status().counts.uploaded_bytes < 100_000)
        status = device.status()
        assert status.counts.uploads == 1
        assert status.counts.uploaded_bytes > 0
        assert status.broker is not None
        assert status.broker.rate_bytes_per_s == pytest.approx(50_000, rel=0.4)
        assert transport._session is first
        assert transport.session_open


async def test_keeping_warm_sends_something_over_a_session_that_is_open(matching: RunningBroker):
    """An open connection says nothing of the radio under it."""

    def pings() -> float:
        return metric(matching, "nearfar_session_frames_total", direction="in", frame="ping")

    async with runtime(matching.url) as device:
        await session_of(device)
        uplink = device._engine.uplink
        assert uplink is not None
        await asyncio.sleep(1.1)
        before = pings()
        assert await asyncio.wrap_future(uplink.prewarm())
        assert await asyncio.wrap_future(uplink.prewarm())
        assert pings() == before + 1


async def test_a_runtime_whose_broker_dawdles_blames_the_broker_and_not_the_link(
    matching: RunningBroker,
):
    async with runtime(matching.url) as device:
        await session_of(device)
        for seed in range(3):
            await device.arun(photo(seed), deadline_ms=5000)
        before = device.status().broker
        assert before is not None
        with held(matching):
            for seed in range(4):
                # Once the batch is overdue the broker says no before the upload.
                with pytest.raises((DeadlineExceeded, Overloaded)):
                    await device.arun(photo(seed), deadline_ms=300)
            await until(lambda: device.status().broker.queue_ms > 100)
        after = device.status().broker
        assert after.rate_bytes_per_s > before.rate_bytes_per_s / 4


async def test_more_requests_than_a_session_carries_wait_their_turn_and_are_answered(
    matching: RunningBroker,
):
    """The broker would refuse the 33rd, and the runtime then leave it alone for a while."""
    count = 2 * limits.MAX_SESSION_REQUESTS
    async with runtime(matching.url) as device:
        transport = await session_of(device)
        with held(matching) as gate:
            asked = [
                asyncio.create_task(device.arun(photo(seed), deadline_ms=20_000))
                for seed in range(count)
            ]
            await until(lambda: matching.services.in_flight >= limits.MAX_SESSION_REQUESTS)
            assert not any(task.done() for task in asked)
            gate.set()
            results = await asyncio.gather(*asked)
        assert transport.session_open
    assert [result.inference_source for result in results] == ["IN_CLOUD"] * count


async def test_a_runtime_is_refused_before_the_upload_and_holds_off(matching: RunningBroker):
    async with linked(matching, 4.0, 20.0) as relay, runtime(relay.url) as device:
        await session_of(device)
        matching.services.scheduler._draining = True
        try:
            before = relay.stats().uplink_bytes
            with pytest.raises(Overloaded):
                await device.arun(noise(200_000), deadline_ms=5000)
            assert relay.stats().uplink_bytes - before < 40_000
            assert device.status().counts.uploaded_bytes < 40_000
            with pytest.raises(Overloaded):
                await device.arun(noise(200_000), deadline_ms=5000)
            assert device.status().counts.uploads == 1
        finally:
            matching.services.scheduler._draining = False
