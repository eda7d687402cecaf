"""How close a variant must come, by task and precision, and what that means in sentences."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from converters.verify.figures import Closeness, Finding
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Precision
from edge_runtime.contract.tasks import TaskName

__all__ = ["Gate", "Gates", "check_gate", "default_gates", "in_doubt", "read_gates"]


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds for one precision. Every one must hold; None: not asked of this task."""

    sqnr_db_mean: float
    sqnr_db_min: float
    size_ratio: float
    """Bytes, over those of the same format's fp32 variant."""
    agreement: float | None = None
    """Share of images, boxes or pixels as in the reference: see ``Closeness``."""
    confident_agreement: float | None = None
    """Classification: the same among images of which the reference is at least 50 % sure."""
    psnr_db: float | None = None
    """Tasks that answer an image: mean over images."""
    quantized_share: float = 0.0
    """Of the bytes of weights, those that are stored in at most 8 bits."""


Gates = dict[Precision, Gate]

# Each row: mean and worst SQNR, size ratio, quantized share; then by task. Trained nets keep
# 91 dB and more in fp32, 43 dB in fp16; coarse precisions depend on the net, and their bounds
# are where the silent mistakes of docs/conversion.md end (13 dB at most in int8).
_NUMBERS: dict[Precision, tuple[float, float, float, float]] = {
    "fp32": (80.0, 60.0, 1.5, 0.0),
    "fp16": (30.0, 20.0, 0.75, 0.0),
    "int8": (16.0, 3.0, 0.6, 0.7),
    "int8-dyn": (20.0, 10.0, 0.9, 0.2),
    "int8w": (20.0, 10.0, 0.6, 0.7),
    "a16w8": (20.0, 10.0, 0.6, 0.7),
    "int4w": (5.0, 0.0, 0.5, 0.5),
    "pal4": (5.0, 0.0, 0.5, 0.5),
    "fp16+sparse": (10.0, 0.0, 0.5, 0.0),
    "int8w+sparse": (10.0, 0.0, 0.4, 0.5),
}
_CLASSIFICATION: dict[Precision, tuple[float, float]] = {
    "fp32": (0.995, 1.0),
    "fp16": (0.97, 0.99),
    "int8": (0.85, 0.95),
    "int8-dyn": (0.95, 0.98),
    "int8w": (0.95, 0.98),
    "a16w8": (0.92, 0.97),
    "int4w": (0.75, 0.88),
    "pal4": (0.75, 0.88),
    "fp16+sparse": (0.85, 0.95),
    "int8w+sparse": (0.85, 0.95),
}
_BOXES: dict[Precision, float] = {"fp32": 0.995, "fp16": 0.95, "int8": 0.8, "int4w": 0.6}
_PIXELS: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.97, "int8": 0.9, "int4w": 0.75}
_PSNR: dict[Precision, float] = {"fp32": 50.0, "fp16": 38.0, "int8": 25.0, "int4w": 18.0}
_COARSE: dict[Precision, Precision] = {
    "int8-dyn": "int8",
    "int8w": "int8",
    "a16w8": "int8",
    "pal4": "int4w",
    "fp16+sparse": "int4w",
    "int8w+sparse": "int4w",
}


# Static precisions: below these, mean and worst SQNR, activation ranges are held against the
# images. The zoo's small net keeps 34 and 24 dB with good ranges, 29 and 15 (Core ML: 31 and
# 21) with those of noise.
_DOUBT_DB: dict[str, tuple[float, float]] = {"int8": (32.0, 22.0), "a16w8": (32.0, 22.0)}
_DOUBT_AGREEMENT = 0.98


def in_doubt(
    precision: str, mean_db: float | None, worst_db: float | None, agreement: float | None
) -> bool:
    """Whether a variant that passed its gate is coarse enough to look into its ranges."""
    if precision not in _DOUBT_DB:
        return False
    mean, worst = _DOUBT_DB[precision]
    return (
        (mean_db is not None and mean_db < mean)
        or (worst_db is not None and worst_db < worst)
        or (agreement is not None and agreement < _DOUBT_AGREEMENT)
    )


