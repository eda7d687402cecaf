"""URLs and keys, discovery, what answers mean, and every failure of the HTTP client."""

from __future__ import annotations

import asyncio
import inspect
import json
import ssl
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
import pytest
import yarl
from aiohttp import client_exceptions
from aiohttp.client_reqrep import ConnectionKey
from multidict import CIMultiDict, CIMultiDictProxy

from edge_runtime.contract.errors import (
    BrokerFault,
    ConfigError,
    DeadlineExceeded,
    ImageUnreadable,
    LabelsMismatch,
    ModelNotFound,
    NearfarError,
    NetworkUnreachable,
    Overloaded,
    RemoteError,
    RequestRejected,
    Unauthorized,
    WireError,
)
from edge_runtime.contract.tasks import ClassificationTask, GenerationTask
from edge_runtime.offload.discovery import Expected, ServedModel, choose_model, decode_models
from edge_runtime.offload.endpoint import check_api_key, check_broker_url
from edge_runtime.offload.failures import translate
from edge_runtime.offload.messages import predict_request, read_answer, refusal
from edge_runtime.offload.resolver import DaemonResolver
from edge_runtime.offload.transport import HttpResponse
from edge_runtime.testing import problem

URL = "https://broker.example"
URL_OBJECT = yarl.URL(URL)
OURS, OTHERS = "a" * 64, "b" * 64
EXPECTED = Expected(task=ClassificationTask(classes=2), labels=("ant", "bee"), labels_sha256=OURS)
MODEL = {"name": "x", "version": "1", "sha256": "", "labels_sha256": None, "task": "t"}


# URL and key ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker.example",
        "ftp://broker.example",
        "http://",
        "http://:80",
        "http://host:99999",
        "http://host:0",
        "http://user:secret@host",
        "http://host?key=1",
        "http://host/#x",
        "http://ho st",
        "http://host\r\nX-Injected: 1",
        "http://h\u00f6st",
        "http://" + "a" * 2000,
        "http://[::1",
    ],
)
def test_a_senseless_broker_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="broker"):
        check_broker_url(url, with_key=False)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080", "http://localhost", "http://[::1]:1", "https://broker.example/path"],
)
def test_a_key_travels_encrypted_or_within_this_machine(url: str) -> None:
    check_broker_url(url, with_key=True)


@pytest.mark.parametrize(
    "url", ["http://192.0.2.7", "http://broker.example", "http://127.evil.test"]
)
def test_a_key_over_plain_http_to_another_machine_is_refused(url: str) -> None:
    check_broker_url(url, with_key=False)
    with pytest.raises(ConfigError, match="unencrypted"):
        check_broker_url(url, with_key=True)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "k\u00e9y", "x" * 513])
def test_a_key_that_is_no_header_value_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        check_api_key(key)


# Discovery ------------------------------------------------------------------------------


def served(name: str, labels: str | None = OURS, version: str = "1") -> ServedModel:
    return ServedModel(
        name=name, version=version, sha256="c" * 64, labels_sha256=labels, task="classification"
    )


def test_no_model_at_all_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="serves no model"):
        choose_model((), None, EXPECTED)


def test_a_named_model_that_is_not_there_is_not_found_and_the_others_are_named() -> None:
    with pytest.raises(ModelNotFound, match="it serves: large"):
        choose_model((served("large"),), "small", EXPECTED)


@pytest.mark.parametrize("wanted", [None, "large"])
@pytest.mark.parametrize("labels", [OTHERS, None])
def test_a_model_with_other_labels_is_refused(wanted: str | None, labels: str | None) -> None:
    with pytest.raises(LabelsMismatch):
        choose_model((served("large", labels),), wanted, EXPECTED)


def test_two_models_that_fit_need_a_choice() -> None:
    models = (served("one"), served("two"), served("three", OTHERS))
    with pytest.raises(ConfigError, match="one, two"):
        choose_model(models, None, EXPECTED)
    assert choose_model(models, "two", EXPECTED).name == "two"


def test_a_model_of_another_task_is_refused() -> None:
    other = msgspec.structs.replace(served("large"), task="segmentation")
    with pytest.raises(ModelNotFound, match="no model of the broker does classification"):
        choose_model((other,), None, EXPECTED)
    with pytest.raises(ConfigError, match="does segmentation, the bundle classification"):
        choose_model((other,), "large", EXPECTED)
    assert choose_model((other, served("mid")), None, EXPECTED).name == "mid"


