"""Open a bundle: nothing is used before every byte is what the manifest says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import MissingFile
from edge_runtime.contract.files import read_bounded, read_labels, verify_tree
from edge_runtime.contract.manifest import MANIFEST_NAME, Manifest, Variant, decode_manifest
from edge_runtime.contract.pipeline import read_anchors

__all__ = ["Bundle"]


class Bundle:
    """A verified bundle on disk. ``Bundle.open`` is the way in."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        labels: tuple[str, ...],
        anchors: NDArray[np.float32] | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.labels = labels
        self.anchors = anchors
        """A detector's, float32 ``[N, 4]``; None for another task."""

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read ``manifest.json``, check it, then check every file against it.

        Raises:
            MissingFile: no manifest, or a listed file is not there.
            ManifestError: the manifest breaks its schema or contradicts itself.
            UnsafePath: a path would leave the folder, or is a link.
            DigestMismatch, UnlistedFile: the files are not the recorded ones.
        """
        root = Path(path).absolute()
        if not (root / MANIFEST_NAME).is_file():
            raise MissingFile(f"{root} is no bundle: it has no {MANIFEST_NAME}")
        manifest = decode_manifest(read_bounded(root / MANIFEST_NAME, limits.MAX_MANIFEST_BYTES))
        verify_tree(root, manifest.files, manifest_name=MANIFEST_NAME)
        labels = read_labels(root, manifest.labels) if manifest.labels is not None else ()
        return cls(root, manifest, labels, read_anchors(root, manifest.task))

    def path(self, variant: Variant) -> Path:
        """Where a variant's file or folder lies."""
        return self.root / variant.path
