"""Is int8 faster? int8 against fp32 of one format: one process, one thread, interleaved.

    python -m benchmarks.int8_latency --json build/bench/int8_latency.json
    python -m benchmarks.int8_latency --only resnet18 --format executorch
    python -m benchmarks.int8_latency --bundle digits.bundle

Both files are loaded at once; each round runs one, then the other, and turns the order
around, so that a machine that slows down slows both. The ratio is the median over rounds of
int8 time / fp32 time: below 1, int8 is faster. A processor's instruction sets decide much of
it (see ``machine.flags``); it foretells no phone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from converters.jobs import Artifact, ConvertJob, Prepared, PrepareJob, SourceRequest
from converters.supervisor import Supervisor
from edge_runtime.bundle import Bundle
from edge_runtime.runtimes.base import LoadedModel, find_runtime

SHARED = Path(__file__).parents[2] / "shared" / "data" / "weights"
CALIBRATION_INPUTS = 8
QUICK = ("mobilenet_v2", "resnet18")


def nets() -> dict[str, SourceRequest]:
    """The nets by name; weights do not change how long int8 takes, so they are random."""
    found = {
        name: SourceRequest(
            source=f"torchvision:{name}",
            weights="random:0",
            preprocess="torchvision",
            input_height=224,
            input_width=224,
        )
        for name in ("mobilenet_v2", "mobilenet_v3_large", "resnet18", "efficientnet_b0")
    }
    weights = SHARED / "mobilenet_v1_025_imagenet.safetensors"
    if weights.exists():
        found["mobilenet_v1_025"] = SourceRequest(
            source=f"{SHARED / 'nets.py'}:mobilenet_v1_025",
            weights=str(weights),
            preprocess="tf",
            input_height=224,
            input_width=224,
        )
    return found


def convert(request: SourceRequest, format_name: Any, folder: Path) -> dict[str, Any]:
    """Write fp32 and int8 of one net; loadable variants by precision."""
    supervisor = Supervisor(folder, jobs=1)
    prepared = supervisor.run("prepare", PrepareJob(source=request, out_dir=str(folder))).answer
    assert isinstance(prepared, Prepared)
    noise = np.random.default_rng(0).normal(
        size=(CALIBRATION_INPUTS, *prepared.inputs[0].shape[1:])
    )
    np.save(folder / "calibration.npy", noise.astype(np.float32))
    variants = {}
    for precision in ("fp32", "int8"):
        out = folder / precision
        out.mkdir()
        job = ConvertJob(
            source=request,
            format=format_name,
            precision=precision,
            out_dir=str(out),
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            calibration=str(folder / "calibration.npy") if precision == "int8" else None,
            task=prepared.task,
            preprocess=prepared.preprocess,
        )
        artifact = supervisor.run(precision, job).answer
        assert isinstance(artifact, Artifact)
        variants[precision] = SimpleNamespace(
            id=precision,
            format=format_name,
            path=out / artifact.path,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
        )
    return variants


def from_bundle(folder: Path, format_name: str) -> dict[str, Any]:
    """The same two variants of a bundle that there is already."""
    bundle = Bundle.open(folder)
    found = {}
    for precision in ("fp32", "int8"):
        variant = bundle.manifest.variant(f"{format_name}-{precision}")
        found[precision] = SimpleNamespace(
            id=variant.id,
            format=format_name,
            path=folder / variant.path,
            inputs=variant.inputs,
            outputs=variant.outputs,
        )
    return found


def measure(variants: dict[str, Any], *, rounds: int, threads: int) -> dict[str, Any]:
    """Time both files, interleaved. Milliseconds are medians of one inference."""
    models: dict[str, LoadedModel] = {}
    for precision, variant in variants.items():
        runtime = find_runtime(variant.format)
        models[precision] = runtime.load(variant.path, variant, threads=threads)
    generator = np.random.default_rng(1)
    inputs = {
        precision: [
            (generator.random(spec.shape) * 255).astype(spec.dtype)
            if spec.dtype == "uint8"
            else generator.normal(size=spec.shape).astype(spec.dtype)
            for spec in model.inputs
        ]
        for precision, model in models.items()
    }
    for precision, model in models.items():
        for _ in range(5):
            model.run(inputs[precision])
    taken: dict[str, list[float]] = {"fp32": [], "int8": []}
    for number in range(rounds):
        order: Sequence[str] = ("fp32", "int8") if number % 2 else ("int8", "fp32")
        for precision in order:
            start = time.perf_counter()
            models[precision].run(inputs[precision])
            taken[precision].append((time.perf_counter() - start) * 1e3)
    ratios = [small / whole for small, whole in zip(taken["int8"], taken["fp32"], strict=True)]
    quarter, _, three_quarters = statistics.quantiles(ratios, n=4)
    sizes = {precision: variant.path.stat().st_size for precision, variant in variants.items()}
    for model in models.values():
        model.close()
    return {
        "fp32_ms": round(statistics.median(taken["fp32"]), 4),
        "int8_ms": round(statistics.median(taken["int8"]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quarter, 4), round(three_quarters, 4)],
        "rounds": rounds,
        "size_ratio": round(sizes["int8"] / sizes["fp32"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_latency")
    parser.add_argument("--json", type=Path, default=Path("build/bench/int8_latency.json"))
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--only", action="append", metavar="NAME", help="these nets")
    parser.add_argument("--bundle", action="append", type=Path, default=[], metavar="DIR")
    parser.add_argument("--format", choices=("tflite", "executorch"), default="tflite")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    known = nets()
    chosen = arguments.only or (list(QUICK) if arguments.quick else list(known))
    if arguments.bundle and not arguments.only:
        chosen = []
    for name in chosen:
        if name not in known:
            parser.error(f"there is no net {name!r}; there are {', '.join(known)}")
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "format": arguments.format,
        "threads": arguments.threads,
        "nets": {},
    }
    options = {"rounds": arguments.rounds, "threads": arguments.threads}
    for folder in arguments.bundle:
        result = measure(from_bundle(folder, arguments.format), **options)
        _record(document, folder.name, result)
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="nearfar-latency-") as scratch:
            variants = convert(known[name], arguments.format, Path(scratch))
            _record(document, name, measure(variants, **options))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.json}")


def _record(document: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    document["nets"][name] = result
    print(
        f"{name}: fp32 {result['fp32_ms']:.2f} ms, int8 {result['int8_ms']:.2f} ms, "
        f"ratio {result['ratio']:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
