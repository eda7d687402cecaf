"""Image to image: style transfer, super-resolution (types only so far)."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["ImageToImageTask"]


class ImageToImageTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="image_to_image"
):
    """``pixel = clip(round(value * output_scale + output_offset), 0, 255)``."""

    output_scale: float = 255.0
    output_offset: float = 0.0
    upscale: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
