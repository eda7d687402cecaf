"""Image generation: a seed in, an image out."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits

__all__ = ["GenerationTask", "latent_from_seed"]

_TWO_64 = 1 << 64


class GenerationTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="generation"
):
    """A latent vector of ``latent_size`` standard normals becomes one image.

    ``pixel = clip(rint(value * output_scale + output_offset), 0, 255)`` of the output
    ``image``, float32 ``[1, 1 or 3, H, W]``.
    """

    latent_size: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LATENT)]
    output_scale: float = 127.5
    output_offset: float = 127.5


def latent_from_seed(seed: int, count: int) -> NDArray[np.float32]:
    """``count`` standard normals, float32 ``[count]``: one seed, one image, everywhere.

    SplitMix64 (Steele et al., OOPSLA 2014) from ``seed`` modulo 2^64 gives u = (top 53 bits
    + 0.5) / 2^53; two of them give sqrt(-2 ln u1) cos(2 pi u2) and the same with sin
    (Box & Muller, 1958), in IEEE double, rounded once.
    """
    state = seed % _TWO_64
    uniforms: list[float] = []
    for _ in range(count + count % 2):
        state = (state + 0x9E3779B97F4A7C15) % _TWO_64
        value = state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % _TWO_64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % _TWO_64
        value ^= value >> 31
        uniforms.append(((value >> 11) + 0.5) / (1 << 53))
    normals: list[float] = []
    for first, second in zip(uniforms[::2], uniforms[1::2], strict=True):
        radius = math.sqrt(-2.0 * math.log(first))
        normals.append(radius * math.cos(2.0 * math.pi * second))
        normals.append(radius * math.sin(2.0 * math.pi * second))
    return np.array(normals[:count], dtype=np.float32)
