"""``EdgeRuntime`` for every task: on the device, and offloaded to a scripted broker."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_runtime import (
    Action,
    Answer,
    Box,
    Bundle,
    ConfigError,
    EdgeRuntime,
    InferenceSource,
    LabelsMismatch,
    ModelNotFound,
    Prediction,
    Prices,
    Result,
    Situation,
    WireError,
)
from edge_runtime.confidence import confidence_of
from edge_runtime.contract import preprocess
from edge_runtime.contract.answer_codec import class_colors
from edge_runtime.contract.tasks import DetectionTask, TaskName
from edge_runtime.contract.wire import ModelRef, PredictAnswer
from edge_runtime.offload.discovery import ServedModel
from edge_runtime.policies import find_policy
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport
from tests.support.bundles import photo
from tests.support.tasks import (
    HEIGHT,
    IMAGE_TASKS,
    LABELS,
    TASKS,
    WIDTH,
    anchors,
    input_spec,
    preprocess_of,
    reference_outputs,
    reference_pixels,
    task_bundle,
    task_of,
)

PHOTO = photo(3)
RGB = np.asarray(Image.open(io.BytesIO(PHOTO)).convert("RGB"))
PHOTO_HEIGHT, PHOTO_WIDTH = RGB.shape[:2]
LOCAL, CLOUD = InferenceSource.ON_DEVICE, InferenceSource.IN_CLOUD
CHEAP = Prices(per_request=0.0, per_second=0.0)


def ask(edge: EdgeRuntime, name: TaskName, **options: object) -> Result:
    if name == "generation":
        return edge.generate(7, **options)  # type: ignore[arg-type]
    return edge.run(PHOTO, **options)  # type: ignore[arg-type]


def local(name: TaskName, **options: object) -> Result:
    with EdgeRuntime(task_bundle(name, **options), policy="ONLY_ON_DEVICE") as edge:  # type: ignore[arg-type]
        return ask(edge, name)


def network_input(name: TaskName) -> np.ndarray:
    """What the net sees, made here from the published steps."""
    if name == "generation":
        from edge_runtime.contract.tasks.generation import latent_from_seed

        return latent_from_seed(7, 6).reshape(input_spec(name).shape)
    record = preprocess_of(name)
    assert record is not None
    return np.ascontiguousarray(preprocess.apply(record, RGB).transpose(2, 0, 1))[None]


# Bad input ------------------------------------------------------------------------------


def test_a_bundle_that_generates_takes_no_image_and_others_no_seed() -> None:
    with EdgeRuntime(task_bundle("generation")) as edge:
        with pytest.raises(ConfigError, match=r"call generate\(seed\)"):
            edge.run(PHOTO)
        for seed in (-1, 2**53, 1.5, "7", True, None):
            with pytest.raises(ConfigError, match="a seed is a whole number"):
                edge.generate(seed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="deadline_ms"):
            edge.generate(1, deadline_ms=0)
    with pytest.raises(ConfigError, match="closed"):
        edge.generate(1)
    with EdgeRuntime(task_bundle("detection")) as edge, pytest.raises(ConfigError, match="run"):
        edge.generate(7)


def test_top_k_is_refused_where_answers_are_no_lists() -> None:
    with (
        EdgeRuntime(task_bundle("segmentation")) as edge,
        pytest.raises(ConfigError, match="not for segmentation"),
    ):
        edge.run(PHOTO, top_k=2)
    with pytest.raises(ValueError, match="classification answers no class map"):
        local("classification").class_map_for(3, 3)


# On the device ---------------------------------------------------------------------------


def test_the_boxes_are_those_of_torchvision() -> None:
    import torch
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import batched_nms

    result = local("detection")
    deltas, logits = (
        torch.from_numpy(o[0]) for o in reference_outputs("detection", network_input("detection"))
    )
    boxes = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(deltas, torch.from_numpy(anchors()))
    scores = torch.sigmoid(logits)
    rows, classes = torch.nonzero(scores >= 0.5, as_tuple=True)
    kept = batched_nms(boxes[rows], scores[rows, classes], classes, 0.5)
    assert 1 < len(kept) < len(rows)  # suppression had something to do
    scale = torch.tensor([PHOTO_WIDTH / WIDTH, PHOTO_HEIGHT / HEIGHT] * 2)
    edge = torch.tensor([PHOTO_WIDTH, PHOTO_HEIGHT] * 2)
    expected = torch.minimum((boxes[rows] * scale).clamp(min=0), edge)[kept].numpy()
    got = [(b.x_min, b.y_min, b.x_max, b.y_max) for b in result.boxes]
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert [b.index for b in result.boxes] == classes[kept].tolist()
    assert [b.label for b in result.boxes] == [LABELS[i] for i in classes[kept].tolist()]
    np.testing.assert_allclose(
        [b.score for b in result.boxes], scores[rows, classes][kept], atol=1e-6
    )
    assert (result.label, result.score) == (result.boxes[0].label, result.boxes[0].score)
    assert result.task == "detection"
    assert result.predictions == ()


def test_the_class_map_is_the_argmax_of_torch() -> None:
    result = local("segmentation")
    expected = reference_outputs("segmentation", network_input("segmentation"))[0][0].argmax(0)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(result.class_map, expected)
    assert (result.label, result.score, result.image) == (None, None, None)
    colors = result.colored_class_map()
    assert (colors[5, 7] == class_colors()[expected[5, 7]]).all()


@pytest.mark.parametrize(
    ("name", "scale", "offset"),
    [("image_to_image", 255.0, 0.0), ("generation", 127.5, 127.5), ("reconstruction", 255.0, 0.0)],
)
def test_the_image_is_that_of_torch(name: TaskName, scale: float, offset: float) -> None:
    result = local(name)
    expected = reference_pixels(reference_outputs(name, network_input(name))[0][0], scale, offset)
    assert result.image is not None
    assert expected.std() > 10
    assert np.abs(result.image.astype(int) - expected).max() <= 1  # the last bit of a float
    assert result.task == name


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_a_file_that_takes_pixels_answers_as_the_one_that_takes_floats(name: TaskName) -> None:
    floats, pixels = local(name), local(name, mode="uint8")
    if floats.class_map is not None:
        np.testing.assert_array_equal(pixels.class_map, floats.class_map)
    elif floats.image is not None:
        assert pixels.image is not None
        assert np.abs(pixels.image.astype(int) - floats.image).max() <= 1
    else:
        assert pixels.label == floats.label
        assert pixels.score == pytest.approx(floats.score, abs=1e-5)
        assert len(pixels.boxes) == len(floats.boxes)


@pytest.mark.parametrize("name", ["segmentation", "image_to_image", "generation", "reconstruction"])
def test_a_file_with_its_channels_last_gives_the_same_pixels(name: TaskName) -> None:
    first, last = local(name), local(name, ending="nhwc")
    np.testing.assert_array_equal(last.class_map, first.class_map)
    np.testing.assert_array_equal(last.image, first.image)


def test_an_argmax_in_the_graph_gives_the_same_map_and_no_confidence() -> None:
    np.testing.assert_array_equal(
        local("segmentation", ending="argmax").class_map, local("segmentation").class_map
    )


def test_boxes_of_a_graph_with_its_own_end_are_in_pixels_of_the_photo() -> None:
    result = local("detection", ending="nms")
    assert 0 < len(result.boxes) <= 3
    by_hand = anchors()[::3] * np.array([PHOTO_WIDTH / WIDTH, PHOTO_HEIGHT / HEIGHT] * 2)
    by_hand = np.clip(by_hand, 0, [PHOTO_WIDTH, PHOTO_HEIGHT] * 2)
    for box in result.boxes:
        corners = np.array([box.x_min, box.y_min, box.x_max, box.y_max])
        assert np.abs(by_hand - corners).max(axis=1).min() < 1e-3


def test_top_k_cuts_boxes_and_without_it_all_come() -> None:
    with EdgeRuntime(task_bundle("detection"), policy="ONLY_ON_DEVICE") as edge:
        every = edge.run(PHOTO).boxes
        assert edge.run(PHOTO, top_k=1).boxes == every[:1]
    assert len(every) > 1


def test_no_object_is_an_answer_too() -> None:
    bundle = Bundle.open(task_bundle("detection"))
    task = msgspec.structs.replace(bundle.manifest.task, score_threshold=1.0)
    manifest = msgspec.structs.replace(bundle.manifest, task=task)
    blind = Bundle(bundle.root, manifest, bundle.labels, bundle.anchors)
    with EdgeRuntime(blind, policy="ONLY_ON_DEVICE") as edge:
        result = edge.run(PHOTO)
    assert (result.boxes, result.label, result.score) == ((), None, None)


def test_a_seed_is_an_image_and_another_seed_another_one() -> None:
    with EdgeRuntime(task_bundle("generation")) as edge:
        first, again, other = edge.generate(7), edge.generate(7), edge.generate(8)
        counts = edge.status().counts
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert (counts.requests, counts.on_device) == (3, 3)
    assert first.region is None


async def test_agenerate_is_generate() -> None:
    async with await asyncio.to_thread(EdgeRuntime, task_bundle("generation")) as edge:
        waited = await edge.agenerate(7)
        np.testing.assert_array_equal(waited.image, edge.generate(7).image)
        with pytest.raises(ConfigError):
            await edge.agenerate(-1)


# Class maps on the photo -----------------------------------------------------------------


def test_a_class_map_is_laid_where_the_model_looked() -> None:
    """The crop cuts the photo's edges off; nothing is known of them."""
    result = local("segmentation")
    assert result.class_map is not None
    assert result.region is not None
    # 320 x 240 becomes 53 x 40, of which the middle 32 x 24 are seen.
    left, right = 10 / 53 * 320, 42 / 53 * 320
    assert result.region == pytest.approx((left, 8 * 6, right, 32 * 6))
    full = result.class_map_for(PHOTO_HEIGHT, PHOTO_WIDTH)
    assert full.shape == (PHOTO_HEIGHT, PHOTO_WIDTH)
    for y in range(0, PHOTO_HEIGHT, 7):
        for x in range(0, PHOTO_WIDTH, 7):
            column = (x + 0.5 - left) / (right - left) * WIDTH
            row = (y + 0.5 - 48) / (192 - 48) * HEIGHT
            if 0 <= column < WIDTH and 0 <= row < HEIGHT:
                assert full[y, x] == result.class_map[int(row), int(column)]
            else:
                assert full[y, x] == 255
    assert (result.class_map_for(PHOTO_HEIGHT, PHOTO_WIDTH, outside=0)[0] == 0).all()


