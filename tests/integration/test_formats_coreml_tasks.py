"""Core ML for every kind of answer: boxes with NMS, class maps, images from latents, pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.formats.coreml import CoreMLBackend
from converters.jobs import ConvertJob, SourceRequest
from converters.ready import ready_module
from converters.sources import load_source
from converters.tasks import describe_model
from edge_runtime.runtimes.coreml import package_name
from edge_runtime.runtimes.mil.interpreter import Interpreter
from edge_runtime.runtimes.mil.program import read_program

pytestmark = pytest.mark.slow

NETS = """
import numpy as np
import torch
from torch import nn
from converters.sources import Detector

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.Hardswish())
        self.boxes, self.scores = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 6, 1)

    def forward(self, x):
        x = self.body(x)
        flat = lambda y, n: y.permute(0, 2, 3, 1).reshape(x.shape[0], -1, n)
        return flat(self.boxes(x), 4), flat(self.scores(x), 3) * 4

def detector():
    torch.manual_seed(0)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 4.0 + 2
    boxes = [np.r_[c - h, c + h] for c in grid for h in (5.0, 7.0)]
    return Detector(module=Heads(), anchors=np.array(boxes, np.float32), classes=3,
                    activation="sigmoid")

def mask():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1),
                         nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))

def generator():
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(20, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32),
        nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.InstanceNorm2d(16, affine=True),
        nn.LeakyReLU(0.2), nn.Conv2d(16, 12, 3, 1, 1), nn.PixelShuffle(2), nn.Tanh())

class Auto(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottleneck = nn.Conv2d(3, 8, 4, 4), nn.Linear(8 * 64, 6)
        self.up = nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, x):
        y = self.down(x).relu()
        return torch.sigmoid(self.up(y)), self.bottleneck(y.flatten(1))

def auto():
    torch.manual_seed(0)
    return Auto()
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "task_nets.py"
    path.write_text(NETS)
    return path


def _job(nets: Path, out: Path, name: str, task: Any, precision: Any, **more: Any) -> ConvertJob:
    out.mkdir(parents=True, exist_ok=True)
    latent = (20, 1, 1) if task == "generation" else None
    request = SourceRequest(
        source=f"{nets}:{name}", task=task, weights="random:0", latent_shape=latent,
        preprocess=None if latent else "unit", input_height=None if latent else 32,
        input_width=None if latent else 32, score_threshold=0.3 if task == "detection" else None,
    )  # fmt: skip
    source = load_source(request)
    shape = describe_model(source, request)
    return ConvertJob(
        source=request, format="coreml", precision=precision, out_dir=str(out),
        inputs=shape.inputs, outputs=shape.outputs, task=shape.task,
        preprocess=source.preprocess, **more,
    )  # fmt: skip


def _run(job: ConvertJob, x: np.ndarray) -> tuple[Any, dict[str, np.ndarray], list[np.ndarray]]:
    """The artifact, what the file answers and what the module answers."""
    import torch

    with torch.no_grad():
        answer = ready_module(job).module(torch.from_numpy(x.astype(np.float32)))
    artifact = CoreMLBackend().convert(job)
    program = read_program(Path(job.out_dir) / artifact.path)
    answers = answer if isinstance(answer, tuple) else (answer,)
    actual = Interpreter(program).run({job.inputs[0].name: x})
    names = [package_name(spec.name, [job.inputs[0].name]) for spec in artifact.outputs]
    assert list(actual) == names
    actual = {spec.name: actual[n] for spec, n in zip(artifact.outputs, names, strict=True)}
    for spec in artifact.outputs:
        spec.check(actual[spec.name].astype(spec.dtype))
    return artifact, actual, [one.numpy() for one in answers]


def _decibels(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = ((expected - actual) ** 2).sum()
    return float(10 * np.log10((expected**2).sum() / max(noise, 1e-30)))


def test_boxes_after_nms_in_the_graph_are_the_modules(nets: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((1, 3, 32, 32)).astype(np.float32)
    _, actual, expected = _run(
        _job(nets, tmp_path / "32", "detector", "detection", "fp32", in_graph=("nms",)), x
    )
    assert (expected[1] > 0).sum() >= 5
    for name, wanted in zip(("boxes", "scores", "classes"), expected, strict=True):
        np.testing.assert_allclose(actual[name], wanted, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "int8w"])
def test_decoding_and_nms_stay_in_fp32(nets: Path, tmp_path: Path, precision: str) -> None:
    job = _job(nets, tmp_path, "detector", "detection", precision, in_graph=("nms",))
    artifact = CoreMLBackend().convert(job)
    program = read_program(Path(job.out_dir) / artifact.path)
    kinds = {op.op_type: [] for op in program.operations}
    for op in program.operations:
        kinds[op.op_type].append(op.outputs[0][1].dtype)
    assert set(kinds["conv"]) == {"float16"}
    for op_type in ("topk", "exp", "minimum", "maximum", "matmul"):
        assert set(kinds[op_type]) == {"float32"}, op_type
    if precision == "int8w":
        assert len(kinds.get("constexpr_affine_dequantize", [])) == 3


def test_class_map_is_int32_and_the_reference_argmax(nets: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((1, 3, 32, 32)).astype(np.float32)
    artifact, actual, expected = _run(
        _job(nets, tmp_path, "mask", "segmentation", "fp16", in_graph=("argmax",)), x
    )
    assert artifact.outputs[0].dtype == "int32"
    assert actual["classes"].dtype == np.int32
    assert (actual["classes"] == expected[0]).mean() > 0.97


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 90), ("fp16", 45), ("int8", 20)])
def test_generator_of_transposed_convolutions(
    nets: Path, tmp_path: Path, precision: str, floor: float
) -> None:
    latents = np.random.default_rng(2).normal(size=(24, 20, 1, 1)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents[1:])
    job = _job(
        nets, tmp_path, "generator", "generation", precision,
        calibration=str(tmp_path / "latents.npy"),
    )  # fmt: skip
    _, actual, expected = _run(job, latents[:1])
    assert _decibels(expected[0], actual["image"]) > floor


def test_two_answers_keep_their_names_and_order(nets: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(3).random((1, 3, 32, 32)).astype(np.float32)
    for precision, floor in (("fp32", 90), ("int4w", 10)):
        job = _job(nets, tmp_path / precision, "auto", "reconstruction", precision)
        _, actual, expected = _run(job, x)
        for name, wanted in zip(("image", "latent"), expected, strict=True):
            assert _decibels(wanted, actual[name]) > floor, (precision, name)


def test_pixels_in_are_normalized_in_the_graph(nets: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (1, 3, 32, 32)).astype(np.uint8)
    job = _job(nets, tmp_path, "auto", "reconstruction", "fp16", input_mode="uint8")
    artifact, actual, expected = _run(job, pixels)
    assert artifact.inputs[0].dtype == "uint8"
    assert _decibels(expected[0], actual["image"]) > 45
