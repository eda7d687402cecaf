"""Tiny servables, made with torch.export and the contract's own functions."""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

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

SIZE = 32
LABELS = ("zero", "one", "two", "three", "four")


def tiny_net(seed: int = 0, *, layout: Literal["NCHW", "NHWC"] = "NCHW") -> Any:
    """Two convolutions and a linear layer with fixed random weights, as an nn.Module."""
    import torch

    class TinyNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, stride=2)
            self.second = torch.nn.Conv2d(8, 8, 3, stride=2)
            self.head = torch.nn.Linear(8, len(LABELS))

        def forward(self, images: Any) -> Any:
            if layout == "NHWC":
                images = images.permute(0, 3, 1, 2)
            hidden = torch.relu(self.second(torch.relu(self.first(images))))
            return self.head(hidden.mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet().eval()


def crashing_net() -> Any:
    """``tiny_net``, but an all-black image ends the process with SIGFPE.

    The smallest integer divided by -1 has no value in 32 bits; torch's kernel does not check.
    """
    import torch

    class CrashingNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()

        def forward(self, images: Any) -> Any:
            black = images.amax((1, 2, 3)) <= -1.0
            above = torch.where(black, torch.iinfo(torch.int32).min, 1).to(torch.int32)
            below = torch.where(black, -1, 1).to(torch.int32)
            one = torch.div(above, below, rounding_mode="trunc")
            return self.inner(images) + (one - 1)[:, None].to(torch.float32)

    return CrashingNet().eval()


def failing_net() -> Any:
    """``tiny_net``, but an all-white image makes the model raise: it looks beyond a table."""
    import torch

    class FailingNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()
            self.table = torch.nn.Parameter(torch.zeros(2))

        def forward(self, images: Any) -> Any:
            white = (images.amin((1, 2, 3)) >= 1.0).to(torch.int64) * 100
            return self.inner(images) + torch.gather(self.table, 0, white)[:, None]

    return FailingNet().eval()


def greedy_net() -> Any:
    """``tiny_net``, but one image asks for 1 MiB of memory, two for 256, four for 64 GiB."""
    import torch

    class GreedyNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()

        def forward(self, images: Any) -> Any:
            scores = self.inner(images)
            unused = scores.new_empty((images.shape[0] ** 8, 2**18))
            return scores + 0.0 * unused.shape[0]

    return GreedyNet().eval()


def heavy_net() -> Any:
    """``tiny_net`` with 50 MiB of weights beside it."""
    import torch

    class HeavyNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()
            self.weights = torch.nn.Parameter(torch.zeros(5, 50 * 2**20 // 20))

        def forward(self, images: Any) -> Any:
            return self.inner(images) + self.weights.mean(1)

    return HeavyNet().eval()


def write_servable(
    target: Path,
    module: Any,
    *,
    name: str = "tiny",
    version: str = "1.0.0",
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    dynamic_batch: bool = True,
    record: ReferenceRecord | None = None,
    with_record: bool = True,
) -> Path:
    """Export ``module`` (float32 ``[n, 3, 32, 32]`` or NHWC in) as a servable folder.

    ``record``: put this one inside model.pt2 instead of the one the manifest agrees with.
    """
    import torch

    shape = (1, 3, SIZE, SIZE) if layout == "NCHW" else (1, SIZE, SIZE, 3)
    task = ClassificationTask(classes=len(LABELS), top_k=3)
    steps = preprocess.named("tf", SIZE, SIZE)
    inputs = (TensorSpec(name="images", dtype="float32", shape=shape, layout=layout),)
    outputs = (TensorSpec(name="scores", dtype="float32", shape=(1, len(LABELS)), layout="NC"),)
    true_record = ReferenceRecord(task=task, preprocess=steps, inputs=inputs, outputs=outputs)
    batch = torch.export.Dim("batch", min=1, max=256)
    exported = torch.export.export(
        module,
        (torch.zeros(2 if dynamic_batch else 1, *shape[1:]),),
        dynamic_shapes=({0: batch} if dynamic_batch else None,),
    )
    with atomic_directory(target) as work:
        extra = {REFERENCE_RECORD_NAME: canonical_json(record or true_record).decode()}
        torch.export.save(exported, work / "model.pt2", extra_files=extra if with_record else None)
        (work / "labels.txt").write_text("".join(label + "\n" for label in LABELS))
        manifest = Servable(
            name=name,
            version=version,
            task=task,
            preprocess=steps,
            labels=Labels(path="labels.txt", count=len(LABELS), sha256=labels_digest(LABELS)),
            model=Reference(path="model.pt2", inputs=inputs, outputs=outputs),
            provenance=Provenance(source="test", weights="random", nearfar="0.1.0", tools={}),
            files=file_entries(work),
        )
        manifest.check()
        (work / SERVABLE_NAME).write_bytes(canonical_json(manifest))
    return target


def renamed_servable(source: Path, target: Path, name: str, version: str | None = None) -> Path:
    """A copy of a servable under another name or version, without exporting again."""
    manifest = msgspec.json.decode((source / SERVABLE_NAME).read_bytes(), type=Servable)
    with atomic_directory(target) as work:
        for entry in manifest.files:
            (work / entry.path).write_bytes((source / entry.path).read_bytes())
        (work / SERVABLE_NAME).write_bytes(
            canonical_json(
                msgspec.structs.replace(manifest, name=name, version=version or manifest.version)
            )
        )
    return target


def manifest_sha256(servable: Path) -> str:
    """What an answer must say about the model."""
    return hashlib.sha256((servable / SERVABLE_NAME).read_bytes()).hexdigest()


def direct_scores(module: Any, image: bytes, *, layout: str = "NCHW") -> np.ndarray:
    """Probabilities of one encoded image by torch, without any of the broker."""
    import torch

    from edge_runtime.contract.imaging import decode_image

    pixels = preprocess.apply(preprocess.named("tf", SIZE, SIZE), decode_image(image))
    array = pixels.transpose(2, 0, 1) if layout == "NCHW" else pixels
    with torch.inference_mode():
        logits = module(torch.from_numpy(np.ascontiguousarray(array))[None])
        return torch.softmax(logits.double(), dim=1)[0].numpy()


@functools.cache
def shared_servable(layout: Literal["NCHW", "NHWC"] = "NCHW") -> Path:
    """A tiny servable that all tests of a run share, exported once, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="nearfar-test-servable-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_servable(folder / "tiny", tiny_net(layout=layout), layout=layout)
