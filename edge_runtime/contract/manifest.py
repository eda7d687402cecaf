"""The documents ``manifest.json`` (a bundle) and ``servable.json`` (what the broker loads).

Strict: an unknown key, a missing one or a wrong type is a ``ManifestError``. On disk the
JSON is canonical (sorted keys, no spaces, UTF-8), so one manifest has one digest. The JSON
Schema is published as ``docs/manifest.schema.json``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ManifestError, TrustError
from edge_runtime.contract.paths import check_paths
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import DetectionTask, GenerationTask, Task, has_labels
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "MANIFEST_NAME",
    "REFERENCE_RECORD_NAME",
    "SERVABLE_NAME",
    "Accelerator",
    "CalibrationRecord",
    "FileEntry",
    "FileMetadata",
    "Format",
    "GoldenVector",
    "InputMode",
    "Labels",
    "Manifest",
    "MinOs",
    "Precision",
    "Provenance",
    "Quality",
    "Reference",
    "ReferenceRecord",
    "Servable",
    "Variant",
    "canonical_json",
    "decode_manifest",
    "decode_reference_record",
    "decode_servable",
    "json_schema",
    "labels_digest",
    "require_preprocess",
    "variant_digest",
]

MANIFEST_NAME = "manifest.json"
SERVABLE_NAME = "servable.json"
REFERENCE_RECORD_NAME = "nearfar.json"

Format = Literal["torchscript", "tflite", "coreml", "executorch"]
Precision = Literal[
    "fp32", "fp16", "int8", "int8-dyn", "int8w", "int4w", "pal4", "a16w8",
    "fp16+sparse", "int8w+sparse",
]  # fmt: skip
InputMode = Literal["float", "uint8", "image"]
"""``float``: normalized float32; ``uint8``: 8-bit pixels, normalization and channel order
are in the graph; ``image``: the same behind the platform's own image type."""
Accelerator = Literal["cpu", "gpu", "npu"]

# "$" alone also matches before a final newline in Python's regular expressions.
Name = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._+-]*$(?!\n)", max_length=limits.MAX_NAME_CHARS)
]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]*$(?!\n)", max_length=64)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Path = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_PATH_CHARS)]
Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Tensors = Annotated[
    tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TENSORS)
]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the bundle, with its size and hex SHA-256."""

    path: Path
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_BUNDLE_FILE_BYTES)]
    sha256: Sha256
    ship: bool = True
    """False: for verification only, not to be put into an app."""


class Labels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The class names, one a line in ``path``; ``sha256`` is ``labels_digest`` of them."""

    path: Path
    count: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LABELS)]
    sha256: Sha256


class MinOs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The oldest systems a variant runs on; None: not for that system."""

    android_api: Annotated[int, msgspec.Meta(ge=21, le=100)] | None = None
    ios: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}(\.[0-9]{1,2})?$(?!\n)")] | None = None


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How close a saved variant came to the fp32 reference, on ``images`` images."""

    data: Literal["golden", "calibration", "evaluation"]
    images: Count
    sqnr_db_mean: float
    """Mean over images of 10 log10(sum ref^2 / sum (ref - out)^2), capped at 200 dB."""
    sqnr_db_min: float
    max_abs: float
    agreement: Share | None = None
    """With the reference: share of images with its top-1 class, of its boxes found again
    (IoU at least 0.5, same class), of pixels with its class; None: the answer is an image."""
    metrics: dict[Text, float] = {}
    """What else the task measures: ``top5``, ``map``, ``miou``, ``psnr_db``, ``ssim``."""
    size_ratio: Annotated[float, msgspec.Meta(ge=0)]
    """Bytes, over those of the same format's fp32 variant (of the reference without one)."""
    passed: bool
    reasons: tuple[Text, ...] = ()
    """Why not, when ``passed`` is false."""


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model file (or ``.mlpackage`` folder) for one kind of device."""

    id: Name
    format: Format
    precision: Precision
    path: Path
    sha256: Sha256
    """``variant_digest`` of its files."""
    size_bytes: Bytes
    inputs: Tensors
    outputs: Tensors
    preprocess: Preprocess | None
    """What this file expects; equal to the reference's unless steps are baked in."""
    input_mode: InputMode = "float"
    min_os: MinOs
    min_runtime: Text
    peak_ram_bytes: Bytes
    """Measured on Linux: growth of resident memory over loading it and one inference."""
    accelerators: Annotated[tuple[Accelerator, ...], msgspec.Meta(min_length=1, max_length=3)]
    rewrites: tuple[Text, ...] = ()
    kept: tuple[Text, ...] = ()
    """Layers left in higher precision, so that the gate holds."""
    quality: Quality
    ship: bool = True
    """False: a gate failed; no runtime picks it by itself."""


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fp32 source as a ``torch.export`` program with a dynamic batch axis."""

    path: Path
    inputs: Tensors
    outputs: Tensors


class ReferenceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Travels inside ``model.pt2`` as the extra file ``REFERENCE_RECORD_NAME``.

    The manifest beside the file must say the same; whoever loads the file checks that.
    """

    task: Task
    preprocess: Preprocess | None
    inputs: Tensors
    outputs: Tensors


