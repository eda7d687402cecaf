"""For tests of your app: a broker that you script, without a socket.

    transport = ScriptedTransport.for_bundle(bundle, lambda image: "cat", delay_ms=30)
    with EdgeRuntime(bundle, transport=transport, policy="ONLY_IN_CLOUD") as runtime:
        assert runtime.run(photo).label == "cat"
    assert transport.requests[-1].method == "POST"

The runtime around it is the real one: its threads, deadlines, breaker and estimators.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.contract.answer_codec import encode_answer
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.tasks import Prediction, has_labels, task_name
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import (
    PROBLEM_MEDIA_TYPE,
    ModelRef,
    PredictAnswer,
    Problem,
    format_picture_headers,
)
from edge_runtime.offload.discovery import ServedModel
from edge_runtime.offload.transport import HttpRequest, HttpResponse

__all__ = ["Handler", "HttpRequest", "HttpResponse", "ScriptedTransport", "problem"]

Handler = Callable[[HttpRequest], HttpResponse | Awaitable[HttpResponse]]
"""Answers a request, at once or awaited; or raises a ``NearfarError``."""


class ScriptedTransport:
    """A transport whose answers come from a function; it remembers what it was sent.

    ``handler`` gets every request: ``GET /v2/health/ready``, ``GET /v1/models`` and
    ``POST /v1/models/{name}:predict``. ``for_bundle`` answers the first two for you.
    """

    secure = False

    def __init__(self, handler: Handler) -> None:
        self.requests: list[HttpRequest] = []
        self.closed = False
        self._handler = handler
        self._opened = False

    @classmethod
    def for_bundle(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        answer: Callable[[bytes], str | Answer | HttpResponse],
        *,
        delay_ms: float = 0.0,
        model: str = "scripted",
        labels_sha256: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ScriptedTransport:
        """A broker that serves one model with the task and labels of ``bundle``.

        ``answer`` gets the uploaded body (an image, or for a bundle that generates
        ``{"seed": 7}``) and gives a label, an ``Answer`` of the bundle's task, or a whole
        response (such as ``problem(429, "overloaded")``), or raises a ``NearfarError``. It
        comes ``delay_ms`` later. ``labels_sha256`` pretends other labels; ``headers`` are
        added to every answer.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        task, record = opened.manifest.task, opened.manifest.labels
        digest = labels_sha256 or (None if record is None else record.sha256)
        reference = ModelRef(
            name=model,
            version="1",
            sha256=hashlib.sha256(model.encode()).hexdigest(),
            labels_sha256=digest,
        )
        served = ServedModel(
            name=model,
            version=reference.version,
            sha256=reference.sha256,
            labels_sha256=digest,
            task=task_name(task),
            classes=task.classes if has_labels(task) else None,
        )

        async def handle(request: HttpRequest) -> HttpResponse:
            if request.path == "/v2/health/ready":
                return HttpResponse(status=200, headers={}, body=b"{}")
            if request.path == "/v1/models":
                body = msgspec.json.encode({"models": [served]})
                return HttpResponse(status=200, headers={}, body=body)
            await asyncio.sleep(delay_ms / 1e3)
            said = answer(request.body)
            if isinstance(said, HttpResponse):
                return said
            full = _classified(said, opened) if isinstance(said, str) else said
            return _response(reference, full, request.headers.get("Accept", ""), headers or {})

        return cls(handle)

    @property
    def open_connections(self) -> int:
        """One, from the first exchange until ``aclose``."""
        return int(self._opened)

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Ask the handler."""
        self.requests.append(request)
        started = time.perf_counter()
        answer = self._handler(request)
        response = await answer if inspect.isawaitable(answer) else answer
        self._opened = True
        if response.first_byte_ms == 0:
            elapsed_ms = (time.perf_counter() - started) * 1e3
            response = msgspec.structs.replace(response, first_byte_ms=elapsed_ms)
        return response

    async def aclose(self) -> None:
        """Note that the runtime closed its transport."""
        self.closed = True
        self._opened = False


def _classified(label: str, bundle: Bundle) -> Answer:
    if label not in bundle.labels:
        raise ConfigError(f"{label!r} is no label of {bundle.manifest.name}")
    index = bundle.labels.index(label)
    return Answer(predictions=(Prediction(index=index, label=label, score=0.99),))


def _response(
    model: ModelRef, answer: Answer, accept: str, headers: Mapping[str, str]
) -> HttpResponse:
    """As a broker gives it: pixels as a file where the request takes one, else JSON."""
    jpeg = accept.startswith("image/jpeg")
    encoded = encode_answer(answer, media_type="image/jpeg" if jpeg else "image/png")
    picture = encoded.mask or encoded.image
    if picture is not None and accept.startswith(picture.media_type):
        said = format_picture_headers(model, picture.region) | {"Content-Type": picture.media_type}
        own = {name.lower(): value for name, value in said.items()}
        return HttpResponse(status=200, headers={**own, **headers}, body=picture.data)
    body = msgspec.json.encode(PredictAnswer.of(model, encoded))
    own = {"content-type": "application/json"}
    return HttpResponse(status=200, headers={**own, **headers}, body=body)


def problem(
    status: int,
    code: str,
    detail: str = "scripted",
    *,
    headers: Mapping[str, str] | None = None,
) -> HttpResponse:
    """An error answer as the broker gives it: RFC 9457 problem+json.

    Header names are lower case (``{"retry-after": "2"}``).
    """
    document = Problem(
        title=code, status=status, detail=detail, code=code, retryable=status in (429, 503)
    )
    return HttpResponse(
        status=status,
        headers={"content-type": PROBLEM_MEDIA_TYPE, **(headers or {})},
        body=msgspec.json.encode(document),
    )
