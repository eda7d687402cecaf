"""Image generation: a seed in, an image out (types only so far)."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["GenerationTask"]


class GenerationTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="generation"
):
    """A latent vector of ``latent_size`` standard normals becomes one image."""

    latent_size: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    output_scale: float = 127.5
    output_offset: float = 127.5