def test_a_map_of_a_mirrored_input_lies_as_the_photo_does() -> None:
    mirrored = np.ascontiguousarray(RGB[:, ::-1])
    with EdgeRuntime(task_bundle("segmentation", flip=True), policy="ONLY_ON_DEVICE") as edge:
        flipped = edge.run(RGB)
    with EdgeRuntime(task_bundle("segmentation"), policy="ONLY_ON_DEVICE") as edge:
        straight = edge.run(mirrored)
    assert flipped.class_map is not None
    assert straight.class_map is not None
    same = (flipped.class_map == straight.class_map[:, ::-1]).mean()
    assert same > 0.98  # the crop of an odd rest is a pixel off


# Confidence -----------------------------------------------------------------------------


def test_confidence_is_the_best_score_or_says_that_nothing_is_there() -> None:
    task = task_of("detection")
    assert isinstance(task, DetectionTask)
    box = Box(index=0, label="a", score=0.8, x_min=0, y_min=0, x_max=1, y_max=1)
    worse = msgspec.structs.replace(box, score=0.6)
    assert confidence_of(task, [], Answer(boxes=(box, worse))) == 0.8
    assert confidence_of(task, [], Answer(boxes=())) == 1 - task.score_threshold
    ranked = (Prediction(index=0, label="a", score=0.3),)
    assert confidence_of(task_of("classification"), [], Answer(predictions=ranked)) == 0.3
    image = Answer(image=np.zeros((2, 2, 3), np.uint8))
    assert confidence_of(task_of("generation"), [], image) is None