class GoldenVector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input and the reference's outputs for it.

    ``input`` is an encoded image, or a generator's latent as raw little-endian float32.
    ``outputs`` holds one file for each output: every ``stride``-th number of the flattened
    output (NCHW), raw little-endian float32, beginning with the first.
    """

    input: Path
    outputs: Annotated[tuple[Path, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TENSORS)]
    stride: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_TENSOR_ELEMENTS)] = 1


class CalibrationRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which inputs set the ranges of the int8 variants."""

    images: Count
    """How many inputs."""
    data: Literal["images", "latents", "noise"] = "images"
    """``latents``: a generator's own inputs, by seed. ``noise``: no real data, asked for."""
    path: Path | None
    """JSON array of the images' hex SHA-256, sorted: proof against overlap."""
    method: Text


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the numbers come from. No path, no user name, no clock."""

    source: Text
    source_sha256: Sha256 | None = None
    weights: Text
    weights_sha256: Sha256 | None = None
    nearfar: Version
    tools: dict[Text, Text]
    calibration: CalibrationRecord | None = None


class FileMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stored as JSON inside each model file, so that it explains itself without the bundle."""

    format: Literal["nearfar.model"] = "nearfar.model"
    schema_version: Literal[1] = 1
    name: Name
    version: Version
    variant: Name
    task: Task
    preprocess: Preprocess | None
    input_mode: InputMode = "float"
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=limits.MAX_LABELS)] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model family as shipped."""

    format: Literal["nearfar.bundle"] = "nearfar.bundle"
    schema_version: Literal[1] = 1
    name: Name
    version: Version
    task: Task
    preprocess: Preprocess | None
    """What the reference expects; None only where no image goes in."""
    labels: Labels | None = None
    reference: Reference | None = None
    golden: Annotated[tuple[GoldenVector, ...], msgspec.Meta(max_length=256)] = ()
    variants: Annotated[
        tuple[Variant, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_VARIANTS)
    ]
    provenance: Provenance
    files: Annotated[
        tuple[FileEntry, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BUNDLE_FILES)
    ]

    def check(self) -> None:
        """Raise ``ManifestError`` or ``UnsafePath`` where parts contradict each other."""
        check_paths(entry.path for entry in self.files)
        listed = {entry.path: entry for entry in self.files}
        if MANIFEST_NAME in listed:
            raise ManifestError(f"{MANIFEST_NAME} cannot list itself")
        _check_model_part(self.task, self.preprocess, self.labels, listed)
        if self.reference is not None:
            _require(listed, self.reference.path)
        for vector in self.golden:
            for path in (vector.input, *vector.outputs):
                _require(listed, path)
        calibration = self.provenance.calibration
        if calibration is not None and calibration.path is not None:
            _require(listed, calibration.path)
        seen: set[str] = set()
        for variant in self.variants:
            if variant.id in seen:
                raise ManifestError(f"variant {variant.id!r} is listed twice")
            seen.add(variant.id)
            self._check_variant(variant)

    def _check_variant(self, variant: Variant) -> None:
        files = variant_files(variant, self.files)
        if not files:
            raise ManifestError(f"variant {variant.id!r}: no listed file under {variant.path!r}")
        if sum(entry.size_bytes for entry in files) != variant.size_bytes:
            raise ManifestError(f"variant {variant.id!r}: size_bytes is not that of its files")
        if variant_digest(files) != variant.sha256:
            raise ManifestError(f"variant {variant.id!r}: sha256 is not that of its files")
        _check_preprocess(self.task, variant.preprocess)
        quality = variant.quality
        numbers = (
            quality.sqnr_db_mean,
            quality.sqnr_db_min,
            quality.max_abs,
            *quality.metrics.values(),
        )
        if not all(math.isfinite(number) for number in numbers):
            raise ManifestError(f"variant {variant.id!r}: a quality figure is not finite")
        if variant.ship and not quality.passed:
            raise ManifestError(f"variant {variant.id!r} failed its gate and is marked to ship")

    def variant(self, variant_id: str) -> Variant:
        """The variant of this id; ``ManifestError`` names the ones there are."""
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        known = ", ".join(variant.id for variant in self.variants)
        raise ManifestError(f"no variant {variant_id!r} in this bundle; there are: {known}")


class Servable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A full-size model as the broker loads it: ``model.pt2`` and what it means."""

    format: Literal["nearfar.servable"] = "nearfar.servable"
    schema_version: Literal[1] = 1
    name: Name
    version: Version
    task: Task
    preprocess: Preprocess | None
    labels: Labels | None = None
    model: Reference
    provenance: Provenance
    files: Annotated[
        tuple[FileEntry, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BUNDLE_FILES)
    ]

    def check(self) -> None:
        """Raise ``ManifestError`` or ``UnsafePath`` where parts contradict each other."""
        check_paths(entry.path for entry in self.files)
        listed = {entry.path: entry for entry in self.files}
        if SERVABLE_NAME in listed:
            raise ManifestError(f"{SERVABLE_NAME} cannot list itself")
        _check_model_part(self.task, self.preprocess, self.labels, listed)
        _require(listed, self.model.path)


