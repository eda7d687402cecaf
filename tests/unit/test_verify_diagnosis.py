"""Names for mistakes: each is given on exactly the evidence that it claims, and not without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converters.verify.causes import Reference, noise
from converters.verify.diagnose import diagnose
from converters.verify.engine import check_engine
from converters.verify.gates import in_doubt
from converters.verify.mistakes import Mistaken, mistakes
from converters.verify.ranges import (
    RangeRow,
    Spread,
    activation_floor,
    is_fixed,
    judge_ranges,
    match_values,
)
from converters.verify.values import (
    Value,
    as_reference,
    declared_in_program,
    declared_range,
)
from edge_runtime.contract.manifest import ReferenceRecord
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ClassificationTask, DetectionTask, SegmentationTask
from edge_runtime.contract.tasks.detection import AnchorsRecord, box_iou, candidates, suppress
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.mil import program as mil

RNG = np.random.default_rng(3)


def names(findings: Any) -> list[str]:
    return [finding.name for finding in findings]


# Ranges ------------------------------------------------------------------------------------


def test_declared_range_is_what_the_integers_stand_for() -> None:
    assert declared_range(0.5, -128, np.dtype(np.int8)) == (0.0, 127.5)
    assert declared_range(0.25, 10, np.dtype(np.uint8)) == (-2.5, 61.25)


def test_term_of_a_core_ml_sum_in_other_units_declares_no_range() -> None:
    int8, half = mil.Type(dtype="int8", shape=(1, 2)), mil.Type(dtype="float16", shape=(1, 2))

    def number(value: float) -> mil.Operand:
        return mil.Operand(name="", val=np.float16(value))

    def step(kind: str, source: str, target: str, scale: float) -> mil.Operation:
        inputs = {"input": mil.Operand(name=source), "scale": number(scale),
                  "zero_point": mil.Operand(name="", val=np.int8(-119))}  # fmt: skip
        made = int8 if kind == "quantize" else half
        return mil.Operation(op_type=kind, name=target, inputs=inputs, outputs=((target, made),))

    def reader(kind: str, source: str) -> mil.Operation:
        inputs = {"x": mil.Operand(name=source), "y": mil.Operand(name="other")}
        return mil.Operation(op_type=kind, name="", inputs=inputs, outputs=(("", half),))

    program = mil.Function(
        inputs={}, outputs=(),
        operations=(
            step("quantize", "x", "stored", 0.04),
            step("dequantize", "stored", "own", 0.04), reader("conv", "own"),
            step("dequantize", "stored", "term", 1.0), reader("add", "term"),
        ),
    )  # fmt: skip
    ranges, foreign = declared_in_program(program)
    assert foreign == {"term"}
    assert list(ranges) == ["own"]
    assert ranges["own"] == pytest.approx((-0.36, 9.84), rel=1e-3)


def test_layout_of_a_file_is_turned_into_the_references() -> None:
    value = RNG.normal(size=(1, 4, 5, 3)).astype(np.float32)
    turned = as_reference(value, (1, 3, 4, 5))
    assert turned is not None
    assert np.array_equal(turned, value.transpose(0, 3, 1, 2))
    assert as_reference(value, (1, 5, 4, 3)) is None
    flat = as_reference(np.ones((1, 1, 1, 7), np.float32), (1, 7))
    assert flat is not None
    assert flat.shape == (1, 7)


def test_clipped_energy_is_exact() -> None:
    spread = Spread((-1.0, 3.0))
    spread.add(np.array([3.0, 4.0], np.float32))
    assert (spread.low, spread.high) == (0.0, 4.0)
    assert spread.clip_db == pytest.approx(10 * np.log10(25.0))
    spread.add(np.array([-2.0, 0.0], np.float32))
    assert spread.clip_db == pytest.approx(10 * np.log10(29.0 / 2.0))
    assert Spread((0.0, 0.0)).clip_db == 120.0


def test_a_range_from_zero_on_is_a_relus_and_clips_nothing_below() -> None:
    spread = Spread((0.0, 4.0), floor=activation_floor((0.0, 4.0)))
    spread.add(np.array([-5.0, 1.0, 3.0], np.float32))
    assert (spread.low, spread.high, spread.clip_db) == (0.0, 3.0, 120.0)
    plain = Spread((0.0, 4.0))
    plain.add(np.array([-5.0, 1.0, 3.0], np.float32))
    assert plain.low == -5.0
    assert plain.clip_db < 2.0


def test_a_range_that_ends_where_silu_does_clips_nothing_below() -> None:
    declared = (-0.278, 7.8)
    spread = Spread(declared, floor=activation_floor(declared))
    spread.add(np.array([-50.0, 1.0, 7.0], np.float32))
    assert spread.clip_db == 120.0
    spread.add(np.array([15.6], np.float32))  # what it cuts off above, it still shows
    assert spread.clip_db < 8.0
    assert activation_floor((-0.278, 0.5)) is None
    assert activation_floor((-1.0, 9.0)) is None


def test_the_range_of_a_sigmoid_says_nothing_of_calibration() -> None:
    assert is_fixed((0.0, 255 / 256))
    assert is_fixed((-1.0, 32767 / 32768))
    assert not is_fixed((0.0, 0.9))
    assert not is_fixed((-1.0, 2.0))


def test_values_are_matched_by_order_where_shapes_repeat_and_despite_clipping() -> None:
    nodes = {"input": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)}
    for number in range(4):
        nodes[f"norm{number}"] = RNG.normal(size=(1, 6, 8, 8)).astype(np.float32)
        nodes[f"relu{number}"] = np.maximum(nodes[f"norm{number}"], 0.0)
    files = [nodes["input"], *(nodes[f"relu{number}"] for number in (0, 1, 3))]
    values = [Value(np.minimum(0.4 * one, 0.2).transpose(0, 2, 3, 1)) for one in files]
    found = match_values(values, nodes)
    assert [one[-1] for one in found] == ["input", "relu0", "relu1", "relu3"]
    assert {name[-1] for name in found[3]} == {"3"}


def test_a_value_that_follows_nothing_is_left_out() -> None:
    nodes = {"a": RNG.normal(size=(1, 4, 9, 9)).astype(np.float32)}
    stranger = Value(RNG.normal(size=(1, 9, 9, 4)).astype(np.float32))
    assert match_values([stranger, Value(nodes["a"])], nodes) == [[], ["a"]]
    assert match_values([], nodes) == []


LIMITS = (-2.118, 2.64)
REAL = [(-1.11, 2.57), (0.0, 7.43), (0.0, 3.69), (0.0, 10.67), (-14.82, 14.11)]
"""The zoo's small net on 24 photos: input, three ReLUs, logits; then on noise."""
NOISE = [(-2.12, 2.64), (0.0, 13.62), (0.0, 7.98), (0.0, 14.89), (-25.1, 8.3)]
PHOTOS = [(-1.2, 2.58), (0.0, 7.73), (0.0, 6.57), (0.0, 16.65), (-19.81, 21.59)]
"""Declared after calibration with 64 photos, and with 32 images of uniform noise."""
FROM_NOISE = [(-2.13, 2.63), (0.0, 12.77), (0.0, 8.59), (0.0, 21.18), (-28.07, 10.83)]