def test_confidence_of_a_class_map_is_the_mean_best_probability() -> None:
    import torch

    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (1, 3, 50, 60)).astype(np.float32)
    answer = Answer(class_map=logits[0].argmax(0).astype(np.uint8))
    probabilities = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    expected = probabilities.max(1).mean()
    task = task_of("segmentation")
    assert confidence_of(task, [logits], answer) == pytest.approx(expected, abs=1e-6)
    assert confidence_of(task, [probabilities.astype(np.float32)], answer) == pytest.approx(
        expected, abs=1e-5
    )
    large = np.repeat(np.repeat(logits, 8, axis=2), 8, axis=3)
    assert confidence_of(task, [large], answer) == pytest.approx(expected, abs=0.02)
    assert confidence_of(task, [answer.class_map[None].astype(np.int32)], answer) is None  # type: ignore[index]


@pytest.mark.parametrize("name", ["classification", "detection", "segmentation"])
def test_adaptive_asks_again_with_the_answers_own_confidence(name: TaskName) -> None:
    bundle = Bundle.open(task_bundle(name))
    with EdgeRuntime(bundle, policy="ONLY_ON_DEVICE") as edge:
        held = ask(edge, name)
    transport = ScriptedTransport.for_bundle(bundle, lambda _: answer_of(name))
    with EdgeRuntime(bundle, transport=transport, prices=CHEAP) as edge:
        edge.prewarm(wait_ms=2000)
        result = ask(edge, name, deadline_ms=5000)
    assert result.situation.scored
    if held.score is not None:
        assert result.situation.confidence == pytest.approx(held.score)
    else:
        assert 1 / 3 < (result.situation.confidence or 0) < 1
    assert result.decision.reason in ("gain_above_price", "confident")
    assert (result.inference_source is CLOUD) == (result.decision.action is not Action.LOCAL)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("image_to_image", ""),
        ("generation", ""),
        ("reconstruction", ""),
        ("segmentation", "argmax"),
    ],
)
def test_where_answers_carry_no_score_adaptive_decides_by_its_prior(
    name: TaskName, ending: str
) -> None:
    bundle = Bundle.open(task_bundle(name, ending=ending))  # type: ignore[arg-type]
    for prices, action, reason, source in (
        (CHEAP, Action.HEDGED, "prior_gain_above_price", CLOUD),
        (Prices(per_request=0.5), Action.LOCAL, "prior_gain_below_price", LOCAL),
    ):
        transport = ScriptedTransport.for_bundle(bundle, lambda _: answer_of(name))
        with EdgeRuntime(bundle, transport=transport, prices=prices) as edge:
            edge.prewarm(wait_ms=2000)
            result = ask(edge, name, deadline_ms=5000)
        assert (result.decision.action, result.decision.reason) == (action, reason)
        assert result.inference_source is source
        assert (result.situation.scored, result.situation.confidence) == (False, None)
        again = msgspec.json.decode(msgspec.json.encode(result.situation), type=Situation)
        assert find_policy("ADAPTIVE").decide(again) == result.decision


