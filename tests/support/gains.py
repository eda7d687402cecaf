"""A measured gain, for tests."""

from __future__ import annotations

from edge_runtime.gain.store import CloudModel, GainProvenance, GainRecord
from edge_runtime.policies.adaptive import GainPrior

__all__ = ["CLOUD", "OTHER", "VARIANT", "record"]

VARIANT, CLOUD, OTHER = "a" * 64, "b" * 64, "c" * 64


def record(**changes: object) -> GainRecord:
    values: dict[str, object] = {
        "bundle": "tiny@1.0.0",
        "variant": "tflite-fp32",
        "variant_sha256": VARIANT,
        "cloud": CloudModel(name="large", version="1", sha256=CLOUD),
        "task": "classification",
        "evidence": "labels",
        "agreement_metric": "share of images with the same first class",
        "knots": ((0.2, 0.5), (0.6, 0.25), (0.9, -0.1)),
        "own": ((0.2, 0.3), (0.9, 0.95)),
        "nodes": (0.4, 0.9),
        "local_right": 0.7,
        "cloud_right": 0.9,
        "agreement": 0.75,
        "prior": GainPrior(),
        "calibration": None,
        "held_out": None,
        "held_out_prior": None,
        "provenance": GainProvenance(
            images=100, skipped=1, data_sha256="d" * 64, split=None, date="2026-01-02",
            nearfar="0.1.0",
        ),
    }  # fmt: skip
    return GainRecord(**(values | changes))  # type: ignore[arg-type]
