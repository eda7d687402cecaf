"""The public client of the protocol, against a broker on a real socket."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from broker.accounts.keys import KeyFile
from broker.server import RunningBroker
from tests.support import broker_images as images
from tests.support import tasks
from tests.support.broker import broker_here
from tests.support.oip import DATATYPES, DTYPES, EVERY_DTYPE, every_dtype_servable
from tests.support.servables import LABELS, SIZE, direct_scores, shared_servable, tiny_net
from tests.support.tasks import task_servable

pytestmark = pytest.mark.slow


class Threaded:
    """A broker in an event loop of its own: the client blocks its thread."""

    def __init__(self, models: Path, **settings: Any) -> None:
        self._models, self._settings = models, settings
        self._stop = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.running: RunningBroker

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with broker_here(self._models, **self._settings) as self.running:
            self._up.set()
            await self._stop.wait()

    def __enter__(self) -> Threaded:
        self._thread.start()
        assert self._up.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def client(self, **options: Any) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.running.url.removeprefix("http://"), **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    shutil.copytree(every_dtype_servable(), folder / EVERY_DTYPE)
    for name in tasks.TASKS:
        shutil.copytree(task_servable(name), folder / name)
    shutil.copytree(task_servable("image_to_image", mode="uint8"), folder / "pixels")
    tasks.rewrite_servable(folder / "pixels", name="pixels")
    return folder


@pytest.fixture(scope="module")
def broker(models: Path) -> Iterator[Threaded]:
    with Threaded(models) as threaded:
        yield threaded


@pytest.fixture(scope="module")
def client(broker: Threaded) -> Iterator[triton.InferenceServerClient]:
    with broker.client(concurrency=8) as made:
        yield made


def tensor(name: str, values: np.ndarray, datatype: str, *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def encoded(*pictures: bytes) -> Any:
    return tensor("encoded_image", np.array([[one] for one in pictures], dtype=object), "BYTES")


def wanted(*names: str, binary: bool = True, **options: Any) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary, **options) for name in names]


def random_images(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, 3, SIZE, SIZE)).astype(np.float32)


def torch_scores(array: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return tiny_net()(torch.from_numpy(array)).numpy()


def test_health_and_metadata(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.0.0")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("none")
    server = client.get_server_metadata()
    assert server["name"] == "nearfar"
    assert {"binary_tensor_data", "classification", "schedule_policy"} <= set(server["extensions"])
    metadata = client.get_model_metadata("tiny", "1.0.0")
    assert metadata["versions"] == ["1.0.0"]
    assert [(one["name"], one["datatype"], one["shape"]) for one in metadata["inputs"]] == [
        ("images", "FP32", [-1, 3, SIZE, SIZE]),
        ("encoded_image", "BYTES", [-1, 1]),
    ]
    assert [one["name"] for one in metadata["outputs"]] == [
        "scores", "answer_labels", "answer_scores", "answer_indices",
    ]  # fmt: skip


def test_the_configuration_is_what_metadata_says(client: triton.InferenceServerClient):
    config = client.get_model_config("tiny")
    assert config["max_batch_size"] == 64
    assert config["input"] == [
        {"name": "images", "data_type": "TYPE_FP32", "dims": [3, SIZE, SIZE],
         "format": "FORMAT_NCHW", "optional": True},
        {"name": "encoded_image", "data_type": "TYPE_STRING", "dims": [1],
         "format": "FORMAT_NONE", "optional": True},
    ]  # fmt: skip
    policy = config["dynamic_batching"]["default_queue_policy"]
    assert (policy["timeout_action"], policy["allow_timeout_override"]) == ("REJECT", True)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_a_batch_of_tensors_is_answered_as_torch_answers_it(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
):
    array = random_images()
    result = client.infer(
        "tiny",
        [tensor("images", array, "FP32", binary=binary_in)],
        outputs=wanted("scores", "answer_labels", binary=binary_out),
        request_id="mine",
    )
    scores = result.as_numpy("scores")
    assert scores.shape == (3, len(LABELS))
    np.testing.assert_allclose(scores, torch_scores(array), rtol=1e-4, atol=1e-5)
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "mine", "tiny", "1.0.0",
    )  # fmt: skip
    assert [one["name"] for one in response["outputs"]] == ["scores", "answer_labels"]
    best = [
        text.decode() if binary_out else text for text in result.as_numpy("answer_labels")[:, 0]
    ]
    assert best == [LABELS[row.argmax()] for row in scores]


def test_without_outputs_all_of_them_come(client: triton.InferenceServerClient):
    result = client.infer("tiny", [tensor("images", random_images(1), "FP32")])
    probabilities = result.as_numpy("answer_scores")[0]
    indices = result.as_numpy("answer_indices")[0]
    logits = result.as_numpy("scores")[0].astype(np.float64)
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert indices.tolist() == np.argsort(-logits)[:3].tolist()
    np.testing.assert_allclose(probabilities, softmax[indices], rtol=1e-5)


def test_encoded_images_are_pre_processed_by_the_broker(client: triton.InferenceServerClient):
    pictures = [images.png(1), images.jpeg(2), images.png(3)]
    result = client.infer("tiny", [encoded(*pictures)])
    scores = result.as_numpy("answer_scores")
    for row, picture in enumerate(pictures):
        expected = direct_scores(tiny_net(), picture)
        assert result.as_numpy("answer_indices")[row, 0] == expected.argmax()
        np.testing.assert_allclose(scores[row], np.sort(expected)[::-1][:3], rtol=1e-4)


def test_half_precision_inputs_are_the_float32_numbers_that_they_are(
    client: triton.InferenceServerClient,
):
    array = random_images(2)
    half = array.astype(np.float16)
    result = client.infer("tiny", [tensor("images", half, "FP16")])
    expected = torch_scores(half.astype(np.float32))
    np.testing.assert_allclose(result.as_numpy("scores"), expected, rtol=1e-4, atol=1e-5)
    brain = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    result = client.infer("tiny", [tensor("images", array, "BF16")])
    np.testing.assert_allclose(result.as_numpy("scores"), torch_scores(brain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_every_datatype_keep_their_values(
    client: triton.InferenceServerClient, dtype: str
):
    array = np.full((2, 3, tasks.HEIGHT, tasks.WIDTH), 1.0, np.float32)
    array[1] = 7.0
    binary = client.infer(EVERY_DTYPE, [tensor("image", array, "FP32")], outputs=wanted(dtype))
    found = binary.as_numpy(dtype)
    assert binary.get_output(dtype)["datatype"] == DATATYPES[dtype]
    assert found.dtype == np.dtype(dtype)
    expected = np.array([[0, 1, 2, 3], [0, 7, 14, 21]]).astype(dtype)
    assert found.tolist() == expected.tolist()
    json = client.infer(
        EVERY_DTYPE, [tensor("image", array, "FP32")], outputs=wanted(dtype, binary=False)
    )
    assert json.get_output(dtype)["data"] == expected.ravel().tolist()


def test_pixels_go_in_as_uint8(client: triton.InferenceServerClient):
    pixels = np.random.default_rng(2).integers(
        0, 256, (2, 3, tasks.HEIGHT, tasks.WIDTH), dtype=np.uint8
    )
    for binary in (True, False):
        result = client.infer("pixels", [tensor("image", pixels, "UINT8", binary=binary)])
        large = result.as_numpy("image")
        assert large.shape == (2, 3, 2 * tasks.HEIGHT, 2 * tasks.WIDTH)
        expected = 1.0 - pixels.astype(np.float32) / 255.0
        np.testing.assert_allclose(large[:, :, ::2, ::2], expected, atol=1e-5)


def test_answers_of_every_task_come_as_tensors(client: triton.InferenceServerClient):
    from edge_runtime.contract.imaging import sniff_media_type

    found = client.infer("large-detection", [encoded(images.png(3), images.png(4))])
    counts = found.as_numpy("answer_counts")[:, 0]
    boxes = found.as_numpy("answer_boxes")
    assert boxes.shape == (2, counts.max(), 4)
    assert counts.max() > 0
    for row, count in enumerate(counts):
        assert (boxes[row, :count, 2] > boxes[row, :count, 0]).all()
        assert (found.as_numpy("answer_indices")[row, count:] == -1).all()
        assert set(found.as_numpy("answer_labels")[row, count:]) <= {b""}
    mask = client.infer("large-segmentation", [encoded(images.png(3))])
    assert sniff_media_type(mask.as_numpy("answer_mask")[0, 0]) == "image/png"
    scores = mask.as_numpy("scores")
    assert scores.shape == (1, len(tasks.LABELS), tasks.HEIGHT, tasks.WIDTH)
    seeds = tensor("seed", np.array([[7], [8]], np.int64), "INT64")
    made = client.infer("large-generation", [seeds])
    assert made.as_numpy("image").shape == (2, 3, 16, 20)
    assert sniff_media_type(made.as_numpy("answer_image")[1, 0]) == "image/png"


def test_a_latent_gives_what_its_seed_gives(client: triton.InferenceServerClient):
    from edge_runtime.contract.tasks.generation import latent_from_seed

    latent = latent_from_seed(7, tasks.LATENT).reshape(1, tasks.LATENT, 1, 1)
    by_latent = client.infer("large-generation", [tensor("latent", latent, "FP32")])
    seed = tensor("seed", np.array([[7]], np.int64), "INT64", binary=False)
    by_seed = client.infer("large-generation", [seed])
    np.testing.assert_array_equal(by_latent.as_numpy("image"), by_seed.as_numpy("image"))


def test_boxes_of_a_tensor_are_in_pixels_of_the_tensor(client: triton.InferenceServerClient):
    array = np.random.default_rng(5).normal(size=(1, 3, tasks.HEIGHT, tasks.WIDTH))
    found = client.infer("large-detection", [tensor("image", array.astype(np.float32), "FP32")])
    boxes = found.as_numpy("answer_boxes")[0]
    assert found.as_numpy("answer_counts")[0, 0] == len(boxes) > 0
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= tasks.WIDTH
    assert boxes[:, 3].max() <= tasks.HEIGHT


def test_classes_instead_of_scores(client: triton.InferenceServerClient):
    array = random_images(2)
    result = client.infer(
        "tiny", [tensor("images", array, "FP32")], outputs=wanted("scores", class_count=2)
    )
    found = result.as_numpy("scores")
    assert found.shape == (2, 2)
    for row, logits in enumerate(torch_scores(array)):
        for rank, index in enumerate(np.argsort(-logits)[:2]):
            value, place, label = found[row, rank].decode().split(":")
            assert (int(place), label) == (index, LABELS[index])
            assert abs(float(value) - logits[index]) < 1e-4


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_both_ways(client: triton.InferenceServerClient, coding: str):
    array = random_images(2)
    result = client.infer(
        "tiny",
        [tensor("images", array, "FP32")],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    np.testing.assert_allclose(result.as_numpy("scores"), torch_scores(array), rtol=1e-4, atol=1e-5)
    large = client.infer(
        "large-image-to-image", [encoded(images.png())], response_compression_algorithm=coding
    )
    assert large.as_numpy("image").shape == (1, 3, 2 * tasks.HEIGHT, 2 * tasks.WIDTH)


REFUSED: list[tuple[str, str, Any, str, str]] = [
    ("an unknown model", "none", lambda: tensor("images", random_images(1), "FP32"), "404",
     "no model of this name"),
    ("an unknown input", "tiny", lambda: tensor("pixels", random_images(1), "FP32"), "400",
     "unexpected inference input 'pixels' for model 'tiny'"),
    ("another datatype", "tiny", lambda: tensor("images", random_images(1).astype(np.float64),
     "FP64"), "400", "data-type is 'FP64', but the model expects 'FP32'"),
    ("another shape", "tiny", lambda: tensor("images", random_images(1)[0], "FP32"), "400",
     f"expected [-1, 3, {SIZE}, {SIZE}], got [3, {SIZE}, {SIZE}]"),
    ("an empty batch", "tiny", lambda: tensor("images", random_images(0), "FP32"), "400",
     "batch of 0"),
    ("not a number", "tiny", lambda: tensor("images", random_images(1) * np.nan, "FP32"), "400",
     "NaN or infinity"),
    ("no image", "tiny", lambda: encoded(b"junk"), "422", "no JPEG, PNG or WebP"),
    ("a broken image", "tiny", lambda: encoded(images.png(), images.png()[:80]), "422", "row 1"),
    ("a seed out of range", "large-generation",
     lambda: tensor("seed", np.array([[-1]], np.int64), "INT64"), "400", "a seed must be 0 to"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "sent", "status", "text"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_makes_no_sense_is_refused_in_words(
    client: triton.InferenceServerClient, model: str, sent: Any, status: str, text: str
):
    with pytest.raises(InferenceServerException) as refused:
        client.infer(model, [sent()])
    assert text in refused.value.message()
    assert refused.value.status() == status


def test_other_refusals(client: triton.InferenceServerClient):
    good = tensor("images", random_images(1), "FP32")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"inputs": [good, encoded(images.png())]}, "send either 'images' or 'encoded_image'"),
        ({"inputs": [good], "outputs": wanted("none")}, "unexpected inference output 'none'"),
        ({"inputs": [good], "outputs": wanted("scores", "scores")}, "twice"),
        ({"inputs": [good], "outputs": wanted("answer_labels", class_count=2)}, "own outputs"),
        ({"inputs": [good], "sequence_id": 4}, "keep no state"),
        (
            {"inputs": [good], "model_version": "2"},
            "no version or alias of this name; it is served in version '1.0.0'",
        ),
    ]
    for arguments, text in refused:
        with pytest.raises(InferenceServerException, match=text):
            client.infer("tiny", **arguments)
    half = tensor("images", random_images(1).astype(np.float16), "FP16", binary=False)
    with pytest.raises(InferenceServerException, match="FP16 cannot be sent as JSON"):
        client.infer("tiny", [half])
    shared = triton.InferInput("images", [1, 3, SIZE, SIZE], "FP32")
    shared.set_shared_memory("region", 12)
    with pytest.raises(InferenceServerException, match="shared memory is not offered"):
        client.infer("tiny", [shared])
    unsupported: list[Any] = [
        client.get_trace_settings, client.get_log_settings,
        client.get_system_shared_memory_status, client.get_cuda_shared_memory_status,
        lambda: client.get_trace_settings("tiny"),
        lambda: client.update_log_settings({"log_info": True}),
        lambda: client.update_trace_settings("tiny", {"trace_level": ["OFF"]}),
    ]  # fmt: skip
    for call in unsupported:
        with pytest.raises(InferenceServerException, match="does not support") as failed:
            call()
        assert failed.value.status() == "501"


def test_a_timeout_is_a_deadline_and_priority_is_taken(client: triton.InferenceServerClient):
    good = tensor("images", random_images(1), "FP32")
    assert client.infer("tiny", [good], priority=1, timeout=20_000_000) is not None
    assert client.infer("tiny", [good], timeout=0) is not None
    with pytest.raises(InferenceServerException) as late:
        client.infer("tiny", [good], timeout=1)
    assert late.value.status() == "504"
    with pytest.raises(InferenceServerException, match="timeout must be a whole number"):
        client.infer("tiny", [good], timeout=-1)


def test_statistics_count_requests_inferences_and_executions(broker: Threaded, models: Path):
    with Threaded(models / "tiny") as fresh, fresh.client() as client:
        for rows in (1, 1, 3):
            client.infer("tiny", [tensor("images", random_images(rows), "FP32")])
        with pytest.raises(InferenceServerException):
            client.infer("tiny", [encoded(b"junk")])
        (stats,) = client.get_inference_statistics("tiny", "1.0.0")["model_stats"]
        assert stats["inference_count"] == 5
        assert stats["inference_stats"]["success"]["count"] == 3
        assert stats["inference_stats"]["fail"]["count"] == 1
        sizes = {one["batch_size"]: one["compute_infer"]["count"] for one in stats["batch_stats"]}
        assert sum(size * count for size, count in sizes.items()) == 5
        assert sum(sizes.values()) == stats["execution_count"]
        assert stats["inference_stats"]["compute_infer"]["ns"] > 0
        assert stats["inference_stats"]["success"]["ns"] >= stats["inference_stats"]["queue"]["ns"]
        assert client.get_inference_statistics()["model_stats"] == [stats]
        metrics = client._get("metrics", {}, {}).read().decode()
        for name, value in (
            ("nv_inference_request_success", 3),
            ("nv_inference_count", 5),
            ("nv_inference_exec_count", stats["execution_count"]),
        ):
            assert f'{name}{{model="tiny",version="1.0.0"}} {value}\n' in metrics
        failed = 'nv_inference_request_failure{model="tiny",version="1.0.0",reason="OTHER"} 1\n'
        assert failed in metrics


def test_async_inference(client: triton.InferenceServerClient):
    array = random_images(8)
    pending = [
        client.async_infer("tiny", [tensor("images", array[row : row + 1], "FP32")])
        for row in range(8)
    ]
    found = np.concatenate([one.get_result().as_numpy("scores") for one in pending])
    np.testing.assert_allclose(found, torch_scores(array), rtol=1e-4, atol=1e-5)


def test_the_asyncio_client_is_answered_too(broker: Threaded):
    array = random_images(2)

    async def ask() -> Any:
        url = broker.running.url.removeprefix("http://")
        async with triton_aio.InferenceServerClient(url) as client:
            assert await client.is_model_ready("tiny")
            inputs = [tensor("images", array, "FP32")]
            plain = await client.infer("tiny", inputs)
            packed = await client.infer(
                "tiny", inputs,
                request_compression_algorithm="gzip", response_compression_algorithm="deflate",
            )  # fmt: skip
            return plain.as_numpy("scores"), packed.as_numpy("scores")

    for scores in asyncio.run(ask()):
        np.testing.assert_allclose(scores, torch_scores(array), rtol=1e-4, atol=1e-5)


@pytest.fixture
def guarded(models: Path, tmp_path: Path) -> Iterator[tuple[Threaded, dict[str, str], Any]]:
    """A broker that asks for keys; headers of a plain key and of an admin key."""
    keys = KeyFile(tmp_path / "keys.json")
    headers = [
        {"Authorization": f"Bearer {keys.add('acme', admin=admin)[1]}"} for admin in (False, True)
    ]
    with Threaded(models / "tiny", keys=str(keys.path)) as threaded:
        yield threaded, headers[0], headers[1]


def test_a_model_leaves_service_and_comes_back(
    guarded: tuple[Threaded, dict[str, str], dict[str, str]],
):
    threaded, plain, admin = guarded
    good = tensor("images", random_images(1), "FP32")
    ready = [{"name": "tiny", "version": "1.0.0", "state": "READY", "reason": ""}]
    with threaded.client() as client:
        assert client.is_server_live()
        for call in (
            client.get_server_metadata,
            client.get_model_repository_index,
            lambda: client.infer("tiny", [good]),
            lambda: client.unload_model("tiny"),
        ):
            with pytest.raises(InferenceServerException, match="API key is needed") as unknown:
                call()
            assert unknown.value.status() == "401"
        assert client.get_model_repository_index(headers=dict(plain)) == ready
        for control in (client.unload_model, client.load_model):
            with pytest.raises(InferenceServerException, match="no admin key") as refused:
                control("tiny", headers=dict(plain))
            assert refused.value.status() == "401"
        client.unload_model("tiny", headers=dict(admin))
        (entry,) = client.get_model_repository_index(headers=dict(plain))
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "unloaded")
        assert not client.is_model_ready("tiny", headers=dict(plain))
        with pytest.raises(InferenceServerException, match="out of service") as gone:
            client.infer("tiny", [good], headers=dict(plain))
        assert gone.value.status() == "404"
        with pytest.raises(InferenceServerException, match="no model of this name"):
            client.load_model("other", headers=dict(admin))
        with pytest.raises(InferenceServerException, match="is not taken"):
            client.load_model("tiny", headers=dict(admin), config="{}")
        client.load_model("tiny", headers=dict(admin))
        assert client.get_model_repository_index(headers=dict(plain)) == ready
        assert client.infer("tiny", [good], headers=dict(plain)) is not None


def test_what_was_admitted_before_an_unload_is_answered(
    guarded: tuple[Threaded, dict[str, str], dict[str, str]],
):
    threaded, plain, admin = guarded
    services = threaded.running.services
    hold = threading.Event()
    # The executor's one thread is busy with something else for a while.
    services.executor._thread.submit(hold.wait)  # type: ignore[attr-defined]
    array = random_images(6)

    def ask(row: int) -> np.ndarray:
        with threaded.client() as client:
            sent = [tensor("images", array[row : row + 1], "FP32")]
            return client.infer("tiny", sent, headers=dict(plain)).as_numpy("scores")

    with ThreadPoolExecutor(6) as pool:
        pending = [pool.submit(ask, row) for row in range(6)]
        while services.in_flight < 6:
            threading.Event().wait(0.005)
        with threaded.client() as client:
            client.unload_model("tiny", headers=dict(admin))
            with pytest.raises(InferenceServerException, match="out of service"):
                client.infer("tiny", [encoded(images.png())], headers=dict(plain))
        hold.set()
        found = np.concatenate([one.result(60) for one in pending])
    np.testing.assert_allclose(found, torch_scores(array), rtol=1e-4, atol=1e-5)
