"""Write a proof's figures into the manifest."""

from __future__ import annotations

import msgspec

from converters.verify.outcome import Report, VariantReport
from edge_runtime.contract.manifest import Manifest, Quality, Variant

__all__ = ["with_quality"]


def with_quality(manifest: Manifest, report: Report, data: str) -> Manifest:
    """The manifest with each variant's figures; one that failed is marked not to ship."""
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
