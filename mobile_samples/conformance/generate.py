"""Write the conformance vectors: ``python -m mobile_samples.conformance.generate``."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.manifest import FileEntry, canonical_json, labels_digest, variant_digest
from edge_runtime.contract.preprocess import (
    NAMED,
    CenterCrop,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
    apply,
    apply_uint8,
)
from edge_runtime.contract.tasks.classification import ClassificationTask, postprocess
from edge_runtime.contract.wire import (
    ServerTiming,
    format_server_timing,
    parse_deadline_ms,
    parse_queue_delay_ms,
    parse_server_timing,
)
from mobile_samples.conformance.frames import frame_vectors

HERE = Path(__file__).parent
FILES = ("preprocess.json", "classification.json", "wire.json", "digests.json", "frames.json")


def picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """The input picture of ``README.md``, uint8 ``[height, width, 3]``."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.int64)
    value = x * (7 + seed) + y * (13 + 2 * seed) + c * 101 + (x * y) % 31 + (x // 5) * (y // 3)
    return (value % 256).astype(np.uint8)


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def preprocess_vectors() -> list[dict[str, Any]]:
    """Sizes that shrink, grow, stay and stretch; every named normalization; gray; mirror."""
    records = []
    sizes = ((64, 48), (31, 97), (224, 224), (5, 7), (300, 200))
    algorithms = ("resize_bilinear_aa@1", "resize_bilinear@1")
    for (width, height), algorithm, name in itertools.product(sizes, algorithms, NAMED):
        color, normalization = NAMED[name]
        records.append(
            (
                width,
                height,
                Preprocess(
                    resize=ResizeShorterSide(size=36, algorithm=algorithm),
                    crop=CenterCrop(height=32, width=31),
                    color=color,
                    normalization=normalization,
                ),
            )
        )
    unit = NAMED["unit"][1]
    for (width, height), algorithm in itertools.product(sizes, algorithms):
        gray = msgspec.structs.replace(unit, mean=(0.5,), std=(0.25,))
        records.append(
            (
                width,
                height,
                Preprocess(
                    resize=ResizeExact(height=28, width=28, algorithm=algorithm),
                    color="GRAY",
                    normalization=gray,
                ),
            )
        )
        records.append(
            (
                width,
                height,
                Preprocess(
                    resize=ResizeExact(height=17, width=40, algorithm=algorithm),
                    crop=CenterCrop(height=12, width=33),
                    flip_horizontal=True,
                    normalization=unit,
                ),
            )
        )
    vectors = []
    for number, (width, height, record) in enumerate(records):
        image = picture(width, height, number % 5)
        pixels, values = apply_uint8(record, image), apply(record, image)
        vectors.append(
            {
                "width": width,
                "height": height,
                "seed": number % 5,
                "preprocess": msgspec.to_builtins(record),
                "uint8_sha256": _sha256(pixels),
                "uint8_first": [int(v) for v in pixels.reshape(-1)[:4]],
                "float32_sha256": _sha256(values.astype("<f4")),
                "float32_first": [float(v) for v in values.reshape(-1)[:4]],
            }
        )
    return vectors


def classification_vectors() -> list[dict[str, Any]]:
    """Ordinary logits, huge and equal ones, each activation and some temperatures."""
    cases: list[tuple[list[float], str, float]] = [
        ([0.0, 1.0, 2.0, 3.0], "softmax", 1.0),
        ([3.0, 3.0, 3.0, -1.0], "softmax", 1.0),
        ([800.0, 799.0, -800.0, 0.0], "softmax", 1.0),
        ([0.5, -0.25, 4.0, 1.0], "softmax", 2.5),
        ([0.5, -0.25, 4.0, 1.0], "sigmoid", 1.0),
        ([-1000.0, 1000.0, 0.0, 0.0], "sigmoid", 1.0),
        ([0.1, 0.2, 0.3, 0.4], "none", 1.0),
    ]
    vectors = []
    for logits, activation, temperature in cases:
        task = msgspec.convert(
            {
                "type": "classification",
                "classes": 4,
                "activation": activation,
                "temperature": temperature,
                "top_k": 3,
            },
            ClassificationTask,
        )
        answer = postprocess(task, np.array(logits, dtype=np.float32), ("a", "b", "c", "d"))
        vectors.append(
            {
                "task": msgspec.to_builtins(task),
                "labels": ["a", "b", "c", "d"],
                "logits": logits,
                "predictions": msgspec.to_builtins(answer),
            }
        )
    return vectors


def wire_vectors() -> dict[str, Any]:
    """Header values and what they mean; ``error`` is the code of the refusal."""
    deadlines: list[dict[str, Any]] = []
    for value in (None, "1", "250", "600000", "0", "-5", "1.5", "", " 7", "abc", "600001", "+9"):
        try:
            deadlines.append({"value": value, "deadline_ms": parse_deadline_ms(value)})
        except NearfarError as error:
            deadlines.append({"value": value, "error": error.code})
    timings = [
        None,
        "recv;dur=1.5, q;dur=0.25, inf;dur=9",
        "inf;dur=3.125",
        "q;desc=wait;dur=7, other;dur=1",
        "recv;dur=-1, q;dur=nan, inf",
        "garbage;;;=,,",
    ]
    formatted = ServerTiming(recv_ms=1.0, queue_ms=None, inference_ms=2.5)
    return {
        "deadline": deadlines,
        "server_timing": [
            {"value": value, "timing": msgspec.to_builtins(parse_server_timing(value))}
            for value in timings
        ],
        "server_timing_format": [
            {
                "timing": msgspec.to_builtins(formatted),
                "value": format_server_timing(formatted),
            }
        ],
        "queue_delay": [
            {"value": value, "queue_delay_ms": parse_queue_delay_ms(value)}
            for value in (None, "0", "42", "-1", "4.2", "many")
        ],
    }


def digest_vectors() -> dict[str, Any]:
    """Canonical JSON of awkward values, and the two digests built on lists."""
    values: list[Any] = [
        {"b": 1, "a": [True, None, 1.0, 0.1, 1e-7, 1e21], "é": '\u2028 " \\ \u0001'},
        {"z": {"y": [], "x": {}}, "A": -0.0, "a": 123456789012},
    ]
    labels = ["tench", "great white shark", "Müller's", ""]
    files = [
        FileEntry(path="variants/b.bin", size_bytes=3, sha256="ab" * 32),
        FileEntry(path="variants/a.bin", size_bytes=4, sha256="cd" * 32),
    ]
    return {
        "canonical_json": [
            {"value": value, "text": canonical_json(value).decode()} for value in values
        ],
        "labels": [{"labels": labels, "sha256": labels_digest(labels)}],
        "variant": [{"files": msgspec.to_builtins(files), "sha256": variant_digest(files)}],
    }


def documents() -> dict[str, str]:
    """Every vector file's text, by name."""
    contents: tuple[Any, ...] = (
        preprocess_vectors(),
        classification_vectors(),
        wire_vectors(),
        digest_vectors(),
        frame_vectors(),
    )
    return {
        name: json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        for name, content in zip(FILES, contents, strict=True)
    }


if __name__ == "__main__":
    for file_name, text in documents().items():
        (HERE / file_name).write_text(text, encoding="utf-8")
