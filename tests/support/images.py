"""Images that are wrong in one way each, made by hand where no library would write them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A colorful RGB picture, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG from raw, unfiltered scan lines (each with its filter byte)."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows, 9))
        + png_chunk(b"IEND", b"")
    )


def bomb(side: int = 30_000) -> bytes:
    """A PNG of ``side`` x ``side`` in a few kB: its header alone must refuse it."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
        + png_chunk(b"IEND", b"")
    )


def rgb16(width: int = 8, height: int = 8) -> bytes:
    row = b"\x00" + bytes(range(6)) * width
    return png(width, height, depth=16, color=2, rows=row * height)


def animated(kind: str) -> bytes:
    frames = [photo(16, 16, seed) for seed in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