# In the cloud ---------------------------------------------------------------------------


@dataclass
class Made:
    """An answer for each task that no local model gives."""

    map: np.ndarray
    image: np.ndarray


MADE = Made(
    map=(np.arange(30 * 40).reshape(30, 40) % 3).astype(np.uint8),
    image=np.random.default_rng(2).integers(0, 256, (30, 40, 3), dtype=np.uint8),
)
BOX = Box(index=1, label="car", score=0.9, x_min=1.5, y_min=2.0, x_max=30.0, y_max=40.25)


def answer_of(name: TaskName) -> Answer:
    region = None if name == "generation" else (0.0, 0.0, 320.0, 240.0)
    if name == "classification":
        return Answer(predictions=(Prediction(index=2, label="tree", score=0.9),))
    if name == "detection":
        return Answer(boxes=(BOX, msgspec.structs.replace(BOX, score=0.5)))
    if name == "segmentation":
        return Answer(class_map=MADE.map, region=region)
    return Answer(image=MADE.image, region=region)


def in_cloud(
    name: TaskName, answer: Callable[[bytes], Answer | str | HttpResponse], **options: object
) -> tuple[Result, HttpRequest]:
    transport = ScriptedTransport.for_bundle(task_bundle(name), answer)
    with EdgeRuntime(
        task_bundle(name),
        policy="ONLY_IN_CLOUD",
        transport=transport,
        deadline_ms=5000,
        **options,  # type: ignore[arg-type]
    ) as edge:
        return ask(edge, name), transport.requests[-1]


