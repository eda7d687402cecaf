"""The same model, converted twice on different paths: every file of every format is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_runtime.bundle import Bundle
from tests.support import padded_digits
from tests.support.digits import checked, render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PRECISIONS = "fp32,fp16,int8,int8w"


def _convert(folder: Path, *, jobs: int) -> Bundle:
    """All from below ``folder``: source, weights, calibration images and bundle."""
    folder.mkdir(parents=True)
    source = folder / "net.py"
    shutil.copyfile(str(padded_digits.__file__), source)
    padded_digits.save_weights(folder / "weights.safetensors")
    checked(
        "convert", f"{source}:net", "--weights", folder / "weights.safetensors",
        "--preprocess", "torchvision", "--input-size", "32", "--name", "twice",
        "--calib", render(folder / "calib", "calib", 32), "--to", "all",
        "--precision", PRECISIONS, "--jobs", str(jobs), "-o", folder / "b", "--quiet",
    )  # fmt: skip
    return Bundle.open(folder / "b")


def test_two_conversions_on_two_paths_give_identical_digests_in_all_formats(
    tmp_path: Path,
) -> None:
    """Also of the reference, golden vectors and calibration record; and however many at a time."""
    first = _convert(tmp_path / "here", jobs=2)
    second = _convert(tmp_path / "elsewhere" / "much deeper", jobs=1)
    digests = {variant.id: variant.sha256 for variant in first.manifest.variants}
    assert set(digests) == {
        "torchscript-fp32", "torchscript-int8",
        "tflite-fp32", "tflite-fp16", "tflite-int8", "tflite-int8w",
        "coreml-fp32", "coreml-fp16", "coreml-int8", "coreml-int8w",
        "executorch-fp32", "executorch-int8",
    }  # fmt: skip
    assert {variant.id: variant.sha256 for variant in second.manifest.variants} == digests
    files = {entry.path: entry.sha256 for entry in first.manifest.files}
    assert {entry.path: entry.sha256 for entry in second.manifest.files} == files
