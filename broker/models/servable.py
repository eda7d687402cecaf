"""One servable folder, opened: its manifest read, every file checked."""

from __future__ import annotations

import hashlib
import heapq
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.models.shapes import answer_bytes, check_tensors, output_bytes
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ManifestError
from edge_runtime.contract.files import read_bounded, read_labels, verify_tree
from edge_runtime.contract.manifest import SERVABLE_NAME, Servable, decode_servable
from edge_runtime.contract.pipeline import read_anchors
from edge_runtime.contract.tasks import Task, TaskName, task_name
from edge_runtime.contract.wire import ModelRef

__all__ = ["ModelKey", "OpenedServable", "open_servable", "read_servable"]

_MAX_OUTPUT_BYTES: Final = 512 * 2**20
"""What the outputs of one batch may take in memory."""


class ModelKey(NamedTuple):
    """Which model: its name and version."""

    name: str
    version: str


class OpenedServable(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A servable whose files were found to be what its manifest says."""

    root: Path
    manifest: Servable
    sha256: str
    """Hex SHA-256 of ``servable.json``, which lists the digest of every other file."""
    labels: tuple[str, ...]
    """Empty for a task without classes."""

    @cached_property
    def key(self) -> ModelKey:
        """Name and version."""
        return ModelKey(self.manifest.name, self.manifest.version)

    @property
    def task(self) -> Task:
        """The task, with its parameters."""
        return self.manifest.task

    @property
    def task_name(self) -> TaskName:
        """The task's tag."""
        return task_name(self.manifest.task)

    @property
    def program_path(self) -> Path:
        """The ``torch.export`` program."""
        return self.root / self.manifest.model.path

    @property
    def program_bytes(self) -> int:
        """Size of that file: weights are nearly all of it."""
        path = self.manifest.model.path
        return next(entry.size_bytes for entry in self.manifest.files if entry.path == path)

    def anchors(self) -> NDArray[np.float32] | None:
        """A detector's anchors, float32 ``[N, 4]``; None for another task."""
        return read_anchors(self.root, self.manifest.task)

    @property
    def largest_batch(self) -> int:
        """How many requests one batch may hold, so that its answers stay within bounds.

        The encoded answers fit into ``limits.MAX_BATCH_BYTES``, and the raw outputs into 512
        MiB; at least 1.
        """
        label_bytes = (len(label.encode()) for label in self.labels)
        longest = heapq.nlargest(limits.MAX_TOP_K, label_bytes)
        by_answers = limits.MAX_BATCH_BYTES // answer_bytes(self.manifest, longest)
        by_outputs = _MAX_OUTPUT_BYTES // output_bytes(self.manifest)
        return max(1, min(limits.MAX_BATCH, by_answers, by_outputs))

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
    try:
        check_tensors(manifest)
    except ManifestError as error:
        raise ManifestError(f"{SERVABLE_NAME} of {manifest.name!r}: {error.detail}") from None
    return OpenedServable(
        root=root,
        manifest=manifest,
        sha256=hashlib.sha256(data).hexdigest(),
        labels=() if manifest.labels is None else read_labels(root, manifest.labels),
    )


def open_servable(root: Path) -> OpenedServable:
    """Read the manifest of a folder and check every file against it.

    Raises ``MissingFile``, ``LimitExceeded``, ``ManifestError`` (also for tensors that do
    not fit the task) and what ``verify_tree`` raises.
    """
    opened = read_servable(root)
    verify_tree(root, opened.manifest.files, manifest_name=SERVABLE_NAME)
    return opened