@pytest.mark.parametrize("name", TASKS)
def test_the_clouds_answer_arrives_exactly(name: TaskName) -> None:
    wanted = answer_of(name)
    result, request = in_cloud(name, lambda _: wanted)
    assert result.inference_source is CLOUD
    assert result.task == name
    assert result.predictions == (wanted.predictions or ())
    assert result.boxes == (wanted.boxes or ())
    np.testing.assert_array_equal(result.class_map, wanted.class_map)
    np.testing.assert_array_equal(result.image, wanted.image)
    assert result.region == wanted.region
    if name == "generation":
        assert request.headers["Content-Type"] == "application/json"
        assert request.body == b'{"seed":7}'
        assert result.situation.upload_bytes == len(request.body)
    else:
        assert request.headers["Content-Type"] == "image/jpeg"


def test_pixels_are_asked_for_as_files_and_as_jpeg_where_that_is_allowed() -> None:
    for name, accept in (
        ("classification", "application/json"),
        ("detection", "application/json"),
        ("segmentation", "image/png, application/json"),
        ("generation", "image/png, application/json"),
    ):
        _, request = in_cloud(name, lambda _, name=name: answer_of(name))  # type: ignore[misc]
        assert request.headers["Accept"] == accept
    result, request = in_cloud(
        "image_to_image", lambda _: answer_of("image_to_image"), jpeg_answers=True
    )
    assert request.headers["Accept"] == "image/jpeg, application/json"
    assert result.image is not None
    assert result.image.shape == MADE.image.shape
    assert not np.array_equal(result.image, MADE.image)
    result, request = in_cloud(
        "segmentation", lambda _: answer_of("segmentation"), jpeg_answers=True
    )
    np.testing.assert_array_equal(result.class_map, MADE.map)


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_of_another_task_is_a_wire_error(name: TaskName) -> None:
    for other in TASKS:
        if name == other or {name, other} <= {"image_to_image", "generation", "reconstruction"}:
            continue  # those three all answer an image
        with pytest.raises(WireError):
            in_cloud(name, lambda _, other=other: as_json(answer_of(other)))  # type: ignore[misc]


