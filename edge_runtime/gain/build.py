"""From a measurement to the record that is stored."""

from __future__ import annotations

import datetime as dt
import os
import time

from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tasks import task_name
from edge_runtime.gain.agreement import require_agreement
from edge_runtime.gain.data import data_digest
from edge_runtime.gain.measure import Measurement
from edge_runtime.gain.model import cross_fitted_gain, fit_gain, gain_figures, prior_gain
from edge_runtime.gain.scores import calibration_figures
from edge_runtime.gain.store import CloudModel, GainProvenance, GainRecord
from edge_runtime.policies.adaptive import GainPrior
from edge_runtime.runtimes.base import installed_version

__all__ = ["build_record", "today"]


def today() -> str:
    """The date (UTC) of ``SOURCE_DATE_EPOCH`` where it is set, else of the clock.

    Raises ``ConfigError`` when that variable is no whole number of seconds.
    """
    said = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        seconds = time.time() if said is None else float(int(said))
        return dt.datetime.fromtimestamp(seconds, dt.UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"SOURCE_DATE_EPOCH is {said!r}: set it to whole seconds since 1970, or unset it"
        ) from None


def build_record(
    bundle: Bundle,
    variant: Variant,
    measured: Measurement,
    *,
    split: str | None,
    prior: GainPrior | None = None,
) -> GainRecord:
    """Fit everything and judge it on the halves it has not seen."""
    stated = prior or GainPrior()
    samples, manifest = measured.samples, bundle.manifest
    labeled = samples.local_right is not None and samples.cloud_right is not None
    curve = fit_gain(samples, stated)
    held_out = held_out_prior = cloud_right = None
    if labeled:
        assert samples.cloud_right is not None  # noqa: S101
        cloud_right = float(samples.cloud_right.mean())
        held_out = gain_figures(samples, cross_fitted_gain(samples, stated))
        held_out_prior = gain_figures(samples, prior_gain(samples, stated))
    return GainRecord(
        bundle=f"{manifest.name}@{manifest.version}",
        variant=variant.id,
        variant_sha256=variant.sha256,
        cloud=CloudModel(
            name=measured.cloud.name, version=measured.cloud.version, sha256=measured.cloud.sha256
        ),
        task=task_name(manifest.task),
        evidence="labels" if labeled else "agreement",
        agreement_metric=require_agreement(manifest.task),
        knots=curve.knots,
        own=curve.own,
        nodes=curve.nodes,
        local_right=curve.local_right,
        cloud_right=cloud_right,
        agreement=float(samples.agreement.mean()),
        prior=stated,
        calibration=calibration_figures(samples),
        held_out=held_out,
        held_out_prior=held_out_prior,
        provenance=GainProvenance(
            images=len(samples),
            skipped=measured.skipped,
            data_sha256=data_digest(samples.digests, measured.classes),
            split=split,
            date=today(),
            nearfar=installed_version("nearfar"),
        ),
    )