def test_without_labels_the_task_alone_decides_and_the_clouds_labels_do_not_matter() -> None:
    generator = Expected(task=GenerationTask(latent_size=4))
    models = tuple(
        msgspec.structs.replace(served(name, labels), task="generation")
        for name, labels in (("one", None), ("two", OTHERS))
    )
    assert choose_model(models[1:], None, generator).name == "two"
    with pytest.raises(ConfigError, match="do the bundle's task"):
        choose_model(models, None, generator)


def test_the_only_model_with_our_labels_is_taken() -> None:
    models = (served("other", OTHERS), served("large"), served("large", version="2"))
    assert choose_model(models, None, EXPECTED) == models[1]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"models": [{"name": "x"}]}',
        json.dumps({"models": [{**MODEL, "name": "../x"}]}).encode(),
        json.dumps({"models": [{**MODEL, "version": 1}]}).encode(),
        json.dumps({"models": [MODEL] * 300}).encode(),
        b"\xff\xfe",
    ],
)
def test_a_senseless_list_of_models_is_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_models(body)


def test_keys_of_a_later_broker_are_ignored() -> None:
    document = {"models": [{**msgspec.to_builtins(served("large")), "new": 1}], "next": None}
    assert decode_models(json.dumps(document).encode()) == (served("large"),)


# Answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "error", "hard", "hold_s"),
    [
        (problem(400, "image_unreadable"), ImageUnreadable, False, 0),
        (problem(400, "wire"), RequestRejected, False, 0),
        (problem(422, "no-such-code"), RequestRejected, False, 0),
        (problem(401, "unauthorized"), Unauthorized, False, 10),
        (problem(403, "unauthorized"), Unauthorized, False, 10),
        (problem(404, "model_not_found"), ModelNotFound, False, 10),
        (problem(408, "deadline_exceeded"), DeadlineExceeded, False, 0),
        (problem(504, "deadline_exceeded"), DeadlineExceeded, False, 0),
        (problem(429, "overloaded"), Overloaded, False, 1),
        (problem(429, "overloaded", headers={"retry-after": "7"}), Overloaded, False, 7),
        (problem(429, "overloaded", headers={"retry-after": "99999"}), Overloaded, False, 60),
        (problem(429, "x", headers={"retry-after": "Fri, 21 Nov"}), Overloaded, False, 1),
        (problem(503, "overloaded"), Overloaded, False, 1),
        (HttpResponse(status=503, headers={}, body=b"<html>"), Overloaded, True, 1),
        (problem(500, "broker_fault"), BrokerFault, True, 0),
        (HttpResponse(status=502, headers={}, body=b"\xff"), BrokerFault, True, 0),
        (HttpResponse(status=302, headers={}, body=b""), BrokerFault, True, 0),
        (HttpResponse(status=204, headers={}, body=b""), WireError, True, 0),
    ],
)
def test_each_status_means_one_error(
    response: HttpResponse, error: type[NearfarError], hard: bool, hold_s: float
) -> None:
    no = refusal(response)
    assert no is not None
    assert (type(no.error), no.hard, no.hold_s) == (error, hard, hold_s)
    assert str(response.status) in no.error.detail


def test_a_long_problem_is_quoted_in_part() -> None:
    no = refusal(problem(400, "wire", "x" * 100_000))
    assert no is not None
    assert len(no.error.detail) < 600


def answer_body(**changes: Any) -> bytes:
    reference = {"name": "large", "version": "1", "sha256": "c" * 64, "labels_sha256": OURS}
    prediction = {"index": 1, "label": "bee", "score": 0.9, **changes.pop("prediction", {})}
    return json.dumps(
        {"model": {**reference, **changes.pop("model", {})}, "predictions": [prediction], **changes}
    ).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        answer_body(extra=1),
        answer_body(predictions=[]),
        answer_body(model={"name": "small"}),
        answer_body(prediction={"index": 2}),
        answer_body(prediction={"index": -1}),
        answer_body(prediction={"label": "wasp"}),
        answer_body(prediction={"score": "high"}),
        b"[" * 10_000,
    ],
)
def test_an_answer_that_makes_no_sense_is_a_wire_error(body: bytes) -> None:
    response = HttpResponse(status=200, headers={}, body=body)
    with pytest.raises(WireError):
        read_answer(response, "large", EXPECTED)


def test_a_sound_answer_is_read() -> None:
    response = HttpResponse(status=200, headers={}, body=answer_body())
    assert read_answer(response, "large", EXPECTED).answer.predictions[0].label == "bee"