def as_json(answer: Answer) -> HttpResponse:
    """Sent as JSON whatever is asked for: what an answer is must not depend on the way."""
    from edge_runtime.contract.answer_codec import encode_answer

    reference = ModelRef(
        name="scripted",
        version="1",
        sha256="0" * 64,
        labels_sha256=Bundle.open(task_bundle("detection")).manifest.labels.sha256,  # type: ignore[union-attr]
    )
    body = msgspec.json.encode(PredictAnswer.of(reference, encode_answer(answer)))
    return HttpResponse(status=200, headers={"content-type": "application/json"}, body=body)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("detection", Answer(boxes=(msgspec.structs.replace(BOX, label="tree"),))),
        ("detection", Answer(boxes=(msgspec.structs.replace(BOX, index=3),))),
        ("detection", Answer(boxes=(msgspec.structs.replace(BOX, x_min=31.0),))),
        ("detection", Answer(boxes=(msgspec.structs.replace(BOX, y_max=1.0),))),
        ("segmentation", Answer(class_map=np.full((4, 4), 3, np.uint8))),
    ],
)
def test_an_answer_that_contradicts_the_bundle_is_a_wire_error(
    name: TaskName, answer: Answer
) -> None:
    with pytest.raises(WireError):
        in_cloud(name, lambda _: answer)
    with pytest.raises(WireError):
        in_cloud(name, lambda _: as_json(answer))


def test_a_picture_that_does_not_say_whose_it_is_is_a_wire_error() -> None:
    def anonymous(_: bytes) -> HttpResponse:
        return HttpResponse(status=200, headers={"content-type": "image/png"}, body=b"\x89PNG")

    with pytest.raises(WireError, match="which model"):
        in_cloud("segmentation", anonymous)


def serving(*models: ServedModel) -> ScriptedTransport:
    def handle(request: HttpRequest) -> HttpResponse:
        body = msgspec.json.encode({"models": models}) if "models" in request.path else b"{}"
        assert request.method == "GET", "nothing may be uploaded"
        return HttpResponse(status=200, headers={}, body=body)

    return ScriptedTransport(handle)


def model(name: str, task: str, labels_sha256: str | None = None) -> ServedModel:
    return ServedModel(
        name=name, version="1", sha256="0" * 64, labels_sha256=labels_sha256, task=task
    )


def refused(transport: ScriptedTransport, name: TaskName, **options: object) -> EdgeRuntime:
    return EdgeRuntime(
        task_bundle(name),
        policy="ONLY_IN_CLOUD",
        transport=transport,
        **options,  # type: ignore[arg-type]
    )


def test_a_cloud_model_of_another_task_is_refused_and_nothing_uploaded() -> None:
    other = serving(model("style", "image_to_image"), model("faces", "reconstruction"))
    with refused(other, "generation") as edge, pytest.raises(ModelNotFound, match="generation"):
        edge.generate(1)
    with (
        refused(other, "generation", cloud_model="style") as edge,
        pytest.raises(ConfigError, match="does image_to_image, the bundle generation"),
    ):
        edge.generate(1)
    labels = Bundle.open(task_bundle("detection")).manifest.labels
    assert labels is not None
    same_labels = serving(model("large", "segmentation", labels.sha256))
    with refused(same_labels, "detection") as edge, pytest.raises(ModelNotFound):
        edge.run(PHOTO)
    with (
        refused(serving(model("large", "detection", "0" * 64)), "detection") as edge,
        pytest.raises(LabelsMismatch),
    ):
        edge.run(PHOTO)
    two = serving(model("one", "generation"), model("two", "generation"))
    with refused(two, "generation") as edge, pytest.raises(ConfigError, match="one, two"):
        edge.generate(1)


def test_a_slow_answer_is_held_back_by_the_devices_own() -> None:
    bundle = task_bundle("generation")
    transport = ScriptedTransport.for_bundle(
        bundle, lambda _: answer_of("generation"), delay_ms=5000
    )
    with EdgeRuntime(bundle, transport=transport, prices=CHEAP) as edge:
        edge.prewarm(wait_ms=2000)
        held = edge.generate(7, deadline_ms=1000)
    np.testing.assert_array_equal(held.image, local("generation").image)
    assert held.inference_source is LOCAL
    assert held.situation.upload is not None  # it was asked for, and given up
    assert held.deadline_met
