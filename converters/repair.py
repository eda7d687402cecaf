"""``--auto`` at work: convert what failed again with layers kept, then find a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import msgspec

from converters.auto import Prediction, Restored, finer_precisions, restore
from converters.bundle_writer import add_variant_files
from converters.jobs import Artifact, ConvertJob, Job, JobResult, Sensitivity
from converters.plan import Target
from converters.recipes import RECIPES
from converters.verify.outcome import Report, VariantReport
from edge_runtime.contract.manifest import Format, Precision

__all__ = ["Bench", "Written", "repair"]

Written = tuple[Format, Precision, str, Artifact]
"""A variant's format, precision, path in the bundle, and its converter's answer."""


class Bench(Protocol):
    """The conversion under way, as far as a repair needs it."""

    root: Path
    work: Path
    artifacts: list[Written]

    def call(self, name: str, job: Job) -> JobResult:
        """Run one job in a child process; raises its typed error."""
        ...

    def job(self, target: Target) -> ConvertJob:
        """The job that converts ``target``."""
        ...

    def order_job(self) -> Job:
        """The job that orders the layers by what 8 bits cost each."""
        ...

    def judge(self, variant_id: str) -> VariantReport:
        """Write the manifest anew and run this one file."""
        ...


def repair(bench: Bench, targets: list[Target], report: Report) -> dict[str, Restored]:
    """Give each variant that failed its accuracy back, or another to take its place.

    Changes files below ``bench.root`` and ``bench.artifacts``; the caller writes the manifest
    and measures again. By variant: what was done.
    """
    done: dict[str, Restored] = {}
    order: Sensitivity | None = None
    guess: tuple[str, ...] = ()
    for failed in [entry for entry in report.variants if not entry.passed]:
        target = next((t for t in targets if t.id == failed.id), None)
        if target is None:
            continue
        result = Restored(sqnr_db_before=failed.sqnr_db, size_before=failed.size_bytes)
        if target.recipe.calibrated:
            if order is None:
                answer = bench.call("sensitivity", bench.order_job()).answer
                assert isinstance(answer, Sensitivity)  # noqa: S101  # what such a job answers
                order = answer
            tries = _Tries(bench, target)
            prediction = Prediction(
                order=[name for name, _ in order.layers], curve=tuple(order.curve)
            )
            result = restore(failed, prediction, tries.attempt, guess)
            tries.settle(result.kept)
            guess = result.kept or guess
        if not result.kept:
            result = _stand_in(bench, target, result, report)
        done[target.id] = result
    return done


def _stand_in(bench: Bench, target: Target, result: Restored, report: Report) -> Restored:
    """The next precision of the format that passes, converted now unless it is there."""
    passed = {entry.id: entry.passed for entry in report.variants}
    for finer in finer_precisions(target.format, target.precision):
        other = Target(
            format=target.format, precision=finer, recipe=RECIPES[(target.format, finer)]
        )
        if other.id not in passed:
            if other.recipe.from_fp32 and not _has_fp32(bench, target.format):
                continue
            entry = len(bench.artifacts)
            answer = bench.call(other.id, bench.job(other)).answer
            assert isinstance(answer, Artifact)  # noqa: S101
            file = add_variant_files(
                bench.root, other.format, finer, bench.work / other.id / answer.path
            )
            bench.artifacts.append((other.format, finer, file, answer))
            passed[other.id] = bench.judge(other.id).passed
            if not passed[other.id]:  # a stand-in that fails helps nobody
                del bench.artifacts[entry]
                _remove(bench.root / file)
        if passed[other.id]:
            return msgspec.structs.replace(result, stand_in=other.id)
    return result


def _has_fp32(bench: Bench, format_name: Format) -> bool:
    return any(
        (name, precision) == (format_name, "fp32") for name, precision, _, _ in bench.artifacts
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Tries:
    """Conversions of one variant with different layers kept, in the place of its file."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self.bench = bench
        self.target = target
        self.current: tuple[str, ...] = ()

    def settle(self, keep: tuple[str, ...]) -> None:
        """Make the file with ``keep`` the one in the bundle."""
        if keep == self.current:
            return
        target, bench = self.target, self.bench
        job = bench.job(target)
        job = msgspec.structs.replace(job, keep=tuple(dict.fromkeys((*job.keep, *keep))))
        shutil.rmtree(job.out_dir)
        Path(job.out_dir).mkdir()
        answer = bench.call(target.id, job).answer
        assert isinstance(answer, Artifact)  # noqa: S101
        place = next(
            index
            for index, (name, precision, _, _) in enumerate(bench.artifacts)
            if f"{name}-{precision}" == target.id
        )
        _remove(bench.root / bench.artifacts[place][2])
        path = add_variant_files(
            bench.root, target.format, target.precision, Path(job.out_dir) / answer.path
        )
        bench.artifacts[place] = (target.format, target.precision, path, answer)
        self.current = keep

    def attempt(self, keep: tuple[str, ...]) -> VariantReport:
        """Convert with ``keep`` in floating point and judge the file."""
        self.settle(keep)
        return self.bench.judge(self.target.id)