def _require(listed: dict[str, FileEntry], path: str) -> None:
    if path not in listed:
        raise ManifestError(f"{path!r} is used but not listed under files")


def _check_model_part(
    task: Task, preprocess: Preprocess | None, labels: Labels | None, listed: dict[str, FileEntry]
) -> None:
    _check_preprocess(task, preprocess)
    if labels is not None:
        _require(listed, labels.path)
    if has_labels(task) and (labels is None or labels.count != task.classes):
        raise ManifestError("the model needs one label for each of its classes")
    if isinstance(task, DetectionTask):
        _require(listed, task.anchors.path)
        if listed[task.anchors.path].size_bytes != task.anchors.count * 16:
            raise ManifestError(f"{task.anchors.path} does not hold {task.anchors.count} anchors")


def _check_preprocess(task: Task, preprocess: Preprocess | None) -> None:
    if (preprocess is None) is not isinstance(task, GenerationTask):
        raise ManifestError("a generator has no pre-processing, every other model has one")
    if preprocess is not None:
        preprocess.check()


def require_preprocess(preprocess: Preprocess | None) -> Preprocess:
    """The record of a model that takes images. ``ManifestError`` for a generator."""
    if preprocess is None:
        raise ManifestError("this model takes a seed, not an image")
    return preprocess


def variant_files(variant: Variant, files: Iterable[FileEntry]) -> list[FileEntry]:
    """The files of ``variant``: the one at its path, or all below it."""
    prefix = variant.path + "/"
    return [f for f in files if f.path == variant.path or f.path.startswith(prefix)]


def variant_digest(files: Iterable[FileEntry]) -> str:
    r"""Hex SHA-256 that names one variant's bytes.

    Over ``"<sha256>  <path>\n"`` of each file, paths sorted: what ``sha256sum`` prints.
    """
    lines = sorted(f"{entry.sha256}  {entry.path}\n" for entry in files)
    lines.sort(key=lambda line: line[66:])
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def labels_digest(labels: Iterable[str]) -> str:
    """Hex SHA-256 of the labels, each followed by a newline, UTF-8."""
    return hashlib.sha256("".join(label + "\n" for label in labels).encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, shortest floats. One value, one encoding."""
    return msgspec.json.encode(value, order="sorted")


_T = TypeVar("_T", Manifest, Servable)


def _decode(data: bytes, kind: type[_T], name: str) -> _T:
    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise ManifestError(f"{name} has more than {limits.MAX_MANIFEST_BYTES} bytes")
    try:
        value = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{name} breaks its schema: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{name} is not JSON: {error}") from None
    try:
        value.check()
    except TrustError:
        raise
    except ManifestError as error:
        raise ManifestError(f"{name}: {error.detail}") from None
    return value


def decode_manifest(data: bytes) -> Manifest:
    """Decode and check ``manifest.json``. Raises ``ManifestError`` or ``UnsafePath``."""
    return _decode(data, Manifest, MANIFEST_NAME)


def decode_servable(data: bytes) -> Servable:
    """Decode and check ``servable.json``. Raises ``ManifestError`` or ``UnsafePath``."""
    return _decode(data, Servable, SERVABLE_NAME)


def decode_reference_record(data: bytes | str) -> ReferenceRecord:
    """Decode the record inside a ``model.pt2``. Raises ``ManifestError``."""
    try:
        return msgspec.json.decode(data, type=ReferenceRecord)
    except msgspec.DecodeError as error:
        raise ManifestError(f"the record inside model.pt2 makes no sense: {error}") from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of both documents, as published in ``docs/``."""
    schemas, components = msgspec.json.schema_components(
        [Manifest, Servable], ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nearfar manifest.json and servable.json",
        "oneOf": list(schemas),
        "$defs": components,
    }
