"""Would a quantized TorchScript file answer rightly on another engine?

Its integers, scales and zero points then are sound, and a kernel of QNNPACK, the engine of
phones, is not. Known: clamps (ReLU6, hardtanh) of quantized channels-last tensors, whose
values it permutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import Finding
from converters.verify.metrics import sqnr_db
from edge_runtime.contract.errors import NearfarError

__all__ = ["check_engine"]

_GAIN_DB = 8.0
_LEAST_DB = 10.0
_CLAMPS = ("hardtanh", "clamp", "relu6")
_OURS = "qnnpack"

Array = NDArray[np.floating]


def check_engine(
    path: Path, batches: Sequence[NDArray[Any]], wanted: Array, given: Array
) -> list[Finding]:
    """Run the file on every other engine of this torch; name the kernel when one does better.

    ``batches``: what the file is fed with, batch 1 each. ``wanted`` and ``given``: first
    output of the reference and of the file on QNNPACK, ``[batches, ...]``.
    """
    import torch

    from converters.verify.census import find_census

    before = float(sqnr_db(wanted, given).mean())
    best, engine = before, ""
    for other in torch.backends.quantized.supported_engines:
        if other in (_OURS, "none"):
            continue
        answers = _answers(path, batches, other)
        if answers is None or answers.shape != wanted.shape:
            continue
        ratio = float(sqnr_db(wanted, answers).mean())
        if ratio > best:
            best, engine = ratio, other
    if best < before + _GAIN_DB or best < _LEAST_DB:
        return []
    try:
        census = find_census("torchscript", path)
    except NearfarError:
        census = None
    operators = [] if census is None else list(census.ops)
    clamps = [name for name in operators if any(kind in name for kind in _CLAMPS)]
    told = f"{before:.1f} dB on {_OURS}, which phones have, and {best:.1f} dB on {engine}"
    if clamps:
        return [
            Finding(
                name="engine-relu6",
                detail=f"it answers rightly but for the engine: {told}. {_OURS} permutes the "
                f"values of quantized clamps, and the file has {', '.join(clamps)}: replace "
                "ReLU6 by a ReLU whose range ends at 6",
            )
        ]
    return [
        Finding(
            name="engine",
            detail=f"it answers rightly but for the engine: {told}. A kernel of {_OURS} is wrong "
            f"for one of {', '.join(operators) or 'its operators'}: leave that layer in float",
        )
    ]


def _answers(path: Path, batches: Sequence[NDArray[Any]], engine: str) -> Array | None:
    """First output on one engine; None where it cannot run the file."""
    import torch
    from torch.jit.mobile import _load_for_lite_interpreter

    torch.backends.quantized.engine = engine
    try:
        module = _load_for_lite_interpreter(str(path))
        rows = []
        with torch.inference_mode():
            for batch in batches:
                answer = module(torch.from_numpy(batch))
                first = answer[0] if isinstance(answer, tuple | list) else answer
                rows.append(first.float().contiguous().numpy().copy())
    except RuntimeError:
        return None
    finally:
        torch.backends.quantized.engine = _OURS
    return np.concatenate(rows)
