"""Change a bundle and mend its digests: an attacker who can write, or a careless hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import (
    MANIFEST_NAME,
    Manifest,
    Variant,
    canonical_json,
    decode_manifest,
    variant_digest,
    variant_files,
)


def read(root: Path) -> Manifest:
    return decode_manifest((root / MANIFEST_NAME).read_bytes())


def mend(root: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> Manifest:
    """Apply ``change`` to the manifest and make every digest and size right again."""
    manifest = change(read(root))
    files = file_entries(root, exclude=(MANIFEST_NAME,))
    ship = {entry.path: entry.ship for entry in manifest.files}
    files = tuple(
        msgspec.structs.replace(entry, ship=ship.get(entry.path, True)) for entry in files
    )

    def mended(variant: Variant) -> Variant:
        own = variant_files(variant, files)
        return msgspec.structs.replace(
            variant,
            sha256=variant_digest(own),
            size_bytes=sum(entry.size_bytes for entry in own),
        )

    manifest = msgspec.structs.replace(
        manifest, files=files, variants=tuple(mended(v) for v in manifest.variants)
    )
    (root / MANIFEST_NAME).write_bytes(canonical_json(manifest))
    return manifest


def change_variant(
    manifest: Manifest, variant_id: str, change: Callable[[Variant], Variant]
) -> Manifest:
    assert any(v.id == variant_id for v in manifest.variants)
    return msgspec.structs.replace(
        manifest,
        variants=tuple(change(v) if v.id == variant_id else v for v in manifest.variants),
    )
