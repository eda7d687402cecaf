"""Servables of every task: what must be recorded, and torch's own numbers in the answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from broker.executors.base import BatchItem
from broker.executors.program import TorchProgram
from broker.models.servable import open_servable, read_servable
from broker.models.warm_up import warm_up_body
from edge_runtime.contract import errors as e
from edge_runtime.contract import limits
from edge_runtime.contract.answer_codec import decode_answer_pixels
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.pipeline import prepare_image, prepare_seed
from edge_runtime.contract.tasks import ImageToImageTask, TaskName
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.contract.wire import EncodedAnswer, encode_seed
from tests.support import broker_images as images
from tests.support.tasks import (
    HEIGHT,
    IMAGE_TASKS,
    TASKS,
    WIDTH,
    input_spec,
    output_specs,
    preprocess_of,
    reference_outputs,
    reference_pixels,
    rewrite_servable,
    task_bundle,
    task_of,
    task_servable,
    write_task_servable,
)


def program(name: TaskName, **options: object) -> TorchProgram:
    servable = open_servable(task_servable(name, **options))  # type: ignore[arg-type]
    return TorchProgram.load(servable, "cpu", precision="fp32")


def decoded(name: TaskName, result: EncodedAnswer | e.NearfarError) -> Answer:
    assert isinstance(result, EncodedAnswer), result
    return decode_answer_pixels(result, task_of(name))


def body(name: TaskName, seed: int = 0) -> bytes:
    return encode_seed(seed) if name == "generation" else images.png(seed, 90, 70)


def expected_outputs(name: TaskName, data: bytes, seed: int = 0) -> list[np.ndarray]:
    from edge_runtime.contract.imaging import decode_image

    record = preprocess_of(name)
    if record is None:
        prepared = prepare_seed(input_spec(name), seed)
    else:
        prepared = prepare_image(record, input_spec(name), decode_image(data))
    return reference_outputs(name, prepared.array)


# What is refused --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(task_servable(request.param), tmp_path / "model"))


def model(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Reference:
    return Reference(path="model.pt2", inputs=inputs, outputs=outputs)


def spec(*shape: int, layout: str = "NCHW", dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=shape, layout=layout)  # type: ignore[arg-type]


IMAGE = spec(1, 3, HEIGHT, WIDTH)
WRONG: list[tuple[TaskName, tuple[TensorSpec, ...], tuple[TensorSpec, ...], str]] = [
    ("classification", (IMAGE, IMAGE), output_specs("classification"), "one input"),
    ("classification", (spec(1, 3, WIDTH, HEIGHT),), output_specs("classification"), "24 x 32"),
    ("classification", (spec(2, 3, HEIGHT, WIDTH),), output_specs("classification"), "24 x 32"),
    ("classification", (spec(1, 3, HEIGHT, WIDTH, dtype="int8"),),
     output_specs("classification"), "float32 or uint8"),
    ("classification", (spec(1, 3, HEIGHT, WIDTH, layout="OTHER"),),
     output_specs("classification"), "OTHER"),
    ("classification", (IMAGE,), (spec(1, 4, layout="NC"),), "one output of 3 scores"),
    ("classification", (IMAGE,), output_specs("classification") * 2, "one output of 3 scores"),
    ("detection", (IMAGE,), output_specs("detection")[:1], "outputs"),
    ("detection", (IMAGE,), output_specs("detection")[::-1], "outputs"),
    ("segmentation", (IMAGE,), (spec(1, 4, HEIGHT, WIDTH),), "scores"),
    ("segmentation", (IMAGE,), (spec(1, 3, layout="NC"),), "scores"),
    ("image_to_image", (IMAGE,), (spec(1, 2, HEIGHT, WIDTH),), "an image"),
    ("image_to_image", (IMAGE,), (spec(1, 3, 8000, 8000),), "smaller input"),
    ("image_to_image", (IMAGE,), (spec(1, 1, 1, 40_000),), "smaller input"),
    ("reconstruction", (IMAGE,), output_specs("reconstruction")[1:], "an image"),
    ("generation", (IMAGE,), output_specs("generation"), "latent of 6"),
    ("generation", (spec(1, 6, layout="NC", dtype="int32"),), output_specs("generation"), "latent"),
    ("generation", (spec(1, 6, layout="NC"),), (spec(2, 3, 4, 4),), "batch 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "inputs", "outputs", "says"), WRONG, indirect=["folder"],
    ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)],
)  # fmt: skip
def test_a_manifest_whose_tensors_do_not_fit_its_task_is_refused(
    folder: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], says: str
) -> None:
    rewrite_servable(folder, model=model(inputs, outputs))
    with pytest.raises(e.ManifestError, match=says):
        open_servable(folder)


def test_a_generator_with_pre_processing_is_refused(tmp_path: Path) -> None:
    target = Path(shutil.copytree(task_servable("generation"), tmp_path / "m"))
    rewrite_servable(target, preprocess=preprocess_of("detection"))
    with pytest.raises(e.ManifestError, match="no pre-processing"):
        open_servable(target)


@pytest.mark.parametrize("name", ["detection", "segmentation", "reconstruction"])
def test_a_program_with_other_outputs_than_recorded_does_not_load(
    tmp_path: Path, name: TaskName
) -> None:
    import torch

    class Other(torch.nn.Module):
        def forward(self, x):
            return x[:, :2] * 2

    target = tmp_path / "m"
    target.mkdir()
    write_task_servable(target, name, module=Other().eval())
    with pytest.raises(e.ModelLoadError, match="its manifest says"):
        TorchProgram.load(open_servable(target), "cpu")


def test_a_detector_without_its_anchors_is_refused(tmp_path: Path) -> None:
    target = Path(shutil.copytree(task_servable("detection"), tmp_path / "m"))
    (target / "anchors.f32").write_bytes(bytes(16))
    rewrite_servable(target, files=file_entries(target, exclude=["servable.json"]))
    with pytest.raises(e.ManifestError, match="anchors"):
        open_servable(target)


# Answers ----------------------------------------------------------------------------------


def test_boxes_are_in_pixels_of_the_photo_and_equal_to_the_devices() -> None:
    """Against the bundle of the same net, whose boxes are held to torchvision's elsewhere."""
    from edge_runtime import EdgeRuntime

    photo = images.png(3, 300, 200)
    answer = decoded("detection", program("detection").run([BatchItem(photo)])[0])
    with EdgeRuntime(task_bundle("detection"), policy="ONLY_ON_DEVICE") as edge:
        local = edge.run(photo)
    assert answer.boxes is not None
    assert len(answer.boxes) == len(local.boxes) > 1
    for ours, theirs in zip(answer.boxes, local.boxes, strict=True):
        assert ours.label == theirs.label
        for field in ("score", "x_min", "y_min", "x_max", "y_max"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), abs=1e-3)
    assert max(box.x_max for box in answer.boxes) > WIDTH


