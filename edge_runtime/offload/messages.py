"""Requests to a broker, and what its answers mean. The wire format is ``contract/wire.py``."""

from __future__ import annotations

import re
from typing import Annotated, Final
from uuid import uuid4

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.answer_codec import decode_answer_pixels, picture_of_file
from edge_runtime.contract.errors import (
    BrokerFault,
    DeadlineExceeded,
    ImageError,
    ModelNotFound,
    NearfarError,
    Overloaded,
    RequestRejected,
    Unauthorized,
    WireError,
    error_from_code,
)
from edge_runtime.contract.tasks import (
    GenerationTask,
    ImageToImageTask,
    ReconstructionTask,
    SegmentationTask,
    Task,
    TaskName,
    task_name,
)
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    IDEMPOTENCY_HEADER,
    JSON_MEDIA_TYPE,
    REQUEST_ID_HEADER,
    EncodedAnswer,
    ModelRef,
    PictureType,
    Problem,
    decode_answer,
    decode_problem,
    parse_picture_headers,
)
from edge_runtime.offload.discovery import Expected, check_labels
from edge_runtime.offload.transport import HttpRequest, HttpResponse, UploadReceipt

__all__ = [
    "CloudReply",
    "Load",
    "Refusal",
    "accept_header",
    "decode_load",
    "health_request",
    "load_request",
    "models_request",
    "predict_request",
    "read_answer",
    "refusal",
]

