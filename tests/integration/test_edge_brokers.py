"""Two real brokers: one becomes slow, one is killed, and every request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_runtime import Bundle, EdgeRuntime, Result
from tests.support.broker import broker_process
from tests.support.bundles import photo, servable, tiny_bundle

pytestmark = pytest.mark.slow
BUNDLE = Bundle.open(tiny_bundle())


class SlowRoad:
    """A TCP relay that can hold back everything that passes, by ``delay_s`` each way."""

    def __init__(self, url: str) -> None:
        self.delay_s = 0.0
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slow-road")
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        ways = [
            asyncio.create_task(self._pass(reader, back)),
            asyncio.create_task(self._pass(there, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, back):
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()

    def close(self) -> None:
        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def slow_road(url: str) -> Iterator[SlowRoad]:
    road = SlowRoad(url)
    try:
        yield road
    finally:
        road.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servable(tmp_path_factory.mktemp("servable") / "same")


def uploads(runtime: EdgeRuntime) -> int:
    return runtime.status().counts.uploads


def run(runtime: EdgeRuntime, count: int) -> list[Result]:
    """``ONLY_IN_CLOUD`` raises where no broker answers: all of these were answered."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda n: runtime.run(photo(n), deadline_ms=8000), range(count)))


def test_one_slowed_then_the_other_killed_and_every_request_answered(
    models: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    arguments = ("--models", str(models))
    with (
        broker_process(tmp_path / "a", *arguments) as first,
        broker_process(tmp_path / "b", *arguments) as second,
        slow_road(first.url) as road,
        EdgeRuntime(BUNDLE, [road.url, second.url], "ONLY_IN_CLOUD") as runtime,
    ):
        assert runtime.prewarm(wait_ms=10_000)
        run(runtime, 40)
        road.delay_s = 0.15
        run(runtime, 12)  # finds out
        before = [status.rtt_samples for status in runtime.status().brokers]
        assert len(run(runtime, 30)) == 30
        slowed, sound = (
            status.rtt_samples - earlier
            for status, earlier in zip(runtime.status().brokers, before, strict=True)
        )
        assert slowed < sound / 2
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(runtime.run, photo(number), deadline_ms=8000) for number in range(40)
            ]
            second.process.kill()
            labels = [future.result().label for future in asked]
        assert len(labels) == 40
        assert len(run(runtime, 10)) == 10
        assert [status.breaker for status in runtime.status().brokers] == ["CLOSED", "OPEN"]
