"""Servables and the photo of the benchmark, made on the spot; weights are random."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_runtime.contract import preprocess
from edge_runtime.contract.files import atomic_directory, file_entries
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    SERVABLE_NAME,
    Labels,
    Provenance,
    Reference,
    ReferenceRecord,
    Servable,
    canonical_json,
    labels_digest,
)
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec

__all__ = [
    "TENSOR_BYTES",
    "photo",
    "tensor",
    "write_photos",
    "write_resnet18",
    "write_trivial",
]

_TRIVIAL_SIDE = 50
TENSOR_BYTES = 3 * _TRIVIAL_SIDE * _TRIVIAL_SIDE * 4
"""Of the trivial model's input: 30 kB, the size of a small photo, and nothing to decode."""


def photo(width: int = 480, height: int = 360, seed: int = 7) -> bytes:
    """A JPEG with the spectrum of a photo (amplitude falls as 1/frequency), about 30 kB."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * random.random(frequency.shape))
        plane = np.fft.irfft2(phase / frequency, s=(height, width))
        planes.append((plane - plane.min()) / np.ptp(plane) * 255)
    pixels = np.stack(planes, axis=2).astype(np.uint8)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=42)
    return buffer.getvalue()


def write_photos(target: Path, count: int) -> Path:
    """A folder of them, no two alike."""
    target.mkdir()
    for number in range(count):
        (target / f"{number:03}.jpg").write_bytes(photo(seed=100 + number))
    return target


def tensor() -> bytes:
    """One input of the trivial model."""
    return np.zeros(TENSOR_BYTES // 4, dtype="<f4").tobytes()


def write_trivial(target: Path) -> Path:
    """One small convolution: what a request costs without a model, as near as can be."""
    import torch

    class Trivial(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 2, 3, stride=25)

        def forward(self, images: Any) -> Any:
            return self.first(images).mean((2, 3))

    return _write(target, Trivial().eval(), "trivial", _TRIVIAL_SIDE, 2)


def write_resnet18(target: Path) -> Path:
    """ResNet-18 at 224 x 224."""
    import torch
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.resnet18(weights=None).eval()
    return _write(target, module, "resnet18", 224, 1000)


def _write(target: Path, module: Any, name: str, side: int, classes: int) -> Path:
    import torch

    task = ClassificationTask(classes=classes, top_k=min(classes, 5))
    steps = msgspec.structs.replace(preprocess.named("tf", side, side), decode="scaled")
    shape = (1, 3, side, side)
    inputs = (TensorSpec(name="images", dtype="float32", shape=shape, layout="NCHW"),)
    outputs = (TensorSpec(name="scores", dtype="float32", shape=(1, classes), layout="NC"),)
    record = ReferenceRecord(task=task, preprocess=steps, inputs=inputs, outputs=outputs)
    exported = torch.export.export(
        module,
        (torch.zeros(2, *shape[1:]),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    labels = [f"class {number}" for number in range(classes)]
    with atomic_directory(target) as work:
        extra = {REFERENCE_RECORD_NAME: canonical_json(record).decode()}
        torch.export.save(exported, work / "model.pt2", extra_files=extra)
        (work / "labels.txt").write_text("".join(label + "\n" for label in labels))
        manifest = Servable(
            name=name,
            version="1.0.0",
            task=task,
            preprocess=steps,
            labels=Labels(path="labels.txt", count=classes, sha256=labels_digest(labels)),
            model=Reference(path="model.pt2", inputs=inputs, outputs=outputs),
            provenance=Provenance(source="benchmark", weights="random", nearfar="0.1.0", tools={}),
            files=file_entries(work),
        )
        manifest.check()
        (work / SERVABLE_NAME).write_bytes(canonical_json(manifest))
    return target
