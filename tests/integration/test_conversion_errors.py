"""What cannot be converted: one typed sentence, exit 2, and nothing half-written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from edge_runtime.contract.errors import ConfigError, ConversionError
from tests.support import images
from tests.support.digits import nearfar

pytestmark = pytest.mark.slow

NETS = """
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Fft(Net):
    def forward(self, x):
        return super().forward(torch.fft.fft2(x).real)


class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


class Tuple(Net):
    def forward(self, x):
        return super().forward(x), x


def unseeded():
    torch.manual_seed(time.time_ns())
    return Net()


def broken():
    raise RuntimeError("no such thing")


def number():
    return 7
"""

COMMON = ["--preprocess", "unit", "--input-size", "16", "--precision", "fp32", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("sources")
    (root / "nets.py").write_text(NETS)
    layer = {"conv.weight": torch.zeros(8, 3, 3, 3), "conv.bias": torch.zeros(8)}
    sound = {**layer, "head.weight": torch.zeros(4, 8), "head.bias": torch.zeros(4)}
    save_file(sound, str(root / "sound.safetensors"))
    save_file(layer, str(root / "short.safetensors"))
    save_file({**sound, "head.weight": torch.zeros(5, 8)}, str(root / "wide.safetensors"))
    save_file({**sound, "extra": torch.zeros(1)}, str(root / "extra.safetensors"))
    (root / "corrupt.safetensors").write_bytes(b"\x00" * 100)
    (root / "evil.pth").write_bytes(pickle.dumps(Evil(str(root / "pwned"))))
    (root / "two.txt").write_text("a\nb\n")
    return root


class Evil:
    """A pickle that would create a file when it is loaded carelessly."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("source", "extra", "code", "words"),
    [
        ("nets.py:Net", ["--weights", "short.safetensors"], "weights_mismatch", "2 missing"),
        ("nets.py:Net", ["--weights", "wide.safetensors"], "weights_mismatch", "another shape"),
        ("nets.py:Net", ["--weights", "extra.safetensors"], "weights_mismatch", "unexpected"),
        ("nets.py:Net", ["--weights", "corrupt.safetensors"], "source", "no readable weights"),
        ("nets.py:Net", ["--weights", "missing.pth"], "source", "does not exist"),
        ("nets.py:Net", ["--weights", "evil.pth"], "source", "could run any code"),
        ("nets.py:Net", [], "config", "no weights"),
        ("nets.py:Net", ["--weights", "DEFAULT"], "config", "no weights of its own"),
        ("nets.py:Net", ["--weights", "random:x"], "config", "whole number"),
        ("nets.py:Net", ["--weights", "random:0", "--labels", "two.txt"], "config", "2 labels"),
        ("nets.py:Missing", ["--weights", "random:0"], "source", "no callable"),
        ("nets.py:broken", ["--weights", "random:0"], "source", "no such thing"),
        ("nets.py:number", ["--weights", "random:0"], "source", "no nn.Module"),
        (
            "nets.py:Tuple",
            ["--weights", "random:0"],
            "source",
            "answers 2 tensors; classification needs logits",
        ),
        ("nets.py:Branching", ["--weights", "random:0"], "source", "torch.export"),
        ("gone.py:Net", ["--weights", "random:0"], "source", "does not exist"),
        ("torchvision:resnet19", ["--weights", "random:0"], "source", "no classification model"),
        ("zoo:dogs", [], "source", "digits-large"),
        ("onnx:net", ["--weights", "random:0"], "source", "none of"),
    ],
)
def test_source_that_cannot_be_built(
    folder: Path, tmp_path: Path, source: str, extra: list[str], code: str, words: str
) -> None:
    from converters.jobs import PrepareJob, SourceRequest
    from converters.prepare import prepare

    options = dict(zip(extra[::2], extra[1::2], strict=True))

    def path(value: str | None) -> str | None:
        return str(folder / value) if value is not None and "." in value else value

    request = SourceRequest(
        source=str(folder / source) if ".py:" in source else source,
        weights=path(options.get("--weights")),
        labels=path(options.get("--labels")),
        preprocess="unit",
        input_height=16,
        input_width=16,
    )
    with pytest.raises(ConversionError if code != "config" else ConfigError) as caught:
        prepare(PrepareJob(source=request, out_dir=str(tmp_path)))
    assert caught.value.code == code
    assert words in caught.value.detail
    assert not (folder / "pwned").exists()


