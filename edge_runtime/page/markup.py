"""Text from outside, made safe to show."""

from __future__ import annotations

import re
from html import escape

__all__ = ["clean", "text"]

# Control characters (a terminal obeys them), and those that turn the direction of a text.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def clean(value: object) -> str:
    """Anything as one line without control and direction characters."""
    return _UNSHOWN.sub("\ufffd", str(value))


def text(value: object) -> str:
    """The same as escaped HTML."""
    return escape(clean(value), quote=True)
