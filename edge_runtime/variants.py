"""Choose the local variant: the best one that is fast enough, by measurement.

Order of merit: precision as recorded below, then format, then agreement with the
reference. Only variants that ship and passed their gate, and only formats whose runtime is
installed, count; Core ML packages run here through the interpreter that proves them, so
``auto`` leaves them out.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    NearfarError,
    RuntimeFault,
    TensorError,
)
from edge_runtime.contract.manifest import Variant
from edge_runtime.estimators import LocalEstimator
from edge_runtime.local import LocalPipeline, Selection
from edge_runtime.photo import Photo
from edge_runtime.results import Measured
from edge_runtime.runtimes.base import Runtime, available_runtimes, find_runtime
from edge_runtime.seed import Seed

__all__ = ["select_variant"]

_PRECISIONS = (
    "fp32", "fp16", "fp16+sparse", "a16w8", "int8w", "int8w+sparse", "int8-dyn", "int8", "pal4",
    "int4w",
)  # fmt: skip
_FORMATS = ("tflite", "executorch", "torchscript")
_MEASURE_S = 1.0
_MAX_RUNS = 16


def select_variant(bundle: Bundle, wanted: str, *, fits_ms: float, threads: int) -> Selection:
    """Load and time the variant to use; call it in the thread that will run the model.

    Args:
        bundle: an opened bundle.
        wanted: ``auto``, a variant's id, or ``FORMAT-PRECISION`` in any case.
        fits_ms: ``auto`` takes the best variant whose 95th percentile is at most this.
        threads: for the interpreter.

    Raises:
        ConfigError: no such variant, or none that ``auto`` may take.
        BackendUnavailable: what would have to be installed.
        ModelLoadError, InferenceError: the only variant left does not run.
    """
    if wanted == "auto":
        return _select_auto(bundle, fits_ms, threads)
    variant = _find(bundle, wanted)
    pipeline = _load(bundle, variant, find_runtime(variant.format), threads)
    latencies_ms = _measure(pipeline, runs=4)  # there is nothing to choose: a first idea
    return Selection(
        pipeline=pipeline,
        reason=f"asked for as {wanted}",
        measured=(_measured(variant, latencies_ms),),
        latencies_ms=latencies_ms,
    )


def _find(bundle: Bundle, wanted: str) -> Variant:
    variants = bundle.manifest.variants
    name = wanted.lower()
    by_id = [v for v in variants if v.id == name]
    by_kind = [v for v in variants if f"{v.format}-{v.precision}" == name]
    matching = by_id or sorted(by_kind, key=lambda v: not v.ship)
    if not matching:
        known = ", ".join(variant.id for variant in variants)
        raise ConfigError(f"no variant {wanted!r} in this bundle; there are: {known}")
    return matching[0]


def _select_auto(bundle: Bundle, fits_ms: float, threads: int) -> Selection:
    runtimes, missing = _runtimes()
    candidates = _candidates(bundle, runtimes, missing)
    measured: list[Measured] = []
    timed: list[tuple[float, Variant]] = []
    failure: NearfarError | None = None
    for variant in candidates:
        try:
            pipeline = _load(bundle, variant, runtimes[variant.format], threads)
            latencies_ms = _measure(pipeline)
        except (RuntimeFault, TensorError) as error:
            measured.append(Measured(variant=variant.id, error=f"{error.code}: {error.detail}"))
            failure = failure or error
            continue
        entry = _measured(variant, latencies_ms)
        measured.append(entry)
        p95_ms = LocalEstimator.of(latencies_ms).quantile_ms(0.95)
        if p95_ms <= fits_ms:
            return Selection(
                pipeline=pipeline,
                reason=f"the best whose 95th percentile ({p95_ms:.1f} ms) fits {fits_ms:.0f} ms, "
                "half the deadline",
                measured=tuple(measured),
                latencies_ms=latencies_ms,
            )
        pipeline.close()
        timed.append((p95_ms, variant))
    if not timed:
        assert failure is not None  # noqa: S101  # there is a candidate, and it failed
        raise failure
    p95_ms, fastest = min(timed, key=lambda pair: pair[0])
    pipeline = _load(bundle, fastest, runtimes[fastest.format], threads)
    return Selection(
        pipeline=pipeline,
        reason=f"none fits {fits_ms:.0f} ms, half the deadline; this is the fastest "
        f"(95th percentile {p95_ms:.1f} ms)",
        measured=tuple(measured),
        latencies_ms=_measure(pipeline),
    )


def _runtimes() -> tuple[dict[str, Runtime], dict[str, str]]:
    """Usable runtimes by format, and why the others are not."""
    usable: dict[str, Runtime] = {}
    missing: dict[str, str] = {}
    for name, runtime in available_runtimes().items():
        state = runtime.availability()
        if state.available:
            usable[name] = runtime
        else:
            missing[name] = f"{name}: {state.reason}; install it with: {state.install}"
    return usable, missing


def _candidates(
    bundle: Bundle, runtimes: Mapping[str, Runtime], missing: Mapping[str, str]
) -> list[Variant]:
    """What ``auto`` may take, best first."""
    sound = [v for v in bundle.manifest.variants if v.ship and v.quality.passed]
    if not sound:
        raise ConfigError(
            "no variant of this bundle passed its gate and ships: choose one by its id, "
            "or convert the model again"
        )
    usable = [v for v in sound if v.format in runtimes and v.format in _FORMATS]
    if not usable:
        reasons = [
            missing.get(name, f"{name}: not run here by itself; choose it by its id")
            for name in sorted({v.format for v in sound})
        ]
        raise BackendUnavailable("no variant of this bundle runs here. " + ". ".join(reasons))
    return sorted(
        usable,
        key=lambda v: (
            _PRECISIONS.index(v.precision),
            _FORMATS.index(v.format),
            -(v.quality.agreement or 0.0),
            -v.quality.sqnr_db_mean,
            v.id,
        ),
    )


def _load(bundle: Bundle, variant: Variant, runtime: Runtime, threads: int) -> LocalPipeline:
    model = runtime.load(bundle.path(variant), variant, threads=threads)
    return LocalPipeline(model, variant, bundle)


def _measure(pipeline: LocalPipeline, *, runs: int = _MAX_RUNS) -> tuple[float, ...]:
    """Latencies of ``runs`` runs, or of a second of them, on a 640 x 480 JPEG or a seed.

    One more run before them warms everything up and is left out.
    """
    encoded = None if pipeline.generates else _sample_jpeg()
    latencies_ms: list[float] = []
    began = time.monotonic()
    try:
        while len(latencies_ms) <= runs:
            started = time.monotonic()
            pipeline.answer(Seed(0) if encoded is None else Photo.read(encoded))
            ended = time.monotonic()
            latencies_ms.append((ended - started) * 1e3)
            if ended - began > _MEASURE_S and len(latencies_ms) > 1:
                break
    except BaseException:
        pipeline.close()
        raise
    return tuple(latencies_ms[1:])


@cache
def _sample_jpeg() -> bytes:
    """A picture with edges and texture: decoding it costs what a photo's does."""
    rows, columns = np.mgrid[0:480, 0:640]
    texture = (rows * columns // 7) % 61
    planes = [(rows // 2 + texture) % 256, (columns // 3 + texture) % 256, (rows + columns) % 256]
    pixels: NDArray[np.uint8] = np.stack(planes, axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _measured(variant: Variant, latencies_ms: tuple[float, ...]) -> Measured:
    estimator = LocalEstimator.of(latencies_ms)
    return Measured(
        variant=variant.id,
        p50_ms=estimator.quantile_ms(0.5),
        p95_ms=estimator.quantile_ms(0.95),
    )
