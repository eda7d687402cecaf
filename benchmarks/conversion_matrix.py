"""Every model x format x precision: what is proven, what is sound, what is refused and why.

    python -m benchmarks.conversion_matrix --json build/bench/matrix.json [--quick] [--only NAME]

Status of a cell:
  proven      the saved file passed its gate against the fp32 reference;
  structural  a net without training, quantized: the file loads, takes and gives the
              reference's tensors, is really quantized and gives finite answers (how close they
              are says nothing about a net whose answers are noise);
  refused     it cannot be, with the reason;
  failed      anything else.

Precisions that a format does not have at all are no cells: ``not_offered`` lists them with
their reasons (also: ``nearfar formats``).

Resumable: cells already in the JSON are kept; ``--again`` measures all of the chosen models
anew, ``--retry`` the failed ones. Photos come
from ``../shared/data`` where that lies beside the project, else they are rendered digits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import describe_machine
from converters.convert import Conversion, Outcome
from converters.convert import convert as convert_source
from converters.dataset import Dataset, read_dataset
from converters.options import source_request
from converters.plan import FileOptions, plan
from converters.recipes import FORMATS, OFFERED, REFUSED, find_recipe
from converters.verify.gates import default_gates
from converters.verify.outcome import Options, VariantReport
from converters.verify.verify import verify_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.tasks import task_name

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
NETS = HERE / "nets.py"
EVALUATION_IMAGES = 40
CALIBRATION_IMAGES = 32
UNTRAINED_IMAGES = 8
"""For calibration and for comparison: the quality of such nets is not judged."""
_NOISE_CANNOT = {"parity", "agreement", "layer"}
"""What a net whose answers are noise may miss; ``layer`` says where parity was lost."""
REFUSALS = ("precision_refused", "unsupported_operator")


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the matrix."""

    name: str
    source: str
    options: dict[str, Any] = {}
    trained: bool = False
    quick: bool = False
    photos: str = "imagenet"


def _net(name: str, **options: Any) -> Model:
    quick = bool(options.pop("quick", False))
    return Model(
        name=name,
        source=f"{NETS}:{name}",
        options={"weights": "random:0", **options},
        quick=quick,
    )


def _vision(name: str, size: int, **options: Any) -> Model:
    quick = bool(options.pop("quick", False))
    chosen = {
        "weights": "random:0",
        "preprocess": "torchvision",
        "input_size": str(size),
        **options,
    }
    return Model(name=name, source=f"torchvision:{name}", options=chosen, quick=quick)


def _keras(name: str, size: int) -> Model:
    return Model(
        name=f"keras_{name}",
        source=f"keras:{name}",
        options={"weights": "random:0", "input_size": str(size)},
    )


def _shared(name: str, task: str, preprocess: str, size: int, photos: str, **options: Any) -> Model:
    weights = {"mobilenet_v1_025": "_imagenet", "resnet20": "_cifar10", "resnet56": "_cifar10"}
    file = SHARED / "weights" / f"{name}{weights.get(name, '')}.safetensors"
    return Model(
        name=f"trained_{name}",
        source=f"{SHARED / 'weights' / 'nets.py'}:{name}",
        options={
            "weights": str(file),
            "task": task,
            "preprocess": preprocess,
            "input_size": str(size),
            **options,
        },
        trained=True,
        photos=photos,
    )


