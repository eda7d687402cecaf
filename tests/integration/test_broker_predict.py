"""What a device gets from a broker: torch's own numbers, quickly, with the record of how."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.manifest import labels_digest
from edge_runtime.contract.wire import decode_answer, parse_server_timing
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request
from tests.support.servables import (
    LABELS,
    direct_scores,
    manifest_sha256,
    renamed_servable,
    shared_servable,
    tiny_net,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    shutil.copytree(shared_servable("NHWC"), folder / "nhwc-source")
    renamed_servable(folder / "nhwc-source", folder / "tiny-nhwc", "tiny-nhwc")
    shutil.rmtree(folder / "nhwc-source")
    async with broker_here(folder) as running:
        yield running


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
async def test_answers_are_those_of_torch_run_directly(broker: RunningBroker, kind: str, seed: int):
    image = getattr(images, kind)(seed, 200 + seed, 150)
    reply = await predict(broker.url, image, content_type=f"image/{kind}", query="?top_k=5")
    assert reply.status == 200
    answer = decode_answer(reply.body)
    expected = direct_scores(tiny_net(), image)
    assert [p.index for p in answer.predictions] == list(np.argsort(-expected, kind="stable"))
    for prediction in answer.predictions:
        assert prediction.label == LABELS[prediction.index]
        assert prediction.score == pytest.approx(expected[prediction.index], abs=1e-6)


async def test_a_model_that_takes_nhwc_answers_alike(broker: RunningBroker):
    image = images.png(7)
    reply = await predict(broker.url, image, model="tiny-nhwc", query="?top_k=1")
    expected = direct_scores(tiny_net(layout="NHWC"), image, layout="NHWC")
    best = decode_answer(reply.body).predictions[0]
    assert best.index == int(expected.argmax())
    assert best.score == pytest.approx(expected.max(), abs=1e-6)


async def test_batched_answers_are_those_of_each_image_alone(broker: RunningBroker):
    pictures = [images.png(seed) for seed in range(24)]
    async with aiohttp.ClientSession() as session:
        replies = await asyncio.gather(
            *(predict(broker.url, picture, session=session) for picture in pictures)
        )
    for picture, reply in zip(pictures, replies, strict=True):
        expected = direct_scores(tiny_net(), picture)
        best = decode_answer(reply.body).predictions[0]
        assert best.index == int(expected.argmax())
        assert best.score == pytest.approx(expected.max(), abs=1e-5)


async def test_concurrent_requests_run_in_batches(broker: RunningBroker):
    before = broker.services.executor.stats()
    async with aiohttp.ClientSession() as session:
        replies = await asyncio.gather(
            *(predict(broker.url, images.png(1), session=session) for _ in range(64))
        )
    after = broker.services.executor.stats()
    assert [reply.status for reply in replies] == [200] * 64
    assert after.images - before.images == 64
    assert after.batches - before.batches <= 32  # 8 when nothing disturbs


async def test_an_answer_says_how_long_each_part_took_and_how_long_the_next_will_wait(
    broker: RunningBroker,
):
    reply = await predict(broker.url, images.png(), headers={"X-Request-Id": "dev-1.a"})
    timing = parse_server_timing(reply.headers["Server-Timing"])
    assert timing.recv_ms is not None
    assert timing.recv_ms >= 0
    assert timing.queue_ms is not None
    assert timing.queue_ms >= 0
    assert timing.inference_ms is not None
    assert timing.inference_ms > 0
    assert int(reply.headers["X-Queue-Delay-Ms"]) >= 0
    assert reply.headers["X-Request-Id"] == "dev-1.a"
    assert reply.headers["Server"] == "nearfar"


async def test_an_answer_names_the_model_that_gave_it(broker: RunningBroker):
    answer = decode_answer((await predict(broker.url, images.png())).body)
    assert answer.model.name == "tiny"
    assert answer.model.version == "1.0.0"
    assert answer.model.sha256 == manifest_sha256(shared_servable())
    assert answer.model.labels_sha256 == labels_digest(LABELS)


@pytest.mark.parametrize(("query", "count"), [("", 3), ("?top_k=1", 1), ("?top_k=1000", 5)])
async def test_top_k_sets_how_many_answers_come(broker: RunningBroker, query: str, count: int):
    reply = await predict(broker.url, images.png(), query=query)
    assert len(decode_answer(reply.body).predictions) == count


async def test_without_a_deadline_the_default_counts(broker: RunningBroker):
    assert limits.DEFAULT_DEADLINE_MS == 1000
    assert (await predict(broker.url, images.png(), deadline_ms=None)).status == 200


@pytest.mark.parametrize("make", [images.opaque_alpha_png, images.exif_rotated_png])
async def test_the_same_picture_stored_otherwise_is_answered_alike(broker: RunningBroker, make):
    """Opaque alpha is dropped; a picture stored turned is turned upright."""
    straight = decode_answer((await predict(broker.url, images.png(3))).body)
    other = decode_answer((await predict(broker.url, make(3))).body)
    assert [p.index for p in other.predictions] == [p.index for p in straight.predictions]
    assert other.predictions[0].score == pytest.approx(straight.predictions[0].score, abs=1e-6)


async def test_a_webp_is_answered(broker: RunningBroker):
    image = images.lossless_webp()
    assert (await predict(broker.url, image, content_type="image/webp")).status == 200


async def test_a_body_in_chunks_is_answered(broker: RunningBroker):
    async def chunks() -> AsyncIterator[bytes]:
        data = images.png()
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    reply = await request(
        "POST",
        f"{broker.url}/v1/models/tiny:predict",
        data=chunks(),
        headers={"Content-Type": "image/png", "X-Deadline-Ms": "5000"},
    )
    assert reply.status == 200


async def test_models_are_listed_with_what_a_device_must_check(broker: RunningBroker):
    listed = (await request("GET", f"{broker.url}/v1/models")).json["models"]
    assert [model["name"] for model in listed] == ["tiny", "tiny-nhwc"]
    one = (await request("GET", f"{broker.url}/v1/models/tiny")).json
    assert one == listed[0]
    assert one == {
        "name": "tiny",
        "version": "1.0.0",
        "sha256": manifest_sha256(shared_servable()),
        "labels_sha256": labels_digest(LABELS),
        "task": "classification",
        "classes": 5,
        "runtime": "eager",
        "precision": "fp32",
        "default": True,
        "aliases": [],
        "percent": 100,
        "shadow_percent": 0,
    }


async def test_the_inference_protocol_says_live_ready_and_what_is_there(broker: RunningBroker):
    url = broker.url
    assert (await request("GET", f"{url}/v2")).json["name"] == "nearfar"
    assert (await request("GET", f"{url}/v2/health/live")).json == {"live": True}
    assert (await request("GET", f"{url}/v2/health/ready")).json == {"ready": True}
    metadata = (await request("GET", f"{url}/v2/models/tiny")).json
    assert metadata == {
        "name": "tiny",
        "versions": ["1.0.0"],
        "platform": "pytorch_exportedprogram",
        "inputs": [
            {
                "name": "images",
                "datatype": "FP32",
                "shape": [-1, 3, 32, 32],
                "parameters": {"alternative": "tensor"},
            },
            {
                "name": "encoded_image",
                "datatype": "BYTES",
                "shape": [-1, 1],
                "parameters": {"alternative": "image"},
            },
        ],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "answer_labels", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "answer_scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "answer_indices", "datatype": "INT32", "shape": [-1, -1]},
        ],
    }
    versioned = await request("GET", f"{url}/v2/models/tiny/versions/1.0.0")
    assert versioned.json == metadata
    for path in ("tiny/ready", "tiny/versions/1.0.0/ready"):
        ready = await request("GET", f"{url}/v2/models/{path}")
        assert ready.status == 200
        assert ready.json == {"name": "tiny", "ready": True}


@pytest.mark.parametrize(
    "path", ["huge", "huge/ready", "tiny/versions/2", "tiny/versions/2/ready", "tiny/nothing"]
)
async def test_inference_protocol_errors_have_its_shape(broker: RunningBroker, path: str):
    reply = await request("GET", f"{broker.url}/v2/models/{path}")
    assert reply.status == 404
    assert list(reply.json) == ["error"]


async def test_metrics_count_what_happened_and_name_no_one(broker: RunningBroker):
    await predict(broker.url, images.png())
    await predict(broker.url, b"junk")
    text = (await request("GET", f"{broker.url}/metrics")).body.decode()
    assert 'nearfar_requests_total{route="predict",status="200"}' in text
    assert 'nearfar_errors_total{code="image_unreadable"}' in text
    assert 'nearfar_batch_images_count{model="tiny"}' in text
    assert "nearfar_executor_ready 1.0" in text
    assert "tenant" not in text


async def test_made_up_paths_make_no_metric_series(broker: RunningBroker):
    for number in range(50):
        await request("GET", f"{broker.url}/made/up/{number}")
        await predict(broker.url, images.png(), model=f"made-up-{number}")
    text = (await request("GET", f"{broker.url}/metrics")).body.decode()
    assert "made" not in text
    assert sum(not line.startswith("#") for line in text.splitlines()) < 500


async def test_the_folder_may_be_gone_once_the_models_are_loaded(tmp_path: Path):
    folder = Path(shutil.copytree(shared_servable(), tmp_path / "tiny"))
    async with broker_here(folder) as running:
        shutil.rmtree(folder)
        assert (await predict(running.url, images.png())).status == 200
