"""The executor ``ray``: actors on a real cluster of two nodes, one of which is lost."""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.executors.base import BatchItem, ExecutorOptions
from broker.executors.ray import RayExecutor
from broker.models.servable import ModelKey, open_servable
from edge_runtime.contract import errors as e
from tests.support import broker_images as images
from tests.support.broker import (
    Events,
    broker_process,
    children_of,
    predict,
    until,
    wait_until_gone,
)
from tests.support.ray_cluster import add_node, local_cluster
from tests.support.servables import direct_scores, shared_servable, tiny_net

pytestmark = pytest.mark.slow

TINY = ModelKey("tiny", "1.0.0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without a slot, so that it is never the node that is lost, and one node more."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with local_cluster() as made:
        yield made


async def test_batches_run_on_two_nodes_and_one_that_is_lost_costs_its_part_alone(cluster: Any):
    node = add_node(cluster)
    events = Events()
    options = ExecutorOptions(
        device="cpu", threads=1, slots=2, backend=cluster.address, start_timeout_s=240.0
    )
    executor = RayExecutor([open_servable(shared_servable())], options, events)
    await executor.start()
    try:
        assert executor.stats().models[TINY].runtime == "eager"
        bodies = [images.png(number) for number in range(5)]
        batch = [*(BatchItem(body) for body in bodies), BatchItem(b"junk")]
        outcome = await executor.run(TINY, batch)
        assert isinstance(outcome.results[5], e.ImageUnreadable)
        for body, result in zip(bodies, outcome.results, strict=False):
            assert not isinstance(result, e.NearfarError)
            assert result.predictions is not None
            expected = direct_scores(tiny_net(), body)
            assert result.predictions[0].index == int(expected.argmax())
            assert result.predictions[0].score == pytest.approx(expected.max(), abs=1e-6)

        await executor.unload(TINY)
        late = await executor.run(TINY, batch[:2])
        assert [type(result) for result in late.results] == [e.ModelNotFound] * 2
        await executor.load(TINY)
        outcome = await executor.run(TINY, batch[:2])
        assert not any(isinstance(result, e.NearfarError) for result in outcome.results)

        cluster.remove_node(node)
        outcome = await executor.run(TINY, batch[:4])
        kinds = {type(result) for result in outcome.results}
        assert {kind for kind in kinds if issubclass(kind, e.NearfarError)} <= {e.WorkerLost}
        await until(lambda: events.named("actor_lost"), 60)
        outcome = await executor.run(TINY, batch[:4])  # on the node that is left
        assert not any(isinstance(result, e.NearfarError) for result in outcome.results)

        add_node(cluster)
        await until(lambda: executor.stats().restarts == 1, 120)
        outcome = await executor.run(TINY, batch[:4])
        assert not any(isinstance(result, e.NearfarError) for result in outcome.results)
    finally:
        await executor.close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:9", e.BackendUnavailable),
        ("ray://127.0.0.1:9", e.ConfigError),
        ("auto", e.ConfigError),
    ],
)
async def test_a_cluster_that_is_not_there_stops_the_start_at_once(
    address: str, expected: type[e.NearfarError]
):
    options = ExecutorOptions(device="cpu", backend=address)
    executor = RayExecutor([open_servable(shared_servable())], options, Events())
    with pytest.raises(expected):
        await executor.start()


def test_a_broker_with_a_cluster_of_its_own_answers_drains_and_leaves_no_process(tmp_path: Path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        arguments = ("--models", str(shared_servable()), "--executor", "ray")
        with broker_process(tmp_path, *arguments) as broker:
            reply = asyncio.run(predict(broker.url, images.png(), deadline_ms=30_000))
            assert reply.status == 200
            started = children_of(broker.process.pid)
            assert started
            broker.process.send_signal(signal.SIGTERM)
            assert broker.process.wait(60) == 0
            assert broker.events("drained")
            assert all(wait_until_gone(pid, 20.0) for pid in started)
