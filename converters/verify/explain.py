"""Look into files that failed or are in doubt, and say in the report what is behind it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from converters.jobs import Job, LayersJob, LayersResult, VariantRun
from converters.supervisor import JobError, Supervisor
from converters.verify.figures import Finding
from converters.verify.gates import in_doubt
from converters.verify.outcome import Report, VariantReport
from edge_runtime.contract.manifest import Format

__all__ = ["doubtful", "explain", "look_into"]

_RECORDS = frozenset({"labels", "task", "metadata"})
"""Findings that say nothing of the answers: no layer is to blame."""


def doubtful(entry: VariantReport) -> bool:
    """Whether this file failed for its answers, or came close to it."""
    if not entry.passed and not {finding.name for finding in entry.findings} <= _RECORDS:
        return not entry.backend_missing
    return in_doubt(entry.precision, entry.sqnr_db, entry.sqnr_db_min, entry.agreement)


def look_into(job: LayersJob, runs: Sequence[VariantRun], supervisor: Supervisor) -> LayersResult:
    """What ``job`` finds in the files ``runs``, of any formats.

    To load the reference and to run it on every image costs more than to look into a file, so
    one process takes several formats. One that crashes takes its group along: each format of
    that group is then asked again, alone.
    """
    formats = sorted({run.variant.format for run in runs})
    groups = [formats[start :: supervisor.jobs] for start in range(supervisor.jobs)]
    found = LayersResult()
    crashed = _ask(job, runs, [group for group in groups if group], supervisor, found)
    again = [[name] for group in crashed if len(group) > 1 for name in group]
    _ask(job, runs, again, supervisor, found)  # who crashes alone failed before, with its reason
    return found


def _ask(
    job: LayersJob,
    runs: Sequence[VariantRun],
    groups: Sequence[Sequence[Format]],
    supervisor: Supervisor,
    found: LayersResult,
) -> list[Sequence[Format]]:
    """Add to ``found`` what each group's process answers; the groups that crashed."""
    jobs: list[tuple[str, Job]] = []
    for group in groups:
        chosen = [run for run in runs if run.variant.format in group]
        jobs.append((f"{'+'.join(group)} layers", msgspec.structs.replace(job, variants=chosen)))
    crashed = []
    for group, result in zip(groups, supervisor.run_all(jobs), strict=True):
        if isinstance(result, JobError):
            crashed.append(group)
            continue
        assert isinstance(result.answer, LayersResult)  # noqa: S101  # what a LayersJob answers
        found.rows.update(result.answer.rows)
        found.findings.update(result.answer.findings)
        found.causes.update(result.answer.causes)
    return crashed


def explain(report: Report, found: LayersResult) -> Report:
    """The report with layers, and with the mistakes behind what failed or is in doubt."""
    report.layers.update(found.rows)
    variants = tuple(_with_causes(entry, found) for entry in report.variants)
    passed = all(v.passed for v in variants) and all(c.passed for c in report.checks)
    return msgspec.structs.replace(report, variants=variants, passed=passed)


def _with_causes(entry: VariantReport, found: LayersResult) -> VariantReport:
    """The variant with the mistakes behind it, and, if it failed, where it diverges.

    Where only a layer diverges, one that passed stays as it is.
    """
    known = {finding.name for finding in entry.findings}
    causes = found.causes.get(entry.id, []) if doubtful(entry) else []
    added = [finding for finding in causes if finding.name not in known]
    layer = found.findings.get(entry.id)
    if layer is not None and not entry.passed and layer.name not in {f.name for f in added}:
        added.append(Finding(name=layer.name, detail=layer.detail))
    if not added:
        return entry
    return msgspec.structs.replace(
        entry,
        passed=False,
        reasons=(*entry.reasons, *(finding.detail for finding in added)),
        findings=(*entry.findings, *added),
    )
