"""What a broker would refuse waits on the device, first come, first served."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.offload.places import Places


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_next_in_line_goes_when_a_place_is_free() -> None:
    places, order = Places(2, 1000), []

    async def go(name: str) -> None:
        await places.take(10)
        order.append(name)

    tasks = [asyncio.create_task(go(name)) for name in "abcd"]
    await _turns()
    assert order == ["a", "b"]
    places.give(10)
    await _turns()
    assert order == ["a", "b", "c"]
    places.give(10)
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c", "d"]


async def test_bytes_count_too_and_one_that_is_too_large_goes_alone() -> None:
    places = Places(8, 100)
    await places.take(60)
    large = asyncio.create_task(places.take(500))
    small = asyncio.create_task(places.take(10))
    await _turns()
    assert not large.done()
    assert not small.done(), "it would pass the large one for ever"
    places.give(60)
    await _turns()
    assert large.done()
    assert not small.done()
    places.give(500)
    await asyncio.wait_for(small, 1)


async def test_one_that_is_cancelled_in_line_takes_no_place() -> None:
    places = Places(1, 100)
    await places.take(1)
    gone, next_one = asyncio.create_task(places.take(1)), asyncio.create_task(places.take(1))
    await _turns()
    gone.cancel()
    places.give(1)
    await asyncio.wait_for(next_one, 1)
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_one_that_is_cancelled_as_its_turn_comes_hands_it_on() -> None:
    places = Places(1, 100)
    await places.take(1)
    gone, next_one = asyncio.create_task(places.take(1)), asyncio.create_task(places.take(1))
    await _turns()
    places.give(1)
    gone.cancel()
    await asyncio.wait_for(next_one, 1)


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=30), st.integers(1, 5))
def test_bounds_hold_and_everybody_gets_a_turn(asks: list[tuple[int, bool]], most: int) -> None:
    async def run() -> None:
        places, inside, peak = Places(most, 100), [], []

        async def one(size: int) -> None:
            await places.take(size)
            inside.append(size)
            peak.append((len(inside), sum(inside)))
            try:
                await asyncio.sleep(0)
            finally:
                inside.remove(size)
                places.give(size)

        tasks = [asyncio.create_task(one(size)) for size, _ in asks]
        await asyncio.sleep(0)
        for task, (_, cancels) in zip(tasks, asks, strict=True):
            if cancels:
                task.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert all(count <= most and size <= 100 for count, size in peak)
        kept = sum(not cancels for _, cancels in asks)
        assert len(peak) >= kept

    asyncio.run(run())
