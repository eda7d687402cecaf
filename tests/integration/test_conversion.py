"""From a trained model to a proven bundle, by the command line, with the zoo's small net."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from converters.dataset import read_dataset
from converters.verify.gates import default_gates
from converters.verify.outcome import Options, Report
from converters.verify.verify import verify_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.manifest import Manifest, Variant
from edge_runtime.contract.preprocess import NAMED
from tests.support.digits import convert_digits, nearfar, only, render
from tests.support.mend import change_variant, mend

pytestmark = pytest.mark.slow

EXPECTED = {
    "torchscript-fp32", "torchscript-int8",
    "tflite-fp32", "tflite-fp16", "tflite-int8",
    "coreml-fp32", "coreml-fp16", "coreml-int8",
}  # fmt: skip


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("calib"), "calib", 64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("test"), "test", 80)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, calibration: Path, scratch: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        return convert_digits(tmp_path_factory.mktemp("bundle"), calibration)


def _verify(bundle: Path, photos: Path, *, labels: bool = False) -> Report:
    data = read_dataset(
        photos, labels=photos / "labels.csv" if labels else None, purpose="evaluation"
    )
    return verify_bundle(
        Bundle.open(bundle), data, Options(gates=default_gates("classification"), jobs=2)
    )


def test_bundle_holds_every_variant_reference_and_golden_vectors(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert {variant.id for variant in manifest.variants} == EXPECTED
    assert all(v.ship and v.quality.passed and v.peak_ram_bytes > 0 for v in manifest.variants)
    assert len(manifest.golden) == 8
    private = {entry.path for entry in manifest.files if not entry.ship}
    assert private == {"reference/model.pt2", "calibration.json"}
    used = json.loads((bundle / "calibration.json").read_text())
    assert manifest.provenance.calibration is not None
    assert manifest.provenance.calibration.images == len(used) == 64


def test_a_conversion_leaves_no_temporary_file(bundle: Path, scratch: Path) -> None:
    assert bundle.is_dir()
    left = {path.name.partition("_")[0] for path in scratch.iterdir()}
    assert left <= {"torchinductor"}, "the cache of torch has one folder a user, for all runs"


def test_no_file_of_the_bundle_names_this_machine(bundle: Path) -> None:
    home = str(Path(__file__).parents[2]).encode()
    for path in bundle.rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data += b"".join(archive.read(name) for name in archive.namelist())
        assert home not in data, path
        assert b"site-packages" not in data, path


def test_verify_passes_and_tells_machines(bundle: Path, photos: Path, tmp_path: Path) -> None:
    done = nearfar(
        "verify", bundle, "--eval", photos, "--labels", photos / "labels.csv",
        "--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["passed"] is True
    assert {entry["id"] for entry in report["variants"]} == EXPECTED
    for entry in report["variants"]:
        assert entry["passed"] is True
        assert entry["reasons"] == []
        assert entry["images"] == 80
        floor = {"fp32": 100.0, "fp16": 40.0, "int8": 25.0}[entry["precision"]]
        assert entry["sqnr_db"] > floor
        assert entry["agreement"] >= (1.0 if entry["precision"] != "int8" else 0.95)
        assert entry["size_ratio"] <= {"fp32": 1.0, "fp16": 0.65, "int8": 0.55}[entry["precision"]]
    suite = ET.parse(tmp_path / "v.xml").getroot()  # noqa: S314  # our own file
    assert suite.attrib["failures"] == "0"
    assert len(suite) == len(EXPECTED) + len(report["checks"])
    assert len(report["checks"]) == 5


def test_int8_weights_are_the_same_integers_in_every_format(bundle: Path) -> None:
    """Chosen once, before any exporter rounds: TFLite and Core ML hold equal int8 tensors."""
    from ai_edge_litert.interpreter import Interpreter

    from edge_runtime.runtimes.mil.program import read_program

    interpreter = Interpreter(str(bundle / "variants" / "tflite-int8.tflite"))
    interpreter.allocate_tensors()
    tflite = []
    for detail in interpreter.get_tensor_details():
        if (
            np.dtype(detail["dtype"]) == np.int8
            and len(detail["quantization"][:1])
            and (len(detail["quantization_parameters"]["scales"]) > 1)
        ):
            weight = interpreter.get_tensor(detail["index"])
            tflite.append(weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight)
    program = read_program(bundle / "variants" / "coreml-int8.mlpackage")
    coreml = [
        np.asarray(op.inputs["quantized_data"].val)
        for op in program.operations
        if op.op_type == "constexpr_affine_dequantize"
    ]
    assert len(tflite) == len(coreml) >= 3

    def key(weight: np.ndarray) -> tuple[int, bytes]:
        return weight.size, np.sort(weight, axis=None).tobytes()

    assert sorted(map(key, tflite)) == sorted(map(key, coreml))


def _set_record(name: str | None = None, *, bgr: bool = False) -> Callable[[Variant], Variant]:
    def change(variant: Variant) -> Variant:
        record = variant.preprocess
        if name is not None:
            color, normalization = NAMED[name]
            record = msgspec.structs.replace(record, color=color, normalization=normalization)
        if bgr:
            record = msgspec.structs.replace(record, color="BGR")
        return msgspec.structs.replace(variant, preprocess=record)

    return change


@pytest.mark.parametrize("names", [("tf", "unit", "caffe"), ("unit", "caffe", "tf")])
def test_wrong_record_of_a_variant_fails_for_its_parity(
    bundle: Path, photos: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Three variants of one file each get another wrong record; a fourth stays sound."""
    wrong = dict(zip(("tflite-fp32", "tflite-fp16", "tflite-int8"), names, strict=True))
    copy = only(bundle, tmp_path / "b", *wrong, "torchscript-fp32")
    for variant_id, name in wrong.items():
        mend(copy, partial(change_variant, variant_id=variant_id, change=_set_record(name)))
    failed = {v.id: v.reasons for v in _verify(copy, photos).variants if not v.passed}
    assert set(failed) == set(wrong)
    for reasons in failed.values():
        assert any("pre-processing 'torchvision'" in reason for reason in reasons)


