"""Verify a bundle: load each saved file where it will run, and compare with the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from converters.dataset import Dataset, image_digests
from converters.jobs import (
    Job,
    JobResult,
    LayersJob,
    RunJob,
    RunResult,
    SamplesJob,
    SamplesResult,
    VariantRun,
)
from converters.report.records import Sample
from converters.report.samples import choose_samples
from converters.supervisor import JobError, Supervisor
from converters.verify.checks import (
    Check,
    candidates,
    check_contract,
    check_golden,
    check_labels,
    check_preprocess,
    check_record,
    probe_findings,
)
from converters.verify.explain import doubtful, explain, look_into
from converters.verify.figures import Closeness, Finding
from converters.verify.gates import check_gate
from converters.verify.metrics import Matrix
from converters.verify.outcome import Options, Report, VariantReport
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import (
    BackendUnavailable,
    EvaluationError,
    ReferenceMissing,
)
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import ClassificationTask, DetectionTask, task_name

__all__ = ["measure_bundle", "verify_bundle"]

_PROBE_IMAGES = 16
_LAYER_IMAGES = 48
"""On which the causes behind a doubtful variant are looked for."""
_CONTAINER_BYTES = 64 * 1024
"""Graph, names and metadata, which no precision shrinks: not judged as size."""

Results = dict[str, JobResult | JobError]


def verify_bundle(bundle: Bundle, data: Dataset, options: Options) -> Report:
    """Run every variant and the reference on ``data``, in child processes, and judge them.

    A generator is judged on seeded latents instead. Raises:
        ReferenceMissing: the bundle carries none and ``options`` names none.
        EvaluationError: images that calibrated the bundle, or labels it does not have.
        ImageError, SourceError ...: the input is unusable.
    """
    manifest = bundle.manifest
    if manifest.reference is None and options.reference is None:
        raise ReferenceMissing(
            "this bundle carries no reference: pass --reference SOURCE --weights FILE"
        )
    _refuse_overlap(bundle, data.files)
    return measure_bundle(bundle, data, options, verifying=True)


def measure_bundle(
    bundle: Bundle,
    data: Dataset,
    options: Options,
    *,
    verifying: bool = False,
    answers: Path | None = None,
) -> Report:
    """``verify_bundle`` without asking whether ``data`` may be used for it.

    ``answers``: a folder that keeps the reference's answers from one call to the next, while
    reference and ``data`` stay the same.
    """
    record = bundle.manifest.provenance.calibration
    # Noise that was asked for is in the manifest; whoever verifies is told by its effect.
    ranges = verifying or record is None or record.data != "noise"
    if answers is not None:
        answers.mkdir(exist_ok=True)
        return _Verification(bundle, data, options, answers, ranges=ranges).run()
    with tempfile.TemporaryDirectory(prefix="nearfar-verify-") as scratch:
        return _Verification(bundle, data, options, Path(scratch), ranges=ranges).run()


def _refuse_overlap(bundle: Bundle, files: Sequence[Path]) -> None:
    record = bundle.manifest.provenance.calibration
    if record is None or record.path is None:
        return
    used = set(msgspec.json.decode((bundle.root / record.path).read_bytes(), type=list[str]))
    for path, digest in zip(files, image_digests(files), strict=True):
        if digest in used:
            raise EvaluationError(
                f"{path.name} calibrated this bundle (same content): evaluate on other images, "
                "with --labels CSV --split NAME, or a separate folder"
            )


class _Verification:
    """One run: the reference first, then one child process a format, then the verdict."""

    def __init__(
        self, bundle: Bundle, data: Dataset, options: Options, scratch: Path, *, ranges: bool
    ) -> None:
        self.bundle = bundle
        self.ranges = ranges
        self.manifest = bundle.manifest
        self.data = data
        self.options = options
        self.scratch = scratch
        generator = self.manifest.preprocess is None
        self.images = [] if generator else [str(path) for path in data.files]
        self.latents = options.latents if generator else 0
        self.classes = (
            np.array(data.classes, dtype=np.int64)
            if data.classes is not None and isinstance(self.manifest.task, ClassificationTask)
            else None
        )
        self.probes: list[tuple[str, Preprocess]] = []
        if self.manifest.preprocess is not None:
            self.probes = candidates(self.manifest.preprocess)

    def run(self) -> Report:
        supervisor = Supervisor(
            self.scratch, jobs=self.options.jobs, listener=self.options.listener
        )
        answer = self._reference(supervisor)
        jobs = self._variant_jobs()
        results = dict(zip([name for name, _ in jobs], supervisor.run_all(jobs), strict=True))
        report = self._explained(self._judge(answer, results), supervisor)
        if self.options.samples is not None:
            self.options.samples.extend(self._samples(report, results, supervisor))
        return report

    def _reference(self, supervisor: Supervisor) -> RunResult:
        known = self.scratch / "reference.json"
        if known.exists():
            return msgspec.json.decode(known.read_bytes(), type=RunResult)
        answer = supervisor.run("reference", self._reference_job()).answer
        assert isinstance(answer, RunResult)  # noqa: S101  # what a RunJob answers
        known.write_bytes(msgspec.json.encode(answer))
        return answer

    def _samples(self, report: Report, results: Results, supervisor: Supervisor) -> list[Sample]:
        close: dict[str, list[float]] = {}
        for ran in results.values():
            if isinstance(ran, JobResult) and isinstance(ran.answer, RunResult):
                close.update(ran.answer.per_input)
        failed = [entry.id for entry in report.variants if not entry.passed]
        rows = choose_samples(close, failed=failed) or [0]
        if self.latents:
            rows.sort()
        jobs: list[tuple[str, Job]] = []
        for name in sorted({variant.format for variant in self.manifest.variants}):
            run = self._job()
            job = SamplesJob(
                task=run.task,
                labels=run.labels,
                rows=rows,
                images=[self.images[row] for row in rows] if self.images else [],
                latents=self.latents,
                out_dir=run.out_dir,
                preprocess=self.manifest.preprocess,
                variants=self._runs(name),
                anchors=run.anchors,
            )
            jobs.append((f"{name} samples", job))
        found = [
            result.answer
            for result in supervisor.run_all(jobs)
            if isinstance(result, JobResult) and isinstance(result.answer, SamplesResult)
        ]
        if not found:
            return []
        return [
            Sample(
                title=Path(self.images[row]).name if self.images else f"seed {row}",
                input=found[0].inputs[place],
                reference=found[0].references[place],
                answers={
                    name: answers[place]
                    for result in found
                    for name, answers in result.answers.items()
                },
            )
            for place, row in enumerate(rows)
        ]

    def _runs(self, format_name: str) -> list[VariantRun]:
        return [
            VariantRun(path=str(self.bundle.path(variant)), variant=variant)
            for variant in self.manifest.variants
            if variant.format == format_name
        ]

    def _explained(self, report: Report, supervisor: Supervisor) -> Report:
        """Look into what failed or is in doubt; with ``options.layers`` into every file."""
        reference, options = self.manifest.reference, self.options
        if reference is None or options.reference is not None or not options.explain:
            return report
        chosen = {entry.id for entry in report.variants if options.layers or doubtful(entry)}
        job = LayersJob(
            reference=str(self.bundle.root / reference.path),
            images=self.images[:_LAYER_IMAGES],
            latents=min(self.latents, _LAYER_IMAGES),
            ranges=self.ranges,
        )
        formats = sorted({variant.format for variant in self.manifest.variants})
        runs = [run for name in formats for run in self._runs(name) if run.variant.id in chosen]
        return explain(report, look_into(job, runs, supervisor))

    def _job(self) -> RunJob:
        task = self.manifest.task
        job = RunJob(
            task=task,
            images=self.images,
            latents=self.latents,
            out_dir=str(self.scratch),
            labels=list(self.bundle.labels),
        )
        if isinstance(task, DetectionTask):
            job.anchors = str(self.bundle.root / task.anchors.path)
        return job

    def _reference_job(self) -> RunJob:
        manifest, job = self.manifest, self._job()
        job.golden = [str(self.bundle.root / vector.input) for vector in manifest.golden]
        if self.classes is not None:
            job.probes = [record for _, record in self.probes[1:]]
        if self.options.reference is not None:
            job.reference_source = self.options.reference
            job.reference_preprocess = manifest.preprocess
            job.reference_inputs = manifest.reference.inputs if manifest.reference else ()
        elif manifest.reference is not None:
            # Its own record, inside model.pt2, says how it is fed; check_record compares.
            job.reference = str(self.bundle.root / manifest.reference.path)
        return job

    def _variant_jobs(self) -> list[tuple[str, Job]]:
        jobs: list[tuple[str, Job]] = []
        for name in sorted({variant.format for variant in self.manifest.variants}):
            job = self._job()
            job.variants = self._runs(name)
            job.probes = [record for _, record in self.probes]
            job.probe_images = min(_PROBE_IMAGES, len(self.images))
            jobs.append((name, job))
        return jobs

    def _judge(self, answer: RunResult, results: Results) -> Report:
        checks = self._checks(answer)
        variants = sorted(self.manifest.variants, key=lambda v: v.format)
        reports = [self._judge_variant(variant, results) for variant in variants]
        return Report(
            bundle=self.manifest.name,
            version=self.manifest.version,
            task=task_name(self.manifest.task),
            passed=all(v.passed for v in reports) and all(c.passed for c in checks),
            images=len(self.images) or self.latents,
            reference_accuracy=self._reference_accuracy(),
            variants=tuple(reports),
            checks=tuple(checks),
        )

    def _answers(self, name: str) -> Matrix:
        return np.asarray(np.load(self.scratch / f"{name}.0.npy", mmap_mode="r"))

    def _reference_accuracy(self) -> float | None:
        if self.classes is None:
            return None
        return float((self._answers("reference").argmax(axis=1) == self.classes).mean())

    def _checks(self, answer: RunResult) -> list[Check]:
        checks = [check_record(self.bundle, answer.record), check_contract(self.bundle)]
        if self.manifest.golden:
            files = sorted(self.scratch.glob("golden.*.npy"))
            checks.append(check_golden(self.bundle, [np.load(path) for path in files]))
        if self.classes is not None:
            reference = self._answers("reference")
            checks.append(check_labels(reference, self.classes))
            others = [
                (name, self._answers(f"probe{number}"))
                for number, (name, _) in enumerate(self.probes[1:])  # without the declared one
            ]
            checks.append(check_preprocess(reference, others, self.classes))
        return checks

    def _judge_variant(self, variant: Variant, results: Results) -> VariantReport:
        ran = results[variant.format]
        ratio = _size_ratio(self.bundle, variant)
        images = len(self.images) or self.latents
        if isinstance(ran, JobError):
            missing = isinstance(ran.cause, BackendUnavailable)
            return _failed(variant, ratio, images, ran.cause.code, ran.detail, missing=missing)
        answer = ran.answer
        assert isinstance(answer, RunResult)  # noqa: S101  # what a RunJob answers
        if variant.id in answer.errors:
            code, detail = answer.errors[variant.id]
            missing = code == BackendUnavailable.code
            return _failed(variant, ratio, images, code, detail, missing=missing)
        figures = answer.figures[variant.id]
        share = answer.quantized_share.get(variant.id)
        gate = self.options.gates[variant.precision]
        if variant.kept:  # what stays in floating point is stored so
            gate = msgspec.structs.replace(gate, quantized_share=0.0)
        judged = ratio * max(0, variant.size_bytes - _CONTAINER_BYTES) / max(1, variant.size_bytes)
        findings = check_gate(gate, variant.precision, figures, judged, share)
        findings += answer.findings.get(variant.id, [])
        if variant.id in answer.probe_db:
            names = [name for name, _ in self.probes]
            findings += probe_findings(names, answer.probe_db[variant.id], self._own_probe(variant))
        return self._report(variant, ratio, figures, findings, answer)

    def _own_probe(self, variant: Variant) -> int | None:
        """Which of the probes is the variant's own record, if any."""
        for number, (_, record) in enumerate(self.probes):
            if record == variant.preprocess:
                return number
        return None

    def _report(
        self,
        variant: Variant,
        ratio: float,
        figures: Closeness,
        findings: list[Finding],
        answer: RunResult,
    ) -> VariantReport:
        confident = None
        if figures.confident:
            confident = 1.0 - figures.confident_disagreements / figures.confident
        accuracy = None
        if self.classes is not None:
            accuracy = float((np.array(answer.top1[variant.id]) == self.classes).mean())
        return VariantReport(
            id=variant.id,
            format=variant.format,
            precision=variant.precision,
            passed=not findings,
            reasons=tuple(finding.detail for finding in findings),
            findings=tuple(findings),
            images=figures.images,
            sqnr_db=figures.sqnr_db_mean,
            sqnr_db_min=figures.sqnr_db_min,
            wanted_db=self.options.gates[variant.precision].sqnr_db_mean,
            max_abs=figures.max_abs,
            agreement=figures.agreement,
            disagreements=figures.disagreements,
            confident_agreement=confident,
            metrics=figures.metrics,
            size_ratio=ratio,
            size_bytes=variant.size_bytes,
            quantized_share=answer.quantized_share.get(variant.id),
            accuracy=accuracy,
            milliseconds=answer.milliseconds.get(variant.id),
            peak_ram_bytes=answer.peak_ram_bytes.get(variant.id),
        )


def _size_ratio(bundle: Bundle, variant: Variant) -> float:
    manifest = bundle.manifest
    for other in manifest.variants:
        if other.format == variant.format and other.precision == "fp32":
            return variant.size_bytes / max(1, other.size_bytes)
    for entry in manifest.files:
        if manifest.reference is not None and entry.path == manifest.reference.path:
            return variant.size_bytes / max(1, entry.size_bytes)
    return 1.0


def _failed(
    variant: Variant, ratio: float, images: int, code: str, detail: str, *, missing: bool
) -> VariantReport:
    return VariantReport(
        id=variant.id,
        format=variant.format,
        precision=variant.precision,
        passed=False,
        reasons=(detail,),
        findings=(Finding(name=code, detail=detail),),
        images=images,
        size_ratio=ratio,
        size_bytes=variant.size_bytes,
        backend_missing=missing,
    )
