"""Proofs as they come out of ``verify``, with figures that tests can count on."""

from __future__ import annotations

import numpy as np

from converters.report.records import LayerRow, Sample
from converters.report.samples import render_input, render_sample
from converters.verify.checks import Check
from converters.verify.figures import Finding
from converters.verify.outcome import Report, VariantReport
from edge_runtime.contract.tasks import ClassificationTask
from tests.support.bundles import LABELS

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[2J\u202egnp"


def entry(
    identifier: str, *findings: Finding, sqnr_db: float | None = 40.0, **changes: object
) -> VariantReport:
    """One variant; ``findings`` make it fail."""
    format_name, _, precision = identifier.partition("-")
    values: dict[str, object] = {
        "sqnr_db_min": None if sqnr_db is None else sqnr_db - 5,
        "agreement": None if sqnr_db is None else 0.99,
        "disagreements": None if sqnr_db is None else 1,
        "size_ratio": 0.5,
        "size_bytes": 20_000,
        "milliseconds": None if sqnr_db is None else 1.25,
        "peak_ram_bytes": None if sqnr_db is None else 300_000,
        **changes,
    }
    return VariantReport(
        id=identifier,
        format=format_name,
        precision=precision,
        passed=not findings,
        reasons=tuple(finding.detail for finding in findings),
        findings=findings,
        images=100,
        sqnr_db=sqnr_db,
        **values,  # type: ignore[arg-type]
    )


def report(*variants: VariantReport, checks: tuple[Check, ...] = (), **changes: object) -> Report:
    """A proof of a classifier."""
    values: dict[str, object] = {
        "bundle": "tiny",
        "version": "1.0.0",
        "task": "classification",
        "reference_accuracy": None,
        **changes,
    }
    return Report(
        passed=all(v.passed for v in variants) and all(c.passed for c in checks),
        images=100,
        variants=variants,
        checks=checks,
        **values,  # type: ignore[arg-type]
    )


def hostile_report() -> Report:
    """Names and reasons from files that wish the reader ill."""
    finding = Finding(name=HOSTILE, detail=HOSTILE)
    return report(
        entry("tflite-fp32", sqnr_db=120.0),
        entry("tflite-int8", finding, sqnr_db=9.0),
        entry("coreml-fp16", finding, sqnr_db=None, backend_missing=True),
        entry("torchscript-fp32", sqnr_db=118.0),
        checks=(Check(name="labels", passed=False, detail=HOSTILE),),
        bundle=HOSTILE,
        version=HOSTILE,
    )


def hostile_layers() -> dict[str, list[LayerRow]]:
    return {
        "tflite-int8": [
            LayerRow(name=f"{HOSTILE}{n}", op=HOSTILE, sqnr_db=30.0 - n) for n in range(40)
        ]
    }


def hostile_samples() -> list[Sample]:
    """Real renderings, of labels that wish the reader ill."""
    labels = tuple(f"{HOSTILE}{label}" for label in LABELS)
    task = ClassificationTask(classes=len(labels))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    exact = [rng.normal(0, 1, (1, 10)).astype(np.float32)]
    other = [exact[0][:, ::-1].copy()]
    return [
        Sample(
            title=HOSTILE,
            input=render_input(pixels),
            reference=render_sample(task, labels, pixels, exact),
            answers={"tflite-int8": render_sample(task, labels, pixels, other, reference=exact)},
        )
    ]