def rows(declared: list[tuple[float, float]], clip_db: float = 120.0) -> list[RangeRow]:
    return [
        RangeRow(
            name=f"layer {number}",
            declared=own,
            real=real,
            clip_db=clip_db,
            noise={"uniform pixels": wild},
            limits=LIMITS if number == 0 else None,
        )
        for number, (own, real, wild) in enumerate(zip(declared, REAL, NOISE, strict=True))
    ]


def test_ranges_measured_on_photos_get_no_name_and_those_on_noise_theirs() -> None:
    assert judge_ranges(rows(PHOTOS)) == []
    (finding,) = judge_ranges(rows(FROM_NOISE))
    assert finding.name == "noise-calibration"
    assert "in 5 of 5 tensors" in finding.detail
    assert "12% of a range from the noise's and 43% from the images'" in finding.detail


def test_photos_with_wide_values_are_not_taken_for_noise() -> None:
    """Measured: 48 photos calibrated, 24 judge; the logits' range is nearly symmetric."""
    table = [
        RangeRow("input", (-1.2, 2.58), (-1.11, 2.57), 120.0, {"uniform": (-2.12, 2.64)}, LIMITS),
        RangeRow("relu6", (0.0, 6.0), (0.0, 6.0), 120.0, {"uniform": (0.0, 6.0)}),
        RangeRow("relu", (0.0, 18.6), (0.0, 11.35), 120.0, {"uniform": (0.0, 17.44)}),
        RangeRow("logits", (-22.57, 23.11), (-13.72, 13.16), 120.0, {"uniform": (-25.43, 7.82)}),
    ]
    assert judge_ranges(table) == []