def test_user_sees_one_sentence_and_no_half_written_bundle(folder: Path, tmp_path: Path) -> None:
    done = nearfar(
        "convert", folder / "nets.py:Net", "--weights", folder / "wide.safetensors", *COMMON,
        "-o", tmp_path / "out" / "b",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error [weights_mismatch]: wide.safetensors does not fit")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_net_that_comes_out_otherwise_in_each_process_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    done = nearfar(
        "convert", folder / "nets.py:unseeded", "--weights", "random:0", *COMMON,
        "--to", "torchscript", "-o", tmp_path / "b",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error [source]: torchscript-fp32: the source builds other weights" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_operator_that_a_format_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    done = nearfar(
        "convert", folder / "nets.py:Fft", "--weights", folder / "sound.safetensors",
        *COMMON, "--to", "tflite", "-o", tmp_path / "b",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error [unsupported_operator]: tflite-fp32" in done.stderr
    assert "complex64" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_calibration_that_is_unusable_is_refused(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(24):
        (photos / f"{number}.png").write_bytes(images.encode(images.photo(seed=number)))
    table = tmp_path / "labels.csv"
    lines = [f"{number}.png,{number % 4}" for number in range(24)]
    common = [
        "convert", str(folder / "nets.py:Net"), "--weights", "random:0", "--preprocess", "unit",
        "--input-size", "16", "--to", "tflite", "--precision", "int8", "--quiet",
        "--calib", str(photos), "--calib-labels", str(table), "-o", str(tmp_path / "b"),
    ]  # fmt: skip
    for text, words in (
        ("\n".join(["file,class_index", *lines]), "no better than chance"),
        ("\n".join(["file,class_index", "0.png,4"]), "classes 0 to 3"),
        ("file,class_index\nnowhere.png,1\n", "not in"),
    ):
        table.write_text(text)
        done = nearfar(*common)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "error [calibration]" in done.stderr
        assert words in done.stderr
    (photos / "0.png").write_bytes(images.encode(images.photo())[:80])
    table.write_text("file,class_index\n0.png,1\n")
    done = nearfar(*common)
    assert done.returncode == 2
    assert "calibration image" in done.stderr
    assert "0.png" in done.stderr
    assert not (tmp_path / "b").exists()


def test_layers_to_keep_go_by_the_nets_own_names(folder: Path, tmp_path: Path) -> None:
    common = [
        "convert", folder / "nets.py:Net", "--weights", "random:0", "--preprocess", "unit",
        "--input-size", "16", "--to", "torchscript", "--allow-synthetic-calibration", "--quiet",
        "-o", tmp_path / "b",
    ]  # fmt: skip
    for precision, keep, words in (
        ("fp32", "head", "--keep goes with int8 or a16w8"),
        ("int8", "hat", "--keep hat: the model has no module of this name; there are head"),
    ):
        done = nearfar(*common, "--precision", precision, "--keep", keep)
        assert done.returncode == 2
        assert words in done.stderr
        assert not (tmp_path / "b").exists()
    nearfar(*common, "--precision", "int8", "--keep", " head ,head")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert [variant["kept"] for variant in manifest["variants"]] == [["head"]]


def test_downloads_fail_with_a_clear_offline_error(tmp_path: Path) -> None:
    done = nearfar(
        "convert", "torchvision:resnet18", "--weights", "DEFAULT", "--precision", "fp32",
        "--quiet", "-o", tmp_path / "b",
    )  # fmt: skip
    if done.returncode == 0:
        pytest.skip("the network or a cache has torchvision's resnet18 weights")
    assert done.returncode == 2
    assert "error [weights_unavailable]" in done.stderr
    assert "--weights FILE" in done.stderr


def test_existing_output_is_kept_unless_forced(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "precious").write_text("x")
    done = nearfar(
        "convert", folder / "nets.py:Net", "--weights", "random:0", *COMMON, "-o", target
    )
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (target / "precious").read_text() == "x"