def test_wrong_record_everywhere_is_caught_by_the_one_inside_model_pt2(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    copy = only(bundle, tmp_path / "b", "tflite-fp32")

    def change(manifest: Manifest) -> Manifest:
        wrong = _set_record("unit")(manifest.variants[0])
        return msgspec.structs.replace(manifest, variants=(wrong,), preprocess=wrong.preprocess)

    mend(copy, change)
    report = _verify(copy, photos)
    assert not report.passed
    assert [check.name for check in report.checks if not check.passed] == ["reference-record"]


def test_unfrozen_mobile_optimization_is_rejected_for_its_parity(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    """The failure that raises no error: optimize_for_mobile on a trace that is not frozen."""
    import torch
    from torch.utils.mobile_optimizer import optimize_for_mobile

    from converters.jobs import SourceRequest
    from converters.sources import load_source

    copy = only(bundle, tmp_path / "b", "torchscript-fp32", "tflite-fp32")
    module = load_source(SourceRequest(source="zoo:digits-small")).module
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.zeros(1, 3, 32, 32))
        broken = optimize_for_mobile(traced)
    variant = Bundle.open(copy).manifest.variant("torchscript-fp32")
    broken._save_for_lite_interpreter(str(copy / variant.path))
    mend(copy)
    report = _verify(copy, photos)
    failed = [v for v in report.variants if not v.passed]
    assert [v.id for v in failed] == ["torchscript-fp32"]
    assert failed[0].sqnr_db is not None
    assert failed[0].sqnr_db < 30


def test_fp32_passed_off_as_int8_is_not_believed(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    copy = only(bundle, tmp_path / "b", "tflite-fp32", "tflite-int8")
    manifest = Bundle.open(copy).manifest
    fp32, int8 = manifest.variant("tflite-fp32"), manifest.variant("tflite-int8")
    shutil.copyfile(copy / fp32.path, copy / int8.path)
    mend(copy)
    failed = {v.id: v.reasons for v in _verify(copy, photos).variants if not v.passed}
    assert set(failed) == {"tflite-int8"}
    assert "only 0% of the weights are stored in 8 bits" in failed["tflite-int8"][0]


def test_swapped_files_and_garbage_are_load_errors_of_their_variant(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    copy = only(bundle, tmp_path / "b", "tflite-fp32", "torchscript-fp32", "coreml-fp32")
    for variant in Bundle.open(copy).manifest.variants:
        path = copy / variant.path
        if path.is_dir():
            path = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
        data = bytearray(path.read_bytes())
        data[: len(data) // 2] = b"\x5a" * (len(data) // 2)
        path.write_bytes(data)
    mend(copy)
    report = _verify(copy, photos)
    assert report.exit_code == 1
    assert all(not v.passed and len(v.reasons) == 1 for v in report.variants)


def test_wrong_preprocess_at_conversion_fails_with_labels(
    photos: Path, tmp_path: Path, calibration: Path
) -> None:
    """Everything agrees with everything; only the labels know."""
    done = nearfar(
        "convert", "zoo:digits-small", "--preprocess", "unit", "--input-size", "32",
        "--to", "torchscript", "--precision", "fp32", "-o", tmp_path / "b", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments = ["verify", tmp_path / "b", "--eval", photos, "--quiet"]
    assert nearfar(*arguments).returncode == 0
    done = nearfar(*arguments, "--labels", photos / "labels.csv", "--json", tmp_path / "v.json")
    assert done.returncode == 1
    report = json.loads((tmp_path / "v.json").read_text())
    failed = [check for check in report["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["preprocess"]
    assert "'torchvision'" in failed[0]["detail"]


def test_calibration_images_cannot_evaluate(
    bundle: Path, calibration: Path, photos: Path, tmp_path: Path
) -> None:
    """By content: a renamed copy among other images is found."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted(photos.glob("*.jpg"))[:3]):
        shutil.copyfile(path, mixed / f"{number}.jpg")
    shutil.copyfile(next(iter(calibration.glob("*.jpg"))), mixed / "innocent.jpg")
    done = nearfar("verify", bundle, "--eval", mixed, "--quiet")
    assert done.returncode == 2
    assert "innocent.jpg calibrated this bundle" in done.stderr
    assert "Traceback" not in done.stderr


def test_converting_again_elsewhere_gives_the_same_bytes(
    bundle: Path, calibration: Path, tmp_path: Path
) -> None:
    target = tmp_path / "elsewhere" / "deeper" / "b"
    done = nearfar(
        "convert", "zoo:digits-small", "--precision", "fp32,int8", "--calib", calibration,
        "--calib-labels", calibration / "labels.csv", "-o", target, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = Bundle.open(bundle).manifest, Bundle.open(target).manifest
    assert len(second.variants) == 6
    for variant in second.variants:
        assert variant.sha256 == first.variant(variant.id).sha256, variant.id
