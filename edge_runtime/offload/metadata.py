"""Strip metadata before upload: no place, time, camera serial or preview leaves the device.

Pixels are never re-encoded: the file is taken apart into its segments or chunks and put
together from those a decoder needs. An orientation other than 1 stays in effect through a
minimal EXIF block that holds nothing else. What follows the image's end (previews, motion
photos) is cut off. ICC profiles go too: no decoder of ours applies them.

Formats: ISO/IEC 10918-1 (JPEG), PNG third edition, the WebP container specification.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ImageUnreadable
from edge_runtime.contract.imaging import sniff_media_type

__all__ = ["strip_metadata"]

_ORIENTATION_TAG = 0x0112

# JPEG: APP0 (JFIF) and APP14 (Adobe) say how to read the colors; the others are metadata.
_JPEG_DROPPED = frozenset([*range(0xE1, 0xEE), 0xEF, 0xFE])
_JPEG_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"])
_PNG_MAY_ORIENT = frozenset([b"eXIf", b"tEXt", b"zTXt", b"iTXt"])

_WEBP_DROPPED = frozenset([b"EXIF", b"XMP ", b"ICCP"])
_WEBP_FLAGS_DROPPED = 0x20 | 0x08 | 0x04  # ICC, EXIF, XMP
_WEBP_FLAG_EXIF = 0x08


def strip_metadata(data: bytes) -> bytes:
    """The same picture without metadata; ``data`` is a JPEG, PNG or WebP.

    Raises ``ImageUnreadable`` when the file's structure is broken: such a file would not
    be uploaded whole.
    """
    media_type = sniff_media_type(data)
    if media_type == "image/jpeg":
        return _strip_jpeg(data)
    if media_type == "image/png":
        return _strip_png(data)
    if media_type == "image/webp":
        return _strip_webp(data)
    raise ImageUnreadable("these bytes are no JPEG, PNG or WebP image: use one of those")


def _broken(kind: str) -> ImageUnreadable:
    return ImageUnreadable(f"the {kind} file is truncated or corrupt: encode the image anew")


def _orientation(data: bytes, *, load: bool = False) -> int:
    """The orientation that Pillow, and so every decoder of ours, would apply; else 1."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
                if load:
                    if picture.width * picture.height > limits.MAX_IMAGE_PIXELS:
                        return 1  # the broker refuses it by its size
                    picture.load()
                value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block counts as none, as in decode_image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _tiff(orientation: int) -> bytes:
    """A TIFF with one directory of one entry: tag 0x0112, SHORT, one value."""
    entry = struct.pack("<HHIHH", _ORIENTATION_TAG, 3, 1, orientation, 0)
    return b"II*\x00" + struct.pack("<IH", 8, 1) + entry + b"\x00\x00\x00\x00"


# JPEG ------------------------------------------------------------------------------


def _strip_jpeg(data: bytes) -> bytes:
    parts = [b"\xff\xd8"]
    orientation = _orientation(data)
    if orientation != 1:
        body = b"Exif\x00\x00" + _tiff(orientation)
        parts.append(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    for marker, segment in _jpeg_segments(data):
        if marker not in _JPEG_DROPPED:
            parts.append(segment)
    return b"".join(parts)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """``(marker, bytes)`` after SOI up to and with EOI; SOS carries its scan."""
    at = 2
    while True:
        if at + 2 > len(data) or data[at] != 0xFF:
            raise _broken("JPEG")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9:
            yield marker, data[at : at + 2]
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # no payload
            end = at + 2
        else:
            if at + 4 > len(data):
                raise _broken("JPEG")
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if end > len(data) or end < at + 4:
                raise _broken("JPEG")
        if marker == 0xDA:
            following = _JPEG_NEXT_MARKER.search(data, end)
            if following is None:
                raise _broken("JPEG")
            end = following.start()
        yield marker, data[at:end]
        at = end


# PNG -------------------------------------------------------------------------------


def _strip_png(data: bytes) -> bytes:
    chunks = list(_png_chunks(data))
    may_orient = any(kind in _PNG_MAY_ORIENT for kind, _ in chunks)
    orientation = _orientation(data, load=True) if may_orient else 1
    parts = [_PNG_SIGNATURE]
    for kind, chunk in chunks:
        if kind in _PNG_KEPT:
            parts.append(chunk)
        if kind == b"IHDR" and orientation != 1:
            body = b"eXIf" + _tiff(orientation)
            crc = struct.pack(">I", zlib.crc32(body))
            parts.append(struct.pack(">I", len(body) - 4) + body + crc)
    return b"".join(parts)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """``(type, whole chunk)`` up to and with IEND."""
    at = len(_PNG_SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise _broken("PNG")
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise _broken("PNG")
        kind = data[at + 4 : at + 8]
        yield kind, data[at:end]
        if kind == b"IEND":
            return
        at = end


# WebP ------------------------------------------------------------------------------


def _strip_webp(data: bytes) -> bytes:
    chunks = list(_webp_chunks(data))
    if not chunks:
        raise _broken("WebP")
    if chunks[0][0] != b"VP8X":  # the simple layout: one chunk, no room for metadata
        body = chunks[0][1]
    else:
        has_metadata = any(kind in _WEBP_DROPPED for kind, _ in chunks)
        orientation = _orientation(data) if has_metadata else 1
        header = bytearray(chunks[0][1])
        if len(header) < 18:
            raise _broken("WebP")
        header[8] &= ~_WEBP_FLAGS_DROPPED & 0xFF
        parts = [chunk for kind, chunk in chunks[1:] if kind not in _WEBP_DROPPED]
        if orientation != 1:
            header[8] |= _WEBP_FLAG_EXIF
            tiff = _tiff(orientation)
            parts.append(b"EXIF" + struct.pack("<I", len(tiff)) + tiff)
        body = b"".join([bytes(header), *parts])
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """``(type, whole chunk with padding)`` within the size that RIFF states."""
    stop = 8 + int.from_bytes(data[4:8], "little")
    if stop > len(data):
        raise _broken("WebP")
    at = 12
    while at + 8 <= stop:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + (size & 1)
        if end > stop:
            raise _broken("WebP")
        yield data[at : at + 4], data[at:end]
        at = end
