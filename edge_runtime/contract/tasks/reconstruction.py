"""Reconstruction: an autoencoder, image in, the same image out."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.contract import limits

__all__ = ["ReconstructionTask"]


class ReconstructionTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reconstruction"
):
    """Outputs: ``image`` float32 ``[1, 1 or 3, H, W]``, and ``latent`` when the model gives it.

    ``latent_size`` is the width of that bottleneck in numbers; None: not answered.
    ``pixel = clip(rint(value * output_scale + output_offset), 0, 255)``.
    """

    latent_size: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LATENT)] | None = None
    output_scale: float = 255.0
    output_offset: float = 0.0
