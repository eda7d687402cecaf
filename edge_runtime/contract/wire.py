"""What device and broker say to each other over HTTP.

Request headers
    ``X-Deadline-Ms``      integer milliseconds left when the request was sent; the broker
                           counts it from the end of the header block. No clocks compared.
    ``X-Request-Id``       optional, 1 to 128 of ``[A-Za-z0-9_.-]``; echoed.
    ``Idempotency-Key``    optional, of the same letters: a retry under the same key joins
                           the first try, or gets its answer, for a minute.
Response headers
    ``Server-Timing``      ``recv;dur=..., q;dur=..., inf;dur=...`` in milliseconds:
                           reading the body, waiting in the queue, running the model
                           (W3C Server Timing). Estimators learn from these.
    ``X-Queue-Delay-Ms``   predicted wait of a new request, integer milliseconds.
    ``X-Request-Id``       the request's, or a new one.
    ``X-Model-Name``, ``X-Model-Version``, ``X-Model-Sha256``, ``X-Labels-Sha256``
                           ``ModelRef``, where the body is an image and not JSON.
    ``X-Region``           ``Picture.region`` there: four numbers, separated by commas.
Bodies
    request: the encoded image itself (``image/jpeg``, ``image/png``, ``image/webp``), or
    ``SeedRequest`` as JSON for a model that generates;
    answer: ``PredictAnswer`` as JSON; with ``Accept: image/png`` (or ``image/jpeg``, where
    the answer is an image) the ``Picture`` itself; errors: ``Problem`` as
    ``application/problem+json`` (RFC 9457).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.tasks.classification import Prediction
from edge_runtime.contract.tasks.detection import Box

__all__ = [
    "DEADLINE_HEADER",
    "IDEMPOTENCY_HEADER",
    "JSON_MEDIA_TYPE",
    "MAX_SEED",
    "MAX_SEED_BODY_BYTES",
    "PICTURE_HEADERS",
    "PRIORITY_HEADER",
    "PROBLEM_MEDIA_TYPE",
    "QUEUE_DELAY_HEADER",
    "REQUEST_ID_HEADER",
    "SERVER_TIMING_HEADER",
    "EncodedAnswer",
    "ModelRef",
    "Picture",
    "PictureType",
    "PredictAnswer",
    "Problem",
    "Region",
    "SeedRequest",
    "ServerTiming",
    "check_deadline_ms",
    "decode_answer",
    "decode_problem",
    "decode_seed",
    "encode_seed",
    "format_picture_headers",
    "format_server_timing",
    "parse_deadline_ms",
    "parse_idempotency_key",
    "parse_picture_headers",
    "parse_queue_delay_ms",
    "parse_request_id",
    "parse_server_timing",
]

DEADLINE_HEADER: Final = "X-Deadline-Ms"
REQUEST_ID_HEADER: Final = "X-Request-Id"
IDEMPOTENCY_HEADER: Final = "Idempotency-Key"
PRIORITY_HEADER: Final = "X-Priority"
QUEUE_DELAY_HEADER: Final = "X-Queue-Delay-Ms"
SERVER_TIMING_HEADER: Final = "Server-Timing"
JSON_MEDIA_TYPE: Final = "application/json"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"

_NAME_HEADER: Final = "X-Model-Name"
_VERSION_HEADER: Final = "X-Model-Version"
_SHA256_HEADER: Final = "X-Model-Sha256"
_LABELS_HEADER: Final = "X-Labels-Sha256"
_REGION_HEADER: Final = "X-Region"
PICTURE_HEADERS: Final = (
    _NAME_HEADER,
    _VERSION_HEADER,
    _SHA256_HEADER,
    _LABELS_HEADER,
    _REGION_HEADER,
)

MAX_SEED: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly (RFC 8259 section 6)."""
MAX_SEED_BODY_BYTES: Final = 256
"""A ``SeedRequest``. ``LimitExceeded``."""

PictureType = Literal["image/png", "image/jpeg"]
Region = tuple[float, float, float, float]
"""x_min, y_min, x_max, y_max in pixels of the upright original image."""

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


class Picture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pixels as a file: a mask (8-bit PNG, the class of each pixel) or an RGB image."""

    media_type: PictureType
    width: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_IMAGE_SIDE)]
    height: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_IMAGE_SIDE)]
    region: Region | None = None
    """What it shows of the original image; None: it was made from a seed."""
    data: bytes
    """Base64 in JSON."""


Predictions = Annotated[
    tuple[Prediction, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TOP_K)
]
Boxes = Annotated[tuple[Box, ...], msgspec.Meta(max_length=limits.MAX_TOP_K)]


class EncodedAnswer(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One request's answer, ready to travel. Exactly one field is set."""

    predictions: Predictions | None = None
    """Classification, best first."""
    boxes: Boxes | None = None
    """Detection, best first; empty: nothing was found."""
    mask: Picture | None = None
    """Segmentation."""
    image: Picture | None = None
    """Image to image, generation, reconstruction."""

    def __post_init__(self) -> None:
        _require_one(self.predictions, self.boxes, self.mask, self.image)