def test_a_mask_holds_the_argmax_and_says_what_it_shows() -> None:
    data = body("segmentation")
    answer = decoded("segmentation", program("segmentation").run([BatchItem(data)])[0])
    expected = expected_outputs("segmentation", data)[0][0].argmax(0)
    np.testing.assert_array_equal(answer.class_map, expected)
    # 90 x 70 becomes 51 x 40; columns 10 to 42 and rows 8 to 32 are seen.
    assert answer.region == pytest.approx((10 / 51 * 90, 14.0, 42 / 51 * 90, 56.0))


@pytest.mark.parametrize(
    ("name", "scale", "offset"),
    [("image_to_image", 255.0, 0.0), ("generation", 127.5, 127.5), ("reconstruction", 255.0, 0.0)],
)
def test_an_image_is_torchs_output_in_8_bits(name: TaskName, scale: float, offset: float) -> None:
    data = body(name, 5)
    answer = decoded(name, program(name).run([BatchItem(data)])[0])
    expected = reference_pixels(expected_outputs(name, data, 5)[0][0], scale, offset)
    assert answer.image is not None
    assert np.abs(answer.image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_answers_each_request_as_if_it_were_alone(name: TaskName) -> None:
    loaded = program(name)
    bodies = [body(name, seed) for seed in range(5)]
    together = loaded.run([BatchItem(one) for one in bodies])
    for one, result in zip(bodies, together, strict=True):
        alone = decoded(name, loaded.run([BatchItem(one)])[0])
        batched = decoded(name, result)
        if alone.image is not None:
            assert batched.image is not None
            assert np.abs(alone.image.astype(int) - batched.image).max() <= 1
        elif alone.class_map is not None:
            assert (alone.class_map == batched.class_map).mean() > 0.99
        else:
            ours = (batched.predictions or batched.boxes or (None,))[0]
            theirs = (alone.predictions or alone.boxes or (None,))[0]
            assert ours is not None
            assert theirs is not None
            assert ours.label == theirs.label
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)
    assert len({str(result) for result in together}) == len(bodies)


