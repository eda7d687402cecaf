"""What the device child tells its parent: one JSON object a line on stdout."""

from __future__ import annotations

from typing import Final

import msgspec

from edge_runtime.contract.errors import WireError
from edge_runtime.policies.base import InferenceMode
from edge_runtime.results import InferenceSource

__all__ = ["MODES", "DeviceEnd", "DeviceMessage", "DeviceReady", "RequestRecord", "decode_message"]

MODES: Final = (
    InferenceMode.ONLY_ON_DEVICE,
    InferenceMode.ONLY_IN_CLOUD,
    InferenceMode.ADAPTIVE,
)
"""The modes that the demo compares, in the order they run."""


class DeviceReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The bundle is open; requests start now."""

    variant: str | None
    """The local variant in use; None: this mode loads none."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One photo and its answer."""

    file: str
    truth: int
    link_s: float
    """When it was asked, in seconds since the link schedule started."""
    latency_ms: float
    """From the call to the answer, or to the error."""
    predicted: int | None = None
    """None: no answer came; ``error`` says why."""
    source: InferenceSource | None = None
    action: str | None = None
    reason: str | None = None
    upload_started: bool = False
    uploaded_bytes: int = 0
    """That crossed the uplink between this photo and the next one, whoever sent them."""
    error: str | None = None

    @property
    def answered(self) -> bool:
        """Whether an answer came, in time or late, right or wrong."""
        return self.predicted is not None

    @property
    def right(self) -> bool:
        """Whether the answer is the photo's digit."""
        return self.predicted == self.truth


class DeviceEnd(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """All photos are through, and nothing crosses the link any more."""

    uploaded_bytes: int
    """All that crossed the uplink in this mode, opening connections included."""
    downloaded_bytes: int


DeviceMessage = DeviceReady | RequestRecord | DeviceEnd

_decoder: msgspec.json.Decoder[DeviceMessage] = msgspec.json.Decoder(DeviceMessage)


def decode_message(line: bytes) -> DeviceMessage:
    """Decode one line. Raises ``WireError``."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"a child process wrote a line that makes no sense: {error}") from None
