"""Every way a request can be wrong: its status, its code, and never a 500."""

from __future__ import annotations

import gzip
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.wire import decode_problem
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request
from tests.support.servables import shared_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable()) as running:
        yield running


def corrupt_jpeg() -> bytes:
    return b"\xff\xd8\xff" + b"\x00\x37" * 500


def corrupt_png() -> bytes:
    data = bytearray(images.png())
    data[60:400] = b"\xaa" * 340
    return bytes(data)


BAD_IMAGES = [
    ("corrupt JPEG", corrupt_jpeg(), "image/jpeg", 422, "image_unreadable"),
    ("corrupt PNG", corrupt_png(), "image/png", 422, "image_unreadable"),
    ("truncated JPEG", images.jpeg()[:-400], "image/jpeg", 422, "image_unreadable"),
    ("truncated PNG", images.png()[:-900], "image/png", 422, "image_unreadable"),
    ("cut after the magic", images.png()[:8], "image/png", 422, "image_unreadable"),
    ("bomb, 30000 x 30000", images.bomb_png(), "image/png", 413, "image_too_large"),
    ("strip, 32768 x 1", images.strip_png(), "image/png", 413, "image_too_large"),
    ("no image", b"GET / HTTP/1.1\r\n" * 20, "image/png", 422, "image_unreadable"),
    ("GIF", images.gif(), "image/png", 422, "image_unreadable"),
    ("animated PNG", images.animated_png(), "image/png", 422, "image_animated"),
    ("animated WebP", images.animated_webp(), "image/webp", 422, "image_animated"),
    ("CMYK", images.cmyk_jpeg(), "image/jpeg", 422, "image_mode_unsupported"),
    ("16-bit gray", images.sixteen_bit_png(), "image/png", 422, "image_mode_unsupported"),
    ("16-bit RGB", images.sixteen_bit_rgb_png(), "image/png", 422, "image_mode_unsupported"),
    ("translucent", images.translucent_png(), "image/png", 422, "image_mode_unsupported"),
    ("PNG called JPEG", images.png(), "image/jpeg", 415, "media_type_unsupported"),
    ("empty", b"", "image/png", 422, "image_unreadable"),
    (
        "over the limit",
        b"\x89PNG\r\n\x1a\n" + b"\0" * limits.MAX_IMAGE_BYTES,
        "image/png",
        413,
        "image_too_large",
    ),
]


@pytest.mark.parametrize(
    ("image", "content_type", "status", "code"),
    [case[1:] for case in BAD_IMAGES],
    ids=[case[0] for case in BAD_IMAGES],
)
async def test_a_bad_image_has_its_own_answer(
    broker: RunningBroker, image: bytes, content_type: str, status: int, code: str
):
    reply = await predict(broker.url, image, content_type=content_type)
    problem = decode_problem(reply.body)
    assert problem is not None
    assert (reply.status, problem.status, problem.code) == (status, status, code)
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert problem.retryable is False
    assert problem.request_id == reply.headers["X-Request-Id"]
    assert len(problem.detail) > 20
    assert "Traceback" not in problem.detail


async def test_a_png_cut_anywhere_is_unreadable(broker: RunningBroker):
    whole = images.png(0, 40, 30)
    for end in range(1, len(whole) - 16, 97):
        reply = await predict(broker.url, whole[:end])
        assert (reply.status, reply.code) == (422, "image_unreadable"), end


async def test_a_bomb_is_refused_before_it_is_decoded(broker: RunningBroker):
    bomb = images.bomb_png()
    assert len(bomb) < 2000
    started = time.perf_counter()
    assert (await predict(broker.url, bomb)).status == 413
    assert time.perf_counter() - started < 1.0  # decoding 900 million pixels takes many


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "1e3", "0x10"])
async def test_a_senseless_deadline_is_the_callers_mistake(broker: RunningBroker, value: str):
    reply = await predict(broker.url, images.png(), deadline_ms=value)
    assert (reply.status, reply.code) == (400, "wire")
    assert "X-Deadline-Ms" in reply.json["detail"]


