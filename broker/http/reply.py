"""An answer as it goes out, whichever way."""

from __future__ import annotations

import msgspec

from broker.http.accept import AnswerType
from edge_runtime.contract.wire import ModelRef, Region, ServerTiming

__all__ = ["Reply"]


class Reply(msgspec.Struct, frozen=True):
    """Encoded once; a retry gets the same bytes."""

    media_type: AnswerType
    body: bytes
    timing: ServerTiming
    model: ModelRef
    region: Region | None
    """Of a picture."""