@pytest.mark.parametrize("name", TASKS)
def test_a_request_that_cannot_be_used_costs_itself_alone(name: TaskName) -> None:
    good = body(name, 1)
    bad = b"{}" if name == "generation" else good[:-300]
    first, second, third = program(name).run([BatchItem(good), BatchItem(bad), BatchItem(good)])
    assert isinstance(second, e.WireError if name == "generation" else e.ImageUnreadable)
    assert isinstance(first, EncodedAnswer)
    assert first == third


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_a_model_that_takes_pixels_answers_as_the_one_that_takes_floats(name: TaskName) -> None:
    data = body(name, 2)
    pixels = decoded(name, program(name, mode="uint8").run([BatchItem(data)])[0])
    floats = decoded(name, program(name).run([BatchItem(data)])[0])
    if floats.image is not None:
        assert pixels.image is not None
        assert np.abs(pixels.image.astype(int) - floats.image).max() <= 1
    elif floats.class_map is not None:
        assert (pixels.class_map == floats.class_map).mean() > 0.99
    else:
        ours = (pixels.predictions or pixels.boxes or (None,))[0]
        theirs = (floats.predictions or floats.boxes or (None,))[0]
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_top_k_and_encodings_are_honored(name: TaskName) -> None:
    (result,) = program(name).run(
        [BatchItem(body(name), top_k=1, media_type="image/jpeg", colored=True)]
    )
    answer = decoded(name, result)
    assert isinstance(result, EncodedAnswer)
    assert len(answer.predictions or answer.boxes or ()) <= 1
    if result.image is not None:
        assert result.image.data.startswith(b"\xff\xd8\xff")
    if result.mask is not None:
        assert b"PLTE" in result.mask.data


@pytest.mark.parametrize("name", TASKS)
def test_the_warm_up_request_is_one_that_the_model_answers(name: TaskName) -> None:
    servable = open_servable(task_servable(name))
    (result,) = program(name).run([BatchItem(warm_up_body(servable))])
    assert isinstance(result, EncodedAnswer)


@pytest.mark.parametrize("name", ["detection", "segmentation", "image_to_image"])
def test_a_model_that_answers_nan_is_an_inference_error(tmp_path: Path, name: TaskName) -> None:
    import torch

    from tests.support.tasks import net

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(name)

        def forward(self, x):
            answer = self.inner(x)
            if isinstance(answer, tuple):
                return tuple(one * float("nan") for one in answer)
            return answer * float("nan")

    target = tmp_path / "m"
    target.mkdir()
    write_task_servable(target, name, module=Broken().eval())
    loaded = TorchProgram.load(open_servable(target), "cpu")
    (result,) = loaded.run([BatchItem(body(name))])
    assert isinstance(result, e.InferenceError)
    assert "NaN" in result.detail


# Bounds -----------------------------------------------------------------------------------


def test_a_batch_of_large_answers_is_small(tmp_path: Path) -> None:
    """Answers of one batch travel in one frame: 2048 x 2048 pixels leave room for five."""
    target = Path(shutil.copytree(task_servable("image_to_image"), tmp_path / "m"))
    rewrite_servable(
        target,
        model=model((IMAGE,), (spec(1, 3, 2048, 2048),)),
        task=ImageToImageTask(upscale=2),
    )
    servable = read_servable(target)
    assert servable.largest_batch == 5
    assert servable.largest_batch * 2048 * 2048 * 3 <= limits.MAX_BATCH_BYTES
    assert read_servable(task_servable("detection")).largest_batch == limits.MAX_BATCH


def test_an_answers_bound_holds_for_noise(tmp_path: Path) -> None:
    """Noise is what a PNG cannot compress."""
    from broker.models.shapes import answer_bytes
    from edge_runtime.contract.answer_codec import encode_answer

    target = Path(shutil.copytree(task_servable("image_to_image"), tmp_path / "m"))
    rewrite_servable(target, model=model((IMAGE,), (spec(1, 3, 300, 500),)))
    bound = answer_bytes(read_servable(target).manifest, [])
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    for media_type in ("image/png", "image/jpeg"):
        encoded = encode_answer(Answer(image=noise), media_type=media_type)  # type: ignore[arg-type]
        assert encoded.image is not None
        assert len(encoded.image.data) < bound
    assert bound < 1.1 * noise.size