def test_one_tensor_that_many_photos_stretch_to_the_range_of_noise_is_chance() -> None:
    """Measured: 500 photos calibrated, 48 judge; two others are far from noise."""
    table = [
        RangeRow("input", (-2.11, 2.65), (-2.12, 2.64), 70.0, {"uniform": (-2.12, 2.64)}, LIMITS),
        RangeRow("relu", (0.0, 15.59), (0.0, 12.6), 120.0, {"uniform": (0.0, 15.83)}),
        RangeRow("relu_1", (0.0, 13.71), (0.0, 8.9), 120.0, {"uniform": (0.0, 8.79)}),
        RangeRow("relu_2", (0.0, 31.83), (0.0, 19.9), 120.0, {"uniform": (0.0, 19.22)}),
    ]
    assert judge_ranges(table) == []
    (finding,) = judge_ranges(table[:2])
    assert finding.name == "noise-calibration"


@given(st.floats(min_value=0.06, max_value=1.0), st.floats(min_value=20.0, max_value=120.0))
def test_ranges_of_paler_images_are_never_those_of_noise(factor: float, clip_db: float) -> None:
    declared = [(factor * low, factor * high) for low, high in REAL]
    assert judge_ranges(rows(declared, clip_db)) == []


def test_clipping_needs_one_tensor_far_out_or_half_of_them_out() -> None:
    declared = [(0.5 * low, 0.5 * high) for low, high in REAL]
    table = rows(declared, 30.0)
    assert judge_ranges(table) == []
    one = dataclasses.replace(table[2], clip_db=13.9)
    (finding,) = judge_ranges([*table[:2], one, *table[3:]])
    assert finding.name == "clipped-calibration"
    assert "layer 2 may hold 0 to 1.84 and takes 0 to 3.69" in finding.detail
    assert names(judge_ranges(rows(declared, 19.9))) == ["clipped-calibration"]
    assert judge_ranges(rows(declared, 19.9)[:2]) == []
    assert judge_ranges([]) == []


def test_an_input_wider_than_any_pixel_was_not_calibrated_with_images() -> None:
    wide = dataclasses.replace(rows(PHOTOS)[0], declared=(-4.4, 3.0))
    (finding,) = judge_ranges([wide])
    assert finding.name == "noise-calibration"
    assert "every image lies within -2.12 to 2.64" in finding.detail
    symmetric = dataclasses.replace(wide, declared=(-2.64, 2.64))
    assert judge_ranges([symmetric]) == []


def test_noise_covers_the_usual_kinds_and_is_the_same_every_time() -> None:
    record = ReferenceRecord(
        task=ClassificationTask(classes=2),
        preprocess=named("tf", 224, 112),
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 224, 112), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 2), layout="NC"),),
    )
    first, second = noise(record), noise(record)
    assert len(first) == 5
    for kind, batches in first.items():
        assert len(batches) == 16
        assert all(batch.shape == (1, 3, 224, 112) for batch in batches)
        assert all(np.array_equal(*pair) for pair in zip(batches, second[kind], strict=True))
    uniform = np.stack(first["uniform pixels"])
    assert (uniform.min(), uniform.max()) == (-1.0, 1.0)
    assert np.stack(first["normal inputs"]).std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("precision", "figures", "expected"),
    [
        ("int8", (33.0, 23.0, 1.0), False),
        ("int8", (31.9, 23.0, 1.0), True),
        ("a16w8", (33.0, 21.9, 1.0), True),
        ("int8", (33.0, 23.0, 0.97), True),
        ("int8", (None, None, None), False),
        ("fp16", (29.9, 17.0, 0.9), False),
        ("int8w", (21.0, 12.0, 0.96), False),
    ],
)
def test_only_static_precisions_are_looked_into_without_having_failed(
    precision: str, figures: tuple[float | None, ...], expected: bool
) -> None:
    assert in_doubt(precision, *figures) is expected


# Mistakes built into the reference ---------------------------------------------------------


class Net(nn.Module):
    """Two convolutions with batch norm, the second strided; random statistics."""

    def __init__(self, *, bias: bool = False, pad: str = "end") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.first = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
            self.norm = nn.BatchNorm2d(6)
            self.sides = nn.ZeroPad2d({"end": (0, 1, 0, 1), "same": (1, 1, 1, 1)}.get(pad, 0))
            self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1 if pad == "inside" else 0)
            for values in (self.norm.running_mean, self.norm.bias, self.norm.weight):
                nn.init.normal_(values)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.second(self.sides(torch.relu(self.norm(self.first(image)))))


IMAGE = torch.from_numpy(RNG.normal(size=(1, 3, 12, 12)).astype(np.float32))


def answers(net: nn.Module, values: list[Value] | None = None) -> dict[str, list[np.ndarray]]:
    """What each mistake makes of the net's answer, by the finding's name."""
    program = torch.export.export(net.eval(), (IMAGE,)).module()
    found: dict[str, list[np.ndarray]] = {}
    for name, _, mistake in mistakes(values or []):
        answer = Mistaken(program, mistake).answer(IMAGE)
        if answer is not None:
            found.setdefault(name, []).append(answer[0].detach().numpy())
    return found


