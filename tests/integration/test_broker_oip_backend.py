"""The executor ``oip``: a second broker runs the models, and its faults become typed errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from broker.accounts.keys import KeyFile
from broker.executors.base import BatchItem, ExecutorOptions
from broker.executors.oip import OipExecutor
from broker.models.servable import ModelKey, open_servable
from edge_runtime.contract import errors as e
from tests.support import broker_images as images
from tests.support.broker import Events, broker_here, predict, stopped
from tests.support.broker import broker_process as a_broker_process
from tests.support.servables import direct_scores, renamed_servable, shared_servable, tiny_net

pytestmark = pytest.mark.slow

TINY = ModelKey("tiny", "1.0.0")


def executor_for(url: str, folder: Path | None = None, **options: object) -> OipExecutor:
    values = {"backend": url, "start_timeout_s": 10.0, "hang_timeout_s": 10.0} | options
    return OipExecutor(
        [open_servable(folder or shared_servable())], ExecutorOptions(**values), Events()
    )


@dataclass
class Stub:
    """A server that says the right metadata and answers what the test tells it to."""

    url: str = ""
    ready: bool = True
    answer: Callable[[], Awaitable[web.Response]] | None = None

    async def on_ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)

    async def on_metadata(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "name": "tiny",
                "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
                "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 5]}],
            }
        )

    async def on_infer(self, request: web.Request) -> web.Response:
        await request.read()
        assert self.answer is not None
        return await self.answer()


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[Stub]:
    server, app = Stub(), web.Application()
    app.router.add_get("/v2/health/ready", server.on_ready)
    app.router.add_get("/v2/models/tiny", server.on_metadata)
    app.router.add_post("/v2/models/tiny/infer", server.on_infer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


async def test_a_second_broker_answers_with_the_models_own_numbers(tmp_path: Path):
    keys = KeyFile(tmp_path / "keys.json")
    _, text = keys.add("front")
    key_file = tmp_path / "key.txt"
    key_file.write_text(text + "\n")
    async with broker_here(shared_servable(), keys=str(tmp_path / "keys.json")) as backend:
        front = broker_here(
            shared_servable(),
            executor="oip",
            backend=backend.url,
            backend_key_file=str(key_file),
        )
        async with front as broker:
            assert broker.services.executor.stats().models[TINY].runtime == "oip"
            bodies = [images.jpeg(number) for number in range(12)]
            replies = await asyncio.gather(
                *(predict(broker.url, body, content_type="image/jpeg") for body in bodies)
            )
            for body, reply in zip(bodies, replies, strict=True):
                assert reply.status == 200
                expected = direct_scores(tiny_net(), body)
                best = reply.json["predictions"][0]
                assert best["index"] == int(expected.argmax())
                assert best["score"] == pytest.approx(expected.max(), abs=1e-5)
            junk = await predict(broker.url, b"junk")
            assert junk.code == "image_unreadable"  # no tensor left for the backend


async def test_another_model_under_the_same_name_is_refused_at_the_start(tmp_path: Path):
    other = shared_servable("NHWC")
    async with broker_here(other) as backend:
        with pytest.raises(e.ModelLoadError, match="another model under this name"):
            await executor_for(backend.url).start()
        renamed = renamed_servable(shared_servable(), tmp_path / "unknown", "unknown")
        with pytest.raises(e.ModelNotFound, match="404"):
            await executor_for(backend.url, renamed).start()


async def test_a_server_that_is_not_there_and_a_url_that_makes_no_sense_stop_the_start():
    with pytest.raises(e.BackendUnavailable, match="start it first"):
        await executor_for("http://127.0.0.1:9", start_timeout_s=0.5).start()
    for url in ("127.0.0.1:9", "ftp://host", "http://"):
        with pytest.raises(e.ConfigError, match="must be like"):
            executor_for(url)
    with pytest.raises(e.ConfigError, match="--backend"):
        OipExecutor([open_servable(shared_servable())], ExecutorOptions(), Events())


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (500, b'{"error": "boom"}', e.InferenceError),
        (400, b"<html>", e.InferenceError),
        (401, b"{}", e.BackendUnavailable),
        (404, b'{"error": "gone"}', e.ModelNotFound),
        (429, b"{}", e.Overloaded),
        (503, b"{}", e.Overloaded),
        (504, b"{}", e.DeadlineExceeded),
        (200, b"junk", e.InferenceError),
        (200, b'{"outputs": []}', e.InferenceError),
        (
            200,
            b'{"outputs":[{"name":"scores","datatype":"FP32","shape":[4],"data":[1,2,3,4]}]}',
            e.InferenceError,
        ),
        (200, b"x" * 2**21, e.InferenceError),
    ],
)
async def test_what_a_backend_says_becomes_a_typed_error(
    stub: Stub, status: int, body: bytes, expected: type[e.NearfarError]
):
    async def infer() -> web.Response:
        return web.Response(status=status, body=body)

    stub.answer = infer
    executor = executor_for(stub.url)
    await executor.start()
    try:
        try:
            outcome = await executor.run(TINY, [BatchItem(images.png())])
        except e.NearfarError as error:
            found: object = error
        else:
            found = outcome.results[0]
        assert type(found) is expected
    finally:
        await executor.close()


async def test_an_answer_in_json_alone_is_taken_too(stub: Stub):
    async def infer() -> web.Response:
        return web.json_response(
            {
                "outputs": [
                    {
                        "name": "scores",
                        "datatype": "FP32",
                        "shape": [1, 5],
                        "data": [0.0, 3.0, 1.0, 0.0, 0.0],
                    }
                ]
            }
        )

    stub.answer = infer
    executor = executor_for(stub.url)
    await executor.start()
    try:
        outcome = await executor.run(TINY, [BatchItem(images.png())])
        (result,) = outcome.results
        assert not isinstance(result, e.NearfarError)
        assert result.predictions is not None
        assert [p.index for p in result.predictions[:2]] == [1, 2]
    finally:
        await executor.close()


async def test_a_backend_that_hangs_is_left_at_the_timeout_and_asked_again_once_it_is_ready(
    stub: Stub,
):
    release = asyncio.Event()

    async def infer() -> web.Response:
        await release.wait()
        return web.Response(status=503)

    stub.answer = infer
    executor = executor_for(stub.url, hang_timeout_s=0.5)
    await executor.start()
    try:
        stub.ready = False
        with pytest.raises(e.DeadlineExceeded, match="gave no answer"):
            await executor.run(TINY, [BatchItem(images.png())])
        assert executor.ready_in_s() == float("inf")
        assert not executor.stats().ready
        release.set()
        stub.ready = True
        await asyncio.wait_for(executor.wait_ready(), 10)
        with pytest.raises(e.Overloaded):
            await executor.run(TINY, [BatchItem(images.png())])
    finally:
        release.set()
        await executor.close()


@pytest.mark.slow
async def test_a_backend_that_is_killed_is_a_lost_worker(tmp_path: Path):
    with a_broker_process(tmp_path, "--models", str(shared_servable())) as backend:
        executor = executor_for(backend.url)
        await executor.start()
        try:
            outcome = await executor.run(TINY, [BatchItem(images.png())])
            assert not isinstance(outcome.results[0], e.NearfarError)
            with stopped(backend.process.pid):
                batch = asyncio.create_task(executor.run(TINY, [BatchItem(images.png())]))
                await asyncio.sleep(0.3)
                backend.process.kill()
                with pytest.raises(e.WorkerLost):
                    await batch
            assert executor.ready_in_s() == float("inf")
            assert executor.stats().restarts == 1
        finally:
            await executor.close()
