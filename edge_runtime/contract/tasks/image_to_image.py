"""Image to image: style transfer, super-resolution."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["ImageToImageTask"]


class ImageToImageTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="image_to_image"
):
    """``pixel = clip(rint(value * output_scale + output_offset), 0, 255)``.

    The model's output is ``image``, float32 ``[1, 1 or 3, H * upscale, W * upscale]``.
    """

    output_scale: float = 255.0
    output_offset: float = 0.0
    upscale: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
