"""The cache of trained weights: damage is noticed, nothing half-written is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.zoo import ZOO
from converters.zoo.weights import (
    CACHE_VARIABLE,
    WeightsRecord,
    cache_folder,
    ensure_weights,
    read_record,
    save_weights,
    weights_file,
)
from edge_runtime.contract.errors import ConfigError

_RECORD = WeightsRecord(name="digits-small", temperature=0.9, test_accuracy=0.9, test_photos=436)


@pytest.fixture
def tensors() -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(5)
    return {
        "a.weight": rng.standard_normal((4, 3)).astype(np.float32),
        "b.num_batches_tracked": np.array(7, np.int64),
    }


def test_every_damaged_byte_is_noticed(
    tmp_path: Path, tensors: dict[str, NDArray[np.generic]]
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors, _RECORD)
    sound = path.read_bytes()
    assert read_record(path) == _RECORD
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        assert read_record(path) is None, position


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_noticed(
    tmp_path: Path, tensors: dict[str, NDArray[np.generic]], keep: int
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors, _RECORD)
    path.write_bytes(path.read_bytes()[:keep])
    assert read_record(path) is None


def test_a_missing_file_and_a_folder_have_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path / "nothing") is None
    assert read_record(tmp_path) is None


def test_foreign_safetensors_have_no_record(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "w.safetensors", {"nearfar": "{}"})
    assert read_record(tmp_path / "w.safetensors") is None


def test_saving_leaves_no_other_file_and_is_deterministic(
    tmp_path: Path, tensors: dict[str, NDArray[np.generic]]
) -> None:
    save_weights(tmp_path / "a", tensors, _RECORD)
    save_weights(tmp_path / "b", dict(reversed(tensors.items())), _RECORD)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    assert weights_file("digits-small").parent == tmp_path / "zoo"
    assert weights_file("digits-small") != weights_file("digits-large")
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder() == Path.home() / ".cache" / "nearfar"


def test_a_cache_that_cannot_be_written_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked))
    with pytest.raises(ConfigError, match=CACHE_VARIABLE):
        ensure_weights("digits-small")


def test_a_cached_file_is_used_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, NDArray[np.generic]]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    path = weights_file("digits-small")
    path.parent.mkdir()
    save_weights(path, tensors, _RECORD)
    before = path.stat()
    assert ZOO["digits-small"].weights_path() == path
    assert ZOO["digits-small"].temperature() == 0.9
    assert ZOO["digits-small"].task().temperature == 0.9
    assert path.stat().st_mtime_ns == before.st_mtime_ns