def run(net: nn.Module, image: torch.Tensor = IMAGE) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(net.eval()(image).numpy())


@pytest.mark.slow
def test_lost_shift_is_what_optimize_for_mobile_makes_of_an_unfrozen_trace() -> None:
    from torch.utils.mobile_optimizer import optimize_for_mobile

    net = Net().eval()
    with torch.no_grad():
        broken = optimize_for_mobile(torch.jit.trace(net, IMAGE))(IMAGE).numpy()
    lost, _ = answers(net)["unfrozen-batch-norm"]
    assert np.abs(lost - broken).max() < 1e-5
    assert np.abs(run(net) - broken).max() > 0.1


@pytest.mark.slow
def test_lost_shift_is_told_by_inner_values_and_needs_a_convolution_without_bias() -> None:
    net = Net().eval()
    sound = torch.relu(net.norm(net.first(IMAGE))).detach().numpy()
    assert len(answers(net, [Value(sound)])["unfrozen-batch-norm"]) == 1
    zero = net.norm(torch.zeros(1, 6, 1, 1))
    hit = torch.relu(net.norm(net.first(IMAGE)) - zero).detach().numpy()
    assert len(answers(net, [Value(hit)])["unfrozen-batch-norm"]) == 2
    assert len(answers(Net(bias=True))["unfrozen-batch-norm"]) == 1


def test_batch_statistics_are_those_of_training_mode() -> None:
    net = Net()
    _, statistics = answers(net)["unfrozen-batch-norm"]
    with torch.no_grad():
        training = net.train()(IMAGE).numpy()
    assert np.abs(statistics - training).max() < 1e-5


@pytest.mark.slow
def test_one_sided_padding_made_symmetric_and_the_reverse() -> None:
    (symmetric,) = answers(Net(pad="end"))["padding"]
    assert np.abs(symmetric - run(Net(pad="same"))).max() < 1e-5
    (one_sided,) = answers(Net(pad="inside"))["padding"]
    assert np.abs(one_sided - run(Net(pad="end"))).max() < 1e-5
    assert np.abs(run(Net(pad="end")) - run(Net(pad="same"))).max() > 0.1


@pytest.mark.slow
def test_reference_keeps_every_value_and_its_range_on_noise() -> None:
    record = ReferenceRecord(
        task=ClassificationTask(classes=2),
        preprocess=named("tf", 12, 12),
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 12, 12), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 8, 6, 6), layout="NCHW"),),
    )
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(
        Net().eval(), (torch.cat([IMAGE, IMAGE]),), dynamic_shapes=((batch,))
    )
    reference = Reference(exported.module(), record, [], 0)
    assert reference.batch_size == 8
    values = reference.values(IMAGE.numpy())
    assert next(iter(values)) == "image"
    assert np.array_equal(list(values.values())[-1], run(Net()))
    ranges = reference.noise_ranges(values)
    assert set(ranges) == set(values)
    assert ranges["image"]["uniform pixels"] == (-1.0, 1.0)
    assert reference.limits() == (-1.0, 1.0)


# Engines -----------------------------------------------------------------------------------


