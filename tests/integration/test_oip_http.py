"""The Open Inference Protocol over plain HTTP: bounds, codings, deadlines, one scheduler."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract import limits
from tests.support import broker_images as images
from tests.support.broker import Reply, broker_here, predict, raw_exchange, request, until
from tests.support.oip import (
    EVERY_DTYPE,
    binary,
    body_of,
    every_dtype_servable,
    input_of,
    read_answer,
)
from tests.support.servables import LABELS, SIZE, shared_servable, tiny_net
from tests.support.tasks import HEIGHT, WIDTH

pytestmark = pytest.mark.asyncio(loop_scope="module")

LENGTH = "Inference-Header-Content-Length"
SHAPE = [1, 3, SIZE, SIZE]
RAW_BYTES = 3 * SIZE * SIZE * 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    shutil.copytree(every_dtype_servable(), folder / EVERY_DTYPE)
    async with broker_here(folder) as running:
        yield running


async def infer(
    url: str,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    model: str = "tiny",
    **options: Any,
) -> Reply:
    address = f"{url}/v2/models/{model}/infer"
    return await request("POST", address, data=body, headers=headers or {}, **options)


def tensor_request(rows: int = 1, **more: Any) -> tuple[bytes, dict[str, str], np.ndarray]:
    array = np.random.default_rng(rows).normal(size=(rows, *SHAPE[1:])).astype("<f4")
    sent = input_of("images", "FP32", [rows, *SHAPE[1:]], size=array.nbytes)
    return (*body_of([sent], [array.tobytes()], **more), array)


def scores_of(reply: Reply) -> np.ndarray:
    assert reply.status == 200, reply.body
    message, tails = read_answer(reply.body, reply.headers.get(LENGTH))
    (output,) = [one for one in message["outputs"] if one["name"] == "scores"]
    if "scores" in tails:
        return np.frombuffer(tails["scores"], "<f4").reshape(output["shape"])
    return np.array(output["data"], "<f4").reshape(output["shape"])


def expected(array: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return tiny_net()(torch.from_numpy(array)).numpy()


def close(found: np.ndarray, array: np.ndarray) -> bool:
    return bool(np.allclose(found, expected(array), rtol=1e-4, atol=1e-5))


async def test_a_device_may_post_its_image_as_it_is(broker: RunningBroker):
    for image in (images.png(3), images.jpeg(3)):
        raw = await infer(broker.url, image, {LENGTH: "0", "Content-Type": "image/jpeg"})
        message, tails = read_answer(raw.body, raw.headers[LENGTH])
        assert raw.headers["Content-Type"] == "application/octet-stream"
        direct = (await predict(broker.url, image, content_type=None, headers={
            "Content-Type": "image/png" if image[:4] == b"\x89PNG" else "image/jpeg"
        })).json  # fmt: skip
        labels = [one["label"] for one in direct["predictions"]]
        size = struct.unpack_from("<I", tails["answer_labels"])[0]
        assert tails["answer_labels"][4 : 4 + size].decode() == labels[0]
        found = np.frombuffer(tails["answer_scores"], "<f4")
        assert np.allclose(found, [one["score"] for one in direct["predictions"]], rtol=1e-6)
        assert [one["shape"] for one in message["outputs"]][:2] == [[1, len(LABELS)], [1, 3]]


async def test_a_body_without_json_is_one_row(broker: RunningBroker):
    array = tensor_request()[2]
    assert close(scores_of(await infer(broker.url, array.tobytes(), {LENGTH: "0"})), array)
    for wrong in (array.tobytes()[:-1], array.tobytes() * 2, b"junk"):
        reply = await infer(broker.url, wrong, {LENGTH: "0"})
        assert reply.status == 400
        assert f"{RAW_BYTES} bytes" in reply.json["error"]


async def test_an_image_in_json_is_base64(broker: RunningBroker):
    text = base64.b64encode(images.png(1)).decode()
    sent = input_of("encoded_image", "BYTES", [2], data=[text, text])
    sent["parameters"] = {"content_type": "base64"}
    body, _ = body_of([sent], outputs=[{"name": "answer_labels"}])
    reply = await infer(broker.url, body)
    direct = (await predict(broker.url, images.png(1))).json
    labels = [one["label"] for one in direct["predictions"]]
    assert reply.json["outputs"][0]["data"] == labels * 2
    sent["data"] = ["no base64!", text]
    reply = await infer(broker.url, body_of([sent])[0])
    assert (reply.status, "base64" in reply.json["error"]) == (400, True)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_answers_are_compressed_for_who_asks(broker: RunningBroker, coding: str):
    plain = np.zeros((1, 3, HEIGHT, WIDTH), "<f4")
    body, headers = body_of(
        [input_of("image", "FP32", list(plain.shape), size=plain.nbytes)],
        [plain.tobytes()],
        outputs=[{"name": "image_out"}],
        parameters={"binary_data_output": True},
    )
    pack = gzip.compress if coding == "gzip" else zlib.compress
    headers |= {"Content-Encoding": coding, "Accept-Encoding": coding}
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        reply = await infer(broker.url, pack(body), headers, model=EVERY_DTYPE, session=session)
    assert reply.headers["Content-Encoding"] == coding
    assert "Accept-Encoding" in reply.headers["Vary"]
    assert len(reply.body) < plain.nbytes / 4
    unpack = gzip.decompress if coding == "gzip" else zlib.decompress
    _, tails = read_answer(unpack(reply.body), reply.headers[LENGTH])
    assert tails["image_out"] == plain.tobytes()


async def test_small_answers_and_who_does_not_ask_get_them_plain(broker: RunningBroker):
    body, headers, array = tensor_request(outputs=[{"name": "scores"}])
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        for accept in ("gzip", "identity", "gzip;q=0"):
            sent = headers | {"Accept-Encoding": accept}
            reply = await infer(broker.url, body, sent, session=session)
            assert "Content-Encoding" not in reply.headers
            assert close(scores_of(reply), array)


async def test_a_bomb_is_refused(broker: RunningBroker):
    bomb = gzip.compress(bytes(128 * 2**20))
    reply = await infer(broker.url, bomb, {"Content-Encoding": "gzip", LENGTH: "0"})
    assert reply.status == 413
    assert "once unpacked" in reply.json["error"]
    many = gzip.compress(b"x") * 100_000
    reply = await infer(broker.url, many, {"Content-Encoding": "gzip", LENGTH: "0"})
    assert reply.status == 400
    assert "follow the gzip" in reply.json["error"]
    reply = await infer(broker.url, b"{}", {"Content-Encoding": "br"})
    assert reply.status == 415


async def test_a_refusal_on_the_headers_costs_no_upload(broker: RunningBroker):
    cases = [
        (b"tiny", b"Content-Length: %d" % (limits.MAX_INFER_BYTES + 1), b"413"),
        (b"tiny", b"Content-Length: %d" % (limits.MAX_INFER_JSON_BYTES + 1), b"413"),
        (b"tiny", b"Content-Length: %d\r\n%s: 0" % (9 * 2**20, LENGTH.encode()), b"413"),
        (b"tiny", b"Content-Length: %d\r\n%s: 99" % (65 * 2**20, LENGTH.encode()), b"413"),
        (b"tiny", b"Content-Length: 100\r\n%s: 101" % LENGTH.encode(), b"400"),
        (b"none", b"Content-Length: 100", b"404"),
        (b"tiny", b"Content-Length: 100\r\nX-Deadline-Ms: 0", b"400"),
        (b"tiny", b"Content-Length: 100\r\n" + LENGTH.encode() + b": -1", b"400"),
        (b"tiny", b"Content-Length: 100\r\nContent-Encoding: br", b"415"),
        (b"tiny", b"Content-Length: 0", b"400"),
    ]
    for model, header, status in cases:
        head = b"POST /v2/models/" + model + b"/infer HTTP/1.1\r\nHost: x\r\n"
        head += b"Expect: 100-continue\r\n" + header + b"\r\n\r\n"
        answer = await raw_exchange(broker.url, head, answers=1)
        assert answer.split(b" ", 2)[1] == status, answer
        assert b'{"error":' in answer


async def test_the_body_is_asked_for_once_it_is_welcome(broker: RunningBroker):
    body, headers, array = tensor_request()
    async with aiohttp.ClientSession() as session:
        reply = await infer(broker.url, body, headers, session=session, expect100=True)
    assert close(scores_of(reply), array)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 5000):
            yield body[at : at + 5000]

    chunked = await infer(broker.url, pieces(), headers)  # type: ignore[arg-type]
    assert close(scores_of(chunked), array)


async def test_rows_and_images_of_predict_share_batches(broker: RunningBroker):
    body, headers, array = tensor_request(rows=5)
    before = broker.services.executor.stats().images
    replies = await asyncio.gather(
        infer(broker.url, body, headers),
        predict(broker.url, images.png(1)),
        infer(broker.url, images.png(1), {LENGTH: "0"}),
        predict(broker.url, b"junk"),
    )
    assert close(scores_of(replies[0]), array)
    assert [reply.status for reply in replies] == [200, 200, 200, 422]
    assert broker.services.executor.stats().images == before + 7
    assert broker.services.scheduler.queued(broker.services.repository.get("tiny").key) == 0


async def test_a_row_that_fails_takes_its_request_and_no_place(broker: RunningBroker):
    data = binary([images.png(1), images.png()[:80], images.png(2)], "BYTES")
    body, headers = body_of([input_of("encoded_image", "BYTES", [3, 1], size=len(data))], [data])
    reply = await infer(broker.url, body, headers)
    assert reply.status == 422
    assert reply.json["error"].startswith("row 1: ")
    key = broker.services.repository.get("tiny").key
    await until(lambda: broker.services.scheduler.queued(key) == 0)
    assert broker.services.scheduler.upload_bytes == 0


async def test_more_rows_than_a_batch_holds_are_answered_in_order(broker: RunningBroker):
    body, headers, array = tensor_request(rows=limits.MAX_INFER_ROWS)
    assert close(scores_of(await infer(broker.url, body, headers)), array)


async def test_a_request_that_the_queue_cannot_hold_is_refused_whole(tmp_path: Path):
    async with broker_here(shared_servable(), max_queue=4) as running:
        key = running.services.repository.get("tiny").key
        body, headers, _ = tensor_request(rows=5)
        reply = await infer(running.url, body, headers)
        assert reply.status == 503
        assert "4 requests wait already" in reply.json["error"]
        assert int(reply.headers["Retry-After"]) >= 1
        assert running.services.scheduler.queued(key) == 0
        assert running.services.scheduler.upload_bytes == 0
        body, headers, array = tensor_request(rows=4)
        assert close(scores_of(await infer(running.url, body, headers)), array)


async def test_deadlines_of_header_and_timeout(broker: RunningBroker):
    body, headers, array = tensor_request(parameters={"timeout": 30_000_000})
    for header in ({}, {"X-Deadline-Ms": "20000"}, {"X-Deadline-Ms": "600000"}):
        assert close(scores_of(await infer(broker.url, body, headers | header)), array)
    reply = await infer(broker.url, body, headers | {"X-Deadline-Ms": "1"})
    assert reply.status == 504
    late, headers, _ = tensor_request(rows=4, parameters={"timeout": 1})
    reply = await infer(broker.url, late, headers)
    assert reply.status == 504
    assert broker.services.scheduler.upload_bytes == 0


async def test_who_leaves_gives_all_its_places_back(broker: RunningBroker):
    hold = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        asyncio.run_coroutine_threadsafe(hold.wait(), loop).result()

    broker.services.executor._thread.submit(wait)  # type: ignore[attr-defined]
    body, headers, _ = tensor_request(rows=20)
    key = broker.services.repository.get("tiny").key
    asking = asyncio.create_task(infer(broker.url, body, headers))
    await until(lambda: broker.services.scheduler.queued(key) >= 11)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: broker.services.scheduler.queued(key) == 0)
    assert broker.services.scheduler.upload_bytes == 0
    hold.set()
    metrics = (await request("GET", f"{broker.url}/metrics")).body.decode()
    labels = '{model="tiny",version="1.0.0",reason="CANCELED"}'
    assert f"nv_inference_request_failure{labels} 1\n" in metrics
    body, headers, array = tensor_request()
    assert close(scores_of(await infer(broker.url, body, headers)), array)


async def test_all_dtypes_in_one_answer(broker: RunningBroker):
    array = np.full((1, 3, HEIGHT, WIDTH), 2.0, "<f4")
    body, headers = body_of(
        [input_of("image", "FP32", list(array.shape), size=array.nbytes)],
        [array.tobytes()],
        parameters={"binary_data_output": True},
    )
    reply = await infer(broker.url, body, headers, model=EVERY_DTYPE)
    message, tails = read_answer(reply.body, reply.headers[LENGTH])
    assert len(message["outputs"]) == 10
    assert tails["image_out"] == array.tobytes()
    for dtype in ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"):
        assert tails[dtype] == np.array([0, 2, 4, 6]).astype(dtype).tobytes()


async def test_no_mutation_of_a_request_is_a_fault_of_the_broker(broker: RunningBroker):
    chosen = random.Random(5)
    body, headers, _ = tensor_request(parameters={"timeout": 5_000_000}, id="x")
    json_bytes = int(headers[LENGTH])
    statuses = set()
    async with aiohttp.ClientSession() as session:
        for _ in range(150):
            harmed = bytearray(body)
            for _ in range(chosen.randrange(1, 4)):
                harmed[chosen.randrange(json_bytes)] = chosen.randrange(256)
            length = str(max(json_bytes + chosen.choice([0, 0, 0, -1, 1, 5]), 1))
            reply = await infer(broker.url, bytes(harmed), {LENGTH: length}, session=session)
            statuses.add(reply.status)
            if reply.status != 200:
                assert set(reply.json) == {"error"}
                assert reply.json["error"]
    assert 200 in statuses
    assert 400 in statuses
    assert statuses <= {200, 400, 404, 504}
    assert (await request("GET", f"{broker.url}/v2/health/ready")).status == 200


@pytest.mark.slow
async def test_a_worker_process_gives_tensors_of_many_batches(tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(every_dtype_servable(), folder / EVERY_DTYPE)
    shutil.copytree(shared_servable(), folder / "tiny")
    async with broker_here(folder, executor="worker", max_batch=4) as running:
        body, headers, array = tensor_request(rows=10)
        wide = np.random.default_rng(1).normal(size=(10, 3, HEIGHT, WIDTH)).astype("<f4")
        sent = input_of("image", "FP32", list(wide.shape), size=wide.nbytes)
        asked = [{"name": "image_out", "parameters": {"binary_data": True}}]
        wide_body, wide_headers = body_of([sent], [wide.tobytes()], outputs=asked)
        small, large = await asyncio.gather(
            infer(running.url, body, headers),
            infer(running.url, wide_body, wide_headers, model=EVERY_DTYPE),
        )
        assert close(scores_of(small), array)
        assert read_answer(large.body, large.headers[LENGTH])[1]["image_out"] == wide.tobytes()
        batches = (await request("GET", f"{running.url}/v2/models/tiny/stats")).json
        sizes = [one["batch_size"] for one in batches["model_stats"][0]["batch_stats"]]
        assert max(sizes) <= 4


async def test_models_out_of_service_are_out_of_every_route(broker: RunningBroker):
    repository = broker.services.repository
    repository.withdraw("tiny")
    try:
        for path in ("/v2/models/tiny", "/v2/models/tiny/ready", "/v1/models/tiny"):
            assert (await request("GET", broker.url + path)).status == 404
        assert (await predict(broker.url, images.png())).status == 404
        listed = (await request("GET", f"{broker.url}/v1/models")).json["models"]
        assert [one["name"] for one in listed] == [EVERY_DTYPE]
        everyone = (await request("POST", f"{broker.url}/v2/repository/index")).json
        assert [(one["name"], one["state"]) for one in everyone] == [
            (EVERY_DTYPE, "READY"), ("tiny", "UNAVAILABLE"),
        ]  # fmt: skip
        asked = json.dumps({"ready": True})
        ready = await request("POST", f"{broker.url}/v2/repository/index", data=asked)
        assert [one["name"] for one in ready.json] == [EVERY_DTYPE]
    finally:
        repository.restore("tiny")
    assert (await predict(broker.url, images.png())).status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_examples_of_the_documentation_work(broker: RunningBroker, tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(images.jpeg())
    text = (Path(__file__).parents[2] / "docs" / "oip.md").read_text()
    ((shell,), (python,)) = (
        re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("sh", "python")
    )
    address = broker.url.removeprefix("http://")
    python = python.replace("127.0.0.1:8080", address).replace("digits-large", "tiny")
    environment = os.environ | {
        "URL": broker.url, "MODEL": "tiny", "IMAGE": str(tmp_path / "photo.jpg"),
    }  # fmt: skip
    for command in (["bash", "-euc", shell], [sys.executable, "-c", python]):
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, cwd=tmp_path, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "answer.bin").read_bytes().startswith(b'{"model_name":"tiny"')
    direct = (await predict(broker.url, images.jpeg(), content_type="image/jpeg")).json
    assert direct["predictions"][0]["label"] in done.stdout