def models() -> list[Model]:
    """All rows; those on shared weights only where these are."""
    rows = [
        Model(name="digits_small", source="zoo:digits-small", trained=True, quick=True,
              photos="digits"),
        Model(name="digits_large", source="zoo:digits-large", trained=True, photos="digits"),
        _net("small_cnn", preprocess=str(HERE / "gray28.toml")),
        _net("small_cnn_224", preprocess="unit", input_size="224"),
        _vision("mobilenet_v2", 224),
        _vision("mobilenet_v3_large", 224),
        _vision("resnet50", 224),
        _vision("inception_v3", 299),
        _vision("vgg16", 224),
        _vision("efficientnet_b0", 224),
        _vision("vit_b_16", 224),
        _keras("MobileNetV2", 224),
        _keras("VGG16", 224),
        _keras("ResNet50", 224),
        _net("tiny_detector", task="detection", preprocess="unit", input_size="64", quick=True),
        _vision("ssdlite320_mobilenet_v3_large", 320, task="detection", preprocess="tf"),
        _vision("retinanet_resnet50_fpn", 320, task="detection"),
        _net("tiny_segmenter", task="segmentation", preprocess="unit", input_size="64",
             quick=True),
        _vision("lraspp_mobilenet_v3_large", 320, task="segmentation"),
        _vision("deeplabv3_mobilenet_v3_large", 320, task="segmentation"),
        _net("style_transfer", task="image_to_image", preprocess="unit", input_size="128"),
        _net("espcn", task="image_to_image", preprocess="unit", input_size="64", quick=True),
        _net("dcgan_generator", task="generation", latent="100x1x1", quick=True),
        _net("vae", task="reconstruction", preprocess="unit", input_size="64", quick=True),
        _net("vae_decoder", task="generation", latent="32", output_range="0:1"),
    ]  # fmt: skip
    if SHARED.is_dir():
        rows += [
            _shared("mobilenet_v1_025", "classification", "tf", 224, "imagenet"),
            _shared("resnet20", "classification", "torchvision", 32, "cifar10"),
            _shared("resnet56", "classification", "torchvision", 32, "cifar10"),
            _shared("style_wave", "image_to_image", "raw", 224, "imagenet",
                    output_range="0:255"),
            Model(
                name="trained_mobilenet_v2",
                source="torchvision:mobilenet_v2",
                options={
                    "weights": str(SHARED / "weights" / "mobilenet_v2_imagenet.safetensors"),
                    "preprocess": "torchvision",
                    "input_size": "224",
                },
                trained=True,
            ),
        ]  # fmt: skip
    return rows


def _photos(kind: str, scratch: Path) -> tuple[Dataset, Dataset]:
    """Calibration and evaluation images, no image in both."""
    if kind == "digits" or not SHARED.is_dir():
        return _rendered(scratch)
    if kind == "cifar10":
        files = read_dataset(SHARED / "images" / "cifar10", purpose="evaluation").files
        return Dataset(files=files[1::8][:CALIBRATION_IMAGES]), Dataset(files=files[::8][:40])
    folder, labels = SHARED / "images" / "imagenet", SHARED / "images" / "imagenet_labels.csv"
    calibration = read_dataset(folder, labels=labels, split="calib", purpose="calibration")
    evaluation = read_dataset(folder, labels=labels, split="eval", purpose="evaluation")
    return (
        Dataset(files=calibration.files[:CALIBRATION_IMAGES]),
        Dataset(files=evaluation.files[:EVALUATION_IMAGES]),
    )


def _rendered(scratch: Path) -> tuple[Dataset, Dataset]:
    from converters.zoo.digits import write_split

    folders = []
    for split, count in (("calib", CALIBRATION_IMAGES), ("test", EVALUATION_IMAGES)):
        folder = scratch / split
        if not folder.exists():
            write_split(folder, split, count=count)
        folders.append(Dataset(files=tuple(sorted(folder.glob("*.jpg")))))
    return folders[0], folders[1]


