"""Inference requests: what a client means arrives, and what makes no sense is its error."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.http.errors import status_of
from broker.oip.compression import pack, unpack
from broker.oip.datatypes import DATATYPES, Datatype, write_binary, write_json
from broker.oip.interface import Interface
from broker.oip.message import parse_infer
from broker.oip.rows import read_infer
from edge_runtime.contract.errors import ImageTooLarge, NearfarError, WireError
from tests.support import broker_images as images
from tests.support.oip import NUMPY, binary, body_of, input_of, opened

HEIGHT, WIDTH = 24, 32
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
texts = st.text(st.characters(exclude_characters="[],", exclude_categories=("Cs",)), max_size=8)


def values_of(datatype: str, count: int, seed: int) -> Any:
    """``count`` values of a datatype, its extremes among them."""
    rng = np.random.default_rng(seed)
    if datatype == "BYTES":
        return [rng.bytes(int(size)) for size in rng.integers(0, 9, count)]
    if datatype == "BOOL":
        return rng.random(count) < 0.5
    if datatype in ("FP16", "FP32", "FP64", "BF16"):
        drawn = rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)
        return drawn.astype(NUMPY.get(datatype, "<f4"))
    bounds = np.iinfo(NUMPY[datatype])
    drawn = rng.integers(bounds.min, bounds.max, count, dtype=NUMPY[datatype], endpoint=True)
    drawn[0] = bounds.max
    drawn[-1] = bounds.min
    return drawn


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(DATATYPES), shapes), min_size=1, max_size=3), st.data())
def test_tensors_arrive_as_they_were_sent(kinds: list[tuple[Any, list[int]]], data: st.DataObject):
    inputs, tails, sent = [], [], []
    for number, (datatype, shape) in enumerate(kinds):
        values = values_of(datatype, int(np.prod(shape)), data.draw(st.integers(0, 999)))
        as_json = datatype not in ("FP16", "BF16", "BYTES") and data.draw(st.booleans())
        sent.append((datatype, shape, values))
        if as_json:
            nested = np.asarray(values).reshape(shape) if data.draw(st.booleans()) else values
            inputs.append(input_of(f"i{number}", datatype, shape, data=nested.tolist()))
        else:
            tails.append(binary(values, datatype))
            inputs.append(input_of(f"i{number}", datatype, shape, size=len(tails[-1])))
    body, headers = body_of(inputs, tails, id="some id")
    length = headers.get("Inference-Header-Content-Length")
    request = parse_infer(body, None if length is None else int(length))
    assert request.id == "some id"
    for tensor, (datatype, shape, values) in zip(request.inputs, sent, strict=True):
        found = tensor.read()
        if datatype == "BYTES":
            assert found == values
            continue
        assert isinstance(found, np.ndarray)
        assert found.shape == tuple(shape)
        if datatype == "BF16":
            values = (values.view("<u4") & 0xFFFF0000).view("<f4")
        assert found.ravel().tolist() == np.asarray(values).ravel().tolist()


@settings(max_examples=25)
@given(st.sampled_from([one for one in DATATYPES if one != "BF16"]), shapes, st.integers(0, 999))
def test_outputs_are_written_as_the_format_says(datatype: Datatype, shape: list[int], seed: int):
    values = values_of(datatype, int(np.prod(shape)), seed)
    assert write_binary(datatype, values) == binary(values, datatype)
    if datatype != "BYTES":
        written = json.loads(json.dumps(write_json("o", np.reshape(values, shape))))
        assert np.array(written, NUMPY[datatype]).tolist() == np.asarray(values).tolist()


@settings(max_examples=15)
@given(st.lists(texts, min_size=1, max_size=4))
def test_text_arrives_from_json(elements: list[str]):
    body, _ = body_of([input_of("t", "BYTES", [len(elements), 1], data=[[e] for e in elements])])
    assert parse_infer(body, None).inputs[0].read() == [element.encode() for element in elements]


CLASSIFIER = Interface(opened("classification"))
GENERATOR = Interface(opened("generation"))


def good_requests() -> list[tuple[Interface, bytes, int | None]]:
    pixels = np.zeros((2, 3, HEIGHT, WIDTH), "<f4")
    tensor = input_of("image", "FP32", [2, 3, HEIGHT, WIDTH], size=pixels.nbytes)
    picture = binary([images.png()], "BYTES")
    picked = [{"name": "logits", "parameters": {"classification": 2, "binary_data": True}}]
    parameters = {"timeout": 5_000_000, "priority": 1, "binary_data_output": True}
    made = [
        (CLASSIFIER, body_of([tensor], [pixels.tobytes()], outputs=picked, id="a")),
        (
            CLASSIFIER,
            body_of(
                [input_of("encoded_image", "BYTES", [1, 1], size=len(picture))],
                [picture],
                parameters=parameters,
            ),
        ),
        (GENERATOR, body_of([input_of("seed", "INT64", [2], data=[7, 8])])),
        (GENERATOR, body_of([input_of("latent", "FP32", [1, 6, 1, 1], data=[0.5] * 6)])),
    ]
    return [
        (interface, body, int(length) if (length := headers.get(_LENGTH)) else None)
        for interface, (body, headers) in made
    ]


_LENGTH = "Inference-Header-Content-Length"
GOOD = good_requests()


def test_the_requests_that_are_harmed_below_are_good():
    assert [len(read_infer(*one).items) for one in GOOD] == [2, 1, 2, 1]


def read_or_refuse(interface: Interface, body: bytes, length: int | None) -> None:
    """A request is read, or is an error of the client's: nothing else may happen."""
    status = 200
    try:
        read_infer(interface, body, length)
    except NearfarError as error:
        status = status_of(error)
    assert status == 200 or 400 <= status < 500


