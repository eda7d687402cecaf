"""Shadows: how answers are compared, and that copies wait, skip, and do no harm."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest
from PIL import Image

from broker.executors.base import BatchItem, ExecutorStats, LoadedModel, TensorAnswer
from broker.models import changes as c
from broker.models.agreement import agreement
from broker.models.repository import Repository
from broker.models.rollout import Rollouts
from broker.models.routing import Shadow
from broker.models.servable import OpenedServable, open_servable
from broker.models.shadowing import Shadows
from broker.scheduling.scheduler import Scheduler
from broker.scheduling.ticket import Answer
from broker.telemetry import Telemetry
from edge_runtime.contract.errors import WorkerLost
from edge_runtime.contract.tasks import Box, Prediction
from edge_runtime.contract.wire import EncodedAnswer, Picture
from tests.support.broker import Events
from tests.support.executors import SleepExecutor
from tests.support.servables import shared_servable


def classes(*scores: tuple[int, float]) -> EncodedAnswer:
    return EncodedAnswer(
        predictions=tuple(Prediction(index=i, label=str(i), score=score) for i, score in scores)
    )


def boxes(*corners: tuple[int, float, float]) -> EncodedAnswer:
    return EncodedAnswer(
        boxes=tuple(
            Box(index=i, label=str(i), score=0.9, x_min=low, y_min=0, x_max=high, y_max=10)
            for i, low, high in corners
        )
    )


def picture(pixels: np.ndarray) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    height, width = pixels.shape[:2]
    return Picture(media_type="image/png", width=width, height=height, data=buffer.getvalue())


@pytest.fixture(scope="module")
def servable() -> OpenedServable:
    return open_servable(shared_servable())


GRAY = np.full((10, 20), 3, dtype=np.uint8)
ONE_OFF = GRAY.copy()
ONE_OFF[0, 0] = 4
MANY_OFF = GRAY.copy()
MANY_OFF[:2] = 4
RGB = np.full((4, 4, 3), 100, dtype=np.uint8)
PAIRS = [
    (classes((1, 0.9), (2, 0.1)), classes((1, 0.7), (2, 0.3)), True, 0.2),
    (classes((1, 0.9), (2, 0.1)), classes((2, 0.6), (1, 0.4)), False, 0.5),
    (classes((1, 0.9)), classes((2, 0.6)), False, 0.9),
    (boxes(), boxes(), True, 0.0),
    (boxes((1, 0, 10)), boxes(), False, 1.0),
    (boxes((1, 0, 10)), boxes((1, 0, 8)), True, 0.2),
    (boxes((1, 0, 10)), boxes((2, 0, 10)), False, 0.0),
    (EncodedAnswer(mask=picture(GRAY)), EncodedAnswer(mask=picture(ONE_OFF)), True, 1 / 200),
    (EncodedAnswer(mask=picture(GRAY)), EncodedAnswer(mask=picture(MANY_OFF)), False, 0.2),
    (EncodedAnswer(image=picture(RGB)), EncodedAnswer(image=picture(RGB + 8)), True, 8 / 255),
    (EncodedAnswer(image=picture(RGB)), EncodedAnswer(image=picture(RGB - 90)), False, 90 / 255),
    (EncodedAnswer(image=picture(RGB)), EncodedAnswer(image=picture(RGB[:2])), False, 1.0),
    (classes((1, 0.9)), boxes(), False, 1.0),
]


@pytest.mark.parametrize(("one", "other", "agree", "difference"), PAIRS)
def test_answers_are_compared_by_what_they_say(
    servable: OpenedServable, one: EncodedAnswer, other: EncodedAnswer,
    agree: bool, difference: float,
):  # fmt: skip
    found = agreement(servable, (), one, other)
    assert (found.agree, found.difference) == (agree, pytest.approx(difference))


def test_tensors_are_compared_as_the_numbers_they_are(servable: OpenedServable):
    def tensor(*numbers: float) -> TensorAnswer:
        return TensorAnswer(tensors=(np.array(numbers, "<f4").tobytes(),), answer=None)

    same = agreement(servable, (0,), tensor(100, 2), tensor(100.5, 2))
    assert (same.agree, same.difference) == (True, 0.5)
    assert not agreement(servable, (0,), tensor(1, 2), tensor(1.5, 2)).agree
    assert not agreement(servable, (0,), tensor(1, 2), tensor(1, float("nan"))).agree


class Held(SleepExecutor):
    """Holds both versions."""

    def stats(self) -> ExecutorStats:
        how = LoadedModel(runtime="eager", precision="fp32")
        return ExecutorStats(device="cpu", ready=True, models=dict.fromkeys(self.keys, how))


@contextlib.asynccontextmanager
async def shadowed(
    servable: OpenedServable, executor: Held
) -> AsyncIterator[tuple[Shadows, Rollouts, Scheduler, OpenedServable, Counter[str], Events]]:
    new = msgspec.structs.replace(servable.manifest, version="2.0.0")
    repository = Repository([servable, msgspec.structs.replace(servable, manifest=new)])
    executor.keys = repository.keys
    events, seen = Events(), Counter[str]()
    rollouts = Rollouts(repository, events)
    rollouts.change("tiny", c.SetShadow(shadow=Shadow(version="2.0.0", percent=100)))
    scheduler = Scheduler(executor, repository.keys, Telemetry(), max_batch=4)
    await scheduler.warm_up(dict.fromkeys(repository.keys, b"warm"))
    executor.batches.clear()
    scheduler.start()
    shadows = Shadows(rollouts, scheduler, executor, lambda _, result: seen.update([result]))
    try:
        yield shadows, rollouts, scheduler, repository.get("tiny"), seen, events
    finally:
        await shadows.close()
        await scheduler.close()


def answered(label: str) -> Answer:
    given = EncodedAnswer(predictions=(Prediction(index=0, label=label, score=1.0),))
    return Answer(given, queue_ms=0.0, inference_ms=1.0)


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_copies_wait_for_an_idle_device_and_few_of_them_wait(servable: OpenedServable):
    executor = Held()
    async with shadowed(servable, executor) as (shadows, _, scheduler, stable, seen, _):
        deadline_s = asyncio.get_running_loop().time() + 5
        with scheduler.admitted(stable.key, deadline_s, 1):  # somebody uploads
            for number in range(6):
                shadows.offer(stable, str(number), BatchItem(b"x"), answered("x"))
            assert seen == {"skipped": 2}
            await asyncio.sleep(0.1)
            assert executor.batches == []
        await until(lambda: seen["agreed"] == 4)
        assert [len(images) for _, images in executor.batches] == [1] * 4


async def test_a_shadow_that_ends_its_process_is_dropped(servable: OpenedServable):
    executor = Held()
    async with shadowed(servable, executor) as (shadows, rollouts, _, stable, seen, events):
        for number in (1, 2):
            executor.fail_next = WorkerLost("gone")
            shadows.offer(stable, "a", BatchItem(b"x"), answered("x"))
            await until(lambda number=number: seen["failed"] == number)
        assert rollouts.status("tiny").shadow is None
        assert events.named("shadow_dropped")[0]["version"] == "2.0.0"
        shadows.offer(stable, "a", BatchItem(b"x"), answered("x"))
        assert seen == {"failed": 2}
