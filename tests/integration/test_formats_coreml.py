"""Core ML packages as they are written: precision, iOS, ends, bytes. Run by the interpreter."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.formats.coreml import CoreMLBackend
from converters.formats.coreml_census import census
from converters.jobs import Artifact, ConvertJob, SourceRequest
from edge_runtime.contract.errors import ConfigError, PrecisionRefused
from edge_runtime.contract.manifest import MinOs, Precision
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.mil.interpreter import Interpreter
from edge_runtime.runtimes.mil.program import read_program, read_spec

pytestmark = pytest.mark.slow

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """Depthwise, residual add, concat, squeeze and excite, hard swish, ReLU6, batch norm."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Hardswish())
        self.left = nn.Conv2d(16, 24, 1)
        self.right = nn.Conv2d(16, 24, 3, 1, 1)
        self.gate = nn.Conv2d(48, 48, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.depth(x)
        x = torch.cat([self.left(x), self.right(x).relu()], 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))

def net():
    torch.manual_seed(0)
    built = Net()
    nn.init.uniform_(built.stem[1].running_var, 0.5, 2.0)
    return built
'''
SHAPE = (1, 3, 24, 24)
FLOORS: dict[Precision, float] = {
    "fp32": 100, "fp16": 45, "int8": 22, "int8w": 32, "int4w": 15, "pal4": 13,
    "fp16+sparse": 12, "int8w+sparse": 12,
}  # fmt: skip


def _inputs(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "small_net.py"
    path.write_text(NET)
    np.save(path.with_name("calibration.npy"), _inputs(16, 1))
    return path


def _job(source: Path, out: Path, precision: Precision, **more: Any) -> ConvertJob:
    out.mkdir(parents=True, exist_ok=True)
    return ConvertJob(
        source=SourceRequest(
            source=f"{source}:net", weights="random:0", preprocess="tf",
            input_height=SHAPE[2], input_width=SHAPE[3],
        ),
        format="coreml",
        precision=precision,
        out_dir=str(out),
        inputs=(TensorSpec(name="image", dtype="float32", shape=SHAPE, layout="NCHW"),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 10), layout="NC"),),
        task=ClassificationTask(classes=10),
        preprocess=named("tf", SHAPE[2], SHAPE[3]),
        calibration=str(source.with_name("calibration.npy")),
        metadata='{"format":"nearfar.model","name":"small","variant":"v","version":"1.2.3"}',
        **more,
    )  # fmt: skip


def _write(source: Path, out: Path, precision: Precision, **more: Any) -> tuple[Path, Artifact]:
    artifact = CoreMLBackend().convert(_job(source, out, precision, **more))
    return out / artifact.path, artifact


@cache
def _expected(source: Path, seed: int) -> np.ndarray:
    import torch

    from converters.sources import load_source

    request = SourceRequest(
        source=f"{source}:net", weights="random:0", preprocess="tf",
        input_height=SHAPE[2], input_width=SHAPE[3],
    )  # fmt: skip
    with torch.no_grad():
        return load_source(request).module(torch.from_numpy(_inputs(8, seed))).numpy()


def _decibels(expected: np.ndarray, path: Path, seed: int) -> float:
    interpreter = Interpreter(read_program(path))
    rows = [interpreter.run({"image": one[None]})["logits"] for one in _inputs(8, seed)]
    wrong = np.concatenate(rows) - expected
    return float(10 * np.log10((expected**2).sum() / (wrong**2).sum()))


def test_every_precision_answers_as_the_source_and_says_which_ios_it_needs(
    source: Path, tmp_path: Path
) -> None:
    needed = {"fp32": 17, "int4w": 18, "int8w+sparse": 18}
    sizes = {}
    for precision, floor in FLOORS.items():
        path, artifact = _write(source, tmp_path / precision, precision)
        assert _decibels(_expected(source, 9), path, 9) > floor, precision
        assert artifact.min_os.ios == f"{needed.get(precision, 17)}.0"
        counted = census(path)
        assert (counted.quantized_share > 0.8) is (precision not in ("fp32", "fp16", "fp16+sparse"))
        sizes[precision] = sum(counted.weight_bytes.values())
        if precision == "int8":
            assert counted.ops["quantize"] >= 6
        if precision.endswith("sparse"):
            assert any(name.startswith("prune_") for name in artifact.rewrites)
            assert counted.weight_bytes["uint1"] > 0
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8w"] < 0.7 * sizes["fp16"]
    assert max(sizes["int4w"], sizes["pal4"]) < sizes["int8w"]
    assert sizes["fp16+sparse"] < sizes["fp16"]
    assert sizes["int8w+sparse"] < sizes["int8w"]


def test_older_ios_than_the_precision_needs_is_refused_before_any_work(tmp_path: Path) -> None:
    missing = tmp_path / "no_such_file.py"
    for precision, ios in (("int4w", "17.0"), ("int8", "16.0"), ("int8w+sparse", "17.4")):
        with pytest.raises(PrecisionRefused, match="needs iOS"):
            _write(missing, tmp_path, precision, min_os=MinOs(ios=ios))  # type: ignore[arg-type]


def test_file_is_written_for_the_ios_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    for precision, ios, version in (("fp16", "15.0", 6), ("pal4", "16.0", 7)):
        path, artifact = _write(
            source,
            tmp_path / precision,
            precision,
            min_os=MinOs(ios=ios),  # type: ignore[arg-type]
        )
        assert artifact.min_os.ios == ios
        assert read_spec(path).specificationVersion == version
        assert _decibels(_expected(source, 5), path, 5) > FLOORS[precision]  # type: ignore[index]


def test_image_input_takes_pixels_and_a_classifier_answers_labels_beside_logits(
    source: Path, tmp_path: Path
) -> None:
    labels = ("crane", "b", "crane", *"defghij")
    path, artifact = _write(source, tmp_path, "fp32", input_mode="image", labels=labels)
    spec = read_spec(path)
    assert spec.description.input[0].type.WhichOneof("Type") == "imageType"
    assert [o.name for o in artifact.outputs] == ["logits"]
    pixels = np.random.default_rng(3).integers(0, 256, SHAPE).astype(np.uint8)
    answer = Interpreter(read_program(path)).run({"image": pixels})
    import torch

    from converters.sources import load_source

    module = load_source(_job(source, tmp_path, "fp32").source).module
    with torch.no_grad():
        logits = module(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)).numpy()
    np.testing.assert_allclose(answer["logits"], logits, atol=1e-4)
    scores = np.exp(logits[0]) / np.exp(logits[0]).sum()
    np.testing.assert_allclose(answer["classLabel_probs"], scores, atol=1e-5)
    names = ["crane (0)", "b", "crane (2)", *"defghij"]
    assert answer["classLabel"] == names[int(scores.argmax())]


def test_kept_layers_stay_float_and_an_unknown_name_is_refused(
    source: Path, tmp_path: Path
) -> None:
    path, artifact = _write(source, tmp_path / "kept", "int8", keep=("right", "head"))
    assert artifact.kept == ("right", "head")
    types = [
        op.inputs["weight"].name.endswith("_compressed")
        for op in read_program(path).operations
        if op.op_type in ("conv", "linear")
    ]
    assert types.count(False) == 2
    with pytest.raises(ConfigError, match="no module"):
        _write(source, tmp_path / "none", "int8", keep=("rihgt",))


def test_same_model_gives_the_same_bytes_with_its_metadata(source: Path, tmp_path: Path) -> None:
    first, _ = _write(source, tmp_path / "a", "int4w")
    second, _ = _write(source, tmp_path / "b", "int4w")
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 3
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    metadata = read_spec(first).description.metadata
    assert json.loads(metadata.userDefined["nearfar.json"])["name"] == "small"
    assert metadata.versionString == "1.2.3"