async def test_a_deadline_beyond_reason_is_refused(broker: RunningBroker):
    reply = await predict(broker.url, images.png(), deadline_ms=600_001)
    assert (reply.status, reply.code) == (400, "limit_exceeded")


async def test_a_deadline_that_cannot_be_met_is_refused_with_the_time_it_takes(
    broker: RunningBroker,
):
    await predict(broker.url, images.png())  # T(b) is fresh: no probe is due
    reply = await predict(broker.url, images.png(), deadline_ms=1)
    assert (reply.status, reply.code) == (504, "deadline_exceeded")
    assert reply.json["retryable"] is True
    assert "X-Queue-Delay-Ms" in reply.headers


@pytest.mark.parametrize("model", ["huge", "Tiny", "tiny%00", "%2e%2e", "a" * 4000])
async def test_an_unknown_model_is_not_found(broker: RunningBroker, model: str):
    reply = await predict(broker.url, images.png(), model=model)
    assert reply.status == 404
    assert reply.code in ("model_not_found", "request_rejected")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "image/gif", "image/*", "text/plain", "multipart/form-data; boundary=x"],
)
async def test_another_media_type_is_unsupported(broker: RunningBroker, content_type: str):
    reply = await predict(broker.url, images.png(), content_type=content_type)
    assert (reply.status, reply.code) == (415, "media_type_unsupported")
    assert "image/jpeg" in reply.json["detail"]


async def test_parameters_and_case_of_a_media_type_do_not_matter(broker: RunningBroker):
    reply = await predict(broker.url, images.png(), content_type="Image/PNG; q=1")
    assert reply.status == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, gzip", "zstd"])
async def test_a_coded_body_is_unsupported(broker: RunningBroker, coding: str):
    body = gzip.compress(images.png())
    reply = await predict(broker.url, body, headers={"Content-Encoding": coding})
    assert (reply.status, reply.code) == (415, "media_type_unsupported")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?top_k=0", "wire"),
        ("?top_k=-1", "wire"),
        ("?top_k=x", "wire"),
        ("?top_k=", "wire"),
        ("?top_k=1.0", "wire"),
        ("?top_k=%D9%A3", "wire"),
        ("?top_k=1&top_k=2", "wire"),
        ("?top_k=1001", "limit_exceeded"),
        ("?top_k=" + "9" * 5000, "limit_exceeded"),
        ("?topk=1", "wire"),
        ("?top_k=1&debug=1", "wire"),
    ],
)
async def test_a_senseless_query_is_refused(broker: RunningBroker, query: str, code: str):
    reply = await predict(broker.url, images.png(), query=query)
    assert (reply.status, reply.code) == (400, code)


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "ä", "a;b", "<script>"])
async def test_a_senseless_request_id_is_refused_under_a_new_one(
    broker: RunningBroker, request_id: str
):
    reply = await predict(broker.url, images.png(), headers={"X-Request-Id": request_id})
    assert (reply.status, reply.code) == (400, "wire")
    assert reply.headers["X-Request-Id"] != request_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/tiny:predict", 405),
        ("PUT", "/v1/models/tiny:predict", 405),
        ("POST", "/v1/models/tiny:train", 404),
        ("DELETE", "/v1/models/tiny", 405),
        ("OPTIONS", "/v1/models", 405),
    ],
)
async def test_other_routes_and_methods_are_problems_too(
    broker: RunningBroker, method: str, path: str, status: int
):
    reply = await request(method, broker.url + path)
    assert reply.status == status
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.code == "request_rejected"
    assert ("Allow" in reply.headers) is (status == 405)


async def test_after_all_of_this_the_broker_still_answers(broker: RunningBroker):
    assert (await predict(broker.url, images.png())).status == 200
    text = (await request("GET", f"{broker.url}/metrics")).body.decode()
    assert 'status="500"' not in text
    assert 'nearfar_queued{model="tiny"} 0.0' in text