class PredictAnswer(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The answer to ``POST /v1/models/{name}:predict``: who answered, and ``EncodedAnswer``.

    Exactly one field beside ``model`` is set.
    """

    model: ModelRef
    predictions: Predictions | None = None
    boxes: Boxes | None = None
    mask: Picture | None = None
    image: Picture | None = None

    def __post_init__(self) -> None:
        _require_one(self.predictions, self.boxes, self.mask, self.image)

    @classmethod
    def of(cls, model: ModelRef, answer: EncodedAnswer) -> PredictAnswer:
        """``answer``, signed by the model that gave it."""
        return cls(
            model=model,
            predictions=answer.predictions,
            boxes=answer.boxes,
            mask=answer.mask,
            image=answer.image,
        )

    @property
    def answer(self) -> EncodedAnswer:
        """The answer alone."""
        return EncodedAnswer(
            predictions=self.predictions, boxes=self.boxes, mask=self.mask, image=self.image
        )


def _require_one(*answers: object) -> None:
    """Raise ``ValueError``, which a decoder turns into its own error."""
    if sum(answer is not None for answer in answers) != 1:
        raise ValueError("exactly one of predictions, boxes, mask and image must be there")


class SeedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask a model that generates: one seed, one image."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEED)]


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
    return check_deadline_ms(int(value))


def check_deadline_ms(deadline_ms: int) -> int:
    """``deadline_ms`` itself. Raises ``WireError`` below 1, ``LimitExceeded`` above the limit."""
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


def parse_idempotency_key(value: str | None) -> str | None:
    """The caller's idempotency key, or None when it sent none. Raises ``WireError``."""
    if value is None:
        return None
    if not _REQUEST_ID.match(value):
        raise WireError(f"{IDEMPOTENCY_HEADER} must be 1 to 128 of A-Z a-z 0-9 _ . -")
    return value


def parse_queue_delay_ms(value: str | None) -> int | None:
    """The broker's predicted wait; None when absent or not understood (it is a hint)."""
    if value is None or not _INTEGER.match(value):
        return None
    return int(value)


def format_server_timing(timing: ServerTiming) -> str:
    """``recv;dur=1.2, q;dur=0.3, inf;dur=9.8``; what is None is left out."""
    parts = []
    if timing.recv_ms is not None:
        parts.append(f"recv;dur={timing.recv_ms:.3f}")
    if timing.queue_ms is not None:
        parts.append(f"q;dur={timing.queue_ms:.3f}")
    if timing.inference_ms is not None:
        parts.append(f"inf;dur={timing.inference_ms:.3f}")
    return ", ".join(parts)


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


def format_picture_headers(model: ModelRef, region: Region | None) -> dict[str, str]:
    """What JSON would say beside the picture, as headers."""
    headers = {
        _NAME_HEADER: model.name,
        _VERSION_HEADER: model.version,
        _SHA256_HEADER: model.sha256,
    }
    if model.labels_sha256 is not None:
        headers[_LABELS_HEADER] = model.labels_sha256
    if region is not None:
        headers[_REGION_HEADER] = ",".join(repr(float(edge)) for edge in region)
    return headers


def parse_picture_headers(headers: Mapping[str, str]) -> tuple[ModelRef, Region | None]:
    """The inverse of ``format_picture_headers``; names in ``headers`` are lower case.

    Raises ``WireError`` when one is missing, too long or makes no sense.
    """
    said = {name: headers.get(name.lower()) for name in PICTURE_HEADERS}
    if any(value is not None and len(value) > limits.MAX_HEADER_CHARS for value in said.values()):
        raise WireError(
            f"a header of the answer has more than {limits.MAX_HEADER_CHARS} characters"
        )
    name, version, sha256 = said[_NAME_HEADER], said[_VERSION_HEADER], said[_SHA256_HEADER]
    if name is None or version is None or sha256 is None:
        raise WireError("the answer's headers do not say which model gave it")
    reference = ModelRef(
        name=name, version=version, sha256=sha256, labels_sha256=said[_LABELS_HEADER]
    )
    return reference, _parse_region(said[_REGION_HEADER])


def _parse_region(value: str | None) -> Region | None:
    if value is None:
        return None
    try:
        x_min, y_min, x_max, y_max = (float(edge) for edge in value.split(","))
    except ValueError:
        raise WireError(f"{_REGION_HEADER} must be four numbers") from None
    region = (x_min, y_min, x_max, y_max)
    if not all(math.isfinite(edge) for edge in region):
        raise WireError(f"{_REGION_HEADER} must be four finite numbers")
    return region


_answer_decoder = msgspec.json.Decoder(PredictAnswer)
_seed_decoder = msgspec.json.Decoder(SeedRequest)
_problem_decoder = msgspec.json.Decoder(Problem)


def decode_answer(data: bytes) -> PredictAnswer:
    """Decode a broker's answer. Raises ``WireError``, also on size."""
    if len(data) > limits.MAX_ANSWER_BYTES:
        raise WireError(f"the answer has more than {limits.MAX_ANSWER_BYTES} bytes")
    try:
        return _answer_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one
        raise WireError(f"the broker's answer makes no sense: {error}") from None


def encode_seed(seed: int) -> bytes:
    """The body that asks a model for the image of ``seed`` (0 to ``MAX_SEED``)."""
    return msgspec.json.encode(SeedRequest(seed=seed))


def decode_seed(data: bytes) -> int:
    """The seed of a ``SeedRequest``. Raises ``WireError``, or ``LimitExceeded`` on size."""
    if len(data) > MAX_SEED_BODY_BYTES:
        raise LimitExceeded(f"a seed's body has at most {MAX_SEED_BODY_BYTES} bytes")
    try:
        return _seed_decoder.decode(data).seed
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f'the body must be {{"seed": NUMBER}}: {error}') from None


def decode_problem(data: bytes) -> Problem | None:
    """Decode problem+json; None when it is something else (a proxy's page, say)."""
    if len(data) > limits.MAX_MANIFEST_BYTES:
        return None
    try:
        return _problem_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
