"""JPEG to a model's pixels: CPU of each way there, one thread, interleaved.

    python -m benchmarks.decode --json build/bench/decode.json

Every round runs each way once, in turned order; the ratio is the median over rounds of a
way's CPU time over that of the exact one, Pillow at full size. ``floor``: decoding to one
pixel a block, without resizing, which nobody who reads the whole file can beat. Images are
synthetic, with noise that gives them about the bytes a pixel of a phone's photos.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from broker.executors.decoding import decode_jpeg
from edge_runtime.contract import preprocess
from edge_runtime.contract.imaging import JpegDecoder, decode_scaled
from edge_runtime.contract.preprocess import Preprocess, apply_uint8, decode_factor

SIZES: Final = {"480x360": (480, 360), "1280x960": (1280, 960), "4032x3024": (4032, 3024)}
EXACT: Final = preprocess.named("torchvision", 224, 224)
SCALED: Final = msgspec.structs.replace(EXACT, decode="scaled")
LIMIT_MS: Final = 30.0
"""Of the scaled way on 12 megapixels."""


def photo(width: int, height: int) -> bytes:
    """A JPEG of quality 75, 4:2:0."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 90 * np.sin(x / p + y / q) for p, q in ((37, 53), (91, 29), (61, 77))]
    coarse = rng.normal(0, 24, (height // 6 + 1, width // 6 + 1, 1)).astype(np.float32)
    grain = np.kron(coarse, np.ones((6, 6, 1), dtype=np.float32))[:height, :width]
    pixels = np.stack(waves, axis=2) + grain + rng.normal(0, 4, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=75, subsampling=2
    )
    return buffer.getvalue()


def prepare(record: Preprocess, jpeg: JpegDecoder | None, data: bytes) -> Any:
    """What the broker does with one body, up to the pixels of the model's input."""
    decoded = decode_scaled(data, partial(decode_factor, record), jpeg)
    return apply_uint8(record, decoded.pixels, (decoded.height, decoded.width))


WAYS: Final[dict[str, Callable[[bytes], Any]]] = {
    "exact_pillow": partial(prepare, EXACT, None),
    "exact_direct": partial(prepare, EXACT, decode_jpeg),
    "scaled_pillow": partial(prepare, SCALED, None),
    "scaled_direct": partial(prepare, SCALED, decode_jpeg),
    "floor": lambda data: decode_jpeg(data, 8),
}


def measure(data: bytes, rounds: int) -> dict[str, Any]:
    """Median CPU milliseconds of each way, and ratios to ``exact_pillow``."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for name in names:
        WAYS[name](data)
    for round_ in range(rounds):
        for name in names if round_ % 2 else reversed(names):
            started_s = time.process_time()
            WAYS[name](data)
            times[name].append((time.process_time() - started_s) * 1e3)
    ratios = {
        name: statistics.median(
            own / exact for own, exact in zip(times[name], times["exact_pillow"], strict=True)
        )
        for name in names
    }
    return {
        "bytes": len(data),
        "cpu_ms": {name: round(statistics.median(times[name]), 3) for name in names},
        "ratio_to_exact_pillow": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a size; write everything as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures as JSON to F")
    parser.add_argument("--rounds", type=int, default=21, help="[default: 21]")
    options = parser.parse_args(arguments)
    sizes = {}
    for name, (width, height) in SIZES.items():
        sizes[name] = measure(photo(width, height), options.rounds)
        ratios = sizes[name]["ratio_to_exact_pillow"]
        shown = ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items())
        print(f"{name} ({sizes[name]['bytes'] // 1000} kB): {shown}", flush=True)
    twelve_ms = sizes["4032x3024"]["cpu_ms"]["scaled_direct"]
    print(f"12 megapixels, decoded and resized: {twelve_ms:.1f} ms CPU")
    report = {
        "machine": describe_machine(),
        "rounds": options.rounds,
        "sizes": sizes,
        "summary": {"passed": {"scaled_12_megapixels_in_30_ms": twelve_ms <= LIMIT_MS}},
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
