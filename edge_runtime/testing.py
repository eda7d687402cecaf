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
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.tasks import Prediction
from edge_runtime.contract.wire import PROBLEM_MEDIA_TYPE, ModelRef, PredictAnswer, Problem
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
        answer: Callable[[bytes], str | HttpResponse],
        *,
        delay_ms: float = 0.0,
        model: str = "scripted",
        labels_sha256: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ScriptedTransport:
        """A broker that serves one model with the labels of ``bundle``.

        ``answer`` gets the uploaded image and gives a label, or a whole response (such as
        ``problem(429, "overloaded")``), or raises a ``NearfarError``. It comes
        ``delay_ms`` later. ``labels_sha256`` pretends other labels; ``headers`` are added
        to every answer.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        record = opened.manifest.labels
        if record is None:
            raise ConfigError("this bundle has no labels to answer with")
        digest = labels_sha256 or record.sha256
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
            task="classification",
            classes=record.count,
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
            if said not in opened.labels:
                raise ConfigError(f"{said!r} is no label of {opened.manifest.name}")
            prediction = Prediction(index=opened.labels.index(said), label=said, score=0.99)
            body = msgspec.json.encode(PredictAnswer(model=reference, predictions=(prediction,)))
            return HttpResponse(status=200, headers=dict(headers or {}), body=body)

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
