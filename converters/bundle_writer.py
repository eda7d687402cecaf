"""Put the pieces of a bundle together; the manifest is written last."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from converters.jobs import Artifact, Prepared, SourceRequest
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import (
    MANIFEST_NAME,
    CalibrationRecord,
    FileEntry,
    Format,
    GoldenVector,
    InputMode,
    Labels,
    Manifest,
    Precision,
    Provenance,
    Quality,
    Reference,
    Variant,
    canonical_json,
    labels_digest,
    variant_digest,
    variant_files,
)

__all__ = [
    "add_variant_files",
    "build_manifest",
    "default_name",
    "labels_record",
    "provenance",
    "write_calibration_record",
    "write_manifest",
]

_REFERENCE_FOLDER = "reference/"
_CALIBRATION_FILE = "calibration.json"
_UNJUDGED = Quality(
    data="golden",
    images=0,
    sqnr_db_mean=0.0,
    sqnr_db_min=0.0,
    max_abs=0.0,
    size_ratio=0.0,
    passed=True,
)


def default_name(source: str) -> str:
    """A bundle name from SOURCE: ``torchvision:ResNet18`` gives ``resnet18``.

    Of a path only its last part, without suffix: where it lay is nobody's business.
    """
    name = source.rpartition(":")[2]
    if "/" in name:
        path = Path(name)
        name = path.parent.name if path.name == "saved_model.pb" else path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def add_variant_files(root: Path, format_name: Format, precision: Precision, artifact: Path) -> str:
    """Move a converter's file or folder into the bundle; returns its relative path."""
    target = f"variants/{format_name}-{precision}{artifact.suffix}"
    (root / "variants").mkdir(exist_ok=True)
    shutil.move(artifact, root / target)
    return target


def write_calibration_record(root: Path, digests: Sequence[str], method: str) -> CalibrationRecord:
    """``calibration.json``: which images were used, by content."""
    (root / _CALIBRATION_FILE).write_text(json.dumps(sorted(digests)), encoding="utf-8")
    return CalibrationRecord(images=len(digests), path=_CALIBRATION_FILE, method=method)


def labels_record(root: Path, labels: Sequence[str]) -> Labels:
    """Write ``labels.txt``."""
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return Labels(path="labels.txt", count=len(labels), sha256=labels_digest(labels))


def provenance(
    request: SourceRequest,
    prepared: Prepared,
    tools: dict[str, str],
    calibration: CalibrationRecord | None = None,
) -> Provenance:
    """Where the model comes from; file names without their folders."""
    kind = request.source.partition(":")[0]
    source = (
        request.source if kind in ("torchvision", "keras", "zoo") else Path(request.source).name
    )
    return Provenance(
        source=source,
        source_sha256=prepared.source_sha256,
        weights=prepared.weights,
        weights_sha256=prepared.weights_sha256,
        nearfar=version("nearfar"),
        tools=dict(sorted(tools.items())),
        calibration=calibration,
    )


def build_manifest(
    root: Path,
    *,
    name: str,
    bundle_version: str,
    prepared: Prepared,
    golden: Sequence[Path],
    artifacts: Sequence[tuple[Format, Precision, str, Artifact]],
    origin: Provenance,
    labels: Labels | None,
    input_mode: InputMode = "float",
) -> Manifest:
    """The manifest of what lies in ``root``, with variants not judged yet.

    ``artifacts``: format, precision, path in the bundle and the converter's answer.
    """
    files = file_entries(
        root, exclude=(MANIFEST_NAME,), no_ship=(_REFERENCE_FOLDER, _CALIBRATION_FILE)
    )
    variants = []
    for format_name, precision, path, artifact in artifacts:
        variant = Variant(
            id=f"{format_name}-{precision}",
            format=format_name,
            precision=precision,
            path=path,
            sha256="0" * 64,
            size_bytes=0,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            preprocess=artifact.preprocess,
            input_mode=input_mode,
            min_os=artifact.min_os,
            min_runtime=artifact.min_runtime,
            peak_ram_bytes=0,
            accelerators=artifact.accelerators,
            rewrites=artifact.rewrites,
            kept=artifact.kept,
            quality=_UNJUDGED,
        )
        own = variant_files(variant, files)
        variants.append(
            msgspec.structs.replace(
                variant,
                sha256=variant_digest(own),
                size_bytes=sum(entry.size_bytes for entry in own),
            )
        )
    return Manifest(
        name=name,
        version=bundle_version,
        task=prepared.task,
        preprocess=prepared.preprocess,
        labels=labels,
        reference=Reference(
            path=_REFERENCE_FOLDER + "model.pt2",
            inputs=prepared.inputs,
            outputs=prepared.outputs,
        ),
        golden=tuple(
            GoldenVector(
                input=path.relative_to(root).as_posix(),
                outputs=tuple(
                    path.with_name(f"{path.stem}.{index}.f32").relative_to(root).as_posix()
                    for index in range(len(prepared.outputs))
                ),
                stride=prepared.golden_stride,
            )
            for path in golden
        ),
        variants=tuple(variants),
        provenance=origin,
        files=files,
    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; files of variants that do not ship are marked so."""
    private = [variant for variant in manifest.variants if not variant.ship]

    def mark(entry: FileEntry) -> FileEntry:
        if any(variant_files(variant, [entry]) for variant in private):
            return msgspec.structs.replace(entry, ship=False)
        return entry

    manifest = msgspec.structs.replace(
        manifest, files=tuple(mark(entry) for entry in manifest.files)
    )
    manifest.check()
    (root / MANIFEST_NAME).write_bytes(canonical_json(manifest))
