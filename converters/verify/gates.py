"""How good a variant must be, by precision. ``docs/conversion.md`` explains the numbers.

Silent mistakes on a trained ImageNet net (wrong normalization, channel order or padding)
leave 6 to 13 dB and 54 to 74 % agreement: every gate is above both.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from converters.verify.metrics import Closeness
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Precision

__all__ = ["DEFAULT_GATES", "Gate", "check_gate", "read_gates"]


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds for one precision. Every one must hold."""

    sqnr_db_mean: float
    sqnr_db_min: float
    agreement: float
    """Share of images with the reference's first class."""
    confident_agreement: float
    """The same among images of which the reference is at least 50 % sure."""
    size_ratio: float
    """Bytes, over those of the same format's fp32 variant."""


DEFAULT_GATES: dict[Precision, Gate] = {
    "fp32": Gate(
        sqnr_db_mean=80.0,
        sqnr_db_min=60.0,
        agreement=0.995,
        confident_agreement=1.0,
        size_ratio=1.5,
    ),
    "fp16": Gate(
        sqnr_db_mean=30.0,
        sqnr_db_min=20.0,
        agreement=0.97,
        confident_agreement=0.99,
        size_ratio=0.75,
    ),
    "int8": Gate(
        sqnr_db_mean=16.0,
        sqnr_db_min=3.0,
        agreement=0.85,
        confident_agreement=0.95,
        size_ratio=0.6,
    ),
}


def read_gates(path: Path | None) -> dict[Precision, Gate]:
    """The default gates, with those of a TOML file (one table a precision) on top."""
    gates = dict(DEFAULT_GATES)
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
    gate: Gate, precision: Precision, figures: Closeness, size_ratio: float
) -> list[str]:
    """What does not hold, as sentences; empty when the variant passes."""
    if not figures.finite:
        return ["answers hold NaN or infinity"]
    reasons = []
    if figures.sqnr_db_mean < gate.sqnr_db_mean:
        reasons.append(
            f"mean SQNR {figures.sqnr_db_mean:.1f} dB is below {gate.sqnr_db_mean:.1f} dB"
        )
    if figures.sqnr_db_min < gate.sqnr_db_min:
        reasons.append(
            f"worst SQNR {figures.sqnr_db_min:.1f} dB is below {gate.sqnr_db_min:.1f} dB"
        )
    exact = precision == "fp32"
    if figures.disagreements > _allowed(gate.agreement, figures.images, exact=exact):
        reasons.append(
            f"top-1 differs from the reference on {figures.disagreements} of {figures.images} "
            f"images; agreement must be {gate.agreement:.1%}"
        )
    if figures.confident_disagreements > _allowed(
        gate.confident_agreement, figures.confident, exact=exact
    ):
        reasons.append(
            f"top-1 differs on {figures.confident_disagreements} of {figures.confident} images "
            f"that the reference is sure of; agreement must be {gate.confident_agreement:.1%}"
        )
    if size_ratio > gate.size_ratio:
        reasons.append(
            f"the file has {size_ratio:.2f} of the fp32 size, over {gate.size_ratio:.2f}: "
            "is it really quantized?"
        )
    return reasons
