"""What the command line asks for, and what its child processes are told and answer.

Every message between parent and child is one of these structs as JSON: nothing is pickled.
"""

from __future__ import annotations

import msgspec

from edge_runtime.contract.manifest import (
    Accelerator,
    Format,
    MinOs,
    Precision,
    ReferenceRecord,
    Variant,
)
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import Task
from edge_runtime.contract.tasks.classification import Activation
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "Artifact",
    "ConvertJob",
    "Job",
    "JobResult",
    "PrepareJob",
    "Prepared",
    "RoundJob",
    "Rounded",
    "RunJob",
    "RunResult",
    "SourceRequest",
    "VariantRun",
]


class _Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class SourceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A trained model, as named on the command line; every path is absolute."""

    source: str
    """``torchvision:NAME``, ``keras:NAME``, ``zoo:NAME`` or ``FILE.py:CALLABLE``."""
    weights: str | None = None
    """A file, ``DEFAULT`` (the library's own loader) or ``random:SEED``."""
    preprocess: str | None = None
    """A name, or a TOML file; None: the source brings its own."""
    input_height: int | None = None
    input_width: int | None = None
    resize_size: int | None = None
    labels: str | None = None
    """A text file, one class a line; None: the source's own, or class numbers."""
    activation: Activation | None = None
    temperature: float | None = None


class PrepareJob(_Message, tag="prepare", kw_only=True):
    """Build the source, export the fp32 reference, run it on the golden images."""

    source: SourceRequest
    out_dir: str
    """Gets ``model.pt2``, ``labels.txt`` and, for each golden image, ``<name>.f32``."""
    golden: list[str] = []
    calibration: list[str] = []
    """Images; their pre-processed pixels go to ``calibration.npy``."""
    calibration_classes: list[int] = []
    """Their classes, when known: mislabeled data are refused."""


class Prepared(_Message, tag="prepared", kw_only=True):
    """What the source turned out to be."""

    task: Task
    preprocess: Preprocess
    labels: list[str]
    labels_given: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source_sha256: str | None
    weights: str
    weights_sha256: str | None
    tools: dict[str, str]
    calibration_accuracy: float | None = None


class RoundJob(_Message, tag="round", kw_only=True):
    """Choose the int8 weights that all formats share."""

    source: SourceRequest
    calibration: str
    out_file: str


class Rounded(_Message, tag="rounded", kw_only=True):
    """How many layers were folded and rounded."""

    folded: int
    rounded: int


class ConvertJob(_Message, tag="convert", kw_only=True):
    """Write one variant."""

    source: SourceRequest
    format: Format
    precision: Precision
    out_dir: str
    inputs: tuple[TensorSpec, ...]
    """Of the reference: NCHW, batch 1."""
    outputs: tuple[TensorSpec, ...]
    calibration: str | None = None
    rounded: str | None = None
    base: str | None = None
    """The same format's fp32 file, where this precision starts from it."""


class Artifact(_Message, tag="artifact", kw_only=True):
    """One written variant."""

    path: str
    """Relative to the job's ``out_dir``."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    min_os: MinOs
    min_runtime: str
    accelerators: tuple[Accelerator, ...]
    rewrites: tuple[str, ...]
    tools: dict[str, str]


class VariantRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One saved file to run on every image."""

    path: str
    variant: Variant


class RunJob(_Message, tag="run", kw_only=True):
    """Run saved files of one format, or the reference, on images."""

    images: list[str]
    golden: list[str] = []
    """Images for the reference alone; its answers go to ``reference.golden.npy``."""
    out_dir: str
    """Gets ``<id>.npy``, float32 ``[images, outputs]``, for each run."""
    variants: list[VariantRun] = []
    probes: list[Preprocess] = []
    """Other pre-processings to try; output ``<id>.probe<k>.npy``."""
    probe_images: int = 0
    """How many of the images the variants are probed on; the reference takes all."""
    reference: str | None = None
    """A ``model.pt2`` to run instead of variants."""
    reference_source: SourceRequest | None = None
    """Or a source to rebuild and run."""
    reference_preprocess: Preprocess | None = None


class RunResult(_Message, tag="ran", kw_only=True):
    """What happened to each file."""

    errors: dict[str, tuple[str, str]]
    """id -> (code, detail) of those that did not load or run."""
    peak_ram_bytes: dict[str, int]
    milliseconds: dict[str, float]
    """Median of one inference, one thread, on this machine."""
    record: ReferenceRecord | None = None
    """What was found inside ``model.pt2``."""


Job = PrepareJob | RoundJob | ConvertJob | RunJob
Answer = Prepared | Rounded | Artifact | RunResult


class JobResult(_Message, kw_only=True):
    """What a child process leaves behind: an answer, or a typed error."""

    answer: Answer | None = None
    error_code: str = ""
    error_detail: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