@pytest.mark.parametrize("digest", [OTHERS, None])
def test_an_answer_of_a_model_with_other_labels_is_named_as_such(digest: str | None) -> None:
    body = answer_body(model={"labels_sha256": digest}, prediction={"label": "wasp"})
    response = HttpResponse(status=200, headers={}, body=body)
    with pytest.raises(LabelsMismatch):
        read_answer(response, "large", EXPECTED)


def test_a_request_says_how_much_time_is_left() -> None:
    request = predict_request("large", b"body", "image/jpeg", 321, "key")
    assert request.path == "/v1/models/large:predict"
    assert request.headers["X-Deadline-Ms"] == "321"
    assert request.headers["Authorization"] == "Bearer key"
    assert request.headers["Content-Type"] == "image/jpeg"
    assert len(request.headers["X-Request-Id"]) == 32
    assert "Authorization" not in predict_request("large", b"", "image/png", 1, None).headers


# Failures of the HTTP client ------------------------------------------------------------


def _key() -> ConnectionKey:
    fields = inspect.signature(ConnectionKey).parameters
    known = {"host": "broker.example", "port": 443, "is_ssl": True, "ssl": True}
    return ConnectionKey(**{name: known.get(name) for name in fields})


def _example(kind: type[Exception]) -> Exception:
    """An instance of any client exception, whatever its constructor wants."""
    certificate = ssl.SSLCertVerificationError("self-signed")
    request = aiohttp.RequestInfo(URL_OBJECT, "POST", CIMultiDictProxy(CIMultiDict()), URL_OBJECT)
    attempts: list[tuple[Any, ...]] = [
        (_key(), OSError(111, "refused")),
        (_key(), certificate),
        ("/path", _key(), OSError(2, "none")),
        (b"1", b"2", "host", 443),
        (request, ()),
        (URL,),
        (),
    ]
    for arguments in attempts:
        with suppress(Exception):
            error = kind(*arguments)
            str(error)
            return error
    raise AssertionError(f"cannot make a {kind.__name__}")


CLIENT_EXCEPTIONS = sorted(
    {
        value
        for value in vars(client_exceptions).values()
        if inspect.isclass(value) and issubclass(value, Exception)
        if value.__module__.startswith("aiohttp")
    },
    key=lambda kind: kind.__name__,
)


def test_the_walk_sees_the_exceptions_that_aiohttp_exports() -> None:
    exported = {
        value
        for value in vars(aiohttp).values()
        if inspect.isclass(value) and issubclass(value, aiohttp.ClientError)
    }
    assert exported <= set(CLIENT_EXCEPTIONS)
    assert len(CLIENT_EXCEPTIONS) >= 20


@pytest.mark.parametrize("kind", CLIENT_EXCEPTIONS, ids=lambda kind: kind.__name__)
def test_every_client_exception_becomes_a_typed_error(kind: type[Exception]) -> None:
    error = translate(_example(kind), URL)
    assert isinstance(error, RemoteError | WireError)
    assert type(error) is not RemoteError
    assert URL in error.detail


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(101, "unreachable"), NetworkUnreachable),
        (ConnectionResetError(), NetworkUnreachable),
        (TimeoutError(), DeadlineExceeded),
        (aiohttp.ConnectionTimeoutError(), NetworkUnreachable),
        (ssl.SSLError("handshake"), NetworkUnreachable),
        (ValueError("nonsense"), WireError),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "bad"), WireError),
        (asyncio.IncompleteReadError(b"", 3), WireError),
        (RuntimeError("Session is closed"), BrokerFault),
        (Overloaded("as it is"), Overloaded),
    ],
)
def test_system_failures_become_typed_errors(
    raised: Exception, expected: type[NearfarError]
) -> None:
    assert type(translate(raised, URL)) is expected


def test_tls_refusals_say_what_to_do() -> None:
    error = translate(_example(aiohttp.ClientConnectorCertificateError), URL)
    assert isinstance(error, NetworkUnreachable)
    assert "tls=" in error.detail


# Looking names up -----------------------------------------------------------------------


async def test_names_are_looked_up_in_threads_that_end() -> None:
    resolver = DaemonResolver()
    found = await resolver.resolve("localhost", 80)
    assert {entry["host"] for entry in found} <= {"127.0.0.1", "::1"}
    for bad in ("no-such-host.invalid", "a" * 70 + ".example"):
        with pytest.raises(OSError, match=r"\S"):
            await resolver.resolve(bad, 80)
    await resolver.close()
