"""What the converters take in: folders, labels, flags. Each mistake has its own sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.cli import convert, verify
from converters.dataset import read_dataset
from converters.golden import write_golden_images
from converters.plan import FileOptions, plan
from converters.preprocessing import KERAS_MODES, declared, keras_mode
from converters.recipes import FORMATS, OFFERED, RECIPES, REFUSED
from converters.sources import read_labels_file
from edge_runtime.contract.errors import (
    CalibrationError,
    ConfigError,
    ConversionError,
    EvaluationError,
    NearfarError,
    PrecisionRefused,
)
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.manifest import MinOs
from edge_runtime.contract.preprocess import NAMED
from tests.support import images
from tests.support.bundles import tiny_bundle

ERRORS = {"calibration": CalibrationError, "evaluation": EvaluationError}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(images.encode(images.photo(seed=number)))
    (folder / "deep" / "3.JPEG").write_bytes(images.encode(images.photo(seed=3), "JPEG"))
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_folder_without_images_is_refused(tmp_path: Path, purpose: str) -> None:
    (tmp_path / "x.txt").write_text("x")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ERRORS[purpose]):
            read_dataset(folder, purpose=purpose)


def test_images_are_found_by_content_in_a_fixed_order(photos: Path) -> None:
    data = read_dataset(photos, purpose="calibration")
    assert [path.name for path in data.files] == ["0.png", "1.png", "2.png", "3.JPEG"]
    assert data.classes is None


def test_labels_choose_split_and_order_and_may_have_more_columns(photos: Path) -> None:
    table = photos.parent / "labels.csv"
    table.write_text("file,class_index,name,split\n2.png,7,x,a\n0.png,1,y,b\ndeep/3.JPEG,0,z,a\n")
    data = read_dataset(photos, labels=table, split="a", purpose="evaluation")
    assert [path.name for path in data.files] == ["2.png", "3.JPEG"]
    assert data.classes == (7, 0)


@pytest.mark.parametrize(
    ("text", "split", "words"),
    [
        ("", None, "no column 'file'"),
        ("file,label\n0.png,1\n", None, "class_index"),
        ("file,class_index\n0.png,1\n", "a", "no column 'split'"),
        ("file,class_index,split\n0.png,1,a\n", "b", "no file of split 'b'"),
        ("file,class_index\n", None, "lists no file"),
        ("file,class_index\n0.png,cat\n", None, "line 2"),
        ("file,class_index\n0.png,-1\n", None, "line 2"),
        ("file,class_index\n0.png,1\n0.png,1\n", None, "twice"),
        ("file,class_index\nnowhere.png,1\n", None, "not in"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    photos: Path, text: str, split: str | None, words: str
) -> None:
    table = photos.parent / "labels.csv"
    table.write_text(text)
    for purpose, error in ERRORS.items():
        with pytest.raises(error, match=words):
            read_dataset(photos, labels=table, split=split, purpose=purpose)


def test_every_combination_has_a_recipe_or_a_reason() -> None:
    for format_name in FORMATS:
        for precision in OFFERED:
            known = ((format_name, precision) in RECIPES) + ((format_name, precision) in REFUSED)
            assert known == 1, (format_name, precision)


def test_plan_leaves_out_what_cannot_be_and_says_why() -> None:
    targets, refused = plan(FORMATS, OFFERED, FileOptions())
    assert len(targets) == len(RECIPES)
    assert len(refused) == len(REFUSED)
    assert any("half-precision" in sentence for sentence in refused)
    with pytest.raises(PrecisionRefused, match="half-precision"):
        plan(["torchscript"], ["fp16"], FileOptions())


def test_plan_refuses_what_the_app_s_oldest_system_cannot_run() -> None:
    old = FileOptions(min_os=MinOs(ios="15.0", android_api=21))
    with pytest.raises(PrecisionRefused, match=r"needs iOS 17\.0, the app is to run on iOS 15"):
        plan(["coreml"], ["int8"], old)
    with pytest.raises(PrecisionRefused, match="Android API"):
        plan(["tflite"], ["fp32"], old)
    new = FileOptions(min_os=MinOs(ios="17.2"))
    assert len(plan(["coreml"], ["fp32", "int8"], new)[0]) == 2


def test_plan_refuses_boxes_decoded_in_integers() -> None:
    inside = FileOptions(in_graph=("nms",))
    assert len(plan(["tflite"], ["fp32", "fp16"], inside)[0]) == 2
    with pytest.raises(PrecisionRefused, match="leave --nms out"):
        plan(["tflite"], ["fp32", "int8"], inside)


def test_preprocess_is_declared_never_guessed(tmp_path: Path) -> None:
    for name in NAMED:
        assert declared(name, height=8, width=9, resize_size=None).size == (8, 9)
    with pytest.raises(ConfigError, match="input-size"):
        declared("tf", height=None, width=None, resize_size=None)
    with pytest.raises(ConfigError, match="no known name"):
        declared("imagenet", height=8, width=8, resize_size=None)
    with pytest.raises(ConfigError, match="larger than the resized"):
        declared("tf", height=8, width=8, resize_size=4)
    toml = tmp_path / "p.toml"
    toml.write_text(
        '[resize]\ntype = "exact"\nheight = 8\nwidth = 8\n'
        "[normalization]\nscale = 255\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n"
    )
    assert declared(str(toml), height=None, width=None, resize_size=None).size == (8, 8)
    with pytest.raises(ConfigError, match="input-size"):
        declared(str(toml), height=9, width=9, resize_size=None)
    toml.write_text("colour = 'RGB'\n")
    with pytest.raises(ConfigError):
        declared(str(toml), height=None, width=None, resize_size=None)
    with pytest.raises(ConfigError, match="cannot read"):
        declared(str(tmp_path / "no.toml"), height=8, width=8, resize_size=None)


@pytest.mark.parametrize(
    ("application", "mode"),
    [
        ("MobileNetV2", "tf"), ("MobileNetV3Large", "raw"), ("ResNet50", "caffe"),
        ("ResNet50V2", "tf"), ("VGG16", "caffe"), ("InceptionV3", "tf"),
        ("DenseNet121", "torchvision"), ("EfficientNetB0", "raw"), ("Unknown", None),
    ],
)  # fmt: skip
def test_keras_applications_bring_their_own_mode(application: str, mode: str | None) -> None:
    assert keras_mode(application) == mode
    assert set(KERAS_MODES.values()) <= set(NAMED)


@pytest.mark.parametrize("data", [b"", b"one\n", b"a\n\nb\n", b"\xff\xfe\n", b"x" * 300 + b"\ny\n"])
def test_labels_file_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        read_labels_file(path)


def test_golden_images_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    first = [p.read_bytes() for p in write_golden_images(tmp_path / "a")]
    second = [p.read_bytes() for p in write_golden_images(tmp_path / "b")]
    assert first == second
    shapes = {decode_image(data).shape for data in first}
    assert len(shapes) >= 6
    assert any(height > width for height, width, _ in shapes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["zoo:digits-small", "--to", "onnx"], "--to"),
        (["zoo:digits-small", "--to", "tflite,tflite"], "--to"),
        (["zoo:digits-small", "--precision", "int3"], "--precision"),
        (["zoo:digits-small", "--precision", "int8"], "--calib DIR"),
        (["zoo:digits-small", "--input-size", "0"], "--input-size"),
        (["zoo:digits-small", "--input-size", "2x2x2"], "--input-size"),
        (["zoo:digits-small", "--calib", "nowhere"], "does not exist"),
        (["zoo:digits-small", "--calib-split", "a"], "--calib DIR"),
        (["zoo:digits-small", "--to", "torchscript", "--precision", "fp16"], "half-precision"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = CliRunner().invoke(convert, [*arguments, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, NearfarError)
    assert words in result.exception.detail
    assert list(tmp_path.iterdir()) == []


def test_verify_refuses_what_it_cannot_judge(photos: Path) -> None:
    bundle = str(tiny_bundle())
    cases: list[tuple[list[str], type[NearfarError], str]] = [
        ([bundle, "--eval", str(photos)], ConversionError, "--reference SOURCE"),
        ([bundle, "--eval", str(photos / "deep" / "none")], EvaluationError, "does not exist"),
        ([bundle, "--eval", str(photos), "--weights", "x"], ConfigError, "--reference"),
        ([str(photos), "--eval", str(photos)], NearfarError, "no bundle"),
        ([bundle, "--eval", str(photos), "--split", "a"], EvaluationError, "labels"),
    ]
    for arguments, error, words in cases:
        result = CliRunner().invoke(verify, arguments)
        assert isinstance(result.exception, error), result.exception
        assert words in result.exception.detail
