"""Opening servables: every way a folder can be wrong has its typed error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from broker.models.repository import Repository, find_servables
from broker.models.servable import open_servable
from edge_runtime.contract import errors as e
from edge_runtime.contract.manifest import SERVABLE_NAME, Servable, canonical_json
from edge_runtime.contract.tasks import SegmentationTask
from tests.support.servables import (
    LABELS,
    manifest_sha256,
    renamed_servable,
    shared_servable,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound servable that a test may harm."""
    return Path(shutil.copytree(shared_servable(), tmp_path / "tiny"))


def rewrite(folder: Path, **changes: object) -> None:
    manifest = msgspec.json.decode((folder / SERVABLE_NAME).read_bytes(), type=Servable)
    changed = msgspec.structs.replace(manifest, **changes)
    (folder / SERVABLE_NAME).write_bytes(canonical_json(changed))


def add_unknown_key(folder: Path) -> None:
    text = (folder / SERVABLE_NAME).read_text()
    (folder / SERVABLE_NAME).write_text(text.replace("{", '{"debug":true,', 1))


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt2").write_bytes(data)


HARMS: list[tuple[str, Callable[[Path], object], type[e.NearfarError]]] = [
    ("no manifest", lambda f: (f / SERVABLE_NAME).unlink(), e.MissingFile),
    ("no model", lambda f: (f / "model.pt2").unlink(), e.MissingFile),
    ("no labels", lambda f: (f / "labels.txt").unlink(), e.MissingFile),
    ("an unlisted file", lambda f: (f / "extra").touch(), e.UnlistedFile),
    ("a changed model", flip_a_byte, e.DigestMismatch),
    ("other labels", lambda f: (f / "labels.txt").write_text("a\n" * 5), e.ManifestError),
    ("an unknown key", add_unknown_key, e.ManifestError),
    ("no JSON", lambda f: (f / SERVABLE_NAME).write_bytes(b"\xff{"), e.ManifestError),
    ("a name with a newline", lambda f: rewrite(f, name="tiny\n"), e.ManifestError),
    ("another task", lambda f: rewrite(f, task=SegmentationTask(classes=5)), e.ManifestError),
    ("no labels record", lambda f: rewrite(f, labels=None), e.ManifestError),
]


@pytest.mark.parametrize(("harm", "expected"), [h[1:] for h in HARMS], ids=[h[0] for h in HARMS])
def test_a_harmed_servable_is_refused(
    folder: Path, harm: Callable[[Path], object], expected: type[e.NearfarError]
):
    harm(folder)
    with pytest.raises(expected) as caught:
        open_servable(folder)
    assert type(caught.value) is expected


def test_a_link_in_place_of_the_model_is_refused(folder: Path, tmp_path: Path):
    (folder / "model.pt2").rename(tmp_path / "elsewhere.pt2")
    (folder / "model.pt2").symlink_to(tmp_path / "elsewhere.pt2")
    with pytest.raises(e.UnsafePath):
        open_servable(folder)


def test_a_sound_servable_opens_with_all_it_says(folder: Path):
    servable = open_servable(folder)
    assert servable.key == ("tiny", "1.0.0")
    assert servable.labels == LABELS
    assert servable.ref.sha256 == manifest_sha256(folder)
    assert servable.ref.labels_sha256 is not None


def test_a_folder_without_servables_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(e.ConfigError, match="nearfar export"):
        find_servables(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(e.ConfigError, match="not a folder"):
        find_servables(tmp_path / "nothing")


def test_a_folder_is_looked_through_for_servables_and_for_name_and_version(
    folder: Path, tmp_path: Path
):
    renamed_servable(folder, tmp_path / "other", "other")
    renamed_servable(folder, tmp_path / "many" / "1.0.0", "many")
    renamed_servable(folder, tmp_path / "many" / "2.0.0", "many", "2.0.0")
    renamed_servable(folder, tmp_path / "a" / "b" / "c", "hidden")
    shutil.copytree(folder, tmp_path / ".unfinished")
    shutil.copytree(folder, tmp_path / "many" / ".unfinished")
    shutil.copytree(folder, tmp_path / "other" / "inside")
    found = [tmp_path / "many" / "1.0.0", tmp_path / "many" / "2.0.0"]
    assert find_servables(tmp_path) == [*found, tmp_path / "other", tmp_path / "tiny"]
    assert find_servables(tmp_path / "many") == found
    shutil.rmtree(tmp_path / "other" / "inside")
    assert Repository.open([tmp_path]).keys == (
        ("many", "2.0.0"), ("many", "1.0.0"), ("other", "1.0.0"), ("tiny", "1.0.0"),
    )  # fmt: skip


@pytest.mark.parametrize("place", ["other/1.0.0", "many/2.0.0"])
def test_a_folder_of_another_name_or_version_than_its_servable_says_is_refused(
    folder: Path, tmp_path: Path, place: str
):
    renamed_servable(folder, tmp_path / "models" / place, "many")
    with pytest.raises(e.ConfigError, match=r"holds version '1\.0\.0' of 'many'"):
        Repository.open([tmp_path / "models"])


def test_two_servables_of_one_name_and_version_are_refused(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(e.ConfigError, match="two servables are named 'tiny'"):
        Repository.open([tmp_path])


def test_an_unknown_name_or_version_names_what_there_is(folder: Path):
    repository = Repository.open([folder])
    with pytest.raises(e.ModelNotFound, match="serves: tiny"):
        repository.get("huge")
    with pytest.raises(e.ModelNotFound, match=r"1\.0\.0"):
        repository.get("tiny", "2")
    assert repository.get("tiny", "1.0.0").key.name == "tiny"
