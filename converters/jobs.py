"""What the command line asks for, and what its child processes are told and answer.

Every message between parent and child is one of these structs as JSON: nothing is pickled.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from converters.ranges import MINMAX, RangeMethod
from converters.report.records import LayerRow, Picture, RenderedAnswer
from converters.verify.figures import Closeness, Finding
from edge_runtime.contract.manifest import (
    Accelerator,
    Format,
    InputMode,
    MinOs,
    Precision,
    ReferenceRecord,
    Variant,
)
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import Task, TaskName
from edge_runtime.contract.tasks.classification import Activation
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "Artifact",
    "ConvertJob",
    "InGraph",
    "Job",
    "JobResult",
    "LayerFinding",
    "LayersJob",
    "LayersResult",
    "PrepareJob",
    "Prepared",
    "RoundJob",
    "Rounded",
    "RunJob",
    "RunResult",
    "SamplesJob",
    "SamplesResult",
    "Sensitivity",
    "SensitivityJob",
    "SourceRequest",
    "VariantRun",
]


InGraph = Literal["nms", "argmax"]
"""Post-processing that a variant carries in its graph."""


class _Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class SourceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A trained model, as named on the command line; every path is absolute."""

    source: str
    """``torchvision:NAME``, ``keras:NAME``, ``zoo:NAME``, ``FILE.py:CALLABLE``, or a saved
    model: ``.pt2``, ``.pt``, ``.keras``, a SavedModel folder."""
    task: TaskName = "classification"
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
    latent_shape: tuple[int, ...] | None = None
    """Generation: the input without its batch axis, for example ``(100, 1, 1)``."""
    output_scale: float | None = None
    """Tasks that answer an image: value * scale + offset is the 8-bit pixel."""
    output_offset: float | None = None
    score_threshold: float | None = None
    """Detection."""


class PrepareJob(_Message, tag="prepare", kw_only=True):
    """Build the source, export the fp32 reference, run it on the golden images."""

    source: SourceRequest
    out_dir: str
    """Gets ``model.pt2``, for a detector ``anchors.f32``, and for each golden input one
    ``<name>.<output>.f32`` an output."""
    golden: list[str] = []
    """Images; for a generator the files are written here, one latent each."""
    calibration: list[str] = []
    """Images; their pre-processed pixels go to ``calibration.npy``."""
    calibration_latents: int = 0
    """Generation: how many latents (seeds 1000, 1001, ...) go there instead."""
    calibration_noise: int = 0
    """How many images of noise go there instead: only when asked for."""
    calibration_classes: list[int] = []
    """Their classes, when known: mislabeled data are refused."""


class Prepared(_Message, tag="prepared", kw_only=True):
    """What the source turned out to be."""

    task: Task
    preprocess: Preprocess | None
    labels: list[str] | None
    """None: the task has no classes."""
    labels_given: bool
    golden_stride: int = 1
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source_sha256: str | None
    weights: str
    weights_sha256: str | None
    tools: dict[str, str]
    calibration_accuracy: float | None = None
    fingerprint: tuple[float, ...] = ()
    """Of the net that was built: see ``sources/fingerprint.py``."""


class RoundJob(_Message, tag="round", kw_only=True):
    """Choose the int8 weights that all formats share."""

    source: SourceRequest
    calibration: str
    out_file: str
    fingerprint: tuple[float, ...] = ()
    """Of the reference's net, which must come out here too; empty: nobody knows."""


class Rounded(_Message, tag="rounded", kw_only=True):
    """How many layers were folded and rounded."""

    folded: int
    rounded: int
    equalized: int = 0
    """How many inputs and outputs of layers had their channels evened out."""


class SensitivityJob(_Message, tag="sensitivity", kw_only=True):
    """Order the layers by what 8 bits cost each."""

    source: SourceRequest
    calibration: str
    rounded: str | None = None
    """The weights that the conversion takes."""


class Sensitivity(_Message, tag="sensitive", kw_only=True):
    """Layers in the order to keep them, with the SQNR in dB when only that one is in 8 bits."""

    layers: list[tuple[str, float]]
    curve: list[tuple[int, float]] = []
    """How many of them are kept in floating point, and the simulated SQNR in dB."""


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
    ranges: RangeMethod = MINMAX
    """How calibration sets the ranges of activations."""
    rounded: str | None = None
    base: str | None = None
    """The same format's fp32 file, where this precision starts from it."""
    task: Task
    preprocess: Preprocess | None
    """Of the reference."""
    input_mode: InputMode = "float"
    in_graph: tuple[InGraph, ...] = ()
    labels: tuple[str, ...] | None = None
    min_os: MinOs | None = None
    """``--min-ios`` and ``--min-android-api``: what the app needs to run on."""
    metadata: str = "{}"
    """JSON to store inside the file: see ``docs/conversion.md``."""
    keep: tuple[str, ...] = ()
    """Module names (of the source) to leave in floating point."""
    fingerprint: tuple[float, ...] = ()
    """See ``RoundJob``."""


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
    kept: tuple[str, ...] = ()
    """Layers left in floating point, of those asked for."""
    preprocess: Preprocess | None
    """What this file expects."""
    tools: dict[str, str]


class VariantRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One saved file to run on every image."""

    path: str
    variant: Variant


class RunJob(_Message, tag="run", kw_only=True):
    """Run saved files of one format, or the reference, on inputs."""

    task: Task
    images: list[str] = []
    latents: int = 0
    """Generation: how many inputs, seeds ``EVALUATION_SEED`` and following."""
    out_dir: str
    """The reference leaves ``reference.<output>.npy``, float32 ``[inputs, ...]``, here; the
    variants are compared with it."""
    golden: list[str] = []
    """Inputs for the reference alone; its answers go to ``golden.<output>.npy``."""
    variants: list[VariantRun] = []
    probes: list[Preprocess] = []
    """Other pre-processings to try. The reference's answers go to ``probe<k>.npy``."""
    probe_images: int = 0
    """How many of the images the variants are probed on; the reference takes all."""
    reference: str | None = None
    """A ``model.pt2`` to run instead of variants."""
    reference_source: SourceRequest | None = None
    """Or a source to rebuild and run."""
    reference_preprocess: Preprocess | None = None
    reference_inputs: tuple[TensorSpec, ...] = ()
    anchors: str | None = None
    """Detection: the file of the anchors."""
    labels: list[str] = []
    """The bundle's."""


class RunResult(_Message, tag="ran", kw_only=True):
    """What happened to each file."""

    errors: dict[str, tuple[str, str]]
    """id -> (code, detail) of those that did not load or run."""
    figures: dict[str, Closeness] = {}
    findings: dict[str, list[Finding]] = {}
    """What else is wrong with a file, whatever its figures."""
    probe_db: dict[str, list[float]] = {}
    """Mean SQNR on the first ``probe_images`` under each of the probes."""
    per_input: dict[str, list[float]] = {}
    """SQNR of each input in dB."""
    top1: dict[str, list[int]] = {}
    """Classification: the first class of each image."""
    quantized_share: dict[str, float] = {}
    """Of the bytes of weights, those stored in at most 8 bits."""
    peak_ram_bytes: dict[str, int]
    milliseconds: dict[str, float]
    """Median of one inference, one thread, on this machine."""
    record: ReferenceRecord | None = None
    """What was found inside ``model.pt2``."""


class LayersJob(_Message, tag="layers", kw_only=True):
    """Compare the inner values of saved files of one format with the reference's."""

    reference: str
    images: list[str] = []
    """The first is compared layer by layer; all tell causes apart. A generator's are seeds."""
    latents: int = 0
    variants: list[VariantRun] = []
    ranges: bool = True
    """Ask whether activation ranges fit these inputs."""


class LayerFinding(msgspec.Struct, frozen=True, kw_only=True):
    """The first layer that diverges."""

    name: Literal["layer", "padding"]
    layer: str
    detail: str


class LayersResult(_Message, tag="compared", kw_only=True):
    """One row for each layer that could be matched, in the reference's order."""

    rows: dict[str, list[LayerRow]] = {}
    findings: dict[str, LayerFinding] = {}
    causes: dict[str, list[Finding]] = {}
    """Named mistakes, also of variants whose inner values cannot be read."""
    errors: dict[str, str] = {}


class SamplesJob(_Message, tag="samples", kw_only=True):
    """Render the answers of one format's files for a few inputs."""

    task: Task
    labels: list[str] = []
    rows: list[int]
    """Which of the verified inputs."""
    images: list[str] = []
    """Those inputs; a generator's are seeds."""
    latents: int = 0
    out_dir: str
    """Where the reference's answers lie."""
    preprocess: Preprocess | None
    variants: list[VariantRun]
    anchors: str | None = None


class SamplesResult(_Message, tag="rendered", kw_only=True):
    """One entry for each of the job's rows."""

    inputs: list[Picture | None] = []
    references: list[RenderedAnswer] = []
    answers: dict[str, list[RenderedAnswer]] = {}


Job = PrepareJob | RoundJob | SensitivityJob | ConvertJob | RunJob | LayersJob | SamplesJob
Answer = Prepared | Rounded | Sensitivity | Artifact | RunResult | LayersResult | SamplesResult


class JobResult(_Message, kw_only=True):
    """What a child process leaves behind: an answer, or a typed error."""

    answer: Answer | None = None
    error_code: str = ""
    error_detail: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