class Capped(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            self.body = nn.Conv2d(3, 8, 3, padding=1)
            self.activation = activation
            self.head = nn.Conv2d(8, 4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.activation(8.0 * self.body(image)))


@pytest.mark.parametrize(
    ("activation", "expected"), [(nn.ReLU6(), ["engine-relu6"]), (nn.ReLU(), [])]
)
def test_quantized_relu6_is_blamed_on_the_engine_and_relu_is_not(
    tmp_path: Path, activation: nn.Module, expected: list[str]
) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    from torch.jit.mobile import _load_for_lite_interpreter

    net = Capped(activation).eval()
    batches = [RNG.normal(size=(1, 3, 12, 12)).astype(np.float32) for _ in range(4)]
    torch.backends.quantized.engine = "qnnpack"
    mapping = get_default_qconfig_mapping("qnnpack")
    prepared = prepare_fx(net, mapping, (torch.from_numpy(batches[0]),))
    with torch.no_grad():
        for batch in batches:
            prepared(torch.from_numpy(batch))
        traced = torch.jit.trace(convert_fx(prepared), torch.from_numpy(batches[0]))
    path = tmp_path / "net.ptl"
    torch.jit.freeze(traced.eval())._save_for_lite_interpreter(str(path))
    module = _load_for_lite_interpreter(str(path))
    given_ = np.concatenate([module(torch.from_numpy(one)).numpy() for one in batches])
    wanted = np.concatenate([run(net, torch.from_numpy(one)) for one in batches])
    assert names(check_engine(path, batches, wanted, given_)) == expected
    assert torch.backends.quantized.engine == "qnnpack"


# Answers alone -----------------------------------------------------------------------------


LOGITS = RNG.normal(0.0, 4.0, (16, 10))
CLASSES = ClassificationTask(classes=10)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def test_softmax_and_class_order_are_told_apart_and_coarse_answers_are_neither() -> None:
    assert names(diagnose(CLASSES, [LOGITS], [softmax(LOGITS)])) == ["softmax-twice"]
    swapped = LOGITS[:, [1, 0, *range(2, 10)]]
    (finding,) = diagnose(CLASSES, [LOGITS], [swapped])
    assert finding.name == "class-order"
    assert "2 of 10 answer as another class" in finding.detail
    coarse = LOGITS + RNG.normal(0.0, 1.5, LOGITS.shape)
    assert diagnose(CLASSES, [LOGITS], [coarse]) == []
    assert diagnose(CLASSES, [LOGITS], [np.full_like(LOGITS, np.nan)]) == []


def test_mask_geometry_is_told_from_scores_and_from_classes() -> None:
    task = SegmentationTask(classes=3)
    scores = np.repeat(np.repeat(RNG.normal(size=(4, 3, 4, 4)), 4, 2), 4, 3)
    for turned, word in (
        (np.swapaxes(scores, -1, -2), "transposed"),
        (scores[..., ::-1], "mirrored"),
        (scores[..., ::-1, :], "upside down"),
    ):
        for answer in (turned, turned.argmax(axis=1)):
            (finding,) = diagnose(task, [scores], [answer])
            assert finding.name == "mask-geometry"
            assert word in finding.detail
    assert diagnose(task, [scores], [scores + RNG.normal(0, 0.5, scores.shape)]) == []


COUNT = 40
DETECTION = DetectionTask(
    classes=4,
    activation="sigmoid",
    anchors=AnchorsRecord(path="anchors.f32", count=COUNT),
    score_threshold=0.3,
)
CENTERS = RNG.uniform(10, 90, (COUNT, 2))
ANCHORS = np.concatenate([CENTERS - 9, CENTERS + 9], axis=1).astype(np.float32)
HEADS = [
    RNG.normal(0, 0.3, (3, COUNT, 4)).astype(np.float32),
    RNG.normal(-1.5, 1.5, (3, COUNT, 4)).astype(np.float32),
]


def detected(iou: float = 0.5) -> list[np.ndarray]:
    """What a file with NMS inside answers: ``[3, K, 4]``, ``[3, K]``, ``[3, K]``."""
    task = msgspec.structs.replace(DETECTION, iou_threshold=iou)
    found = []
    for row in range(3):
        every = candidates(task, ANCHORS, [head[row : row + 1] for head in HEADS])
        keep = np.zeros(len(every.scores), np.float32)
        keep[suppress(task, every)] = 1.0
        size = 4 * COUNT - len(keep)
        found.append(
            (
                np.pad(every.boxes, ((0, size), (0, 0))),
                np.pad(every.scores * keep, (0, size)),
                np.pad(every.classes, (0, size)),
            )
        )
    return [np.stack(one) for one in zip(*found, strict=True)]


def test_boxes_tell_class_offset_row_offset_and_wrong_overlap() -> None:
    boxes, scores, classes = detected()

    def named_as(*answer: np.ndarray) -> list[str]:
        return names(diagnose(DETECTION, HEADS, answer, ANCHORS))

    assert float(box_iou(ANCHORS, ANCHORS)[~np.eye(COUNT, dtype=bool)].max()) > 0.5
    assert named_as(boxes, scores, classes) == []
    assert named_as(boxes, scores, classes + 1) == ["class-offset"]
    assert named_as(np.roll(boxes, 1, axis=1), scores, classes) == ["nms"]
    assert named_as(np.roll(boxes, -1, axis=1), scores, classes) == ["nms"]
    loose = diagnose(DETECTION, HEADS, detected(0.95), ANCHORS)
    assert names(loose) == ["nms"]
    assert "both stay" in loose[0].detail
    tight = diagnose(DETECTION, HEADS, detected(0.05), ANCHORS)
    assert names(tight) == ["nms"]
    assert "drops too many" in tight[0].detail
    moved = boxes + RNG.normal(0.0, 0.2, boxes.shape).astype(np.float32)
    assert named_as(moved, scores, classes) == []