def measure(
    model: Model, scratch: Path, jobs: int, known: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The cells of one row, but for those in ``known``."""
    cells: list[dict[str, Any]] = []
    planned, _ = plan(FORMATS, OFFERED, FileOptions())
    missing = [target for target in planned if (target.format, target.precision) not in known]
    formats = {target.format for target in missing}
    # Sizes are held against the format's own fp32.
    targets = [
        target
        for target in planned
        if target in missing or (target.precision == "fp32" and target.format in formats)
    ]
    if not missing:
        return []
    calibration, evaluation = _photos(model.photos, scratch)
    if not model.trained:
        calibration = Dataset(files=calibration.files[:UNTRAINED_IMAGES])
    output = scratch / f"{model.name}.bundle"
    try:
        request = source_request(model.source, **model.options)
        generates = request.task == "generation"
        outcome = convert_source(
            Conversion(
                source=request,
                targets=targets,
                output=output,
                calibration=None if generates else calibration,
                keep_going=True,
                jobs=jobs,
            )
        )
        report = outcome.report  # on the calibration inputs: enough where quality is not judged
        if model.trained:
            bundle = Bundle.open(output)
            gates = default_gates(task_name(bundle.manifest.task))
            data = Dataset(files=()) if generates else evaluation
            report = verify_bundle(bundle, data, Options(gates=gates, jobs=jobs, explain=False))
    except NearfarError as error:
        return [
            {"model": model.name, "format": t.format, "precision": t.precision,
             "status": "failed", "reason": f"{error.code}: {error.detail}"}
            for t in missing
        ]  # fmt: skip
    found = {entry.id: entry for entry in report.variants}
    for target in missing:
        cell = {"model": model.name, "format": target.format, "precision": target.precision}
        cells.append(cell | _cell(target.id, model, outcome, found.get(target.id)))
    return cells


def _cell(name: str, model: Model, outcome: Outcome, entry: VariantReport | None) -> dict[str, Any]:
    left_out = outcome.left_out.get(name)
    if left_out is not None:
        refused = left_out.name in REFUSALS
        return {"status": "refused" if refused else "failed", "reason": left_out.detail}
    assert entry is not None
    precision = entry.precision
    find_recipe(entry.format, precision)  # type: ignore[arg-type]
    status = "proven" if entry.passed else "failed"
    names = {finding.name for finding in entry.findings}
    if (
        not entry.passed
        and not model.trained
        and precision not in ("fp32", "fp16")
        and names <= _NOISE_CANNOT
    ):
        status = "structural"
    return {
        "status": status,
        "reason": "; ".join(entry.reasons),
        "sqnr_db": entry.sqnr_db,
        "agreement": entry.agreement,
        "metrics": entry.metrics,
        "size_ratio": entry.size_ratio,
        "quantized_share": entry.quantized_share,
        "seconds": outcome.seconds.get(name),
        "peak_rss_bytes": outcome.peak_rss_bytes.get(name),
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion_matrix")
    parser.add_argument("--json", type=Path, default=Path("build/bench/conversion_matrix.json"))
    parser.add_argument("--quick", action="store_true", help="one model a task")
    parser.add_argument("--only", action="append", metavar="NAME", help="these models")
    parser.add_argument("--again", action="store_true", help="measure the chosen models anew")
    parser.add_argument("--retry", action="store_true", help="measure failed cells anew")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"seconds": {}, "cells": []}
    if arguments.json.exists():
        document = json.loads(arguments.json.read_text())
    document["machine"] = describe_machine()
    document["not_offered"] = {
        f"{name}-{precision}": reason for (name, precision), reason in REFUSED.items()
    }
    rows = [row for row in models() if row.quick or not arguments.quick]
    if arguments.only:
        rows = [row for row in rows if row.name in arguments.only]
    if arguments.again:
        anew = {row.name for row in rows}
        document["cells"] = [cell for cell in document["cells"] if cell["model"] not in anew]
    if arguments.retry:
        document["cells"] = [cell for cell in document["cells"] if cell["status"] != "failed"]
    known: dict[str, set[tuple[str, str]]] = {row.name: set() for row in rows}
    for cell in document["cells"]:
        known.setdefault(cell["model"], set()).add((cell["format"], cell["precision"]))
    with tempfile.TemporaryDirectory(prefix="nearfar-matrix-") as scratch:
        for row in rows:
            start = time.monotonic()
            cells = measure(row, Path(scratch), arguments.jobs, known[row.name])
            if not cells:
                continue
            seconds = round(time.monotonic() - start, 1)
            before = document["seconds"].get(row.name, 0.0) if known[row.name] else 0.0
            document["seconds"][row.name] = round(before + seconds, 1)
            document["cells"] += cells
            document["summary"] = dict(Counter(cell["status"] for cell in document["cells"]))
            _write(arguments.json, document)
            counts = Counter(cell["status"] for cell in cells)
            print(f"{row.name}: {dict(counts)} in {seconds} s", flush=True)
            for cell in cells:
                if cell["status"] == "failed":
                    print(f"  {cell['format']} {cell['precision']}: {cell['reason'][:200]}")
    print(f"wrote {arguments.json}: {document.get('summary')}")
    sys.exit(1 if document.get("summary", {}).get("failed") else 0)


if __name__ == "__main__":
    main()