_HOLD_S = 10.0
"""How long not to ask again after a refusal that time alone will not mend."""
_DEFAULT_RETRY_S = 1.0
_MAX_RETRY_S = 60.0
_MAX_SMALL_ANSWER = 1 << 20
_SECONDS = re.compile(r"[0-9]{1,6}\Z")


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def health_request(api_key: str | None) -> HttpRequest:
    """The smallest question there is: opens the connection, measures the round trip."""
    return HttpRequest(
        method="GET",
        path="/v2/health/ready",
        headers=_headers(api_key),
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def models_request(api_key: str | None) -> HttpRequest:
    """Which models does the broker serve?"""
    return HttpRequest(
        method="GET",
        path="/v1/models",
        headers=_headers(api_key),
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def load_request(api_key: str | None) -> HttpRequest:
    """How busy is the broker?"""
    return HttpRequest(
        method="GET",
        path="/v1/load",
        headers=_headers(api_key),
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What of ``GET /v1/load`` counts here; other keys are ignored."""

    queue_delay_ms: Annotated[float, msgspec.Meta(ge=0, le=limits.MAX_DEADLINE_MS)]
    draining: bool = False


_load_decoder = msgspec.json.Decoder(Load)


def decode_load(response: HttpResponse) -> Load | None:
    """The broker's load; None where it does not say, or makes no sense: it is a hint."""
    if response.status != 200:
        return None
    try:
        return _load_decoder.decode(response.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def accept_header(task: Task, image_type: PictureType) -> str:
    """How the answer shall come: pixels as a file, which is a quarter smaller than in JSON."""
    if isinstance(task, SegmentationTask):
        return f"image/png, {JSON_MEDIA_TYPE}"
    if isinstance(task, ImageToImageTask | GenerationTask | ReconstructionTask):
        return f"{image_type}, {JSON_MEDIA_TYPE}"
    return JSON_MEDIA_TYPE


def predict_request(
    model: str,
    body: bytes,
    media_type: str,
    deadline_ms: int,
    api_key: str | None,
    accept: str = JSON_MEDIA_TYPE,
    receipt: UploadReceipt | None = None,
) -> HttpRequest:
    """One image or seed to answer within ``deadline_ms``."""
    unique = uuid4().hex
    return HttpRequest(
        method="POST",
        path=f"/v1/models/{model}:predict",
        headers={
            **_headers(api_key),
            "Accept": accept,
            "Content-Type": media_type,
            DEADLINE_HEADER: str(min(deadline_ms, limits.MAX_DEADLINE_MS)),
            REQUEST_ID_HEADER: unique,
            IDEMPOTENCY_HEADER: unique,
        },
        body=body,
        max_answer_bytes=limits.MAX_ANSWER_BYTES,
        receipt=receipt,
    )


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is no answer."""

    error: NearfarError
    hard: bool
    """Counts against the broker's health."""
    hold_s: float = 0.0
    """Do not ask again for this long."""


def refusal(response: HttpResponse) -> Refusal | None:
    """What went wrong; None for status 200."""
    status = response.status
    if status == 200:
        return None
    problem = decode_problem(response.body)
    detail = _detail(status, problem)
    if status in (401, 403):
        return Refusal(error=Unauthorized(detail), hard=False, hold_s=_HOLD_S)
    if status == 404:
        return Refusal(error=ModelNotFound(detail), hard=False, hold_s=_HOLD_S)
    if status == 429 or status == 503:
        # A broker that says so itself is healthy; a bare 503 comes from a proxy before it.
        said_so = problem is not None and problem.code == Overloaded.code
        hold_s = _retry_after_s(response.headers.get("retry-after"))
        return Refusal(error=Overloaded(detail), hard=status == 503 and not said_so, hold_s=hold_s)
    if status == 408 or (problem is not None and problem.code == DeadlineExceeded.code):
        return Refusal(error=DeadlineExceeded(detail), hard=False)
    if 400 <= status < 500:
        known = error_from_code(problem.code, detail) if problem is not None else None
        error = known if isinstance(known, ImageError) else RequestRejected(detail)
        return Refusal(error=error, hard=False)
    if status >= 500:
        return Refusal(error=BrokerFault(detail), hard=True)
    if 300 <= status < 400:
        detail = f"the broker redirects (HTTP {status}): pass its final URL"
        return Refusal(error=BrokerFault(detail), hard=True)
    return Refusal(error=WireError(f"the broker answered HTTP {status}"), hard=True)


def _detail(status: int, problem: Problem | None) -> str:
    if problem is None:
        return f"the broker answered HTTP {status}"
    return f"the broker answered HTTP {status}: {problem.detail[:500]}"


def _retry_after_s(value: str | None) -> float:
    """Seconds of ``Retry-After``, bounded; its date form counts as not given."""
    if value is None or not _SECONDS.match(value.strip()):
        return _DEFAULT_RETRY_S
    return min(float(value), _MAX_RETRY_S)


class CloudReply(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A sound answer, and which model gave it."""

    model: ModelRef
    answer: Answer


_FIELDS: Final[dict[TaskName, str]] = {
    "classification": "predictions",
    "detection": "boxes",
    "segmentation": "mask",
    "image_to_image": "image",
    "generation": "image",
    "reconstruction": "image",
}


def read_answer(response: HttpResponse, model: str, expected: Expected) -> CloudReply:
    """Decode an answer, JSON or a picture, and hold it to the bundle's task and labels.

    Raises ``LabelsMismatch`` when the model that answered has other labels, ``WireError``
    when the answer contradicts itself, is of another task or makes no sense.
    """
    task = task_name(expected.task)
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in ("image/png", "image/jpeg"):
        reference, region = parse_picture_headers(response.headers)
        file_type: PictureType = "image/png" if media_type == "image/png" else "image/jpeg"
        picture = picture_of_file(response.body, file_type, region)
        encoded = (
            EncodedAnswer(mask=picture) if task == "segmentation" else EncodedAnswer(image=picture)
        )
    else:
        said = decode_answer(response.body)
        reference, encoded = said.model, said.answer
    if reference.name != model:
        raise WireError(f"asked {model!r} and got an answer of {reference.name[:128]!r}")
    check_labels(model, reference.labels_sha256, expected)
    if getattr(encoded, _FIELDS[task]) is None:
        raise WireError(f"the broker's answer holds no {_FIELDS[task]}: it is of another task")
    for prediction in encoded.predictions or ():
        _check_class(prediction.index, prediction.label, expected.labels)
    for box in encoded.boxes or ():
        _check_class(box.index, box.label, expected.labels)
        if box.x_min > box.x_max or box.y_min > box.y_max:
            raise WireError("the broker's answer holds a box with its corners the wrong way round")
    return CloudReply(model=reference, answer=decode_answer_pixels(encoded, expected.task))


def _check_class(index: int, label: str, labels: tuple[str, ...]) -> None:
    if not 0 <= index < len(labels) or labels[index] != label:
        raise WireError(
            f"the broker's answer names class {index} {label[: limits.MAX_LABEL_CHARS]!r}, "
            "the bundle does not"
        )
