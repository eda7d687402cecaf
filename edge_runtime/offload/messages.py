"""Requests to a broker, and what its answers mean. The wire format is ``contract/wire.py``."""

from __future__ import annotations

import re
from uuid import uuid4

import msgspec

from edge_runtime.contract import limits
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
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
    PredictAnswer,
    Problem,
    decode_answer,
    decode_problem,
)
from edge_runtime.offload.discovery import check_labels
from edge_runtime.offload.transport import HttpRequest, HttpResponse

__all__ = [
    "Refusal",
    "health_request",
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


def predict_request(
    model: str, body: bytes, media_type: str, deadline_ms: int, api_key: str | None
) -> HttpRequest:
    """One image to answer within ``deadline_ms``."""
    return HttpRequest(
        method="POST",
        path=f"/v1/models/{model}:predict",
        headers={
            **_headers(api_key),
            "Content-Type": media_type,
            DEADLINE_HEADER: str(min(deadline_ms, limits.MAX_DEADLINE_MS)),
            REQUEST_ID_HEADER: uuid4().hex,
        },
        body=body,
        max_answer_bytes=limits.MAX_ANSWER_BYTES,
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


def read_answer(
    response: HttpResponse, model: str, labels: tuple[str, ...], labels_sha256: str
) -> PredictAnswer:
    """Decode an answer and hold it to the labels of the bundle.

    Raises ``LabelsMismatch`` when the model that answered has other labels, ``WireError``
    when the answer contradicts itself or makes no sense.
    """
    answer = decode_answer(response.body)
    if answer.model.name != model:
        raise WireError(f"asked {model!r} and got an answer of {answer.model.name[:128]!r}")
    check_labels(model, answer.model.labels_sha256, labels_sha256)
    for prediction in answer.predictions:
        if not 0 <= prediction.index < len(labels) or (
            labels[prediction.index] != prediction.label
        ):
            raise WireError(
                f"the broker's answer names class {prediction.index} "
                f"{prediction.label[: limits.MAX_LABEL_CHARS]!r}, the bundle does not"
            )
    return answer
