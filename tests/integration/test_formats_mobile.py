"""Small nets through real conversions and real interpreters: .tflite and .ptl."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from converters.formats.census import census
from converters.formats.engine_check import ratio_db
from converters.formats.metadata import read_metadata
from converters.jobs import Artifact, ConvertJob, JobResult, SourceRequest
from edge_runtime.contract.manifest import Quality, Variant
from edge_runtime.contract.tensors import canonical
from edge_runtime.runtimes.base import find_runtime

pytestmark = pytest.mark.slow

NETS = '''
import torch, torch.nn.functional as F
from torch import nn

class Clamps(nn.Module):
    """Every form of ReLU6; one that fuses with nothing, one behind a scalar."""
    def __init__(self):
        super().__init__()
        self.c1, self.a1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU6()
        self.b1 = nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 16, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(16)
        self.c3, self.c4 = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 10)
    def forward(self, x):
        x = F.relu6(self.b2(self.c2(self.a1(self.b1(self.c1(x))))))
        x = torch.clamp(self.c3(x), 0, 6)
        return self.fc((F.hardtanh(self.c4(x) * 2, 0.0, 6.0) + x).mean((2, 3)))

class PRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.PReLU(16), nn.AdaptiveAvgPool2d(1),
                                 nn.Flatten(), nn.Linear(16, 10))
    def forward(self, x): return self.net(x)

class Swishes(nn.Module):
    """Hard swish as a module, as a function, and behind a sum."""
    def __init__(self):
        super().__init__()
        self.c1, self.a1 = nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish()
        self.c2, self.c3 = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 10)
    def forward(self, x):
        x = self.a1(self.c1(x) * 6)
        x = F.hardswish(x + self.c2(x) * 4)
        return self.fc(F.hardswish(self.c3(x)).mean((2, 3)))

class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(),
                                 nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.mu, self.fc = nn.Linear(512, 12), nn.Linear(12, 512)
        self.dec = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                                 nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid())
    def forward(self, x):
        latent = self.mu(self.enc(x).flatten(1))
        return self.dec(F.relu(self.fc(latent)).view(-1, 8, 8, 8)), latent

def _settled(module):
    torch.manual_seed(7)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.uniform_(-0.3, 0.3); one.running_var.uniform_(0.5, 1.5)
    return module
def clamps(): return _settled(Clamps())
def prelu(): return _settled(PRelu())
def swishes(): return _settled(Swishes())
def vae(): return _settled(Vae())
'''


class Kit:
    """Converts in child processes, runs files through ``edge_runtime.runtimes``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nets.py").write_text(NETS)
        self.images = np.random.default_rng(0).uniform(0, 1, (12, 3, 32, 32)).astype(np.float32)
        np.save(folder / "calibration.npy", self.images[:8])

    def job(self, net: str, form: str, precision: str, name: str, **more: Any) -> ConvertJob:
        from converters.sources import load_source
        from converters.tasks import describe_model

        task = "reconstruction" if net == "vae" else "classification"
        request = SourceRequest(
            source=f"{self.folder / 'nets.py'}:{net}", task=task, weights="random:0",
            preprocess="unit", input_height=32, input_width=32,
        )  # fmt: skip
        source = load_source(request)
        self.module = source.module
        shape = describe_model(source, request)
        out = self.folder / name
        out.mkdir()
        return ConvertJob(
            source=request, format=form, precision=precision, out_dir=str(out),
            inputs=shape.inputs, outputs=shape.outputs, task=shape.task,
            calibration=str(self.folder / "calibration.npy"), preprocess=source.preprocess,
            metadata='{"made": "here"}', **more,
        )  # fmt: skip

    def convert(self, job: ConvertJob) -> JobResult:
        out = Path(job.out_dir)
        (out / "job.json").write_bytes(msgspec.json.encode(job))
        subprocess.run(
            [sys.executable, "-m", "converters.worker", out / "job.json", out / "result.json"],
            capture_output=True, timeout=300, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return msgspec.json.decode((out / "result.json").read_bytes(), type=JobResult)

    def done(self, job: ConvertJob) -> tuple[Artifact, Path]:
        result = self.convert(job)
        assert isinstance(result.answer, Artifact), result.error_detail
        return result.answer, Path(job.out_dir) / result.answer.path

    def ratios(self, job: ConvertJob, artifact: Artifact, path: Path) -> list[float]:
        """dB of each output against torch, over images that calibrated nothing."""
        import torch

        figures = {"sqnr_db_mean": 0.0, "sqnr_db_min": 0.0, "max_abs": 0.0, "size_ratio": 1.0}
        variant = Variant(
            id="v", format=job.format, precision=job.precision, path=path.name, sha256="0" * 64,
            size_bytes=1, inputs=artifact.inputs, outputs=artifact.outputs,
            preprocess=artifact.preprocess, min_os=artifact.min_os, min_runtime="x",
            peak_ram_bytes=0, accelerators=artifact.accelerators,
            quality=Quality(data="golden", images=0, passed=True, **figures),
        )  # fmt: skip
        loaded = find_runtime(job.format).load(path, variant)
        expected: list[list[Any]] = [[] for _ in artifact.outputs]
        given: list[list[Any]] = [[] for _ in artifact.outputs]
        for image in np.rint(self.images[8:] * 255) / 255:
            one = image[None].astype(np.float32)
            with torch.no_grad():
                answer = self.module(torch.from_numpy(one))
            for at, part in enumerate(answer if isinstance(answer, tuple) else (answer,)):
                expected[at].append(part.numpy())
            spec = artifact.inputs[0]
            pixels = np.rint(one * 255) if spec.dtype == "uint8" else one
            pixels = pixels.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else pixels
            answers = loaded.run([np.ascontiguousarray(pixels, dtype=spec.dtype)])
            for at, (array, output) in enumerate(zip(answers, artifact.outputs, strict=True)):
                given[at].append(canonical(array, output))
        return [ratio_db(one, two) for one, two in zip(expected, given, strict=True)]


def operators(path: Path) -> list[str]:
    """Of the file, in order."""
    from converters.formats.tflite_file import operator_names, read_model

    model = read_model(path.read_bytes())
    return [name for graph in model.subgraphs for name in operator_names(model, graph)]


def delegated_parts(path: Path) -> int:
    """How many pieces of the graph XNNPACK takes; 1 when nothing interrupts it."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    return [one["op_name"] for one in interpreter._get_ops_details()].count("DELEGATE")


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def test_every_form_of_relu6_is_right_in_a_quantized_ptl(kit: Kit) -> None:
    job = kit.job("clamps", "torchscript", "int8", "a")
    artifact, path = kit.done(job)
    assert min(kit.ratios(job, artifact, path)) > 25
    assert {"cap_relu6", "wrong_kernels_in_float"} <= set(artifact.rewrites)
    counted = census(path)
    assert counted is not None
    assert counted.quantized_share > 0.9
    assert counted.ops["quantized::conv2d_relu"] == 3
    assert read_metadata(path) == '{"made": "here"}'


def test_prelu_is_right_in_a_quantized_ptl(kit: Kit) -> None:
    job = kit.job("prelu", "torchscript", "int8", "a")
    artifact, path = kit.done(job)
    assert min(kit.ratios(job, artifact, path)) > 25


def test_dynamic_ptl_that_would_quantize_next_to_nothing_is_refused(kit: Kit) -> None:
    result = kit.convert(kit.job("clamps", "torchscript", "int8-dyn", "a"))
    assert result.error_code == "precision_refused"
    assert "no dynamic convolutions" in result.error_detail


def test_name_to_keep_that_is_not_there_is_refused(kit: Kit) -> None:
    result = kit.convert(kit.job("clamps", "torchscript", "int8", "a", keep=("c7",)))
    assert result.error_code == "config"
    assert "c7" in result.error_detail


def test_ptl_takes_pixels_keeps_a_layer_and_is_the_same_twice(kit: Kit) -> None:
    options = {"input_mode": "uint8", "keep": ("c4",)}
    job = kit.job("clamps", "torchscript", "int8", "a", **options)
    artifact, path = kit.done(job)
    assert (artifact.inputs[0].dtype, artifact.inputs[0].shape) == ("uint8", (1, 3, 32, 32))
    assert artifact.kept == ("c4",)
    assert min(kit.ratios(job, artifact, path)) > 25
    counted = census(path)
    assert counted is not None
    assert counted.weight_bytes["float32"] >= 16 * 16 * 9 * 4
    _, again = kit.done(kit.job("clamps", "torchscript", "int8", "b", **options))
    assert again.read_bytes() == path.read_bytes()


def test_two_outputs_and_folded_transposed_convolutions_in_tflite(kit: Kit) -> None:
    exact = kit.job("vae", "tflite", "fp32", "fp32")
    artifact, base = kit.done(exact)
    assert [(spec.name, spec.layout) for spec in artifact.outputs] == [
        ("image", "NHWC"), ("latent", "NC"),
    ]  # fmt: skip
    assert "fold_batch_norm" in artifact.rewrites
    assert min(kit.ratios(exact, artifact, base)) > 90
    for precision in ("int8", "int4w"):
        job = kit.job("vae", "tflite", precision, precision, base=str(base))
        artifact, path = kit.done(job)
        assert min(kit.ratios(job, artifact, path)) > (25 if precision == "int8" else 10)
        counted = census(path)
        assert counted is not None
        assert counted.quantized_share > 0.9
        assert read_metadata(path) == '{"made": "here"}'


def test_hard_swish_in_int8_stays_on_the_delegate(kit: Kit) -> None:
    exact = kit.job("swishes", "tflite", "fp32", "fp32")
    artifact, base = kit.done(exact)
    assert operators(base).count("HARD_SWISH") == 3
    job = kit.job("swishes", "tflite", "int8", "int8", base=str(base), keep=("c2",))
    artifact, path = kit.done(job)
    assert "split_hard_swish" in artifact.rewrites
    assert min(kit.ratios(job, artifact, path)) > 30
    assert "HARD_SWISH" not in operators(path)
    assert artifact.kept == ("c2",)


def test_all_of_an_int8_net_with_hard_swish_is_one_delegated_part(kit: Kit) -> None:
    _, path = kit.done(kit.job("swishes", "tflite", "int8", "int8"))
    assert delegated_parts(path) == 1


def test_tflite_takes_pixels_and_keeps_a_layer(kit: Kit) -> None:
    job = kit.job("clamps", "tflite", "int8", "a", input_mode="uint8", keep=("c4",))
    artifact, path = kit.done(job)
    assert (artifact.inputs[0].dtype, artifact.inputs[0].shape) == ("uint8", (1, 32, 32, 3))
    assert artifact.kept == ("c4",)
    assert min(kit.ratios(job, artifact, path)) > 25
    counted = census(path)
    assert counted is not None
    assert counted.quantized_share > 0.99, "its weights take 8 bits, as those of the others"
    whole, path_whole = kit.done(kit.job("clamps", "tflite", "int8", "b", input_mode="uint8"))
    assert whole.kept == ()
    # Its weights and its input are expanded; no operator falls out of the delegate for it.
    assert operators(path).count("DEQUANTIZE") == operators(path_whole).count("DEQUANTIZE") + 2
    assert delegated_parts(path) == delegated_parts(path_whole) == 1
