"""Which runtime and precision a model gets, and the proof that they compute the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.executors.base import LoadedModel, Precision, RuntimeName
from broker.executors.runtimes.base import (
    Affine,
    ModelRuntime,
    OutOfMemory,
    cpu_has_amx,
    first_line,
    normalized,
)
from broker.executors.runtimes.calibration import Photos
from broker.executors.runtimes.eager import TorchRuntime
from broker.executors.runtimes.openvino import OpenVinoRuntime
from edge_runtime.contract.errors import InferenceError, ModelLoadError, NearfarError
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "LEAST_INT8_AGREEMENT",
    "LEAST_INT8_SQNR_DB",
    "LEAST_SQNR_DB",
    "choose_runtime",
    "sqnr_db",
]

_LOG = logging.getLogger(__name__)

LEAST_SQNR_DB: Final = 20.0
"""Of each output on each trial input, against fp32: noise at a tenth of the signal."""
LEAST_INT8_SQNR_DB: Final = 16.0
"""Mean over photos that int8 was not learned on: the bound of ``nearfar convert``."""
LEAST_INT8_AGREEMENT: Final = 0.9
"""Share of those photos whose best class stays the same."""
_TRIALS: Final = 4
_MOST_DB: Final = 200.0


def choose_runtime(
    exported: Any,
    spec: TensorSpec,
    affine: Affine | None,
    device: str,
    *,
    runtime: RuntimeName = "auto",
    precision: Precision = "auto",
    threads: int = 1,
    known: LoadedModel | None = None,
    photos: Callable[[], Photos] | None = None,
) -> ModelRuntime:
    """The runtime that was asked for, checked against PyTorch in fp32 on trial inputs.

    ``auto``: PyTorch operator by operator, in bf16 where the device multiplies it faster
    (AMX, CUDA), and in fp32 where that misses the bound: a warning in the log
    says so. What was asked for by name and misses it raises ``ModelLoadError``; so does what
    cannot be made. Raises ``BackendUnavailable`` as well. ``known``: what an earlier process
    chose and checked for the same program; it is taken without comparing again. ``photos``:
    what int8 is learned on and, each time, compared with fp32 on.
    """
    if precision == "int8":
        return _in_int8(exported, affine, device, runtime, threads, photos)
    kind: RuntimeName = "eager" if runtime == "auto" else runtime
    wanted: Precision = precision
    if known is not None:
        kind, wanted = cast("RuntimeName", known.runtime), cast("Precision", known.precision)
    elif precision == "auto":
        wanted = _fast_precision(device)
    eager_is_all = (kind, wanted) == ("eager", "fp32")
    eager = TorchRuntime(exported, device, "fp32") if eager_is_all or known is None else None
    if eager_is_all and eager is not None:
        return eager
    makers: dict[str, Callable[[], ModelRuntime]] = {
        "eager": lambda: TorchRuntime(exported, device, wanted),
        "compile": lambda: TorchRuntime(exported, device, wanted, compiled=True),
        "openvino": lambda: OpenVinoRuntime(exported, wanted, threads),
    }
    if kind == "openvino" and device != "cpu":
        raise ModelLoadError("the runtime openvino is for the CPU: pass --device cpu")
    try:
        made = makers[kind]()
        if eager is None:
            return _Measured(made, None if known is None else known.sqnr_db)
        found_db = _compare(made, eager, spec, affine)
        if found_db < LEAST_SQNR_DB:
            raise ModelLoadError(
                f"{kind} in {wanted} is {found_db:.1f} dB off fp32, less than "
                f"{LEAST_SQNR_DB:g}: pass --precision fp32"
            )
    except NearfarError as error:
        if eager is None or runtime != "auto" or precision != "auto":
            raise
        _LOG.warning("fp32 instead of %s: %s", wanted, error.detail)
        return eager
    eager.free()
    return _Measured(made, round(found_db, 1))


def _in_int8(
    exported: Any,
    affine: Affine | None,
    device: str,
    runtime: RuntimeName,
    threads: int,
    photos: Callable[[], Photos] | None,
) -> ModelRuntime:
    """OpenVINO in 8-bit integers. Raises ``ModelLoadError`` for a model that does not bear it."""
    if runtime != "openvino" or device != "cpu":
        raise ModelLoadError("int8 is for OpenVINO on the CPU: pass --runtime openvino")
    if photos is None:
        raise ModelLoadError("int8 is learned on photos, and there are none")
    learned, held_out, classes = photos()
    reference = TorchRuntime(exported, device, "fp32")
    inputs = learned if affine is None else [normalized(rows, affine) for rows in learned]
    made = OpenVinoRuntime(exported, "int8", threads, inputs)
    found_db: list[float] = []
    same = 0
    for rows in held_out:
        exact, given = reference.forward(rows, affine), made.forward(rows, affine)
        found_db.append(min(sqnr_db(*pair) for pair in zip(exact, given, strict=True)))
        same += not classes or int(np.argmax(exact[0])) == int(np.argmax(given[0]))
    reference.free()
    mean_db, agreement = float(np.mean(found_db)), same / len(held_out)
    if mean_db < LEAST_INT8_SQNR_DB or agreement < LEAST_INT8_AGREEMENT:
        raise ModelLoadError(
            f"int8 is {mean_db:.1f} dB off fp32 and has the same best class for {agreement:.0%} of "
            f"{len(held_out)} photos; it needs {LEAST_INT8_SQNR_DB:g} dB and "
            f"{LEAST_INT8_AGREEMENT:.0%}: pass --precision bf16 or fp32"
        )
    return _Measured(made, round(mean_db, 1))


class _Measured:
    """A runtime that says how close to fp32 it was."""

    def __init__(self, inner: ModelRuntime, found_db: float | None) -> None:
        self.info = msgspec.structs.replace(inner.info, sqnr_db=found_db)
        self.forward = inner.forward
        self.free = inner.free


def _fast_precision(device: str) -> Precision:
    if device == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if cpu_has_amx() else "fp32"


def _compare(
    made: ModelRuntime, reference: ModelRuntime, spec: TensorSpec, affine: Affine | None
) -> float:
    """The lowest SQNR of any output on any trial input, in dB."""
    lowest = _MOST_DB
    try:
        for rows in _trial_inputs(spec, affine):
            pairs = zip(reference.forward(rows, affine), made.forward(rows, affine), strict=True)
            lowest = min(lowest, *(sqnr_db(exact, given) for exact, given in pairs))
    except (InferenceError, OutOfMemory) as error:
        raise ModelLoadError(
            f"{made.info.runtime} in {made.info.precision} does not run: {first_line(error)}"
        ) from None
    return lowest


def _trial_inputs(spec: TensorSpec, affine: Affine | None) -> list[NDArray[np.generic]]:
    """The same each time: smooth and noisy pixels, or normal numbers."""
    rng = np.random.default_rng(0)
    shape = spec.shape[1:]
    if affine is None and spec.dtype != "uint8":
        return [rng.standard_normal((1, *shape)).astype(spec.dtype) for _ in range(_TRIALS)]
    inputs: list[NDArray[np.generic]] = []
    for trial in range(_TRIALS):
        noise = rng.normal(0.0, 12.0 * (trial + 1), (2, *shape))
        ramp = np.linspace(0.0, 255.0, math.prod(shape)).reshape(shape)
        inputs.append(np.clip(np.roll(ramp, trial * 97) + noise, 0, 255).astype(np.uint8))
    return inputs


def sqnr_db(exact: NDArray[np.generic], given: NDArray[np.generic]) -> float:
    """``10 log10(sum exact^2 / sum (exact - given)^2)``, from -200 to 200; NaN counts as -200."""
    reference, other = exact.astype(np.float64), given.astype(np.float64)
    if reference.shape != other.shape or not np.isfinite(other).all():
        return -_MOST_DB
    noise = float(((reference - other) ** 2).sum())
    signal = float((reference**2).sum())
    if noise == 0.0:
        return _MOST_DB
    return float(np.clip(10.0 * math.log10(max(signal, 1e-300) / noise), -_MOST_DB, _MOST_DB))
