"""Every task over HTTP: what is refused before the body, and each form an answer can have."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from broker.server import RunningBroker
from edge_runtime.contract.answer_codec import class_colors, decode_answer_pixels
from edge_runtime.contract.tasks import TaskName
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import (
    PredictAnswer,
    decode_answer,
    encode_seed,
    parse_picture_headers,
)
from tests.support import broker_images as images
from tests.support.broker import Reply, broker_here, predict, raw_exchange, request
from tests.support.tasks import LABELS, TASKS, task_of, task_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = {name: f"large-{name.replace('_', '-')}" for name in TASKS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    for name in TASKS:
        shutil.copytree(task_servable(name), folder / name)
    async with broker_here(folder, cors_origins=("*",)) as running:
        yield running


async def ask(
    broker: RunningBroker, name: TaskName, accept: str | None = None, **options: Any
) -> Reply:
    """A sound request; ``options`` change it."""
    generates = name == "generation"
    sent: dict[str, Any] = {
        "image": encode_seed(7) if generates else images.png(1, 90, 70),
        "content_type": "application/json" if generates else "image/png",
        "headers": {} if accept is None else {"Accept": accept},
    }
    sent |= options
    return await predict(broker.url, sent.pop("image"), model=MODEL[name], **sent)


def answer_in(reply: Reply, name: TaskName) -> tuple[PredictAnswer, Answer]:
    assert reply.status == 200, reply.body
    said = decode_answer(reply.body)
    return said, decode_answer_pixels(said.answer, task_of(name))


# Refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "text/plain", None])
async def test_a_generator_refuses_an_image_with_a_sentence(
    broker: RunningBroker, content_type: str | None
):
    reply = await ask(broker, "generation", image=images.png(), content_type=content_type)
    assert (reply.status, reply.code) == (415, "media_type_unsupported")
    assert "this model takes a seed" in reply.json["detail"]
    assert '{"seed": 7}' in reply.json["detail"]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "generation"])
async def test_a_model_of_images_refuses_a_seed_with_a_sentence(
    broker: RunningBroker, name: TaskName
):
    reply = await ask(broker, name, image=encode_seed(7), content_type="application/json")
    assert (reply.status, reply.code) == (415, "media_type_unsupported")
    assert "send the image itself" in reply.json["detail"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "wire"),
        (b"7", "wire"),
        (b"{}", "wire"),
        (b'{"seed": -1}', "wire"),
        (b'{"seed": 1e300}', "wire"),
        (b'{"seed": 7, "steps": 4}', "wire"),
        (b'{"seed": 9007199254740992}', "wire"),
        (b'{"seed": 7}' + b" " * 300, "limit_exceeded"),
    ],
)
async def test_a_seed_that_makes_no_sense_is_refused(broker: RunningBroker, body: bytes, code: str):
    reply = await ask(broker, "generation", image=body)
    assert (reply.status, reply.code) == (400, code)


async def test_an_endless_seed_is_cut_off_while_it_comes(broker: RunningBroker):
    chunk = b"64\r\n" + b" " * 100 + b"\r\n"
    head = (
        f"POST /v1/models/{MODEL['generation']}:predict HTTP/1.1\r\nHost: x\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    received = await raw_exchange(broker.url, head + chunk * 5 + b"0\r\n\r\n", answers=1)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"limit_exceeded" in received


@pytest.mark.parametrize(
    ("name", "query", "says"),
    [
        ("segmentation", "?top_k=2", "only palette is known"),
        ("segmentation", "?palette=1", "true or false"),
        ("segmentation", "?palette=true&palette=false", "true or false"),
        ("detection", "?palette=true", "only top_k is known"),
        ("detection", "?top_k=0", "at least 1"),
        ("image_to_image", "?top_k=2", "takes none"),
        ("generation", "?seed=7", "takes none"),
    ],
)
async def test_a_parameter_of_another_task_is_refused(
    broker: RunningBroker, name: TaskName, query: str, says: str
):
    reply = await ask(broker, name, query=query)
    assert (reply.status, reply.code) == (400, "wire")
    assert says in reply.json["detail"]


@pytest.mark.parametrize(
    ("name", "accept"),
    [
        ("classification", "image/png"),
        ("detection", "image/png"),
        ("segmentation", "image/jpeg"),
        ("generation", "image/webp"),
        ("generation", "image/png;q=9"),
    ],
)
async def test_a_form_that_the_task_does_not_have_is_refused(
    broker: RunningBroker, name: TaskName, accept: str
):
    reply = await ask(broker, name, accept)
    assert (reply.status, reply.code) == (400, "wire")
    assert "Accept" in reply.json["detail"]


# Answered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
async def test_json_answers_hold_exactly_the_tasks_field_and_no_other(
    broker: RunningBroker, name: TaskName
):
    reply = await ask(broker, name)
    fields = {"classification": "predictions", "detection": "boxes", "segmentation": "mask"}
    said, _ = answer_in(reply, name)
    assert list(reply.json) == ["model", fields.get(name, "image")]
    assert reply.headers["Content-Type"].startswith("application/json")
    assert said.model.name == MODEL[name]
    assert (said.model.labels_sha256 is None) == (name not in fields)
    assert "Server-Timing" in reply.headers


async def test_boxes_lie_in_the_upright_photo_whatever_way_it_is_stored(broker: RunningBroker):
    straight = (await ask(broker, "detection", image=images.png(3))).json["boxes"]
    turned = (await ask(broker, "detection", image=images.exif_rotated_png(3))).json["boxes"]
    assert straight == turned
    assert straight
    assert all(box["x_max"] <= 64 and box["y_max"] <= 48 for box in straight)
    assert all(LABELS[box["index"]] == box["label"] for box in straight)
    one = (await ask(broker, "detection", image=images.png(3), query="?top_k=1")).json["boxes"]
    assert one == straight[:1]


async def test_a_mask_as_a_file_is_that_of_the_json_with_the_model_in_its_headers(
    broker: RunningBroker,
):
    said, in_json = answer_in(await ask(broker, "segmentation"), "segmentation")
    reply = await ask(broker, "segmentation", "image/png")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(reply.body)) as file:
        assert file.mode == "L"
        np.testing.assert_array_equal(np.asarray(file), in_json.class_map)
    headers = {name.lower(): value for name, value in reply.headers.items()}
    assert parse_picture_headers(headers) == (said.model, in_json.region)
    assert "Server-Timing" in reply.headers
    assert "X-Queue-Delay-Ms" in reply.headers


async def test_a_mask_with_a_palette_is_for_people_and_still_exact(broker: RunningBroker):
    plain = await ask(broker, "segmentation", "image/png")
    colored = await ask(broker, "segmentation", "image/png", query="?palette=true")
    with Image.open(io.BytesIO(plain.body)) as first, Image.open(io.BytesIO(colored.body)) as other:
        np.testing.assert_array_equal(np.asarray(first), np.asarray(other))
        shown = np.asarray(other.convert("RGB"))
        np.testing.assert_array_equal(shown, class_colors()[np.asarray(first)])


@pytest.mark.parametrize("name", ["image_to_image", "generation", "reconstruction"])
async def test_an_image_comes_as_png_as_jpeg_and_in_json(broker: RunningBroker, name: TaskName):
    _, in_json = answer_in(await ask(broker, name), name)
    assert in_json.image is not None
    png, jpeg = (
        await ask(broker, name, "image/png"),
        await ask(broker, name, "image/jpeg, */*;q=0.1"),
    )
    assert png.headers["Content-Type"] == "image/png"
    assert jpeg.headers["Content-Type"] == "image/jpeg"
    with Image.open(io.BytesIO(png.body)) as exact, Image.open(io.BytesIO(jpeg.body)) as near:
        np.testing.assert_array_equal(np.asarray(exact), in_json.image)
        assert near.format == "JPEG"
        assert near.size == exact.size
    assert ("X-Region" in png.headers) == (name != "generation")


async def test_one_seed_is_one_image_and_another_one_another(broker: RunningBroker):
    first = await ask(broker, "generation", "image/png")
    again = await ask(broker, "generation", "image/png")
    other = await ask(broker, "generation", "image/png", image=encode_seed(8))
    assert first.body == again.body != other.body


async def test_the_list_of_models_says_what_each_one_does(broker: RunningBroker):
    listed = (await request("GET", f"{broker.url}/v1/models")).json["models"]
    assert {model["name"]: model["task"] for model in listed} == {
        MODEL[name]: name for name in TASKS
    }
    classes = {model["task"]: model["classes"] for model in listed}
    assert classes["segmentation"] == len(LABELS)
    assert classes["generation"] is None


async def test_a_page_may_read_the_headers_of_a_picture(broker: RunningBroker):
    reply = await ask(
        broker, "segmentation", headers={"Accept": "image/png", "Origin": "https://a.example"}
    )
    exposed = reply.headers["Access-Control-Expose-Headers"]
    for header in (
        "X-Model-Name",
        "X-Model-Version",
        "X-Model-Sha256",
        "X-Labels-Sha256",
        "X-Region",
    ):
        assert header in exposed
        assert header in reply.headers


async def test_every_model_was_warmed_up_and_counts_as_any_other(broker: RunningBroker):
    metrics = (await request("GET", f"{broker.url}/metrics")).body.decode()
    for name in TASKS:
        await ask(broker, name)
        assert f'nearfar_queued{{model="{MODEL[name]}"}} 0.0' in metrics
    after = (await request("GET", f"{broker.url}/metrics")).body.decode()
    for name in TASKS:
        assert f'nearfar_batch_images_count{{model="{MODEL[name]}"}}' in after
    delays = [
        (await ask(broker, name, deadline_ms=600_000)).headers["X-Queue-Delay-Ms"] for name in TASKS
    ]
    assert all(int(delay) < 1000 for delay in delays)
    assert json.loads((await ask(broker, "generation", deadline_ms=0)).body)["code"] == "wire"
