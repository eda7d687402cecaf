"""``nearfar run``: what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edge_runtime.commands import run
from edge_runtime.contract.errors import ConfigError, MissingFile
from edge_runtime.log import read_log
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FaultBroker
from tests.support.tasks import LABELS, task_bundle

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
    first, second = done.stderr.splitlines()
    assert f"{images[0]}: error [network_unreachable]: " in first
    # By the second photo its tries in the background may have opened the breaker.
    assert f"{images[1]}: error [" in second
    assert "network_unreachable" in second or "circuit_open" in second


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


# Other tasks ----------------------------------------------------------------------------


def test_a_bundle_takes_images_or_seeds_and_not_the_other(images: list[str]) -> None:
    generator, detector = str(task_bundle("generation")), str(task_bundle("detection"))
    for arguments in (
        (generator,),
        (generator, images[0]),
        (generator, images[0], "--seed", "7"),
        (generator, "--seed", "-1"),
        (generator, "--seed", str(2**53)),
        (detector,),
        (detector, "--seed", "7"),
        (detector, images[0], "--seed", "7"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2, arguments
        assert "Error: " in done.stderr


def test_classes_are_no_pictures_and_a_folder_that_cannot_be_made_is_refused(
    images: list[str], tmp_path: Path
) -> None:
    done = call(BUNDLE, images[0], "--save", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "not pictures" in done.stderr
    assert not (tmp_path / "out").exists()
    done = call(str(task_bundle("detection")), images[0], "--save", images[1])
    assert isinstance(done.exception, ConfigError)


def test_boxes_are_a_table_and_drawn_on_the_photo(images: list[str], tmp_path: Path) -> None:
    bundle, out = str(task_bundle("detection")), tmp_path / "out"
    done = call(bundle, images[0], "--top-k", "2", "--save", str(out))
    assert done.exit_code == 0, done.output
    summary, header, first, second, saved = done.stdout.splitlines()
    assert summary.startswith(f"{images[0]}: 2 objects  [ON_DEVICE torchscript-fp32, ")
    assert header.split() == ["label", "score", "x_min", "y_min", "x_max", "y_max"]
    for line in (first, second):
        label, score, *corners = line.split()
        assert label in LABELS
        assert 0.5 <= float(score) <= 1
        assert len(corners) == 4
        assert all(0 <= float(edge) <= 320 for edge in corners)
    assert saved == f"    saved {out / 'photo0.boxes.png'}"
    before = np.asarray(Image.open(images[0]).convert("RGB"))
    drawn = np.asarray(Image.open(out / "photo0.boxes.png"))
    assert drawn.shape == before.shape
    changed = (drawn != before).any(axis=2)
    assert 0.005 < changed.mean() < 0.5


def test_a_mask_is_saved_at_the_photos_size_and_laid_over_it(
    images: list[str], tmp_path: Path
) -> None:
    bundle, out = str(task_bundle("segmentation")), tmp_path / "out"
    done = call(bundle, images[0], "--save", str(out))
    assert done.exit_code == 0, done.output
    assert "%" in done.stdout.splitlines()[0]
    with Image.open(out / "photo0.mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (320, 240))
        found = set(np.unique(np.asarray(mask)).tolist())
    assert found <= {0, 1, 2, 255}
    assert 255 in found  # the crop left the edges out
    before = np.asarray(Image.open(images[0]).convert("RGB"))
    overlay = np.asarray(Image.open(out / "photo0.overlay.png"))
    classes = np.asarray(Image.open(out / "photo0.mask.png"))
    plain = (classes == 0) | (classes == 255)
    np.testing.assert_array_equal(overlay[plain], before[plain])
    assert (overlay[~plain] != before[~plain]).any()


def test_json_carries_everything_and_pixels_as_files(images: list[str], tmp_path: Path) -> None:
    def document(*arguments: str) -> dict[str, object]:
        done = call(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    boxes = document(str(task_bundle("detection")), images[0])
    assert boxes["task"] == "detection"
    assert set(boxes["boxes"][0]) == {  # type: ignore[index]
        "index", "label", "score", "x_min", "y_min", "x_max", "y_max"
    }  # fmt: skip
    assert "predictions" not in boxes
    assert "saved" not in boxes

    mask = document(str(task_bundle("segmentation")), images[0], "--save", str(tmp_path))
    assert sum(entry["share"] for entry in mask["classes"]) == pytest.approx(1)  # type: ignore[attr-defined]
    assert (mask["height"], mask["width"]) == (24, 32)
    assert set(mask["saved"]) == {"mask", "overlay"}  # type: ignore[call-overload]
    assert len(mask["region"]) == 4  # type: ignore[arg-type]

    made = document(str(task_bundle("generation")), "--seed", "7", "--save", str(tmp_path))
    assert made["seed"] == 7
    assert made["saved"] == {"image": str(tmp_path / "seed-7.image.png")}
    assert "class_map" not in made
    classes = document(BUNDLE, images[0])
    assert [*classes][:5] == ["image", "task", "label", "score", "predictions"]


def test_seeds_become_pictures_and_the_same_seed_the_same_picture(tmp_path: Path) -> None:
    bundle = str(task_bundle("generation"))
    done = call(bundle, *("--seed", "7", "--seed", "8", "--seed", "7", "--save", str(tmp_path)))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("seed 7: 20 x 16 pixels  [ON_DEVICE torchscript-fp32")
    first, again = tmp_path / "seed-7.image.png", tmp_path / "seed-7-2.image.png"
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != (tmp_path / "seed-8.image.png").read_bytes()
    assert np.asarray(Image.open(first)).shape == (16, 20, 3)


def test_photos_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "p.jpg")
        paths[-1].write_bytes(photo(len(paths)))
    out = tmp_path / "out"
    done = call(str(task_bundle("image_to_image")), *map(str, paths), "--save", str(out))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["p-2.image.png", "p.image.png"]


def test_an_answer_without_a_score_is_explained(images: list[str]) -> None:
    done = call(str(task_bundle("reconstruction")), images[0], "--explain")
    assert done.exit_code == 0, done.output
    assert "local confidence not given by this task" in done.stdout


def test_decisions_are_logged_where_asked(images: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert call(BUNDLE, *images, "--log", str(log)).exit_code == 0
    read = read_log(log)
    assert [one.entry.action for one in read.entries] == ["LOCAL", "LOCAL"]
    refused = call(BUNDLE, *images, "--log", str(tmp_path / "none" / "log.jsonl"))
    assert isinstance(refused.exception, ConfigError)
