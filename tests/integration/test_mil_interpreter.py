"""Core ML programs on Linux: what coremltools writes, the interpreter computes as torch does."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.runtimes.mil.program import read_program
from edge_runtime.runtimes.mil.schema import import_coremltools

pytestmark = pytest.mark.slow


def _modules() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """One small net for each operator family, and an input shape."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Fn(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Any) -> Any:
            return self.function(x)

    image = (1, 4, 13, 11)
    return {
        "conv stride dilation groups": (
            nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2),
            image,
        ),
        "conv same": (nn.Conv2d(4, 6, 4, padding="same"), image),
        "conv asymmetric pad": (
            nn.Sequential(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(4, 5, 3)),
            image,
        ),
        "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), image),
        "conv transpose": (
            nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
            image,
        ),
        "conv transpose groups": (nn.ConvTranspose2d(4, 4, 4, stride=2, groups=2), image),
        "conv1d": (nn.Conv1d(4, 5, 3, padding=1), (1, 4, 9)),
        "max pool": (nn.MaxPool2d(3, stride=2, padding=1), image),
        "max pool ceil": (nn.MaxPool2d(2, stride=2, ceil_mode=True), image),
        "avg pool": (nn.AvgPool2d(3, stride=2, padding=1), image),
        "avg pool no pad count": (nn.AvgPool2d(3, padding=1, count_include_pad=False), image),
        "adaptive pool": (nn.AdaptiveAvgPool2d(1), image),
        "batch norm": (nn.BatchNorm2d(4), image),
        "instance norm": (nn.InstanceNorm2d(4, affine=True), image),
        "layer norm": (nn.LayerNorm([13, 11]), image),
        "linear": (nn.Linear(11, 7), image),
        "relu": (nn.ReLU(), image),
        "relu6": (nn.ReLU6(), image),
        "named relu6": (Fn(F.relu6), image),
        "leaky relu": (nn.LeakyReLU(0.2), image),
        "prelu": (nn.PReLU(4), image),
        "elu": (nn.ELU(0.7), image),
        "hardswish": (nn.Hardswish(), image),
        "hardsigmoid": (nn.Hardsigmoid(), image),
        "silu": (nn.SiLU(), image),
        "gelu": (nn.GELU(), image),
        "gelu tanh": (nn.GELU(approximate="tanh"), image),
        "tanh": (nn.Tanh(), image),
        "softplus": (nn.Softplus(), image),
        "softmax": (nn.Softmax(dim=1), image),
        "log softmax": (nn.LogSoftmax(dim=1), image),
        "pixel shuffle": (nn.PixelShuffle(2), image),
        "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), image),
        "bilinear corners": (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            image,
        ),
        "nearest": (nn.Upsample(scale_factor=2, mode="nearest"), image),
        "reflect pad": (nn.ReflectionPad2d((1, 2, 3, 0)), image),
        "replicate pad": (nn.ReplicationPad2d((2, 1, 0, 3)), image),
        "mean": (Fn(lambda x: x.mean((2, 3))), image),
        "sum keep": (Fn(lambda x: x.sum(1, keepdim=True)), image),
        "amax": (Fn(lambda x: x.amax((2, 3))), image),
        "argmax": (Fn(lambda x: x.argmax(1).float()), image),
        "slice": (Fn(lambda x: x[:, 1:3, ::2, -5:]), image),
        "index": (Fn(lambda x: x[:, 2]), image),
        "concat": (Fn(lambda x: torch.cat([x, x * 2, x[:, :1]], 1)), image),
        "split": (Fn(lambda x: x.split([1, 3], 1)[1]), image),
        "stack": (Fn(lambda x: torch.stack([x, -x], 2)), image),
        "transpose reshape": (Fn(lambda x: x.permute(0, 2, 3, 1).reshape(1, -1, 4)), image),
        "squeeze": (Fn(lambda x: x[:, :, :1].squeeze(2).unsqueeze(1)), image),
        "arithmetic": (Fn(lambda x: (x - 1) / (x.abs() + 2) + x**2 * 0.5), image),
        "min max": (Fn(lambda x: torch.minimum(torch.maximum(x, x * 0.5), x + 1)), image),
        "compare": (Fn(lambda x: torch.where(x > 0.1, x, -x)), image),
        "exp log sqrt": (Fn(lambda x: torch.log(torch.exp(x) + 1) + torch.sqrt(x.abs())), image),
        "rsqrt": (Fn(lambda x: torch.rsqrt(x.abs() + 1)), image),
        "matmul": (Fn(lambda x: x @ x.transpose(2, 3)), image),
        "topk": (Fn(lambda x: x.flatten(1).topk(5).values), image),
        "gather": (Fn(lambda x: x[:, [2, 0, 3]]), image),
        "tile": (Fn(lambda x: x.repeat(1, 2, 1, 1)), image),
    }


def _package(module: Any, shape: tuple[int, ...], folder: Path, *, half: bool = False) -> Path:
    import torch

    coremltools = import_coremltools()
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        traced = torch.jit.trace(module.eval(), torch.zeros(shape), check_trace=False)
        model = coremltools.convert(
            traced,
            inputs=[coremltools.TensorType(name="x", shape=shape, dtype=np.float32)],
            outputs=[coremltools.TensorType(name="y", dtype=np.float32)],
            convert_to="mlprogram",
            compute_precision=coremltools.precision.FLOAT16
            if half
            else coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS17,
            skip_model_load=True,
        )
    path = folder / "m.mlpackage"
    model.save(str(path))
    return path


def test_every_operator_family_agrees_with_torch(tmp_path: Path) -> None:
    import torch

    from edge_runtime.runtimes.mil.interpreter import Interpreter

    torch.manual_seed(0)
    seen: set[str] = set()
    failures = []
    for number, (name, (module, shape)) in enumerate(_modules().items()):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        folder = tmp_path / str(number)
        folder.mkdir()
        interpreter = Interpreter(read_program(_package(module, shape, folder)))
        seen.update(interpreter.operator_types)
        for draw in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(draw))
            with torch.no_grad():
                expected = module(x).numpy()
            actual = interpreter.run({"x": x.numpy()})["y"]
            if actual.shape != expected.shape or not np.allclose(
                actual, expected, rtol=1e-4, atol=1e-5
            ):
                failures.append(name)
                break
    assert failures == []
    assert len(seen) >= 45, sorted(seen)


def test_half_precision_is_rounded_after_each_operator(tmp_path: Path) -> None:
    import torch

    from edge_runtime.runtimes.mil.interpreter import Interpreter

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    interpreter = Interpreter(read_program(_package(module, (1, 3, 9, 9), tmp_path, half=True)))
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = module(x).numpy()
    actual = interpreter.run({"x": x.numpy()})["y"]
    np.testing.assert_array_equal(actual, actual.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(actual, exact, atol=5e-3)
    assert (actual != exact).any()


def test_reading_a_package_changes_no_byte_of_it(tmp_path: Path) -> None:
    import torch

    path = _package(torch.nn.ReLU(), (1, 3, 4, 4), tmp_path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    read_program(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_folder_that_is_no_program_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(ModelLoadError):
        read_program(tmp_path / "x.mlpackage")
    model = tmp_path / "x.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model.parent.mkdir(parents=True)
    for data in (b"", b"\x08\x08", b"garbage" * 50):
        model.write_bytes(data)
        with pytest.raises(ModelLoadError):
            read_program(tmp_path / "x.mlpackage")
