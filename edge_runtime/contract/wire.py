"""What device and broker say to each other over HTTP.

Request headers
    ``X-Deadline-Ms``      integer milliseconds left when the request was sent; the broker
                           counts it from the end of the header block. No clocks compared.
    ``X-Request-Id``       optional, 1 to 128 of ``[A-Za-z0-9_.-]``; echoed.
Response headers
    ``Server-Timing``      ``recv;dur=..., q;dur=..., inf;dur=...`` in milliseconds:
                           reading the body, waiting in the queue, running the model
                           (W3C Server Timing). Estimators learn from these.
    ``X-Queue-Delay-Ms``   predicted wait of a new request, integer milliseconds.
    ``X-Request-Id``       the request's, or a new one.
Bodies
    request: the encoded image itself (``image/jpeg``, ``image/png``, ``image/webp``);
    answer: ``PredictAnswer`` as JSON; errors: ``Problem`` as
    ``application/problem+json`` (RFC 9457).
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.tasks.classification import Prediction

__all__ = [
    "DEADLINE_HEADER",
    "PROBLEM_MEDIA_TYPE",
    "QUEUE_DELAY_HEADER",
    "REQUEST_ID_HEADER",
    "SERVER_TIMING_HEADER",
    "ModelRef",
    "PredictAnswer",
    "Problem",
    "ServerTiming",
    "decode_answer",
    "decode_problem",
    "format_server_timing",
    "parse_deadline_ms",
    "parse_queue_delay_ms",
    "parse_request_id",
    "parse_server_timing",
]

DEADLINE_HEADER: Final = "X-Deadline-Ms"
REQUEST_ID_HEADER: Final = "X-Request-Id"
QUEUE_DELAY_HEADER: Final = "X-Queue-Delay-Ms"
SERVER_TIMING_HEADER: Final = "Server-Timing"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"

_INTEGER = re.compile(r"[0-9]{1,9}\Z")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")


class ModelRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly which model answered."""

    name: str
    version: str
    sha256: str
    """Digest of the servable's manifest, which lists the digest of every file."""
    labels_sha256: str | None
    """``labels_digest``: a device refuses answers whose labels are not its own."""


class PredictAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to ``POST /v1/models/{name}:predict`` for classification."""

    model: ModelRef
    predictions: Annotated[
        tuple[Prediction, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TOP_K)
    ]


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """RFC 9457 problem details, with ``code`` and ``retryable`` of ``contract/errors.py``."""

    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    type: str = "about:blank"
    request_id: str = ""


class ServerTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds the broker spent; None: it did not say."""

    recv_ms: float | None = None
    queue_ms: float | None = None
    inference_ms: float | None = None


def parse_deadline_ms(value: str | None) -> int:
    """Milliseconds left; ``DEFAULT_DEADLINE_MS`` when the header is absent.

    Raises ``WireError`` unless it is an integer of at least 1, ``LimitExceeded`` above
    ``MAX_DEADLINE_MS``.
    """
    if value is None:
        return limits.DEFAULT_DEADLINE_MS
    if not _INTEGER.match(value):
        raise WireError(f"{DEADLINE_HEADER} must be a whole number of milliseconds")
    deadline_ms = int(value)
    if deadline_ms < 1:
        raise WireError(
            f"{DEADLINE_HEADER} is 0: no time is left; answer on the device, "
            "or send at least 1 millisecond"
        )
    if deadline_ms > limits.MAX_DEADLINE_MS:
        raise LimitExceeded(f"{DEADLINE_HEADER} must be at most {limits.MAX_DEADLINE_MS}")
    return deadline_ms


def parse_request_id(value: str | None) -> str | None:
    """The caller's request id, or None when it sent none. Raises ``WireError``."""
    if value is None:
        return None
    if not _REQUEST_ID.match(value):
        raise WireError(f"{REQUEST_ID_HEADER} must be 1 to 128 of A-Z a-z 0-9 _ . -")
    return value


def parse_queue_delay_ms(value: str | None) -> int | None:
    """The broker's predicted wait; None when absent or not understood (it is a hint)."""
    if value is None or not _INTEGER.match(value):
        return None
    return int(value)


def format_server_timing(timing: ServerTiming) -> str:
    """``recv;dur=1.2, q;dur=0.3, inf;dur=9.8``; what is None is left out."""
    pairs = (
        ("recv", timing.recv_ms),
        ("q", timing.queue_ms),
        ("inf", timing.inference_ms),
    )
    return ", ".join(f"{name};dur={value:.3f}" for name, value in pairs if value is not None)


def parse_server_timing(value: str | None) -> ServerTiming:
    """Read ``Server-Timing``. A hint: what is not understood is None, nothing is raised."""
    if value is None or len(value) > limits.MAX_HEADER_CHARS:
        return ServerTiming()
    found: dict[str, float] = {}
    for metric in value.split(","):
        name, _, parameters = metric.strip().partition(";")
        for parameter in parameters.split(";"):
            key, _, number = parameter.strip().partition("=")
            if key == "dur" and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", number):
                found[name.strip()] = float(number)
    return ServerTiming(
        recv_ms=found.get("recv"), queue_ms=found.get("q"), inference_ms=found.get("inf")
    )


_answer_decoder = msgspec.json.Decoder(PredictAnswer)
_problem_decoder = msgspec.json.Decoder(Problem)


def decode_answer(data: bytes) -> PredictAnswer:
    """Decode a broker's answer. Raises ``WireError``, also on size."""
    if len(data) > limits.MAX_ANSWER_BYTES:
        raise WireError(f"the answer has more than {limits.MAX_ANSWER_BYTES} bytes")
    try:
        return _answer_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one
        raise WireError(f"the broker's answer makes no sense: {error}") from None


def decode_problem(data: bytes) -> Problem | None:
    """Decode problem+json; None when it is something else (a proxy's page, say)."""
    if len(data) > limits.MAX_MANIFEST_BYTES:
        return None
    try:
        return _problem_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
