"""Small pieces of markup that every part of the HTML page uses."""

from __future__ import annotations

from html import escape

from converters.report.numbers import clean

__all__ = ["DASH", "FORMATS", "format_class", "tag", "text"]

DASH = "&ndash;"
FORMATS = ("torchscript", "tflite", "coreml", "executorch")


def text(value: object) -> str:
    """Anything as escaped text, without control and direction characters."""
    return escape(clean(value), quote=True)


def format_class(name: str) -> str:
    """The CSS class that gives a format its color."""
    return name if name in FORMATS else ""


def tag(name: str) -> str:
    """The name of a finding."""
    return f'<span class="tag">[{text(name)}]</span>'
