"""How figures and names are written, on the terminal and on the page alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from converters.verify.outcome import Report, VariantReport

__all__ = [
    "BYTES",
    "Column",
    "agreement_title",
    "clean",
    "format_bytes",
    "format_number",
    "metric_columns",
]

BYTES = "bytes"
"""In place of a format specification: ``format_bytes``."""

# Control characters (a terminal obeys them), and those that turn the direction of a text.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(value: object) -> str:
    """Anything as text without control and direction characters."""
    return _UNSHOWN.sub("\ufffd", str(value))


def format_bytes(count: int) -> str:
    """``35 kB``, ``3.21 MB``, ``98 MB``: powers of 1024."""
    if count >= 10 * 2**20:
        return f"{count / 2**20:.0f} MB"
    if count >= 2**20:
        return f"{count / 2**20:.2f} MB"
    return f"{count / 2**10:.0f} kB"


def format_number(value: float | None, form: str) -> str:
    """``value`` in a format specification, or a dash where there is none."""
    return "-" if value is None else format(value, form)


class Column(NamedTuple):
    """One figure of the variants."""

    title: str
    form: str
    """Format specification, or ``BYTES``."""
    value: Callable[[VariantReport], float | None]

    def show(self, entry: VariantReport) -> str:
        """The cell."""
        value = self.value(entry)
        if self.form == BYTES:
            return "-" if value is None else format_bytes(int(value))
        return format_number(value, self.form)


# Which of the metrics get a column: title and form.
_METRICS = {
    "map": ("mAP", ".3f"),
    "miou": ("mIoU", ".3f"),
    "psnr_db": ("PSNR dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
}


def agreement_title(task: str) -> str | None:
    """What agrees with the reference; None: the answer is an image, nothing can be equal."""
    return {"classification": "agree", "detection": "boxes", "segmentation": "pixels"}.get(task)


def metric_columns(report: Report) -> list[Column]:
    """The task's own figures, those that some variant has."""
    return [
        Column(title, form, lambda entry, key=key: entry.metrics.get(key))  # type: ignore[misc]
        for key, (title, form) in _METRICS.items()
        if any(key in entry.metrics for entry in report.variants)
    ]
