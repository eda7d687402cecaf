"""From a SOURCE to a bundle: plan, prepare, convert each variant, prove, write."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from converters.baked import baked_record
from converters.bundle_writer import (
    add_variant_files,
    build_manifest,
    default_name,
    labels_record,
    provenance,
    write_calibration_record,
    write_manifest,
)
from converters.dataset import Dataset, image_digests
from converters.golden import GOLDEN_COUNT, write_golden_images
from converters.jobs import (
    Artifact,
    ConvertJob,
    InGraph,
    Job,
    JobResult,
    Prepared,
    PrepareJob,
    RoundJob,
    SourceRequest,
)
from converters.recipes import RECIPES, REFUSED, Recipe
from converters.supervisor import JobError, Listener, Supervisor
from converters.tasks import ANCHORS_FILE
from converters.verify.figures import Finding
from converters.verify.gates import default_gates
from converters.verify.verify import Options, Report, VariantReport, measure_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import (
    CalibrationError,
    ConversionError,
    NearfarError,
    PrecisionRefused,
)
from edge_runtime.contract.files import atomic_directory
from edge_runtime.contract.manifest import (
    CalibrationRecord,
    FileMetadata,
    Format,
    InputMode,
    Manifest,
    MinOs,
    Precision,
    Quality,
    Variant,
    canonical_json,
)
from edge_runtime.contract.tasks import task_name

__all__ = ["Conversion", "FileOptions", "Outcome", "Target", "convert", "plan"]

_METHOD = "min-max over all inputs; weights by GPTQ rounding"
_CHECK_IMAGES = 64
_LATENTS = 128
_NOISE_IMAGES = 32
_MAX_LABELS_IN_FILE = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One variant to write."""

    format: Format
    precision: Precision
    recipe: Recipe

    @property
    def id(self) -> str:
        """``tflite-int8``."""
        return f"{self.format}-{self.precision}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What every file of the bundle takes and gives."""

    input_mode: InputMode = "float"
    in_graph: tuple[InGraph, ...] = ()
    min_os: MinOs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything the command line asks for."""

    source: SourceRequest
    targets: Sequence[Target]
    output: Path
    calibration: Dataset | None = None
    noise: bool = False
    """Calibrate with noise where there are no images."""
    options: FileOptions = FileOptions()
    name: str | None = None
    version: str = "1.0.0"
    force: bool = False
    keep_going: bool = False
    """A variant that cannot be written is left out and named, instead of ending it all."""
    jobs: int = 1
    listener: Listener | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and what each job cost."""

    bundle: str
    manifest: Manifest
    report: Report
    seconds: dict[str, float]
    peak_rss_bytes: dict[str, int]
    labels_given: bool
    left_out: dict[str, Finding] = {}
    """Variants that could not be written, by id: the error's code, and why."""


def plan(
    formats: Sequence[Format], precisions: Sequence[Precision], options: FileOptions
) -> tuple[list[Target], list[str]]:
    """The variants to write, and a sentence for each combination that cannot be.

    Raises ``PrecisionRefused`` when a requested format or precision would get nothing.
    """
    targets = []
    refused = []
    for format_name in formats:
        for precision in precisions:
            recipe = RECIPES.get((format_name, precision))
            reason = REFUSED.get((format_name, precision), "not offered")
            if recipe is not None:
                reason = _obstacle(recipe, options)
            if recipe is None or reason:
                refused.append(f"{format_name} {precision}: {reason}")
            else:
                targets.append(Target(format=format_name, precision=precision, recipe=recipe))
    made_formats = {target.format for target in targets}
    made_precisions = {target.precision for target in targets}
    if set(formats) - made_formats or set(precisions) - made_precisions:
        raise PrecisionRefused("; ".join(refused))
    return targets, refused


def _obstacle(recipe: Recipe, options: FileOptions) -> str:
    """Why this recipe cannot be with these options; empty when it can."""
    if recipe.calibrated and "nms" in options.in_graph:
        return (
            "box decoding and NMS lose too much in integers: leave --nms out (the runtime does "
            "both), or take a float precision"
        )
    least = options.min_os
    if least is None:
        return ""
    own_ios, own_android = recipe.min_os.ios, recipe.min_os.android_api
    if least.ios is not None and own_ios is not None and _version(own_ios) > _version(least.ios):
        return f"it needs iOS {own_ios}, the app is to run on iOS {least.ios}"
    if (
        least.android_api is not None
        and own_android is not None
        and own_android > least.android_api
    ):
        return f"it needs Android API {own_android}, the app is to run on {least.android_api}"
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def convert(request: Conversion) -> Outcome:
    """Write the bundle, or raise and leave no trace of one.

    A variant that fails its gate is in the bundle, marked ``ship: false``, and the
    outcome's report says so. Raises the errors of every stage, typed.
    """
    needs_calibration = [t.id for t in request.targets if t.recipe.calibrated]
    generates = request.source.task == "generation"
    if needs_calibration and request.calibration is None and not generates and not request.noise:
        raise CalibrationError(
            f"{', '.join(needs_calibration)}: int8 needs real images of the kind the app will "
            "see: pass --calib DIR (about 100 images), or leave int8 out of --precision"
        )
    with (
        atomic_directory(request.output, replace=request.force) as root,
        tempfile.TemporaryDirectory(prefix="nearfar-convert-") as scratch,
    ):
        return _Run(request, root, Path(scratch)).run()


