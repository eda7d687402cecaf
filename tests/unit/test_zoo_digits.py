"""The zoo's photos: deterministic, of honest size, and no scan in two splits."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from converters.zoo.digits import (
    SPLITS,
    indices,
    load_scans,
    photo_seed,
    render,
    split,
    write_split,
)
from converters.zoo.photo import draw_scene, rasterize
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.imaging import decode_image

_DIGEST_SCRIPT = """
import hashlib
from converters.zoo.digits import load_scans, photo_seed, render
scans, _ = load_scans()
photos = b"".join(render(scans[i], photo_seed(i)) for i in range(5))
print(hashlib.sha256(photos).hexdigest())
"""


def _written(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_count_out_of_range_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for count in (0, -1, len(indices("calib")) + 1):
        with pytest.raises(ConfigError, match="--count must be 1 to"):
            write_split(tmp_path / "photos", "calib", count)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_it_holds_only_our_photos(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    write_split(target, "calib", 3)
    with pytest.raises(ConfigError, match="exists"):
        write_split(target, "calib", 2)
    write_split(target, "calib", 2, replace=True)
    assert len(list(target.glob("*.jpg"))) == 2
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        write_split(target, "calib", 2, replace=True)
    assert (target / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_message: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path / "photos", "calib", 5, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", [-1, 1797])
def test_a_scan_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match="no scan"):
        split(index)


@pytest.mark.slow
def test_no_scan_is_in_two_splits_by_content() -> None:
    scans, _ = load_scans()
    seen = {name: {scans[index].tobytes() for index in indices(name)} for name in SPLITS}
    assert sum(len(found) for found in seen.values()) == len({scan.tobytes() for scan in scans})
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["calib"]
    assert not seen["calib"] & seen["test"]


def test_splits_have_their_sizes_and_every_digit() -> None:
    _, digits = load_scans()
    sizes = {name: len(indices(name)) for name in SPLITS}
    assert sizes["test"] >= 400
    assert 80 <= sizes["calib"] <= 130
    assert sum(sizes.values()) == 1797
    for name in SPLITS:
        assert set(digits[indices(name)]) == set(range(10))


@pytest.mark.slow
def test_one_seed_gives_the_same_bytes_here_and_in_another_process() -> None:
    scans, _ = load_scans()
    photos = [render(scans[index], photo_seed(index)) for index in range(5)]
    assert photos == [render(scans[index], photo_seed(index)) for index in range(5)]
    there = subprocess.run(
        [sys.executable, "-c", _DIGEST_SCRIPT], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == hashlib.sha256(b"".join(photos)).hexdigest()


def test_two_copies_of_a_scan_are_two_photos() -> None:
    scans, _ = load_scans()
    assert render(scans[0], photo_seed(0)) != render(scans[0], photo_seed(0, copy=1))


@pytest.mark.slow
def test_photos_cost_what_a_small_upload_costs() -> None:
    scans, _ = load_scans()
    for index in [*indices("test")[::6], *indices("calib")[::4]]:
        photo = render(scans[index], photo_seed(index))
        assert 15_000 <= len(photo) <= 60_000, index
        height, width, _ = decode_image(photo).shape
        assert 256 <= max(height, width) <= 512, index


def test_a_scene_looks_alike_at_every_resolution() -> None:
    scans, _ = load_scans()
    for index in range(8):
        scene = draw_scene(photo_seed(index))
        means = [
            rasterize(scene, scans[index], side).reshape(-1, 3).mean(axis=0) for side in (64, 288)
        ]
        np.testing.assert_allclose(means[0], means[1], atol=4.0)


def test_the_same_split_twice_is_the_same_folder(tmp_path: Path) -> None:
    photos = write_split(tmp_path / "a", "test", 4)
    write_split(tmp_path / "b", "test", 4)
    assert _written(tmp_path / "a") == _written(tmp_path / "b")
    with (tmp_path / "a" / "labels.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    _, digits = load_scans()
    assert [row["file"] for row in rows] == [photo.name for photo in photos]
    assert [int(row["class_index"]) for row in rows] == list(digits[indices("test")[:4]])
    assert {row["split"] for row in rows} == {"test"}


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_split(
        tmp_path / "a", "calib", 3, progress=lambda _text, done, total: told.append((done, total))
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
