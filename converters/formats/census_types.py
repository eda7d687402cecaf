"""What a saved file really holds: bytes of weights by number type, operators by name.

Each format has its own function that counts (``converters.formats.census`` and the modules
of the other formats); this struct is what ``verify`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = ["BITS", "Census", "make_census"]

BITS: dict[str, int] = {
    "float32": 32, "float16": 16, "bfloat16": 16, "int16": 16,
    "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "uint1": 1,
}  # fmt: skip
"""Bits of one stored weight, by the name used in ``Census.weight_bytes``. Palettes count by
the bits of an index. Wider numbers are left out: they are shapes, indices, scales and biases
at accumulator width, and no quantizer makes them smaller."""


class Census(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one file holds. Make it with ``make_census``."""

    weight_bytes: dict[str, int]
    """Bytes of constants by number type, as stored (two int4 a byte). Wider numbers too."""
    ops: dict[str, int]
    """How often each operator occurs, by the format's own name for it."""
    quantized_ops: int = 0
    """Operators that compute on, or expand, weights or activations of 8 bits or fewer."""
    quantized_share: float = 0.0
    """Share of the weights (by count, 0..1) stored in 8 bits or fewer."""
    half_share: float = 0.0
    """Share of the weights (by count, 0..1) stored in 16 bits or fewer."""


def make_census(
    weight_bytes: Mapping[str, int], ops: Mapping[str, int], quantized_ops: int = 0
) -> Census:
    """A census with its shares worked out; keys sorted, so that equal files print alike.

    A share is by count of numbers, not by bytes: half of the weights in int8 is 0.5,
    although they are a fifth of the file. Without any weight both shares are 0.
    """
    counts = {name: size * 8 / BITS[name] for name, size in weight_bytes.items() if name in BITS}
    total = sum(counts.values())

    def share(bits: int) -> float:
        small = sum(count for name, count in counts.items() if BITS[name] <= bits)
        return small / total if total else 0.0

    return Census(
        weight_bytes=dict(sorted(weight_bytes.items())),
        ops=dict(sorted(ops.items())),
        quantized_ops=quantized_ops,
        quantized_share=share(8),
        half_share=share(16),
    )
