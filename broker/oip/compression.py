"""Bodies that travel compressed: gzip (RFC 1952) and deflate, which is zlib's (RFC 1950)."""

from __future__ import annotations

import gzip
import re
import zlib
from typing import Final, Literal

from edge_runtime.contract.errors import ImageTooLarge, MediaTypeUnsupported, WireError

__all__ = ["Coding", "answer_coding", "pack", "request_coding", "unpack"]

Coding = Literal["gzip", "deflate"]

_WINDOW_BITS: Final[dict[Coding, int]] = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_QUALITY: Final = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)\Z")
_LEVEL: Final = 1
"""Floats of a tensor gain little from a higher one, which takes several times as long."""


def request_coding(content_encoding: str | None) -> Coding | None:
    """How a body is compressed; None: it is not. Raises ``MediaTypeUnsupported``."""
    coding = (content_encoding or "identity").strip().lower()
    if coding == "identity":
        return None
    if coding in ("gzip", "deflate"):
        return "gzip" if coding == "gzip" else "deflate"
    raise MediaTypeUnsupported(
        "Content-Encoding must be gzip or deflate, one of them and once: or send it plain"
    )


def answer_coding(accept_encoding: str | None) -> Coding | None:
    """The coding that the header names and likes best; None: send the answer plain.

    Raises ``WireError`` on a quality that makes no sense (RFC 9110 section 12.5.3).
    """
    if not accept_encoding:
        return None
    best: Coding | None = None
    best_quality = 0.0
    for part in accept_encoding.split(","):
        name, _, parameters = (piece.strip() for piece in part.partition(";"))
        quality = 1.0
        if parameters:
            key, _, value = (piece.strip() for piece in parameters.partition("="))
            if key.lower() != "q" or not _QUALITY.match(value):
                raise WireError("a quality in Accept-Encoding must be 0 to 1, as in gzip;q=0.5")
            quality = float(value)
        if name.lower() in ("gzip", "deflate") and quality > best_quality:
            best_quality = quality
            best = "gzip" if name.lower() == "gzip" else "deflate"
    return best


def unpack(data: bytes, coding: Coding, max_bytes: int) -> bytes:
    """The body before it was compressed, never more than ``max_bytes`` of it in memory.

    Raises ``ImageTooLarge`` beyond, and ``WireError`` on what is broken, cut off or followed
    by something else.
    """
    inflate = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        plain = inflate.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise WireError(f"the body is no {coding}: {error}") from None
    if len(plain) > max_bytes:
        raise ImageTooLarge(
            f"the body has more than {max_bytes} bytes once unpacked: send it plain, "
            "or fewer images at once"
        )
    if not inflate.eof:
        raise WireError(f"the body ends before its {coding} does: send all of it")
    if inflate.unused_data:
        raise WireError(f"{len(inflate.unused_data)} bytes follow the {coding} of the body")
    return plain


def pack(data: bytes, coding: Coding) -> bytes:
    """``data``, compressed."""
    if coding == "gzip":
        return gzip.compress(data, compresslevel=_LEVEL, mtime=0)
    return zlib.compress(data, level=_LEVEL)
