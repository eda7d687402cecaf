"""Idempotency keys: one run for many tries, within bounds."""

from __future__ import annotations

import asyncio

import pytest

from broker.scheduling.replays import Replays
from edge_runtime.contract.errors import Overloaded, WireError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def answer(data: bytes) -> bytes:
    await asyncio.sleep(0)
    return data


async def fail() -> bytes:
    raise Overloaded("no")


def replays(**bounds: int) -> tuple[Replays[bytes], Clock]:
    clock = Clock()
    return Replays(len, clock=clock, **bounds), clock


async def test_a_try_is_found_while_it_runs_and_after_it() -> None:
    known, clock = replays(ttl_ms=60_000)
    started = known.start("acme", "k", "print", answer(b"yes"))
    assert known.find("acme", "k", "print") is started
    assert await started.task == b"yes"
    clock.now = 59.9
    found = known.find("acme", "k", "print")
    assert found is started
    assert await found.task == b"yes"
    clock.now = 60.1
    assert known.find("acme", "k", "print") is None
    assert (len(known), known.kept_bytes) == (0, 0)


async def test_a_try_is_joinable_only_once_its_body_has_come() -> None:
    known, _ = replays()
    started = known.start("acme", "k", "print", answer(b""))
    assert not started.joinable
    started.complete = True
    assert started.joinable
    started.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await started.task
    assert not started.joinable


async def test_a_key_of_another_request_is_refused_and_of_another_tenant_unknown() -> None:
    known, _ = replays()
    await known.start("acme", "k", "print", answer(b"")).task
    with pytest.raises(WireError, match="new key"):
        known.find("acme", "k", "other")
    assert known.find("beta", "k", "other") is None


async def test_failures_are_not_kept() -> None:
    known, _ = replays()
    task = known.start("acme", "k", "print", fail()).task
    with pytest.raises(Overloaded):
        await task
    await asyncio.sleep(0)
    assert known.find("acme", "k", "print") is None
    assert len(known) == 0


async def test_a_tenant_has_so_many_keys_and_pushes_out_its_own_oldest() -> None:
    known, _ = replays(max_per_tenant=3)
    await known.start("beta", "k", "print", answer(b"b")).task
    for number in range(5):
        await known.start("acme", f"k{number}", "print", answer(b"a")).task
    await asyncio.sleep(0)
    kept = [n for n in range(5) if known.find("acme", f"k{n}", "print") is not None]
    assert kept == [2, 3, 4]
    assert known.find("beta", "k", "print") is not None
    assert known.kept_bytes == 4


async def test_answers_take_so_many_bytes_and_the_oldest_go_first() -> None:
    known, _ = replays(max_bytes=100)
    for number in range(4):
        await known.start("acme", f"k{number}", "print", answer(bytes(40))).task
    await asyncio.sleep(0)
    assert known.kept_bytes == 80
    assert known.find("acme", "k0", "print") is None
    assert known.find("acme", "k3", "print") is not None


async def test_a_second_start_under_a_key_takes_its_place() -> None:
    known, _ = replays()
    first = known.start("acme", "k", "print", answer(bytes(10)))
    await first.task
    second = known.start("acme", "k", "print", answer(bytes(3)))
    await second.task
    await asyncio.sleep(0)
    assert known.find("acme", "k", "print") is second
    assert known.kept_bytes == 3