@settings(max_examples=50)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-3, 3),
)
def test_a_harmed_request_is_read_or_refused(
    good: tuple[Interface, bytes, int | None], flips: list[tuple[int, int]], shift: int
):
    interface, body, length = good
    harmed = bytearray(body)
    for at, value in flips:
        harmed[at % len(harmed)] = value
    read_or_refuse(interface, bytes(harmed), None if length is None else max(length + shift, 0))


ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(2**70), 1.5, 1e300, "", "\x00", "image", "FP32", [], [[]],
    [None], [1], [True, "a"], [[1, 2], [3]], {}, {"a": None}, {"binary_data_size": 8},
    {"timeout": -1}, {"timeout": 2**65}, {"priority": "1"}, {"binary_data_output": 1},
    [{"name": "image"}], [{"name": ""}], [{"name": "image", "parameters": {"classification": 1}}],
]  # fmt: skip


@settings(max_examples=50)
@given(st.sampled_from([GOOD[2], GOOD[3]]), st.data())
def test_a_request_with_other_parts_is_read_or_refused(
    good: tuple[Interface, bytes, int | None], data: st.DataObject
):
    interface, body, _ = good
    document = json.loads(body)
    target = data.draw(st.sampled_from([document, document["inputs"][0]]))
    key = data.draw(
        st.sampled_from(
            ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id"]
        )
    )
    target[key] = data.draw(st.sampled_from(ODD))
    read_or_refuse(interface, json.dumps(document).encode(), None)


REFUSED: list[tuple[str, bytes, int | None]] = [
    ("nothing", b"", None),
    ("no JSON", b"\xff{", None),
    ("a list", b"[]", None),
    ("no inputs", b'{"inputs": []}', None),
    ("deep JSON", b'{"inputs":' + b"[" * 100_000, None),
    ("deep parameters", b'{"inputs":[],"x":' + b'{"a":' * 100_000, None),
    ("a header past the end", GOOD[0][1], len(GOOD[0][1]) + 1),
    ("much JSON", b" " * (8 * 2**20 + 1), None),
    ("a huge id", body_of([input_of("seed", "INT64", [1], data=[1])], id="x" * 257)[0], None),
    ("many inputs", body_of([input_of(f"i{n}", "BOOL", [1], data=[True]) for n in range(65)])[0],
     None),
    ("a huge shape", body_of([input_of("image", "FP32", [2**28] * 8, data=[1.0])])[0], None),
    ("a negative size", body_of([input_of("image", "FP32", [1], size=-1)])[0], None),
    ("neither data nor size", body_of([input_of("image", "FP32", [1, 3, 24, 32])])[0], None),
    ("both", body_of([input_of("image", "FP32", [1, 3, 24, 32], data=[1.0], size=4)])[0], None),
    ("a size as text",
     body_of([input_of("image", "FP32", [1]) | {"parameters": {"binary_data_size": "4"}}])[0],
     None),
    ("lists of nothing", body_of([input_of("image", "FP32", [1, 3, 24, 32], data=[[]] * 9999)])[0],
     None),
    ("ragged", body_of([input_of("image", "FP32", [1, 3, 24, 32], data=[[[[1.0]], [[2.0]]]])])[0],
     None),
    ("trailing bytes", GOOD[0][1] + b"x", GOOD[0][2]),
    ("missing bytes", GOOD[0][1][:-1], GOOD[0][2]),
    ("an image as text", body_of([input_of("encoded_image", "BYTES", [1], data=["text"])])[0],
     None),
    ("too many rows", body_of([input_of("image", "FP32", [65, 3, 24, 32], size=4)], [b"1234"])[0],
     None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "length"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_makes_no_sense_is_the_clients_error(body: bytes, length: int | None):
    with pytest.raises(NearfarError) as refused:
        read_infer(CLASSIFIER, body, length)
    assert 400 <= status_of(refused.value) < 500


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_small_body_does_not_become_much_memory(coding: Any):
    bomb = pack(bytes(8 * 2**20), coding)
    assert len(bomb) < 2**20
    with pytest.raises(ImageTooLarge, match="once unpacked"):
        unpack(bomb, coding, 2**20)
    plain = b"some tensor" * 99
    packed = pack(plain, coding)
    assert unpack(packed, coding, len(plain)) == plain
    for broken in (packed[:-1], packed + b"x", b"", b"junk"):
        with pytest.raises(WireError):
            unpack(broken, coding, 2**20)
