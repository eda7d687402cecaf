"""From a SOURCE to a bundle: plan, prepare, convert each variant, prove, write."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from converters.auto import Restored
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
    Job,
    JobResult,
    Prepared,
    PrepareJob,
    RoundJob,
    SensitivityJob,
    SourceRequest,
)
from converters.plan import FileOptions, Target
from converters.quality import with_quality
from converters.ranges import MINMAX, RangeMethod
from converters.recipes import RECIPES
from converters.repair import Written, repair
from converters.resume import JobCache
from converters.supervisor import JobError, Listener, Supervisor
from converters.tasks import ANCHORS_FILE
from converters.verify.figures import Finding
from converters.verify.gates import Gates, default_gates
from converters.verify.outcome import Options, Report, VariantReport
from converters.verify.verify import measure_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import (
    CalibrationError,
    ConversionError,
    NearfarError,
)
from edge_runtime.contract.files import atomic_directory
from edge_runtime.contract.manifest import (
    CalibrationRecord,
    FileMetadata,
    Manifest,
    canonical_json,
)
from edge_runtime.contract.tasks import task_name

__all__ = ["Conversion", "Outcome", "convert"]

_CHECK_IMAGES = 64
_LATENTS = 128
_NOISE_IMAGES = 32
_MAX_LABELS_IN_FILE = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything the command line asks for."""

    source: SourceRequest
    targets: Sequence[Target]
    output: Path
    calibration: Dataset | None = None
    noise: bool = False
    """Calibrate with noise where there are no images."""
    ranges: RangeMethod = MINMAX
    """How the calibration inputs set the ranges of int8 activations."""
    options: FileOptions = dataclasses.field(default_factory=FileOptions)
    gates: Gates | None = None
    """Other bounds than the task's own."""
    name: str | None = None
    version: str = "1.0.0"
    force: bool = False
    auto: bool = False
    """Give variants that fail their gate their accuracy back, or a stand-in."""
    keep_going: bool = False
    """A variant that cannot be written is left out and named, instead of ending it all."""
    cache: JobCache | None = None
    """Finished steps of earlier runs."""
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
    restored: dict[str, Restored] = {}
    """What ``auto`` did, by variant."""
    left_out: dict[str, Finding] = {}
    """Variants that could not be written, by id: the error's code, and why."""


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
        self.supervisor = Supervisor(
            work, jobs=request.jobs, listener=request.listener, cache=request.cache
        )
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.left_out: dict[str, Finding] = {}
        self.restored: dict[str, Restored] = {}

    def run(self) -> Outcome:
        request = self.request
        calibrated = self._calibrated()
        golden = self._golden()
        prepared = self._prepare(golden, calibrated)
        record = self._calibration_record() if calibrated else None
        if calibrated and any(target.recipe.rounded for target in request.targets):
            self._call(
                "weights",
                RoundJob(
                    source=request.source,
                    calibration=str(self.root / "reference" / "calibration.npy"),
                    out_file=str(self.rounded),
                    fingerprint=prepared.fingerprint,
                ),
            )
        artifacts = self._convert_all(prepared)
        if not artifacts:
            target, found = next(iter(self.left_out.items()))
            raise ConversionError(f"no variant could be written. {target}: {found.detail}")
        calibration = self.root / "reference" / "calibration.npy"
        if calibration.exists():  # no part of the bundle
            calibration.rename(self.work / "calibration.npy")
        manifest = self._write(prepared, golden, record, artifacts)
        report = self._measure()
        if request.auto and not report.passed:
            bench = _Bench(self, prepared, golden, record, artifacts)
            self.restored = repair(bench, list(request.targets), report)
            manifest = self._write(prepared, golden, record, artifacts)
            report = self._measure()
        images = calibrated and request.calibration is not None
        manifest = with_quality(manifest, report, "calibration" if images else "golden")
        write_manifest(self.root, manifest)
        return Outcome(
            bundle=str(request.output),
            manifest=manifest,
            report=report,
            seconds=self.seconds,
            peak_rss_bytes=self.peak,
            labels_given=prepared.labels_given,
            restored=self.restored,
            left_out=self.left_out,
        )

    def _calibrated(self) -> bool:
        """Whether calibration inputs are needed, or there anyway and of use."""
        given = self.request.calibration is not None or self.request.source.task == "generation"
        return any(
            target.recipe.calibrated or (given and target.recipe.gains)
            for target in self.request.targets
        )

    @property
    def rounded(self) -> Path:
        """The int8 weights that all formats share, where there were inputs to choose them by."""
        return self.work / "rounded.safetensors"

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
        method = f"{self.request.ranges.sentence}; weights by GPTQ rounding"
        if self.request.source.task == "generation":
            return CalibrationRecord(images=_LATENTS, data="latents", path=None, method=method)
        if self.request.calibration is None:
            return CalibrationRecord(images=_NOISE_IMAGES, data="noise", path=None, method=method)
        digests = image_digests(self.request.calibration.files)
        return write_calibration_record(self.root, digests, method)

    def _convert_all(self, prepared: Prepared) -> list[Written]:
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
        calibration = self._calibration_file()
        calibrated = recipe.calibrated or (recipe.gains and calibration.exists())
        rounded = recipe.rounded and self.rounded.exists()
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
            calibration=str(calibration) if calibrated else None,
            ranges=self.request.ranges,
            rounded=str(self.rounded) if rounded else None,
            base=str(base) if base and not rounded else None,
            keep=options.keep if recipe.calibrated else (),
            fingerprint=prepared.fingerprint,
        )

    def _calibration_file(self) -> Path:
        """Where the inputs lie: the child writes them beside the reference."""
        moved = self.work / "calibration.npy"
        return moved if moved.exists() else self.root / "reference" / "calibration.npy"

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
        artifacts: Sequence[Written],
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

    def _measure(self, only: str | None = None) -> Report:
        """Run every saved file, or one, where it will run, before anyone sees the bundle."""
        bundle = Bundle.open(self.root)
        if only is not None:
            one = bundle.manifest.variant(only)
            base = f"{one.format}-fp32"  # what its size is compared with
            chosen = tuple(v for v in bundle.manifest.variants if v.id in (only, base))
            bundle.manifest = msgspec.structs.replace(bundle.manifest, variants=chosen)
        data = self.request.calibration
        if bundle.manifest.preprocess is None:
            files: tuple[Path, ...] = ()
        elif data is None or bundle.manifest.provenance.calibration is None:
            files = tuple(bundle.root / vector.input for vector in bundle.manifest.golden)
        else:
            step = max(1, len(data.files) // _CHECK_IMAGES)
            files = data.files[::step][:_CHECK_IMAGES]
        options = Options(
            gates=self.request.gates or default_gates(task_name(bundle.manifest.task)),
            jobs=self.request.jobs,
            explain=only is None,
            listener=self.request.listener,
        )
        answers = self.work / "answers"
        return measure_bundle(bundle, Dataset(files=files), options, answers=answers)


class _Bench:
    """What ``repair`` may do with a conversion."""

    def __init__(
        self,
        run: _Run,
        prepared: Prepared,
        golden: Sequence[Path],
        record: CalibrationRecord | None,
        artifacts: list[Written],
    ) -> None:
        self.run = run
        self.prepared = prepared
        self.golden = golden
        self.record = record
        self.artifacts = artifacts
        self.root = run.root
        self.work = run.work

    def call(self, name: str, job: Job) -> JobResult:
        return self.run._call(name, job)

    def job(self, target: Target) -> ConvertJob:
        made: dict[str, tuple[Path, Artifact]] = {}
        for name, precision, path, artifact in self.artifacts:
            made[f"{name}-{precision}"] = (self.root / path, artifact)
        return self.run._job(target, self.prepared, made)

    def order_job(self) -> SensitivityJob:
        rounded = self.run.rounded
        return SensitivityJob(
            source=self.run.request.source,
            calibration=str(self.work / "calibration.npy"),
            rounded=str(rounded) if rounded.exists() else None,
        )

    def judge(self, variant_id: str) -> VariantReport:
        self.run._write(self.prepared, self.golden, self.record, self.artifacts)
        report = self.run._measure(only=variant_id)
        return next(entry for entry in report.variants if entry.id == variant_id)


def _failure(target_id: str, error: JobError) -> NearfarError:
    """The child's own error, with the variant's name in front."""
    return type(error.cause)(f"{target_id}: {error.cause.detail}")
