"""What fp16 cannot hold: a package in half precision that would answer infinity's bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.formats.coreml import CoreMLBackend
from converters.jobs import ConvertJob, SourceRequest
from converters.sources import load_source
from edge_runtime.contract.manifest import Precision
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ImageToImageTask
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.mil.interpreter import Interpreter
from edge_runtime.runtimes.mil.program import read_program

pytestmark = pytest.mark.slow

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """A normalization that is written out: its variance of 0..255 passes 65504."""

    def __init__(self, gain):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 3, 3, padding=1, bias=False)
        self.gain = gain

    def forward(self, x):
        x = self.first(x * self.gain)
        away = x - x.mean((2, 3), keepdim=True)
        variance = (away ** 2).mean((2, 3), keepdim=True)
        return self.last((away / torch.sqrt(variance + 1e-3)).relu())

def loud():
    torch.manual_seed(0)
    return Net(8.0)

def quiet():
    torch.manual_seed(0)
    return Net(0.01)
'''
SHAPE = (1, 3, 16, 16)


def _pixels(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE[1:]))
    return drawn.astype(np.float32)


def _convert(folder: Path, net: str, precision: Precision, calibrated: bool) -> tuple[Any, ...]:
    """The file's decibels on inputs it was not calibrated with, and its rewrites."""
    import torch

    source = folder / "loud_net.py"
    source.write_text(NET)
    calibration = folder / "calibration.npy"
    np.save(calibration, _pixels(8, 1))
    request = SourceRequest(
        source=f"{source}:{net}", task="image_to_image", weights="random:0", preprocess="raw",
        input_height=SHAPE[2], input_width=SHAPE[3],
    )  # fmt: skip
    job = ConvertJob(
        source=request,
        format="coreml",
        precision=precision,
        out_dir=str(folder),
        inputs=(TensorSpec(name="image", dtype="float32", shape=SHAPE, layout="NCHW"),),
        outputs=(TensorSpec(name="image", dtype="float32", shape=SHAPE, layout="NCHW"),),
        task=ImageToImageTask(),
        preprocess=named("raw", SHAPE[2], SHAPE[3]),
        calibration=str(calibration) if calibrated else None,
        metadata='{"format":"nearfar.model","name":"loud","variant":"v","version":"1.0.0"}',
    )
    artifact = CoreMLBackend().convert(job)
    interpreter = Interpreter(read_program(folder / artifact.path))
    given = _pixels(4, 2)
    with torch.no_grad():
        expected = load_source(request).module(torch.from_numpy(given)).numpy()
    answers = [interpreter.run({"image": one[None]})["image_out"] for one in given]
    wrong = np.concatenate(answers) - expected
    return float(10 * np.log10((expected**2).sum() / (wrong**2).sum())), artifact.rewrites


@pytest.mark.parametrize(
    ("precision", "calibrated", "floor_db"),
    [("fp16", False, 50), ("fp16", True, 50), ("int8", True, 25)],
)
def test_a_variance_beyond_fp16_is_computed_in_fp32(
    tmp_path: Path, precision: Precision, calibrated: bool, floor_db: float
) -> None:
    decibels, rewrites = _convert(tmp_path, "loud", precision, calibrated)
    assert "keep_wide_values_fp32" in rewrites
    assert decibels > floor_db


def test_what_fp16_holds_is_left_in_fp16(tmp_path: Path) -> None:
    decibels, rewrites = _convert(tmp_path, "quiet", "fp16", True)
    assert "keep_wide_values_fp32" not in rewrites
    assert decibels > 45
