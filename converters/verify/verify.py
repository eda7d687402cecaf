"""Verify a bundle: load each saved file where it will run, and compare with the reference."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from converters.dataset import Dataset, image_digests
from converters.jobs import Job, JobResult, RunJob, RunResult, SourceRequest, VariantRun
from converters.supervisor import JobError, Listener, Supervisor
from converters.verify.checks import (
    Check,
    candidates,
    check_golden,
    check_labels,
    check_preprocess,
    check_record,
    probe_reasons,
)
from converters.verify.gates import Gate, check_gate
from converters.verify.metrics import Closeness, Matrix, closeness
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import (
    BackendUnavailable,
    EvaluationError,
    ReferenceMissing,
)
from edge_runtime.contract.manifest import Precision, Variant
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tasks.classification import probabilities

__all__ = ["Options", "Report", "VariantReport", "measure_bundle", "verify_bundle"]

_PROBE_IMAGES = 16

Results = dict[str, JobResult | JobError]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to verify."""

    gates: dict[Precision, Gate]
    reference: SourceRequest | None = None
    """Rebuild this source and compare with it, instead of the bundle's own reference."""
    jobs: int = 1
    listener: Listener | None = None


class VariantReport(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's figures; ``None`` where it did not run."""

    id: str
    format: str
    precision: str
    passed: bool
    reasons: tuple[str, ...]
    images: int
    sqnr_db: float | None = None
    sqnr_db_min: float | None = None
    max_abs: float | None = None
    agreement: float | None = None
    disagreements: int | None = None
    confident_agreement: float | None = None
    size_ratio: float | None = None
    size_bytes: int = 0
    accuracy: float | None = None
    milliseconds: float | None = None
    """Median of one inference on this machine, one thread: not a phone's."""
    peak_ram_bytes: int | None = None
    backend_missing: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole proof."""

    bundle: str
    version: str
    passed: bool
    images: int
    reference_accuracy: float | None
    variants: tuple[VariantReport, ...]
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 all passed, 3 a backend is missing, 1 something failed."""
        if self.passed:
            return 0
        failed = [v for v in self.variants if not v.passed]
        if (
            all(check.passed for check in self.checks)
            and failed
            and all(v.backend_missing for v in failed)
        ):
            return 3
        return 1


def verify_bundle(bundle: Bundle, data: Dataset, options: Options) -> Report:
    """Run every variant and the reference on ``data``, in child processes, and judge them.

    Raises:
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
    return measure_bundle(bundle, data, options)


def measure_bundle(bundle: Bundle, data: Dataset, options: Options) -> Report:
    """``verify_bundle`` without asking whether ``data`` may be used for it."""
    with tempfile.TemporaryDirectory(prefix="nearfar-verify-") as scratch:
        return _verify(bundle, data, options, Path(scratch))


def _refuse_overlap(bundle: Bundle, files: Sequence[Path]) -> None:
    record = bundle.manifest.provenance.calibration
    if record is None:
        return
    used = set(msgspec.json.decode((bundle.root / record.path).read_bytes(), type=list[str]))
    for path, digest in zip(files, image_digests(files), strict=True):
        if digest in used:
            raise EvaluationError(
                f"{path.name} calibrated this bundle (same content): evaluate on other images, "
                "with --labels CSV --split NAME, or a separate folder"
            )


def _verify(bundle: Bundle, data: Dataset, options: Options, scratch: Path) -> Report:
    manifest = bundle.manifest
    probes = candidates(manifest.preprocess)
    images = [str(path) for path in data.files]
    jobs: list[tuple[str, Job]] = [
        (
            "reference",
            _reference_job(bundle, data, options, scratch, [record for _, record in probes[1:]]),
        )
    ]
    formats = sorted({variant.format for variant in manifest.variants})
    for name in formats:
        runs = [
            VariantRun(path=str(bundle.path(variant)), variant=variant)
            for variant in manifest.variants
            if variant.format == name
        ]
        jobs.append(
            (
                name,
                RunJob(
                    images=images,
                    out_dir=str(scratch),
                    variants=runs,
                    probes=[record for _, record in probes],
                    probe_images=min(_PROBE_IMAGES, len(images)),
                ),
            )
        )
    supervisor = Supervisor(scratch, jobs=options.jobs, listener=options.listener)
    results = dict(zip([name for name, _ in jobs], supervisor.run_all(jobs), strict=True))
    failed = results["reference"]
    if isinstance(failed, JobError):
        raise failed.cause
    return _judge(bundle, data, options, scratch, results, [name for name, _ in probes])


def _reference_job(
    bundle: Bundle, data: Dataset, options: Options, scratch: Path, probes: list[Preprocess]
) -> RunJob:
    job = RunJob(
        images=[str(path) for path in data.files],
        golden=[str(bundle.root / vector.image) for vector in bundle.manifest.golden],
        out_dir=str(scratch),
        probes=probes if data.classes is not None else [],
    )
    if options.reference is not None:
        job.reference_source = options.reference
        job.reference_preprocess = bundle.manifest.preprocess
    elif bundle.manifest.reference is not None:
        # Its own record, inside model.pt2, says how it is fed; check_record compares.
        job.reference = str(bundle.root / bundle.manifest.reference.path)
    return job


def _judge(
    bundle: Bundle,
    data: Dataset,
    options: Options,
    scratch: Path,
    results: Results,
    probe_names: list[str],
) -> Report:
    manifest = bundle.manifest
    task = manifest.task
    assert isinstance(task, ClassificationTask)  # noqa: S101  # the only task that converts
    reference = np.load(scratch / "reference.npy")
    confidence = probabilities(task, reference).max(axis=1)
    checks = _checks(bundle, data, scratch, results, reference, probe_names)
    classes = np.array(data.classes, dtype=np.int64) if data.classes is not None else None
    reports = []
    for variant in sorted(manifest.variants, key=lambda v: v.format):
        ran = results[variant.format]
        ratio = _size_ratio(bundle, variant)
        if isinstance(ran, JobError):
            reports.append(_failed(variant, ratio, len(reference), ran.code, ran.detail, ran))
            continue
        answer = _ran(ran)
        if variant.id in answer.errors:
            code, detail = answer.errors[variant.id]
            reports.append(_failed(variant, ratio, len(reference), code, detail))
            continue
        own = np.load(scratch / f"{variant.id}.npy")
        if own.shape != reference.shape:
            detail = f"it answers {list(own.shape[1:])}, the reference {list(reference.shape[1:])}"
            reports.append(_failed(variant, ratio, len(reference), "tensor", detail))
            continue
        figures = closeness(reference, own, confidence)
        reasons = check_gate(options.gates[variant.precision], variant.precision, figures, ratio)
        if figures.finite:
            probed = [
                (probe, scratch / f"{variant.id}.probe{number}.npy")
                for number, probe in enumerate(probe_names)
            ]
            reasons += probe_reasons(reference, own, probed, min(_PROBE_IMAGES, len(reference)))
        reports.append(_report(variant, ratio, figures, reasons, own, classes, answer))
    return Report(
        bundle=manifest.name,
        version=manifest.version,
        passed=all(v.passed for v in reports) and all(c.passed for c in checks),
        images=len(reference),
        reference_accuracy=_accuracy(reference, classes),
        variants=tuple(reports),
        checks=tuple(checks),
    )


def _checks(
    bundle: Bundle,
    data: Dataset,
    scratch: Path,
    results: Results,
    reference: Matrix,
    probe_names: list[str],
) -> list[Check]:
    answer = _ran(results["reference"])
    checks = [check_record(bundle, answer.record)]
    if bundle.manifest.golden:
        checks.append(check_golden(bundle, np.load(scratch / "reference.golden.npy")))
    if data.classes is not None:
        classes = np.array(data.classes, dtype=np.int64)
        checks.append(check_labels(reference, classes))
        others = [
            (name, np.load(scratch / f"reference.probe{number}.npy"))
            for number, name in enumerate(probe_names[1:])  # without the declared one
        ]
        checks.append(check_preprocess(reference, others, classes))
    return checks


def _ran(result: JobResult | JobError) -> RunResult:
    assert isinstance(result, JobResult)  # noqa: S101  # a JobError was handled before
    assert isinstance(result.answer, RunResult)  # noqa: S101  # what a RunJob answers
    return result.answer


def _size_ratio(bundle: Bundle, variant: Variant) -> float:
    manifest = bundle.manifest
    for other in manifest.variants:
        if other.format == variant.format and other.precision == "fp32":
            return variant.size_bytes / max(1, other.size_bytes)
    for entry in manifest.files:
        if manifest.reference is not None and entry.path == manifest.reference.path:
            return variant.size_bytes / max(1, entry.size_bytes)
    return 1.0


def _accuracy(logits: Matrix, classes: np.ndarray | None) -> float | None:
    if classes is None:
        return None
    return float((logits.argmax(axis=1) == classes).mean())


def _failed(
    variant: Variant,
    ratio: float,
    images: int,
    code: str,
    detail: str,
    error: JobError | None = None,
) -> VariantReport:
    missing = code == BackendUnavailable.code or (
        error is not None and isinstance(error.cause, BackendUnavailable)
    )
    return VariantReport(
        id=variant.id,
        format=variant.format,
        precision=variant.precision,
        passed=False,
        reasons=(detail,),
        images=images,
        size_ratio=ratio,
        size_bytes=variant.size_bytes,
        backend_missing=missing,
    )


def _report(
    variant: Variant,
    ratio: float,
    figures: Closeness,
    reasons: list[str],
    own: Matrix,
    classes: np.ndarray | None,
    answer: RunResult,
) -> VariantReport:
    confident = None
    if figures.confident:
        confident = 1.0 - figures.confident_disagreements / figures.confident
    return VariantReport(
        id=variant.id,
        format=variant.format,
        precision=variant.precision,
        passed=not reasons,
        reasons=tuple(reasons),
        images=figures.images,
        sqnr_db=figures.sqnr_db_mean,
        sqnr_db_min=figures.sqnr_db_min,
        max_abs=figures.max_abs,
        agreement=figures.agreement,
        disagreements=figures.disagreements,
        confident_agreement=confident,
        size_ratio=ratio,
        size_bytes=variant.size_bytes,
        accuracy=_accuracy(own, classes),
        milliseconds=answer.milliseconds.get(variant.id),
        peak_ram_bytes=answer.peak_ram_bytes.get(variant.id),
    )
