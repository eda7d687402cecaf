"""Every way a broker can fail, in every mode, on real sockets.

The promise: an answer or a typed error by the deadline plus 50 ms, and nothing left behind.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_runtime import (
    Bundle,
    EdgeRuntime,
    InferenceMode,
    InferenceSource,
    NearfarError,
    NetworkUnreachable,
    RemoteError,
    Result,
    WireError,
)
from edge_runtime.contract.errors import ImageError, LabelsMismatch
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FAULTS, FaultBroker, Scope
from tests.support.watch import StallMeter, open_sockets, our_threads

BUNDLE = Bundle.open(tiny_bundle())
DEADLINE_MS = 300
SLACK_MS = 50
TYPICAL = {
    "predict": (
        "black_hole", "drip", "reset_on_request", "reset_mid_upload", "short_body", "garbage",
        "html", "endless", "wrong_labels", "redirect", "status_429", "status_500",
    ),
    "all": ("refuse", "black_hole", "garbage", "wrong_labels", "status_401", "status_503_proxy"),
}  # fmt: skip
NETWORKED = ("ADAPTIVE", "PREFER_IN_CLOUD", "ONLY_IN_CLOUD")
HARMLESS = ("wrong_class", "wrong_model")  # in a list of models, they change nothing


def connect(url: str, mode: str) -> EdgeRuntime:
    return EdgeRuntime(BUNDLE, url, mode, variant="tflite-int8-dyn")


def ask(runtime: EdgeRuntime) -> tuple[Result | NearfarError, float]:
    started = time.monotonic()
    outcome: Result | NearfarError
    try:
        outcome = runtime.run(photo(0), deadline_ms=DEADLINE_MS)
    except NearfarError as error:
        outcome = error
    return outcome, (time.monotonic() - started) * 1e3


def check(mode: str, outcome: Result | NearfarError, elapsed_ms: float, stall_ms: float) -> None:
    assert elapsed_ms <= DEADLINE_MS + SLACK_MS + stall_ms
    if isinstance(outcome, Result):
        assert outcome.inference_source is InferenceSource.ON_DEVICE
        assert outcome.deadline_met or stall_ms > 5
    else:
        assert mode == "ONLY_IN_CLOUD"
        assert isinstance(outcome, RemoteError | WireError | LabelsMismatch | ImageError)


def matrix() -> list[object]:
    """Every fault, in predictions only and in the whole broker; the long tail is slow."""
    return [
        pytest.param(fault, scope, marks=[] if fault in typical else [pytest.mark.slow])
        for scope, typical in TYPICAL.items()
        for fault in FAULTS
    ]


@pytest.mark.parametrize(("fault", "scope"), matrix())
def test_an_answer_or_a_typed_error_by_the_deadline(fault: str, scope: Scope) -> None:
    sockets = open_sockets()
    with FaultBroker(fault, scope=scope) as broker:
        runtimes = {mode: connect(broker.url, mode) for mode in NETWORKED}
        for runtime in runtimes.values():
            runtime.prewarm(wait_ms=100)
        with StallMeter() as stall, ThreadPoolExecutor(len(runtimes)) as pool:
            outcomes = dict(zip(runtimes, pool.map(ask, runtimes.values()), strict=True))
        for runtime in runtimes.values():
            runtime.close()
    for mode, (outcome, elapsed_ms) in outcomes.items():
        if fault in HARMLESS and scope == "all" and isinstance(outcome, Result):
            continue
        check(mode, outcome, elapsed_ms, stall.worst_ms)
    assert our_threads() == []
    gc.collect()
    assert open_sockets() <= sockets


def test_modes_that_answer_on_the_device_do_not_notice() -> None:
    with FaultBroker("black_hole", scope="all") as broker:
        for mode in (InferenceMode.ONLY_ON_DEVICE, InferenceMode.PREFER_ON_DEVICE):
            with connect(broker.url, mode) as runtime:
                outcome, elapsed_ms = ask(runtime)
                assert isinstance(outcome, Result)
                assert elapsed_ms < DEADLINE_MS / 2
        assert broker.connections == 0


@pytest.mark.parametrize("fault", ["black_hole", "reset_mid_upload", "garbage", "drip"])
async def test_async_calls_keep_the_same_promise_and_leave_no_task(fault: str) -> None:
    sockets = open_sockets()
    with FaultBroker(fault) as broker:
        for mode in ("ADAPTIVE", "ONLY_IN_CLOUD"):
            async with connect(broker.url, mode) as runtime:
                await asyncio.to_thread(runtime.prewarm, wait_ms=500)
                with StallMeter() as stall:
                    started = time.monotonic()
                    outcome: Result | NearfarError
                    try:
                        outcome = await runtime.arun(photo(0), deadline_ms=DEADLINE_MS)
                    except NearfarError as error:
                        outcome = error
                    elapsed_ms = (time.monotonic() - started) * 1e3
                check(mode, outcome, elapsed_ms, stall.worst_ms)
                assert asyncio.all_tasks() == {asyncio.current_task()}
    assert our_threads() == []
    gc.collect()
    # asyncio.to_thread keeps no socket; the loop's own were there before.
    assert open_sockets() <= sockets


def test_a_connection_that_is_never_accepted_keeps_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = []
        for _ in range(4):  # fill the queue: further SYNs are dropped
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            waiting.append(filler)
        time.sleep(0.05)
        for mode in ("ADAPTIVE", "ONLY_IN_CLOUD"):
            with connect(f"http://127.0.0.1:{address[1]}", mode) as runtime, StallMeter() as stall:
                outcome, elapsed_ms = ask(runtime)
                assert isinstance(outcome, Result) == (mode == "ADAPTIVE")
                check(mode, outcome, elapsed_ms, stall.worst_ms)
        for filler in waiting:
            filler.close()


def test_a_host_without_an_address_is_unreachable() -> None:
    for mode in ("ADAPTIVE", "ONLY_IN_CLOUD"):
        with connect("http://no-such-host.invalid:9", mode) as runtime, StallMeter() as stall:
            outcome, elapsed_ms = ask(runtime)
            check(mode, outcome, elapsed_ms, stall.worst_ms)
        closed = time.monotonic()
        assert time.monotonic() - closed < 1


def test_a_broker_that_dies_and_returns_is_used_again() -> None:
    with FaultBroker() as broker, connect(broker.url, "ADAPTIVE") as runtime:
        assert runtime.prewarm(wait_ms=2000)
        assert runtime.run(photo(0)).inference_source is InferenceSource.IN_CLOUD
        broker.stop_listening()
        outcomes = [runtime.run(photo(seed), deadline_ms=DEADLINE_MS) for seed in range(6)]
        assert {result.inference_source for result in outcomes} == {InferenceSource.ON_DEVICE}
        status = runtime.status().broker
        assert status is not None
        assert status.breaker == "OPEN"
        assert outcomes[-1].decision.reason == "circuit_open"
        asked = len(broker.requests)
        broker.listen_again()
        give_up = time.monotonic() + 15
        while time.monotonic() < give_up:
            if runtime.run(photo(1)).inference_source is InferenceSource.IN_CLOUD:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the broker was not used again within 15 s")
        assert broker.paths()[asked] == "/v2/health/ready"  # no image was the probe


def test_a_broker_killed_mid_upload_costs_no_answer() -> None:
    with FaultBroker(delay_ms=150) as broker, connect(broker.url, "ADAPTIVE") as runtime:
        assert runtime.prewarm(wait_ms=2000)
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(runtime.run, photo(seed), deadline_ms=1000) for seed in range(4)]
            time.sleep(0.06)
            broker.stop_listening()
            results = [future.result() for future in running]
    assert all(result.deadline_met for result in results)
    lost = [r for r in results if r.inference_source is InferenceSource.ON_DEVICE]
    assert lost
    assert {result.error for result in lost} <= {"network_unreachable", None}


def test_closing_ends_calls_that_are_under_way() -> None:
    with FaultBroker("slow") as broker:
        for mode in ("ADAPTIVE", "ONLY_IN_CLOUD"):
            runtime = connect(broker.url, mode)
            runtime.prewarm(wait_ms=1000)
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(runtime.run, photo(0), deadline_ms=10_000)
                time.sleep(0.1)
                started = time.monotonic()
                runtime.close()
                if mode == "ADAPTIVE":
                    result = running.result(2)
                    assert result.inference_source is InferenceSource.ON_DEVICE
                else:
                    with pytest.raises(NetworkUnreachable):
                        running.result(2)
                assert time.monotonic() - started < 2
    assert our_threads() == []


def test_a_dropped_runtime_closes_itself() -> None:
    sockets = open_sockets()
    with FaultBroker() as broker:
        runtime = connect(broker.url, "ADAPTIVE")
        runtime.prewarm(wait_ms=1000)
        assert our_threads() != []
        del runtime
        gc.collect()
        assert our_threads() == []
    assert open_sockets() <= sockets


def test_an_idle_runtime_uses_no_processor_time() -> None:
    with FaultBroker() as broker, connect(broker.url, "ADAPTIVE") as runtime:
        runtime.prewarm(wait_ms=1000)
        runtime.run(photo(0))
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05
