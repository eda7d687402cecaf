"""What one format and precision takes: data, no code."""

from __future__ import annotations

import msgspec

from edge_runtime.contract.manifest import Accelerator, MinOs

__all__ = ["Recipe"]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What one format and precision needs, and where it runs."""

    calibrated: bool = False
    """Needs calibration inputs: the ranges of activations are stored."""
    gains: bool = False
    """Needs no calibration inputs, and chooses its weights by them where there are any."""
    rounded: bool = False
    """Starts from the int8 weights that all formats share, where there are inputs."""
    from_fp32: bool = False
    """Starts from the same format's fp32 file."""
    min_os: MinOs
    accelerators: tuple[Accelerator, ...]
