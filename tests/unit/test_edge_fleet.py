"""Several brokers: whom a request asks, and what it does when that one fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest

from edge_runtime import (
    Bundle,
    ConfigError,
    EdgeRuntime,
    ImageError,
    InferenceSource,
    NearfarError,
    NetworkUnreachable,
    Result,
)
from edge_runtime.contract.errors import DeadlineExceeded
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport, problem
from tests.support.bundles import LABELS, photo, tiny_bundle
from tests.support.watch import our_threads

BUNDLE = Bundle.open(tiny_bundle())


class Broker:
    """One of several: it can be down, busy, draining or slow."""

    def __init__(self, name: int, *, load: bool = True) -> None:
        self.answers = ScriptedTransport.for_bundle(BUNDLE, self._answer)
        self.label = LABELS[name]
        self.load = load
        self.queue_delay_ms = 0
        self.draining = False
        self.delay_s = 0.0
        self.error: Callable[[], NearfarError | HttpResponse] | None = None
        self.transport = ScriptedTransport(self._handle)

    def _answer(self, _: bytes) -> str:
        return self.label

    async def _handle(self, request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            failure = self.error()
            if isinstance(failure, NearfarError):
                raise failure
            return failure
        if request.path == "/v1/load":
            if not self.load:
                return problem(404, "request_rejected")
            said = {"queue_delay_ms": self.queue_delay_ms, "draining": self.draining, "more": 1}
            return HttpResponse(status=200, headers={}, body=json.dumps(said).encode())
        response = await self.answers.send(request)
        if self.load:
            return response
        headers = {**response.headers, "x-queue-delay-ms": str(self.queue_delay_ms)}
        return HttpResponse(status=response.status, headers=headers, body=response.body)

    @property
    def asked(self) -> int:
        return sum(one.path.endswith(":predict") for one in self.transport.requests)

    def count(self, path: str) -> int:
        return sum(one.path == path for one in self.transport.requests)


def runtime(*brokers: Broker, policy: str = "ONLY_IN_CLOUD") -> EdgeRuntime:
    transports = [broker.transport for broker in brokers]
    opened = EdgeRuntime(BUNDLE, transport=transports, policy=policy, variant="tflite-fp32")
    assert opened.prewarm(wait_ms=3000)
    return opened


def down() -> NearfarError:
    return NetworkUnreachable("down")


def looks_worse(edge: EdgeRuntime, number: int) -> None:
    """So far away that another one is preferred, whatever the measured differences."""
    measured = edge._uplink._uplinks[number]._measured  # type: ignore[union-attr]
    for _ in range(30):
        measured.path = measured.path.pinged(200.0, time.monotonic())


def ask(edge: EdgeRuntime, count: int, *, deadline_ms: float = 3000) -> list[Result]:
    return [edge.run(photo(0), deadline_ms=deadline_ms) for _ in range(count)]


@pytest.mark.parametrize(
    "urls", [[], ["http://127.0.0.1:1", "http://127.0.0.1:1"], ["ftp://x", "http://127.0.0.1:1"]]
)
def test_a_list_of_brokers_that_makes_no_sense_is_refused(urls: list[str]) -> None:
    with pytest.raises(ConfigError, match="broker must be"):
        EdgeRuntime(BUNDLE, urls)


def test_a_request_whose_broker_fails_is_answered_by_another_one() -> None:
    broken, sound = Broker(0), Broker(1)
    with runtime(broken, sound) as edge:
        ask(edge, 1)
        looks_worse(edge, 1)
        broken.error = down
        assert {result.label for result in ask(edge, 12)} == {LABELS[1]}
        assert broken.asked <= 4  # three failures open its breaker
        breakers = [status.breaker for status in edge.status().brokers]
        assert breakers == ["OPEN", "CLOSED"]


@pytest.mark.parametrize(
    "failure",
    [lambda: problem(503, "overloaded"), lambda: problem(500, "broker_fault"),
     lambda: problem(401, "unauthorized")],
)  # fmt: skip
def test_a_refusal_of_one_broker_is_none_of_the_others(
    failure: Callable[[], HttpResponse],
) -> None:
    refusing, sound = Broker(0), Broker(1)
    with runtime(refusing, sound) as edge:
        refusing.error = failure
        assert {result.label for result in ask(edge, 6)} == {LABELS[1]}
        assert refusing.asked <= 1 + 2 * (failure().status == 500)


def test_what_is_wrong_with_the_image_is_not_asked_twice() -> None:
    brokers = Broker(0), Broker(1)
    with runtime(*brokers) as edge:
        for broker in brokers:
            broker.error = lambda: problem(422, "image_unreadable")
        with pytest.raises(ImageError):
            edge.run(photo(0))
        assert sum(broker.asked for broker in brokers) == 1


def test_with_every_broker_down_the_error_is_the_network_and_local_answers_hold() -> None:
    brokers = Broker(0), Broker(1)
    with runtime(*brokers) as edge:
        for broker in brokers:
            broker.error = down
        with pytest.raises(NetworkUnreachable):
            edge.run(photo(0))
    brokers = Broker(0), Broker(1)
    with runtime(*brokers, policy="PREFER_IN_CLOUD") as edge:
        for broker in brokers:
            broker.error = down
        result = edge.run(photo(0))
        assert result.inference_source is InferenceSource.ON_DEVICE


def test_no_time_is_left_for_another_broker_after_the_deadline() -> None:
    brokers = Broker(0), Broker(1)
    with runtime(*brokers) as edge:
        for broker in brokers:
            broker.delay_s = 1.0
        with pytest.raises(DeadlineExceeded):
            edge.run(photo(0), deadline_ms=100)
        assert sum(broker.asked for broker in brokers) == 1


@pytest.mark.parametrize("load", [True, False])
def test_the_smaller_published_delay_wins(load: bool) -> None:
    busy, idle = Broker(0, load=load), Broker(1, load=load)
    with runtime(busy, idle) as edge:
        busy.queue_delay_ms = 900
        ask(edge, 3)  # the news come with the first answers
        before = busy.asked
        ask(edge, 12)
        assert busy.asked - before <= 1
        assert (busy.count("/v1/load"), idle.count("/v1/load")) == (1, 1)


def test_a_draining_broker_gets_no_new_request() -> None:
    leaving, staying = Broker(0), Broker(1)
    with runtime(leaving, staying) as edge:
        leaving.draining = True
        ask(edge, 2)
        before = leaving.asked
        ask(edge, 8)
        assert leaving.asked == before


def test_load_is_spread_over_brokers_that_are_alike() -> None:
    brokers = [Broker(number) for number in range(4)]
    for broker in brokers:
        broker.delay_s = 0.002
    with runtime(*brokers) as edge:
        ask(edge, 60)
    assert sum(broker.asked for broker in brokers) == 60
    assert max(broker.asked for broker in brokers) < 50


def test_a_broker_that_comes_back_is_found_by_a_health_request() -> None:
    first, second = Broker(0), Broker(1)
    with runtime(first, second) as edge:
        looks_worse(edge, 1)
        first.error = down
        ask(edge, 8)
        first.error = None
        first.transport.requests.clear()
        deadline_s = time.monotonic() + 20
        while edge.status().brokers[0].breaker != "CLOSED" and time.monotonic() < deadline_s:
            ask(edge, 1)
            time.sleep(0.05)
        assert edge.status().brokers[0].breaker == "CLOSED"
        assert first.transport.requests[0].path == "/v2/health/ready"


def test_closing_ends_every_broker_and_the_one_thread() -> None:
    brokers = Broker(0), Broker(1)
    with runtime(*brokers) as edge:
        ask(edge, 1)
        assert our_threads().count("nearfar-network") == 1
        assert len(edge.status().brokers) == 2
    assert all(broker.transport.closed for broker in brokers)
    assert our_threads() == []


def test_a_single_broker_that_answered_errors_on_an_open_connection_is_probed_again() -> None:
    only = Broker(0)
    with runtime(only, policy="PREFER_IN_CLOUD") as edge:
        only.error = lambda: problem(500, "broker_fault")
        ask(edge, 4)
        assert edge.status().brokers[0].breaker == "OPEN"
        only.error = None
        deadline_s = time.monotonic() + 20
        while edge.status().brokers[0].breaker != "CLOSED" and time.monotonic() < deadline_s:
            ask(edge, 1)
            time.sleep(0.05)
        assert edge.run(photo(0), deadline_ms=3000).label == LABELS[0]
        assert edge.status().brokers[0].breaker == "CLOSED"
