"""A real ImageNet net on real photos: three formats proven, four silent mistakes caught.

The data lie beside the checkout and are for evaluation only; without them these tests are
skipped by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.preprocess import NAMED
from tests.support.digits import nearfar, only
from tests.support.mend import change_variant, mend

DATA = Path(__file__).parents[3] / "shared" / "data"
IMAGES = DATA / "images" / "imagenet"
LABELS = DATA / "images" / "imagenet_labels.csv"
NETS = DATA / "weights" / "nets.py"
WEIGHTS = DATA / "weights" / "mobilenet_v1_025_imagenet.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared_data,
    pytest.mark.skipif(not WEIGHTS.exists(), reason="../shared/data is not there"),
]


def _convert(target: Path, source: Path, *extra: str) -> Path:
    done = nearfar(
        "convert", f"{source}:mobilenet_v1_025", "--weights", WEIGHTS, "--preprocess", "tf",
        "--input-size", "224", *extra, "-o", target, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(
        tmp_path_factory.mktemp("bundle") / "b", NETS,
        "--calib", str(IMAGES), "--calib-labels", str(LABELS), "--calib-split", "calib",
    )  # fmt: skip


def _verify(bundle: Path, report: Path) -> tuple[int, dict[str, dict[str, object]]]:
    done = nearfar(
        "verify", bundle, "--eval", IMAGES, "--labels", LABELS, "--split", "eval",
        "--json", report, "--quiet",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    document = json.loads(report.read_text())
    return done.returncode, {entry["id"]: entry for entry in document["variants"]}


def test_every_variant_is_proven_on_the_evaluation_photos(bundle: Path, tmp_path: Path) -> None:
    status, variants = _verify(bundle, tmp_path / "v.json")
    assert status == 0
    assert len(variants) == 8
    for entry in variants.values():
        assert entry["images"] == 186
        if entry["precision"] == "fp32":
            assert entry["agreement"] >= 0.995
            assert entry["sqnr_db"] > 95
        elif entry["precision"] == "int8":
            assert entry["agreement"] >= 0.86
            assert entry["sqnr_db"] > 20, "rounding by effect; nearest rounding leaves 13 dB"
            assert entry["size_ratio"] < 0.35


def _record(name: str | None) -> Callable[[Variant], Variant]:
    def change(variant: Variant) -> Variant:
        record = variant.preprocess
        if name is None:
            record = msgspec.structs.replace(record, color="BGR")
        else:
            record = msgspec.structs.replace(record, normalization=NAMED[name][1])
        return msgspec.structs.replace(variant, preprocess=record)

    return change


def test_silent_mistake_in_a_preprocessing_record_fails(bundle: Path, tmp_path: Path) -> None:
    """BGR, torchvision's normalization and x/255; the first in the coarsest precision too."""
    wrong = {
        "tflite-fp32": "torchvision", "tflite-fp16": "unit", "tflite-int8": None,
        "torchscript-int8": "unit",
    }  # fmt: skip
    copy = only(bundle, tmp_path / "b", *wrong, "torchscript-fp32")
    for variant_id, name in wrong.items():
        mend(copy, partial(change_variant, variant_id=variant_id, change=_record(name)))
    status, variants = _verify(copy, tmp_path / "v.json")
    assert status == 1
    assert {key for key, entry in variants.items() if not entry["passed"]} == set(wrong)


def test_symmetric_padding_planted_in_a_variant_fails(bundle: Path, tmp_path: Path) -> None:
    """TensorFlow pads stride-2 convolutions right and bottom only; most ports forget."""
    source = tmp_path / "nets.py"
    text = NETS.read_text()
    assert text.count("(0, 1, 0, 1)") == 1
    source.write_text(text.replace("(0, 1, 0, 1)", "(1, 1, 1, 1)"))
    wrong = _convert(
        tmp_path / "wrong", source, "--to", "tflite", "--precision", "fp32,int8",
        "--calib", str(IMAGES), "--calib-labels", str(LABELS), "--calib-split", "calib",
    )  # fmt: skip
    planted = ("tflite-fp32", "tflite-int8")
    copy = only(bundle, tmp_path / "b", *planted, "torchscript-int8")
    for variant_id in planted:
        path = Bundle.open(bundle).manifest.variant(variant_id).path
        shutil.copyfile(wrong / path, copy / path)
    mend(copy)
    status, variants = _verify(copy, tmp_path / "v.json")
    assert status == 1
    assert {key for key, entry in variants.items() if not entry["passed"]} == set(planted)


def test_wrong_preprocess_at_conversion_fails_with_labels(tmp_path: Path) -> None:
    done = nearfar(
        "convert", f"{NETS}:mobilenet_v1_025", "--weights", WEIGHTS, "--preprocess", "unit",
        "--input-size", "224", "--to", "torchscript", "--precision", "fp32",
        "-o", tmp_path / "b", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = nearfar(
        "verify", tmp_path / "b", "--eval", IMAGES, "--labels", LABELS, "--split", "eval",
        "--json", tmp_path / "v.json", "--quiet",
    )  # fmt: skip
    assert done.returncode == 1
    report = json.loads((tmp_path / "v.json").read_text())
    failed = {check["name"]: check["detail"] for check in report["checks"] if not check["passed"]}
    assert "'tf'" in failed["preprocess"]
