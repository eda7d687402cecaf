"""Every accepted image input, and what is refused before anything runs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ImageTooLarge, ImageUnreadable, TensorError
from edge_runtime.photo import Photo
from tests.support.bundles import photo


def test_a_missing_file_a_folder_and_text_are_unreadable(tmp_path: Path) -> None:
    text = tmp_path / "note.txt"
    text.write_text("no image")
    for path in (tmp_path / "none.jpg", tmp_path, text):
        with pytest.raises(ImageUnreadable):
            Photo.read(path)
    with pytest.raises(ImageUnreadable):
        Photo.read(b"")


def test_too_many_bytes_are_refused_unread(tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(b"\xff\xd8\xff" + bytes(limits.MAX_IMAGE_BYTES))
    with pytest.raises(ImageTooLarge):
        Photo.read(large)
    with pytest.raises(ImageTooLarge):
        Photo.read(large.read_bytes())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(TensorError):
        Photo.read(array)


def test_a_huge_array_is_refused_without_a_copy() -> None:
    row = np.zeros((1, 1, 3), np.uint8)
    with pytest.raises(ImageTooLarge):
        Photo.read(np.broadcast_to(row, (limits.MAX_IMAGE_SIDE + 1, 1, 3)))


def test_other_types_are_refused() -> None:
    with pytest.raises(TensorError, match="encoded bytes, a path or a uint8 RGB array"):
        Photo.read(42)  # type: ignore[arg-type]


def test_bytes_paths_and_arrays_are_one_picture(tmp_path: Path) -> None:
    data = photo(1)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    pixels = Photo.read(data).pixels()
    for same in (bytearray(data), memoryview(data), path, str(path), pixels):
        assert np.array_equal(Photo.read(same).pixels(), pixels)


def test_an_array_becomes_a_jpeg_of_quality_90_only_when_uploaded() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    taken = Photo.read(pixels)
    assert taken.upload_bytes == 60 * 80 // 4  # not yet encoded: an estimate
    body, media_type = taken.upload()
    assert media_type == "image/jpeg"
    assert taken.upload_bytes == len(body)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    assert body == buffer.getvalue()
    assert taken.upload()[0] is body


def test_an_array_with_strides_is_taken_as_it_looks() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    mirrored = pixels[:, ::-1]
    assert np.array_equal(Photo.read(mirrored).pixels(), mirrored)