class _Run:
    """One conversion: its folders, child processes and costs."""

    def __init__(self, request: Conversion, root: Path, work: Path) -> None:
        self.request = request
        self.root = root
        self.work = work
        self.supervisor = Supervisor(work, jobs=request.jobs, listener=request.listener)
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.left_out: dict[str, Finding] = {}

    def run(self) -> Outcome:
        request = self.request
        calibrated = any(target.recipe.calibrated for target in request.targets)
        golden = self._golden()
        prepared = self._prepare(golden, calibrated)
        record = self._calibration_record() if calibrated else None
        if any(target.recipe.rounded for target in request.targets):
            self._call(
                "weights",
                RoundJob(
                    source=request.source,
                    calibration=str(self.root / "reference" / "calibration.npy"),
                    out_file=str(self.work / "rounded.safetensors"),
                ),
            )
        artifacts = self._convert_all(prepared)
        if not artifacts:
            target, found = next(iter(self.left_out.items()))
            raise ConversionError(f"no variant could be written. {target}: {found.detail}")
        (self.root / "reference" / "calibration.npy").unlink(missing_ok=True)
        manifest = self._write(prepared, golden, record, artifacts)
        report = self._measure()
        images = calibrated and request.calibration is not None
        manifest = _with_quality(manifest, report, "calibration" if images else "golden")
        write_manifest(self.root, manifest)
        return Outcome(
            bundle=str(request.output),
            manifest=manifest,
            report=report,
            seconds=self.seconds,
            peak_rss_bytes=self.peak,
            labels_given=prepared.labels_given,
            left_out=self.left_out,
        )

    def _note(self, name: str, result: JobResult) -> None:
        self.seconds[name] = round(result.seconds, 2)
        self.peak[name] = result.peak_rss_bytes

    def _call(self, name: str, job: Job) -> JobResult:
        result = self.supervisor.run(name, job)
        self._note(name, result)
        return result

    def _golden(self) -> list[Path]:
        folder = self.root / "golden"
        if self.request.source.task != "generation":
            return write_golden_images(folder)
        folder.mkdir()
        return [folder / f"latent{seed}.f32" for seed in range(GOLDEN_COUNT)]

    def _prepare(self, golden: Sequence[Path], calibrated: bool) -> Prepared:
        request = self.request
        reference = self.root / "reference"
        reference.mkdir()
        job = PrepareJob(
            source=request.source, out_dir=str(reference), golden=[str(path) for path in golden]
        )
        data = request.calibration
        if calibrated and request.source.task == "generation":
            job.calibration_latents = _LATENTS
        elif calibrated and data is not None:
            job.calibration = [str(path) for path in data.files]
            job.calibration_classes = list(data.classes) if data.classes else []
        elif calibrated:
            job.calibration_noise = _NOISE_IMAGES
        result = self._call("reference", job)
        for path in golden:
            for output in reference.glob(f"{path.stem}.*.f32"):
                output.rename(path.with_name(output.name))
        if (reference / ANCHORS_FILE).exists():
            (reference / ANCHORS_FILE).rename(self.root / ANCHORS_FILE)
        assert isinstance(result.answer, Prepared)  # noqa: S101  # what a PrepareJob answers
        return result.answer

    def _calibration_record(self) -> CalibrationRecord:
        if self.request.source.task == "generation":
            return CalibrationRecord(images=_LATENTS, data="latents", path=None, method=_METHOD)
        if self.request.calibration is None:
            return CalibrationRecord(images=_NOISE_IMAGES, data="noise", path=None, method=_METHOD)
        digests = image_digests(self.request.calibration.files)
        return write_calibration_record(self.root, digests, _METHOD)

    def _convert_all(self, prepared: Prepared) -> list[tuple[Format, Precision, str, Artifact]]:
        """Variants that start from nothing first, then those that start from an fp32 file."""
        targets = list(self.request.targets)
        made: dict[str, tuple[Path, Artifact]] = {}
        for format_name in {t.format for t in targets if t.recipe.from_fp32}:
            if not any(t.id == f"{format_name}-fp32" for t in targets):
                base = RECIPES[(format_name, "fp32")]
                targets.append(Target(format=format_name, precision="fp32", recipe=base))
        for wave in (False, True):
            chosen = [
                t
                for t in targets
                if t.recipe.from_fp32 is wave and (not wave or f"{t.format}-fp32" in made)
            ]
            jobs: list[tuple[str, Job]] = [(t.id, self._job(t, prepared, made)) for t in chosen]
            for target, result in zip(chosen, self.supervisor.run_all(jobs), strict=True):
                if isinstance(result, JobError):
                    if not self.request.keep_going:
                        raise _failure(target.id, result)
                    self._leave_out(target, result)
                    continue
                self._note(target.id, result)
                assert isinstance(result.answer, Artifact)  # noqa: S101
                made[target.id] = (self.work / target.id / result.answer.path, result.answer)
        return [
            (
                target.format,
                target.precision,
                add_variant_files(self.root, target.format, target.precision, made[target.id][0]),
                made[target.id][1],
            )
            for target in self.request.targets
            if target.id in made
        ]

    def _leave_out(self, target: Target, error: JobError) -> None:
        self.left_out[target.id] = Finding(name=error.cause.code, detail=error.cause.detail)
        if target.precision != "fp32":
            return
        for other in self.request.targets:  # nothing to start from
            if other.format == target.format and other.recipe.from_fp32:
                self.left_out[other.id] = self.left_out[target.id]

    def _job(
        self, target: Target, prepared: Prepared, made: dict[str, tuple[Path, Artifact]]
    ) -> ConvertJob:
        out_dir = self.work / target.id
        out_dir.mkdir(exist_ok=True)
        recipe, options = target.recipe, self.request.options
        base = made[f"{target.format}-fp32"][0] if recipe.from_fp32 else None
        calibration = str(self.root / "reference" / "calibration.npy")
        return ConvertJob(
            source=self.request.source,
            format=target.format,
            precision=target.precision,
            out_dir=str(out_dir),
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            task=prepared.task,
            preprocess=prepared.preprocess,
            labels=tuple(prepared.labels) if prepared.labels is not None else None,
            input_mode=options.input_mode,
            in_graph=options.in_graph,
            min_os=options.min_os,
            metadata=self._metadata(target, prepared),
            calibration=calibration if recipe.calibrated else None,
            rounded=str(self.work / "rounded.safetensors") if recipe.rounded else None,
            base=str(base) if base else None,
        )

    def _name(self) -> str:
        return self.request.name or default_name(self.request.source.source)

    def _metadata(self, target: Target, prepared: Prepared) -> str:
        mode = self.request.options.input_mode
        preprocess = prepared.preprocess
        if preprocess is not None and mode != "float":
            preprocess = baked_record(preprocess)
        labels = tuple(prepared.labels or ())
        record = FileMetadata(
            name=self._name(),
            version=self.request.version,
            variant=target.id,
            task=prepared.task,
            preprocess=preprocess,
            input_mode=mode,
            labels=labels if len(labels) <= _MAX_LABELS_IN_FILE else (),
        )
        return canonical_json(record).decode()

    def _write(
        self,
        prepared: Prepared,
        golden: Sequence[Path],
        record: CalibrationRecord | None,
        artifacts: Sequence[tuple[Format, Precision, str, Artifact]],
    ) -> Manifest:
        tools = dict(prepared.tools)
        for _, _, _, artifact in artifacts:
            tools.update(artifact.tools)
        labels = labels_record(self.root, prepared.labels) if prepared.labels else None
        manifest = build_manifest(
            self.root,
            name=self._name(),
            input_mode=self.request.options.input_mode,
            bundle_version=self.request.version,
            prepared=prepared,
            golden=golden,
            artifacts=artifacts,
            origin=provenance(self.request.source, prepared, tools, record),
            labels=labels,
        )
        write_manifest(self.root, manifest)
        return manifest

    def _measure(self) -> Report:
        """Run every saved file where it will run, before anyone sees the bundle."""
        bundle = Bundle.open(self.root)
        data = self.request.calibration
        if bundle.manifest.preprocess is None:
            files: tuple[Path, ...] = ()
        elif data is None or bundle.manifest.provenance.calibration is None:
            files = tuple(bundle.root / vector.input for vector in bundle.manifest.golden)
        else:
            step = max(1, len(data.files) // _CHECK_IMAGES)
            files = data.files[::step][:_CHECK_IMAGES]
        options = Options(
            gates=default_gates(task_name(bundle.manifest.task)),
            jobs=self.request.jobs,
            listener=self.request.listener,
        )
        return measure_bundle(bundle, Dataset(files=files), options)


def _failure(target_id: str, error: JobError) -> NearfarError:
    """The child's own error, with the variant's name in front."""
    return type(error.cause)(f"{target_id}: {error.cause.detail}")


def _with_quality(manifest: Manifest, report: Report, data: str) -> Manifest:
    figures = {entry.id: entry for entry in report.variants}
    variants = tuple(_judged(variant, figures[variant.id], data) for variant in manifest.variants)
    return msgspec.structs.replace(manifest, variants=variants)


def _judged(variant: Variant, entry: VariantReport, data: str) -> Variant:
    quality = Quality(
        data="calibration" if data == "calibration" else "golden",
        images=entry.images,
        sqnr_db_mean=round(entry.sqnr_db or 0.0, 2),
        sqnr_db_min=round(entry.sqnr_db_min or 0.0, 2),
        max_abs=entry.max_abs or 0.0,
        agreement=entry.agreement,
        metrics={name: round(value, 4) for name, value in entry.metrics.items()},
        size_ratio=round(entry.size_ratio or 0.0, 4),
        passed=entry.passed,
        reasons=entry.reasons,
    )
    return msgspec.structs.replace(
        variant,
        quality=quality,
        ship=entry.passed,
        peak_ram_bytes=entry.peak_ram_bytes or 0,
    )
