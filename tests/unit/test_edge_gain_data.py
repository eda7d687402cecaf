"""What may be calibrated with, and what two answers have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime.contract.errors import ConfigError, EvaluationError, TensorError
from edge_runtime.contract.tasks import Box, Prediction
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.gain.agreement import agreement, require_agreement
from edge_runtime.gain.cli import calibrate
from edge_runtime.gain.data import data_digest, read_photos
from tests.support.bundles import photo, tiny_bundle
from tests.support.tasks import task_of

BUNDLE = str(tiny_bundle())


def folder(tmp_path: Path, csv: str | bytes | None, *names: str) -> tuple[Path, Path]:
    for name in names:
        (tmp_path / name).write_bytes(photo(0, width=32, height=32))
    labels = tmp_path / "labels.csv"
    if csv is not None:
        labels.write_bytes(csv.encode() if isinstance(csv, str) else csv)
    return tmp_path, labels


@pytest.mark.parametrize(
    ("csv", "text"),
    [
        ("", "no column 'file'"),
        ("file,label\na.jpg,1\n", "no column 'class_index'"),
        ("file,class_index\n", "lists no file"),
        ("file,class_index\na.jpg,x\n", "line 2: write a file and a whole class_index"),
        ("file,class_index\na.jpg,-1\n", "line 2"),
        ("file,class_index\na.jpg,\u0663\n", "line 2"),
        ("file,class_index\na.jpg,1\na.jpg,1\n", "line 3: 'a.jpg' is listed twice"),
        ("file,class_index\na.jpg,10\n", "class 10 of a bundle with 10 classes"),
        ("file,class_index\nb.jpg,1\n", "'b.jpg' is no file inside"),
        ("file,class_index\n../a.jpg,1\n", "is no file inside"),
        ("file,class_index\n/etc/hostname,1\n", "is no file inside"),
        (b"file,class_index\n\xff.jpg,1\n", "not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_labels_that_make_no_sense_are_refused_with_their_line(
    tmp_path: Path, csv: str | bytes | None, text: str
) -> None:
    root, labels = folder(tmp_path, csv, "a.jpg")
    with pytest.raises(EvaluationError, match=text):
        read_photos(root, labels, split=None, class_count=10, most=100)


def test_a_split_chooses_rows_and_needs_its_column(tmp_path: Path) -> None:
    root, labels = folder(
        tmp_path, "file,class_index,split\na.jpg,1,x\nb.jpg,2,y\n", "a.jpg", "b.jpg"
    )
    found = read_photos(root, labels, split="y", class_count=10, most=100)
    assert (found.files, found.classes) == ((root / "b.jpg",), (2,))
    with pytest.raises(EvaluationError, match="of split 'z'"):
        read_photos(root, labels, split="z", class_count=10, most=100)


def test_a_sample_is_drawn_from_all_and_always_the_same(tmp_path: Path) -> None:
    names = [f"{n:02}.jpg" for n in range(20)]
    root, _ = folder(tmp_path, None, *names)
    (root / "notes.txt").write_text("no image")
    drawn = read_photos(root, None, split=None, class_count=None, most=5)
    assert drawn == read_photos(root, None, split=None, class_count=None, most=5)
    assert len(set(drawn.files)) == 5
    assert drawn.files != tuple(root / name for name in names[:5])
    every = read_photos(root, None, split=None, class_count=None, most=100)
    assert [file.name for file in every.files] == names
    assert every.classes is None
    with pytest.raises(EvaluationError, match="does not exist"):
        read_photos(root / "none", None, split=None, class_count=None, most=5)
    (root / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no JPEG"):
        read_photos(root / "empty", None, split=None, class_count=None, most=5)


def test_the_digest_of_the_data_knows_classes_and_no_order() -> None:
    one = data_digest(("a" * 64, "b" * 64), (1, 2))
    assert one == data_digest(("b" * 64, "a" * 64), (2, 1))
    assert one != data_digest(("a" * 64, "b" * 64), (2, 1))
    assert one != data_digest(("a" * 64, "b" * 64), None)


def box(index: int, x: float, score: float = 0.9) -> Box:
    return Box(
        index=index, label="car", score=score, x_min=x, y_min=0.0, x_max=x + 10.0, y_max=10.0
    )


def test_boxes_agree_by_f1_of_those_matched_one_to_one() -> None:
    def shared(local: list[Box], cloud: list[Box]) -> float:
        return agreement(Answer(boxes=tuple(local)), Answer(boxes=tuple(cloud)))

    assert shared([], []) == 1.0
    assert shared([box(0, 0)], []) == shared([], [box(0, 0)]) == 0.0
    assert shared([box(0, 0)], [box(0, 1), box(0, 50)]) == pytest.approx(2 / 3)
    assert shared([box(0, 0)], [box(1, 0)]) == 0.0
    assert shared([box(0, 0), box(0, 1)], [box(0, 0)]) == pytest.approx(2 / 3)
    assert shared([box(0, 0)], [box(0, 4)]) == 0.0, "an IoU of 0.43"


def test_class_maps_agree_where_both_look_at_the_photo() -> None:
    """The device sees the middle half of the photo, the cloud all of it, at another size."""
    left_right = np.array([[0, 1]], dtype=np.uint8)
    cloud = Answer(class_map=np.repeat(left_right, 4, axis=1), region=(0.0, 0.0, 80.0, 40.0))
    local = Answer(class_map=left_right, region=(20.0, 0.0, 60.0, 40.0))
    assert agreement(local, cloud) == 1.0
    other = Answer(class_map=np.array([[0, 0]], dtype=np.uint8), region=(20.0, 0.0, 60.0, 40.0))
    assert agreement(other, cloud) == 0.5
    away = Answer(class_map=left_right, region=(100.0, 0.0, 140.0, 40.0))
    with pytest.raises(TensorError, match="no common part"):
        agreement(away, cloud)


def test_first_classes_agree_or_not_and_answers_of_two_tasks_never() -> None:
    def said(index: int) -> Answer:
        return Answer(predictions=(Prediction(index=index, label="x", score=0.5),))

    assert (agreement(said(1), said(1)), agreement(said(1), said(2))) == (1.0, 0.0)
    with pytest.raises(TensorError):
        agreement(said(1), Answer(boxes=()))


@pytest.mark.parametrize("name", ["image_to_image", "generation", "reconstruction"])
def test_tasks_that_answer_images_have_no_gain_to_measure(name: str) -> None:
    with pytest.raises(ConfigError, match="goes by its prior"):
        require_agreement(task_of(name))  # type: ignore[arg-type]


def test_the_command_refuses_what_makes_no_sense_before_it_asks_a_broker(tmp_path: Path) -> None:
    root, labels = folder(tmp_path, "file,class_index\na.jpg,1\n", "a.jpg")

    def call(*arguments: str) -> str:
        base = [BUNDLE, "--broker", "http://127.0.0.1:9", "--data", str(root)]
        done = CliRunner().invoke(calibrate, [*base, *arguments])
        assert done.exit_code != 0
        return done.output + str(done.exception)

    assert "either --labels CSV, or --against-cloud" in call()
    assert "either --labels CSV" in call("--labels", str(labels), "--against-cloud")
    assert "--split chooses" in call("--against-cloud", "--split", "x")
    assert "no variant 'none'" in call("--labels", str(labels), "--variant", "none")
