"""The committed vectors and the Python implementation say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_runtime.contract.preprocess import Preprocess, apply_uint8
from edge_runtime.contract.resample import resize, resize_bilinear_aa_spec, shorter_side_size
from mobile_samples.conformance import generate


def test_classification_vectors_hold_within_1e_12() -> None:
    """Not by text: the last bit of an exponential is the processor's."""
    committed = json.loads((generate.HERE / "classification.json").read_text())
    given = json.loads(generate.documents()["classification.json"])
    assert len(committed) == len(given)
    for old, new in zip(committed, given, strict=True):
        assert [p["index"] for p in old["predictions"]] == [p["index"] for p in new["predictions"]]
        for a, b in zip(old["predictions"], new["predictions"], strict=True):
            assert a["label"] == b["label"]
            assert a["score"] == pytest.approx(b["score"], abs=1e-12)
        assert (old["task"], old["logits"]) == (new["task"], new["logits"])


@pytest.mark.parametrize("name", ["preprocess.json", "wire.json", "digests.json", "frames.json"])
def test_committed_vectors_are_what_the_implementation_gives(name: str) -> None:
    committed = (generate.HERE / name).read_text(encoding="utf-8")
    assert committed == generate.documents()[name], (
        "the contract's arithmetic changed: that is a new algorithm version, not an edit"
    )


def test_antialiased_vectors_follow_the_written_definition() -> None:
    """Pillow's result equals the algorithm as docs/preprocessing.md writes it out."""
    import msgspec

    checked = 0
    for vector in json.loads((generate.HERE / "preprocess.json").read_text()):
        record = msgspec.convert(vector["preprocess"], Preprocess)
        if record.resize.algorithm != "resize_bilinear_aa@1" or record.color != "RGB":
            continue
        image = generate.picture(vector["width"], vector["height"], vector["seed"])
        if hasattr(record.resize, "size"):
            height, width = shorter_side_size(*image.shape[:2], record.resize.size)
        else:
            height, width = record.resize.height, record.resize.width
        defined = resize_bilinear_aa_spec(image, height, width)
        np.testing.assert_array_equal(
            resize(image, height, width, record.resize.algorithm), defined
        )
        assert [int(v) for v in apply_uint8(record, image).reshape(-1)[:4]] == vector["uint8_first"]
        checked += 1
    assert checked >= 20
