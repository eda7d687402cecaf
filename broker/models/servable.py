"""One servable folder, opened: its manifest read, every file checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ManifestError
from edge_runtime.contract.files import read_bounded, read_labels, verify_tree
from edge_runtime.contract.manifest import SERVABLE_NAME, Servable, decode_servable
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.wire import ModelRef

__all__ = ["ModelKey", "OpenedServable", "open_servable", "read_servable"]


class ModelKey(NamedTuple):
    """Which model: its name and version."""

    name: str
    version: str


class OpenedServable(msgspec.Struct, frozen=True, kw_only=True):
    """A servable whose files were found to be what its manifest says."""

    root: Path
    manifest: Servable
    sha256: str
    """Hex SHA-256 of ``servable.json``, which lists the digest of every other file."""
    labels: tuple[str, ...]

    @property
    def key(self) -> ModelKey:
        """Name and version."""
        return ModelKey(self.manifest.name, self.manifest.version)

    @property
    def task(self) -> ClassificationTask:
        """The task, with its parameters."""
        task = self.manifest.task
        assert isinstance(task, ClassificationTask)  # noqa: S101  # read_servable checked it
        return task

    @property
    def program_path(self) -> Path:
        """The ``torch.export`` program."""
        return self.root / self.manifest.model.path

    @property
    def ref(self) -> ModelRef:
        """What an answer says about the model that gave it."""
        labels = self.manifest.labels
        return ModelRef(
            name=self.manifest.name,
            version=self.manifest.version,
            sha256=self.sha256,
            labels_sha256=None if labels is None else labels.sha256,
        )


def read_servable(root: Path) -> OpenedServable:
    """Read manifest and labels without hashing the other files.

    For a process that is told the digest of the manifest by one that did ``open_servable``.
    Raises ``MissingFile``, ``LimitExceeded`` or ``ManifestError``.
    """
    data = read_bounded(root / SERVABLE_NAME, limits.MAX_MANIFEST_BYTES)
    manifest = decode_servable(data)
    if not isinstance(manifest.task, ClassificationTask):
        raise ManifestError(
            f"{SERVABLE_NAME} of {manifest.name!r} declares the task "
            f"{manifest.task.__struct_config__.tag!r}: this broker serves classification"
        )
    if len(manifest.model.inputs) != 1 or len(manifest.model.outputs) != 1:
        raise ManifestError(
            f"{SERVABLE_NAME} of {manifest.name!r} must record one input and one output: "
            "export a model that takes one image and gives one score a class"
        )
    assert manifest.labels is not None  # noqa: S101  # Servable.check: classification has labels
    return OpenedServable(
        root=root,
        manifest=manifest,
        sha256=hashlib.sha256(data).hexdigest(),
        labels=read_labels(root, manifest.labels),
    )


def open_servable(root: Path) -> OpenedServable:
    """Read the manifest of a folder and check every file against it.

    Raises ``MissingFile``, ``LimitExceeded``, ``ManifestError`` (also for a task that the
    broker does not serve) and what ``verify_tree`` raises.
    """
    opened = read_servable(root)
    verify_tree(root, opened.manifest.files, manifest_name=SERVABLE_NAME)
    return opened