def default_gates(task: TaskName) -> Gates:
    """The bounds of every precision for one task."""
    gates: Gates = {}
    for precision, (mean, worst, size, share) in _NUMBERS.items():
        gate = Gate(sqnr_db_mean=mean, sqnr_db_min=worst, size_ratio=size, quantized_share=share)
        row = _COARSE.get(precision, precision)
        if task == "classification":
            agreement, confident = _CLASSIFICATION[precision]
            gate = msgspec.structs.replace(gate, agreement=agreement, confident_agreement=confident)
        elif task == "detection":
            gate = msgspec.structs.replace(gate, agreement=_BOXES[row])
        elif task == "segmentation":
            gate = msgspec.structs.replace(gate, agreement=_PIXELS[row])
        else:
            gate = msgspec.structs.replace(gate, psnr_db=_PSNR[row])
        gates[precision] = gate
    return gates


def read_gates(path: Path | None, task: TaskName) -> Gates:
    """The default gates, with those of a TOML file (one table a precision) on top."""
    gates = default_gates(task)
    if path is None:
        return gates
    try:
        tables = msgspec.toml.decode(path.read_bytes(), type=dict[Precision, dict[str, float]])
        for precision, changes in tables.items():
            base = msgspec.to_builtins(gates[precision])
            gates[precision] = msgspec.convert({**base, **changes}, Gate)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
        raise ConfigError(f"{path}: {error}: see docs/conversion.md for the keys") from None
    return gates


def _allowed(share: float, count: int, *, exact: bool) -> int:
    """How many of ``count`` may differ; below exact precisions at least one may."""
    if exact:
        return math.floor((1.0 - share) * count + 1e-9)
    return math.ceil((1.0 - share) * count - 1e-9)


def check_gate(
    gate: Gate,
    precision: Precision,
    figures: Closeness,
    size_ratio: float,
    quantized_share: float | None,
) -> list[Finding]:
    """What does not hold; empty when the variant passes."""
    if not figures.finite:
        return [Finding(name="not-finite", detail="answers hold NaN or infinity")]
    found: list[Finding] = []
    found += _check_numbers(gate, figures)
    found += _check_agreement(gate, precision, figures)
    if size_ratio > gate.size_ratio:
        found.append(
            Finding(
                name="not-quantized" if gate.quantized_share else "size",
                detail=f"the file has {size_ratio:.2f} of the fp32 size, over "
                f"{gate.size_ratio:.2f}: is it really quantized?",
            )
        )
    if quantized_share is not None and quantized_share < gate.quantized_share:
        found.append(
            Finding(
                name="not-quantized",
                detail=f"only {quantized_share:.0%} of the weights are stored in 8 bits or "
                f"less; {gate.quantized_share:.0%} are asked for",
            )
        )
    return found


def _check_numbers(gate: Gate, figures: Closeness) -> list[Finding]:
    found: list[Finding] = []
    mean, worst = figures.sqnr_db_mean, figures.sqnr_db_min
    if mean is not None and mean < gate.sqnr_db_mean:
        found.append(
            Finding(
                name="parity", detail=f"mean SQNR {mean:.1f} dB is below {gate.sqnr_db_mean:.1f} dB"
            )
        )
    if worst is not None and worst < gate.sqnr_db_min:
        found.append(
            Finding(
                name="parity",
                detail=f"worst SQNR {worst:.1f} dB is below {gate.sqnr_db_min:.1f} dB",
            )
        )
    psnr = figures.metrics.get("psnr_db")
    if gate.psnr_db is not None and psnr is not None and psnr < gate.psnr_db:
        found.append(
            Finding(name="parity", detail=f"mean PSNR {psnr:.1f} dB is below {gate.psnr_db:.1f} dB")
        )
    return found


def _check_agreement(gate: Gate, precision: Precision, figures: Closeness) -> list[Finding]:
    found: list[Finding] = []
    exact = precision == "fp32"
    if (
        gate.agreement is not None
        and figures.agreement is not None
        and figures.disagreements > _allowed(gate.agreement, figures.compared, exact=exact)
    ):
        found.append(
            Finding(
                name="agreement",
                detail=f"differs from the reference on {figures.disagreements} of "
                f"{figures.compared}; agreement must be {gate.agreement:.1%}",
            )
        )
    if gate.confident_agreement is not None and figures.confident_disagreements > _allowed(
        gate.confident_agreement, figures.confident, exact=exact
    ):
        found.append(
            Finding(
                name="agreement",
                detail=f"top-1 differs on {figures.confident_disagreements} of "
                f"{figures.confident} images that the reference is sure of; agreement must be "
                f"{gate.confident_agreement:.1%}",
            )
        )
    return found
