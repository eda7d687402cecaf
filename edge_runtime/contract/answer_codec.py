"""Answers on their way: class maps and images become PNG or JPEG files, and come back."""

from __future__ import annotations

import io
import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.tasks import SegmentationTask, Task
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import EncodedAnswer, Picture, PictureType, Region

__all__ = ["class_colors", "decode_answer_pixels", "encode_answer", "picture_of_file"]

_JPEG_QUALITY = 90
_MASK_LEVEL = 6
_IMAGE_LEVEL = 1
"""zlib's: higher ones take several times as long for a tenth of the bytes of a photo."""
_FORMATS: dict[PictureType, str] = {"image/png": "PNG", "image/jpeg": "JPEG"}


@cache
def class_colors() -> NDArray[np.uint8]:
    """A color for every class, uint8 RGB ``[256, 3]``; class 0 is black.

    The PASCAL VOC color map (Everingham et al., IJCV 2010): bit ``b`` of channel ``c`` is
    bit ``c + 3 (7 - b)`` of the class.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    classes = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            source = channel + 3 * (7 - bit)
            colors[:, channel] |= (((classes >> source) & 1) << bit).astype(np.uint8)
    return colors


def encode_answer(
    answer: Answer, *, media_type: PictureType = "image/png", colored: bool = False
) -> EncodedAnswer:
    """``answer`` as it travels.

    ``media_type``: of an image; a mask is a PNG always. ``colored``: give the mask
    ``class_colors`` as its palette, for people; the indices stay the classes.
    """
    if answer.class_map is not None:
        return EncodedAnswer(mask=_mask(answer.class_map, answer.region, colored=colored))
    if answer.image is not None:
        return EncodedAnswer(image=_image(answer.image, answer.region, media_type))
    return EncodedAnswer(predictions=answer.predictions, boxes=answer.boxes)


def _mask(class_map: NDArray[np.uint8], region: Region | None, *, colored: bool) -> Picture:
    picture = Image.fromarray(class_map)
    if colored:
        picture.putpalette(class_colors().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=_MASK_LEVEL)
    return _picture("image/png", picture, region, buffer)


def _image(pixels: NDArray[np.uint8], region: Region | None, media_type: PictureType) -> Picture:
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if media_type == "image/jpeg":
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        picture.save(buffer, "PNG", compress_level=_IMAGE_LEVEL)
    return _picture(media_type, picture, region, buffer)


def _picture(
    media_type: PictureType, picture: Image.Image, region: Region | None, buffer: io.BytesIO
) -> Picture:
    return Picture(
        media_type=media_type,
        width=picture.width,
        height=picture.height,
        region=region,
        data=buffer.getvalue(),
    )


def picture_of_file(data: bytes, media_type: PictureType, region: Region | None) -> Picture:
    """A picture that came as a file alone: its size is what its header says.

    Raises ``WireError`` when it has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=(_FORMATS[media_type],))
    except Exception as error:  # Pillow raises many types on corrupt headers
        raise WireError(f"the answer is no {media_type} ({type(error).__name__})") from None
    with opened:
        return Picture(
            media_type=media_type,
            width=opened.width,
            height=opened.height,
            region=region,
            data=data,
        )


def decode_answer_pixels(encoded: EncodedAnswer, task: Task) -> Answer:
    """The inverse of ``encode_answer``, for an answer that came over a network.

    Raises ``WireError`` when a picture is no sound file of its media type and size, or a
    mask holds a class that ``task`` does not have.
    """
    if encoded.mask is not None:
        classes = task.classes if isinstance(task, SegmentationTask) else limits.MAX_MASK_CLASSES
        return Answer(class_map=_decode_mask(encoded.mask, classes), region=encoded.mask.region)
    if encoded.image is not None:
        return Answer(image=_decode_image(encoded.image), region=encoded.image.region)
    return Answer(predictions=encoded.predictions, boxes=encoded.boxes)


def _decode_mask(picture: Picture, classes: int) -> NDArray[np.uint8]:
    if picture.media_type != "image/png":
        raise WireError("the answer's mask is no PNG: its classes are not exact")
    class_map = _decode(picture, ("L", "P"))
    if int(class_map.max()) >= classes:
        raise WireError(f"the answer's mask holds class {int(class_map.max())} of {classes}")
    return class_map


def _decode_image(picture: Picture) -> NDArray[np.uint8]:
    return _decode(picture, ("RGB",))


def _decode(picture: Picture, modes: tuple[str, ...]) -> NDArray[np.uint8]:
    """Pixels of a file that is what ``picture`` says; sizes are checked before decoding."""
    if picture.width * picture.height > limits.MAX_IMAGE_PIXELS:
        raise WireError(f"the answer's picture has more than {limits.MAX_IMAGE_PIXELS} pixels")
    try:
        with warnings.catch_warnings():
            # Our own bounds are checked; Pillow's warning would be noise.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(picture.data), formats=(_FORMATS[picture.media_type],))
        with opened:
            if opened.size != (picture.width, picture.height) or opened.mode not in modes:
                raise WireError(
                    f"the answer's picture is {opened.mode} {opened.size[0]} x "
                    f"{opened.size[1]}, not {modes[0]} {picture.width} x {picture.height}"
                )
            return np.ascontiguousarray(np.asarray(opened, dtype=np.uint8))
    except WireError:
        raise
    except Exception as error:  # Pillow raises many types on corrupt files
        raise WireError(f"the answer's picture is broken ({type(error).__name__})") from None
