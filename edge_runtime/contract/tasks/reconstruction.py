"""Reconstruction: an autoencoder, image in, the same image out (types only so far)."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["ReconstructionTask"]


class ReconstructionTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reconstruction"
):
    """``latent_size`` is the width of the bottleneck, in numbers."""

    latent_size: Annotated[int, msgspec.Meta(ge=1, le=1_048_576)]
