"""Fine-tuning data: no split that flatters, no class that is missing, no file left unsaid."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from converters.finetune.data import (
    Found,
    Sample,
    Split,
    check_split,
    digest_of,
    find_labeled,
    find_unlabeled,
    split_seeded,
)
from converters.finetune.images import identify, refuse_unreadable
from converters.finetune.output import choose_calibration
from edge_runtime.contract.errors import EvaluationError
from tests.support.shapes import draw, write_shapes

TWO = ("circle", "square")


def quiet(_message: str, _done: int, _total: int) -> None:
    """Say nothing."""


def read(found: Found) -> list[Sample]:
    good, bad = identify(found.samples, quiet)
    assert not bad
    return good


def explicit(folder: Path) -> Split:
    samples = read(find_labeled(folder))
    return Split(
        train=tuple(s for s in samples if s.role == "train"),
        heldout=tuple(s for s in samples if s.role == "heldout"),
    )


def two_sided(folder: Path) -> Path:
    write_shapes(folder / "train", 3, kinds=TWO)
    for kind in TWO:
        (folder / "val" / kind).mkdir(parents=True)
        draw(kind, 90).save(folder / "val" / kind / "a.png")
    return folder


def test_a_leaking_split_is_refused_under_any_name_and_coding(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    assert check_split(explicit(folder), TWO, all_classes=True) == 0
    original = folder / "train" / "square" / "001.png"
    copy = folder / "val" / "square" / "other.webp"
    with Image.open(original) as picture:
        picture.save(copy, lossless=True)
    assert copy.read_bytes() != original.read_bytes()
    with pytest.raises(EvaluationError, match="1 held-out images are training images") as caught:
        check_split(explicit(folder), TWO, all_classes=True)
    assert str(original) in caught.value.detail
    assert str(copy) in caught.value.detail


def test_one_picture_under_two_classes_is_refused(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    shutil.copy(folder / "train/square/001.png", folder / "train/circle/x.png")
    with pytest.raises(EvaluationError, match="the same picture under two classes"):
        check_split(explicit(folder), TWO, all_classes=True)


def test_copies_among_the_training_images_are_counted(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    shutil.copy(folder / "train/square/001.png", folder / "train/square/x.png")
    assert check_split(explicit(folder), TWO, all_classes=True) == 1


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    (folder / "train" / "hexagon").mkdir()
    with pytest.raises(EvaluationError, match="class 'hexagon' is empty"):
        find_labeled(folder)


def test_a_class_without_held_out_images_is_named(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    shutil.rmtree(folder / "val" / "square")
    with pytest.raises(EvaluationError, match=r"class 'square' is empty: .*val/square"):
        find_labeled(folder)


def test_a_class_that_only_val_has_is_named(tmp_path: Path) -> None:
    folder = two_sided(tmp_path)
    shutil.copytree(folder / "val" / "square", folder / "val" / "star")
    with pytest.raises(EvaluationError, match="star is a class that train/ has not"):
        find_labeled(folder)


def test_train_without_val_is_no_split(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train", 2, kinds=TWO)
    with pytest.raises(EvaluationError, match="has train/ and no val/"):
        find_labeled(tmp_path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_shapes(tmp_path, 4, kinds=("circle",))
    split = split_seeded(read(find_labeled(tmp_path)), share=0.25, seed=0)
    with pytest.raises(EvaluationError, match="there is one class"):
        check_split(split, ("circle",), all_classes=True)


def test_a_folder_without_classes_or_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no class folders"):
        find_labeled(tmp_path)
    with pytest.raises(EvaluationError, match="holds no JPEG, PNG or WebP"):
        find_unlabeled(tmp_path)
    with pytest.raises(EvaluationError, match="does not exist"):
        find_labeled(tmp_path / "nowhere")


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    write_shapes(tmp_path, 3, kinds=TWO)
    whole = (tmp_path / "circle/000.png").read_bytes()
    (tmp_path / "circle/000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "square/note.jpg").write_text("not a picture")
    (tmp_path / "square/notes.txt").write_text("no image by any sign: ignored")
    good, bad = identify(find_labeled(tmp_path).samples, quiet)
    assert len(good) == 5
    with pytest.raises(EvaluationError, match="2 images are unreadable") as caught:
        refuse_unreadable(bad)
    assert "circle/000.png (the image data are truncated or corrupt" in caught.value.detail
    assert "square/note.jpg (these bytes are no JPEG" in caught.value.detail
    assert "notes.txt" not in caught.value.detail


def test_the_seeded_split_depends_on_pictures_and_seed_alone(tmp_path: Path) -> None:
    write_shapes(tmp_path / "a", 10)
    renamed = tmp_path / "b"
    for path in sorted((tmp_path / "a").rglob("*.png")):
        target = renamed / path.parent.name / f"x{999 - int(path.stem)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

    def held(folder: Path, seed: int) -> set[str]:
        split = split_seeded(read(find_labeled(folder)), share=0.3, seed=seed)
        assert len(split.train) == 28
        for label in range(4):
            assert sum(s.label == label for s in split.heldout) == 3
        return {sample.pixels for sample in split.heldout}

    assert held(tmp_path / "a", 0) == held(renamed, 0)
    assert held(tmp_path / "a", 0) != held(tmp_path / "a", 1)


def test_copies_stay_on_one_side_of_the_seeded_split(tmp_path: Path) -> None:
    write_shapes(tmp_path, 5, kinds=TWO)
    for path in sorted(tmp_path.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    for seed in range(5):
        split = split_seeded(read(find_labeled(tmp_path)), share=0.4, seed=seed)
        check_split(split, TWO, all_classes=True)
        assert len(split.heldout) == 8


def test_a_class_with_one_picture_cannot_be_split(tmp_path: Path) -> None:
    write_shapes(tmp_path, 1, kinds=TWO)
    shutil.copy(tmp_path / "circle/000.png", tmp_path / "circle/001.png")
    with pytest.raises(EvaluationError, match="one picture"):
        split_seeded(read(find_labeled(tmp_path)), share=0.2, seed=0)


def test_a_csv_gives_classes_and_splits(tmp_path: Path) -> None:
    write_shapes(tmp_path, 2, kinds=TWO)
    table = tmp_path / "labels.csv"
    rows = ["circle/000.png,0,train", "circle/001.png,0,val", "square/000.png,1,train"]
    table.write_text("file,class_index,split\n" + "\n".join([*rows, "square/001.png,1,val"]))
    found = find_labeled(tmp_path, labels_csv=table, names=("round", "angular"))
    assert found.classes == ("round", "angular")
    assert found.source == "csv"
    assert [(s.label, s.role) for s in found.samples] == [
        (0, "train"), (1, "train"), (0, "heldout"), (1, "heldout"),
    ]  # fmt: skip
    table.write_text(table.read_text().replace("square/001.png,1,val", "square/001.png,7,val"))
    with pytest.raises(EvaluationError, match="class_index 7, there are 2 class names"):
        find_labeled(tmp_path, labels_csv=table, names=("round", "angular"))
    assert find_labeled(tmp_path, labels_csv=table).classes == tuple(f"class {i}" for i in range(8))


def test_a_csv_without_splits_is_split_by_seed(tmp_path: Path) -> None:
    write_shapes(tmp_path, 1, kinds=TWO)
    table = tmp_path / "labels.csv"
    table.write_text("file,class_index\ncircle/000.png,0\nsquare/000.png,1\n")
    found = find_labeled(tmp_path, labels_csv=table)
    assert found.source == "seeded"
    assert {sample.role for sample in found.samples} == {None}


def test_a_new_head_wants_every_class_and_a_kept_one_does_not(tmp_path: Path) -> None:
    split = explicit(two_sided(tmp_path))
    names = (*TWO, "triangle")
    check_split(split, names, all_classes=False)
    with pytest.raises(EvaluationError, match="class 'triangle' is empty"):
        check_split(split, names, all_classes=True)


def test_labels_of_other_names_than_the_folders_are_refused(tmp_path: Path) -> None:
    write_shapes(tmp_path, 2, kinds=TWO)
    assert (
        find_labeled(tmp_path, names=("square", "circle")).samples[0].path.parent.name == "square"
    )
    with pytest.raises(EvaluationError, match="differ in 'cross', 'square'"):
        find_labeled(tmp_path, names=("circle", "cross"))


def test_calibration_images_are_spread_over_the_classes(tmp_path: Path) -> None:
    write_shapes(tmp_path, 6)
    samples = read(find_labeled(tmp_path))
    chosen = choose_calibration(samples, count=10)
    counts = sorted(sum(s.label == label for s in chosen) for label in range(4))
    assert counts == [2, 2, 3, 3]
    assert choose_calibration(list(reversed(samples)), count=10) == chosen
    assert len(choose_calibration(samples, count=100)) == 24


def test_the_digest_of_a_split_is_of_its_contents(tmp_path: Path) -> None:
    write_shapes(tmp_path, 2, kinds=TWO)
    samples = read(find_labeled(tmp_path))
    moved = [dataclasses.replace(s, path=tmp_path / "elsewhere.png") for s in samples]
    assert digest_of(samples) == digest_of(reversed(moved))
    assert digest_of(samples) != digest_of(samples[1:])
