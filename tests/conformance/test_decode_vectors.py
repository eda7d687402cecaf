"""The committed JPEGs, decoded at every factor of the scaled mode, give the committed pixels."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

import mobile_samples.conformance
from broker.executors.decoding import decode_jpeg
from edge_runtime.contract.imaging import JpegDecoder, decode_scaled

VECTORS = json.loads((Path(mobile_samples.conformance.__file__).parent / "decode.json").read_text())


@pytest.mark.parametrize("decoder", [None, decode_jpeg], ids=["pillow", "direct"])
@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_a_jpeg_decodes_to_the_committed_pixels(number: int, decoder: JpegDecoder | None):
    vector = VECTORS[number]
    decoded = decode_scaled(
        base64.b64decode(vector["jpeg"]), lambda height, width: vector["factor"], decoder
    )
    assert decoded.pixels.shape == (vector["height"], vector["width"], 3)
    assert [decoded.height, decoded.width] == vector["original"]
    assert hashlib.sha256(decoded.pixels.tobytes()).hexdigest() == vector["rgb_sha256"]
