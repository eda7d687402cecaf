"""Content negotiation as RFC 9110 says, and never a type that was not asked for."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.http.accept import answer_types, negotiate
from edge_runtime.contract.errors import WireError
from tests.support.tasks import task_of

JSON, PNG, JPEG = "application/json", "image/png", "image/jpeg"
ALL = answer_types(task_of("generation"))


def test_each_task_offers_json_first_and_pixels_where_it_has_some() -> None:
    assert answer_types(task_of("classification")) == (JSON,)
    assert answer_types(task_of("detection")) == (JSON,)
    assert answer_types(task_of("segmentation")) == (JSON, PNG)
    for name in ("generation", "image_to_image", "reconstruction"):
        assert answer_types(task_of(name)) == (JSON, PNG, JPEG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "accept",
    ["", "text/html", "image/webp, text/*", "*/*;q=0", "image/*;q=0, application/*;q=0.000",
     "png", "image/png;q=2", "image/png;q=-1", "image/png;q=0.1234", "image/png;q=x", "a/b/c",
     ", ".join(["text/plain"] * 33)],
)  # fmt: skip
def test_a_client_that_takes_nothing_of_ours_or_makes_no_sense_is_refused(accept: str) -> None:
    with pytest.raises(WireError):
        negotiate(accept, ALL)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("image/png", PNG),
        ("IMAGE/PNG", PNG),
        ("image/jpeg, */*", JPEG),
        ("image/*", PNG),
        ("image/png, application/json", PNG),
        ("application/json, image/png", JSON),
        ("application/json;q=0.5, image/png;q=0.4, image/jpeg;q=0.9", JPEG),
        ("image/png;q=0, image/*", JPEG),
        ("text/html, image/avif, image/webp, */*;q=0.8", JSON),
        ("image/png ; q=1.000 ; v=2", PNG),
    ],
)
def test_the_best_liked_type_is_chosen(accept: str | None, chosen: str) -> None:
    assert negotiate(accept, ALL) == chosen


def test_json_is_given_to_a_classifiers_client_only_if_it_takes_it() -> None:
    with pytest.raises(WireError, match="application/json"):
        negotiate("image/png", answer_types(task_of("classification")))


@given(st.text(max_size=60))
def test_any_header_gives_an_offered_type_or_a_wire_error(accept: str) -> None:
    with contextlib.suppress(WireError):
        assert negotiate(accept, ALL) in ALL
