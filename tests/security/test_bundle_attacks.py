"""A bundle that was damaged or tampered with is refused before any file of it is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import Bundle
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    DigestMismatch,
    LimitExceeded,
    ManifestError,
    MissingFile,
    NearfarError,
    TrustError,
    UnlistedFile,
    UnsafePath,
)
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.manifest import MANIFEST_NAME, canonical_json, decode_manifest
from edge_runtime.contract.paths import check_paths, check_relative_path
from tests.support.bundles import tiny_bundle


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle(), tmp_path / "bundle")
    return tmp_path / "bundle"


def _edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / MANIFEST_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_sound_bundle_opens(root: Path) -> None:
    bundle = Bundle.open(root)
    assert len(bundle.labels) == bundle.manifest.task.classes


def test_manifest_on_disk_is_canonical_and_round_trips(root: Path) -> None:
    data = (root / MANIFEST_NAME).read_bytes()
    assert canonical_json(decode_manifest(data)) == data


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_set("surprise", value=1), ManifestError),
        (_set("variants", 0, "surprise", value=1), ManifestError),
        (_set("schema_version", value=2), ManifestError),
        (_set("format", value="other"), ManifestError),
        (_drop("variants"), ManifestError),
        (_set("variants", value=[]), ManifestError),
        (_set("variants", 0, "format", value="onnx"), ManifestError),
        (_set("variants", 0, "precision", value="int3"), ManifestError),
        (_set("variants", 0, "id", value="Bad Id"), ManifestError),
        (_set("variants", 0, "inputs", 0, "shape", value=[1, -3, 2, 2]), ManifestError),
        (_set("variants", 0, "inputs", 0, "shape", value=[1] * 99), ManifestError),
        (_set("variants", 0, "size_bytes", value=1), ManifestError),
        (_set("variants", 0, "sha256", value="0" * 64), ManifestError),
        (_set("variants", 0, "path", value="nowhere.tflite"), ManifestError),
        (_set("variants", 0, "quality", "passed", value=False), ManifestError),
        (_set("variants", 0, "quality", "agreement", value=1.5), ManifestError),
        (_set("variants", 0, "preprocess", "normalization", "std", value=[1, 0, 1]), ManifestError),
        (_set("task", "classes", value=3), ManifestError),
        (_set("task", "type", value="divination"), ManifestError),
        (_set("labels", "path", value="other.txt"), ManifestError),
        (_set("labels", "sha256", value="0" * 64), ManifestError),
        (_set("files", 0, "sha256", value="0" * 64), TrustError),
        (_set("files", 0, "size_bytes", value=-1), ManifestError),
        (_set("files", 0, "path", value="../outside"), UnsafePath),
        (_set("files", 0, "path", value="/etc/passwd"), UnsafePath),
        (_set("files", 0, "path", value="manifest.json"), ManifestError),
    ],
)
def test_tampered_manifest_is_refused(
    root: Path, change: Callable[[dict[str, Any]], None], error: type[NearfarError]
) -> None:
    _edit(root, change)
    # A changed entry can break two rules; any refusal of the right family is right.
    with pytest.raises((error, ManifestError)):
        Bundle.open(root)


def test_two_variants_of_one_id_are_refused(root: Path) -> None:
    _edit(root, lambda d: d["variants"].append(d["variants"][0]))
    with pytest.raises(ManifestError, match="twice"):
        Bundle.open(root)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "\xff\xfe", '{"a":' * 100_000, "{}"]
)
def test_manifest_that_is_no_manifest_is_refused(root: Path, text: str) -> None:
    (root / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError):
        Bundle.open(root)


def test_endless_manifest_is_refused_unread(root: Path) -> None:
    with (root / MANIFEST_NAME).open("wb") as file:
        file.truncate(limits.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(LimitExceeded):
        Bundle.open(root)


def test_named_pipe_in_place_of_a_manifest_does_not_block(root: Path) -> None:
    (root / MANIFEST_NAME).unlink()
    os.mkfifo(root / MANIFEST_NAME)
    with pytest.raises(MissingFile):
        Bundle.open(root)
    with pytest.raises(MissingFile, match="regular file"):
        read_bounded(root / MANIFEST_NAME, 100)


def test_missing_pieces_are_named(root: Path) -> None:
    bundle = Bundle.open(root)
    victim = bundle.manifest.variants[0].path
    (root / victim).unlink()
    with pytest.raises(MissingFile, match=victim.replace(".", r"\.")):
        Bundle.open(root)
    (root / MANIFEST_NAME).unlink()
    with pytest.raises(MissingFile, match=r"manifest\.json"):
        Bundle.open(root)
    with pytest.raises(MissingFile):
        Bundle.open(root / "no-such-folder")


def test_one_flipped_bit_in_any_file_is_noticed(root: Path) -> None:
    for entry in Bundle.open(root).manifest.files:
        path = root / entry.path
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(DigestMismatch, match=entry.path.rpartition("/")[2]):
            Bundle.open(root)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    Bundle.open(root)


def test_grown_file_is_refused_by_its_size(root: Path) -> None:
    entry = Bundle.open(root).manifest.files[0]
    with (root / entry.path).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DigestMismatch, match="bytes"):
        Bundle.open(root)


def test_links_and_unlisted_files_are_refused(root: Path) -> None:
    entry = Bundle.open(root).manifest.files[0]
    (root / "extra.bin").write_bytes(b"x")
    with pytest.raises(UnlistedFile, match=r"extra\.bin"):
        Bundle.open(root)
    (root / "extra.bin").unlink()
    original = root / entry.path
    moved = root.parent / "elsewhere"
    original.rename(moved)
    original.symlink_to(moved)
    with pytest.raises(UnsafePath):
        Bundle.open(root)
    original.unlink()
    moved.rename(original)
    (root / "loop").symlink_to(root.parent)
    with pytest.raises(UnlistedFile):
        Bundle.open(root)


@pytest.mark.parametrize(
    "path",
    [
        "../x", "a/../../x", "/x", "a//b", "", ".", "..", "a/.", "./a", ".hidden", "a/.git",
        "C:x", "C:\\x", "a\\b", "a\x00b", "a\nb", "x.", "x ", "con", "NUL.txt", "lpt1",
        "ü.bin", "a" * 300, "~", "-rf", "a/-b", "$HOME", "a;b", "\u202ea", "a\uff0fb",
    ],
)  # fmt: skip
def test_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(UnsafePath):
        check_relative_path(path)


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_accepted_path_stays_below_its_root(path: str) -> None:
    try:
        check_relative_path(path)
    except UnsafePath:
        return
    root = Path("/root/bundle")
    assert os.path.normpath(root / path) == str(root / path)
    assert (root / path).is_relative_to(root)


@pytest.mark.parametrize("paths", [["a", "a"], ["A/b", "a/B"], ["a", "a/b"], ["x/y/z", "x"]])
def test_paths_that_collide_somewhere_are_refused(paths: list[str]) -> None:
    with pytest.raises(UnsafePath):
        check_paths(paths)


@given(seed=st.integers(0, 2**31), flips=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_mutated_manifest_never_escapes_the_error_tree(seed: int, flips: int) -> None:
    import random

    chosen = random.Random(seed)
    data = bytearray((tiny_bundle() / MANIFEST_NAME).read_bytes())
    for _ in range(flips):
        data[chosen.randrange(len(data))] = chosen.randrange(256)
    try:
        decode_manifest(bytes(data))
    except (ManifestError, TrustError):
        return
