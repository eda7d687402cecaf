"""What the HTML page shows besides the figures: layers, and samples with every file's answer.

Plain structs: child processes render them and send them as JSON.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["LayerRow", "Picture", "Ranked", "RenderedAnswer", "Sample"]


class LayerRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How close one layer of a variant comes to the same layer of the fp32 model."""

    name: str
    op: str
    """Kind of layer, for example ``conv2d``."""
    sqnr_db: float


class Picture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An encoded picture, small enough to stand in a page."""

    media_type: Literal["image/png", "image/jpeg"]
    data: bytes
    width: int
    height: int


class Ranked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A label and its share: a score, or the part of a picture that it covers."""

    label: str
    share: float
    """0 to 1; a score that is no probability may leave that range."""
    color: str | None = None
    """``#rrggbb`` where the label has one in the picture."""


class RenderedAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one model answered for one input, ready to show."""

    ranked: tuple[Ranked, ...] = ()
    """Classification: the best three. Segmentation: the largest three classes."""
    picture: Picture | None = None
    """Detection: the photo with boxes; segmentation: with colors; else the answer itself."""
    difference: Picture | None = None
    """Where it differs from the reference, when that was given."""
    note: str = ""
    """One phrase, for example ``5 boxes, 1 missing``."""
    differs: bool = False
    """The answer is another one than the reference's, not just other numbers."""
    sqnr_db: float | None = None
    """Against the reference, over all outputs: the worst."""
    error: str = ""
    """Why there is no answer."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input and what everyone made of it."""

    title: str
    """A file name, or ``seed N``."""
    input: Picture | None
    """None: a generator's input is no picture."""
    reference: RenderedAnswer
    answers: dict[str, RenderedAnswer]
    """By variant id; one that could not run is missing."""
