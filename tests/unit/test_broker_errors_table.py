"""From errors to statuses: every class of the contract has its place."""

from __future__ import annotations

import json

import pytest

from broker.http.errors import STATUS, error_response, status_of
from edge_runtime.contract import errors as e

EVERY_CLASS = [getattr(e, name) for name in e.__all__ if isinstance(getattr(e, name), type)]


@pytest.mark.parametrize("error", EVERY_CLASS, ids=lambda error: error.__name__)
def test_every_error_of_the_contract_has_a_status(error: type[e.NearfarError]):
    assert 400 <= status_of(error) <= 504


@pytest.mark.parametrize(
    "error",
    [cls for cls in EVERY_CLASS if issubclass(cls, e.ImageError | e.WireError | e.LimitExceeded)],
    ids=lambda error: error.__name__,
)
def test_what_a_client_sends_wrong_is_never_our_fault(error: type[e.NearfarError]):
    assert 400 <= status_of(error) < 500


@pytest.mark.parametrize(
    "error",
    [cls for cls in EVERY_CLASS if issubclass(cls, e.RemoteError | e.WireError)],
    ids=lambda error: error.__name__,
)
def test_only_what_may_work_later_has_a_status_that_says_so(error: type[e.NearfarError]):
    if status_of(error) in (408, 409, 429, 503, 504):
        assert error.retryable
    elif status_of(error) < 500:
        assert not error.retryable


def test_the_table_names_only_classes_of_the_contract():
    assert set(STATUS) <= set(EVERY_CLASS)


def test_a_new_class_inherits_the_status_of_its_parent():
    class ImageTooBlue(e.ImageUnreadable):
        code = "image_too_blue"

    assert status_of(ImageTooBlue) == 422
    assert status_of(ImageTooBlue("x")) == 422


def test_problem_details_hold_what_rfc_9457_and_the_contract_ask():
    response = error_response(e.Overloaded("later"), "/v1/models/m:predict", "id-1")
    assert response.status == 503
    assert response.content_type == "application/problem+json"
    assert json.loads(response.body) == {
        "title": "Service Unavailable",
        "status": 503,
        "detail": "later",
        "code": "overloaded",
        "retryable": True,
        "request_id": "id-1",
    }


def test_inference_protocol_paths_get_their_own_shape():
    response = error_response(e.ModelNotFound("none"), "/v2/models/m", "id-1")
    assert response.status == 404
    assert response.content_type == "application/json"
    assert json.loads(response.body) == {"error": "none"}


def test_a_refused_key_says_how_to_authenticate():
    response = error_response(e.Unauthorized("no"), "/v1/models", "id-1")
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="nearfar"'
