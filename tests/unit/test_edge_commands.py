"""``nearfar run``: what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_runtime.commands import run
from edge_runtime.contract.errors import ConfigError, MissingFile
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FaultBroker

BUNDLE = str(tiny_bundle())


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for seed in range(2):
        path = tmp_path / f"photo{seed}.jpg"
        path.write_bytes(photo(seed))
        paths.append(str(path))
    return paths


def call(*arguments: str) -> Result:
    return CliRunner().invoke(run, arguments)


def test_a_wrong_bundle_or_option_exits_2_with_one_line(images: list[str], tmp_path: Path) -> None:
    for arguments in ((str(tmp_path), images[0]), (BUNDLE, images[0], "--variant", "none")):
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime", "run", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error [")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    for options in (["--mode", "MAYBE"], ["--deadline-ms", "0"], ["--top-k", "0"]):
        assert call(BUNDLE, images[0], *options).exit_code == 2
    assert call(BUNDLE).exit_code == 2
    assert isinstance(call(BUNDLE, images[0], "--mode", "ONLY_IN_CLOUD").exception, ConfigError)


@pytest.mark.parametrize("content", [b"", b"two keys\n", b"\xff\xfe", b"k" * 5000])
def test_a_key_file_that_holds_no_key_is_refused(
    images: list[str], tmp_path: Path, content: bytes
) -> None:
    key = tmp_path / "key.txt"
    key.write_bytes(content)
    done = call(BUNDLE, images[0], "--broker", "https://b.example", "--api-key-file", str(key))
    assert isinstance(done.exception, Exception)
    assert done.exit_code != 0
    missing = call(BUNDLE, images[0], "--api-key-file", str(tmp_path / "none"))
    assert isinstance(missing.exception, MissingFile)


def test_one_unreadable_image_among_several_exits_1_and_the_others_are_answered(
    images: list[str], tmp_path: Path
) -> None:
    done = call(BUNDLE, images[0], str(tmp_path / "none.jpg"), images[1], "--json")
    assert done.exit_code == 1
    first, failed, last = (json.loads(line) for line in done.stdout.splitlines())
    assert first["image"] == images[0]
    assert first["inference_source"] == "ON_DEVICE"
    assert failed["failure"]["code"] == "image_unreadable"
    assert last["label"]
    assert "none.jpg: error [image_unreadable]" in done.stderr


def test_nothing_but_unreadable_images_exits_2(tmp_path: Path) -> None:
    assert call(BUNDLE, str(tmp_path / "none.jpg")).exit_code == 2


def test_an_unreachable_broker_exits_1_when_only_the_cloud_may_answer(images: list[str]) -> None:
    done = call(BUNDLE, *images, "--broker", "http://127.0.0.1:9", "--mode", "ONLY_IN_CLOUD")
    assert done.exit_code == 1
    assert done.stderr.count("network_unreachable") == 2


def test_images_are_answered_on_the_device(images: list[str]) -> None:
    done = call(BUNDLE, *images, "--variant", "TFLITE-FP16", "--top-k", "2")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{images[0]}: ")
    assert "[ON_DEVICE tflite-fp16, " in lines[0]
    assert lines[0].count(",") == 2  # two classes, and the time


def test_a_broker_answers_with_the_key_of_the_file_and_the_reason_is_explained(
    images: list[str], tmp_path: Path
) -> None:
    key = tmp_path / "key.txt"
    key.write_text("k3y\n")
    with FaultBroker() as broker:
        options = ["--broker", broker.url, "--api-key-file", str(key), "--explain"]
        done = call(BUNDLE, images[0], *options)
        assert all(h["authorization"] == "Bearer k3y" for _, _, h, _ in broker.requests)
    assert done.exit_code == 0, done.output
    assert "jay 0.980  [IN_CLOUD cloud@1" in done.stdout
    assert "CASCADE (gain_above_price): the cloud's answer is worth more" in done.stdout
    assert "in time with probability" in done.stdout
    assert "variant tflite-fp32: the best" in done.stdout


def test_help_shows_examples_and_exit_statuses() -> None:
    text = call("--help").stdout
    assert "nearfar run digits.bundle" in text
    assert "Exit status: 0" in text
