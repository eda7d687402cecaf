"""One tiny net for each task: as a bundle with a real .ptl, as a servable with a real .pt2.

Input sides differ (24 x 32), so that a swapped axis cannot pass. The nets have fixed weights;
``reference_outputs`` runs them by torch alone.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_runtime.contract import manifest as manifest_module
from edge_runtime.contract import preprocess
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import (
    MANIFEST_NAME,
    REFERENCE_RECORD_NAME,
    SERVABLE_NAME,
    InputMode,
    Labels,
    Manifest,
    MinOs,
    Provenance,
    Quality,
    Reference,
    ReferenceRecord,
    Servable,
    Variant,
    canonical_json,
    labels_digest,
    variant_digest,
)
from edge_runtime.contract.preprocess import (
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
)
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    ImageToImageTask,
    ReconstructionTask,
    SegmentationTask,
    Task,
    TaskName,
    has_labels,
)
from edge_runtime.contract.tasks.detection import AnchorsRecord
from edge_runtime.contract.tensors import TensorSpec
from tests.support.cache import cached

HEIGHT, WIDTH = 24, 32
LABELS = ("ground", "car", "tree")
LATENT = 6
TASKS: tuple[TaskName, ...] = (
    "classification", "detection", "segmentation", "image_to_image", "generation",
    "reconstruction",
)  # fmt: skip
IMAGE_TASKS: tuple[TaskName, ...] = tuple(name for name in TASKS if name != "generation")
Ending = Literal["", "argmax", "nms", "nhwc"]
"""``argmax`` and ``nms``: the end of segmentation and detection in the graph; ``nhwc``:
images come out with their channels last."""


def anchors() -> np.ndarray:
    """12 boxes of two sizes on a grid over the input, float32 ``[12, 4]``."""
    boxes = []
    for y in (6.0, 18.0):
        for x in (6.0, 16.0, 26.0):
            for half in (5.0, 7.0):
                boxes.append((x - half, y - half, x + half, y + half))
    return np.array(boxes, dtype=np.float32)


def task_of(name: TaskName) -> Task:
    tasks: dict[TaskName, Task] = {
        "classification": ClassificationTask(classes=len(LABELS), top_k=2),
        "detection": DetectionTask(
            classes=len(LABELS),
            activation="sigmoid",
            anchors=AnchorsRecord(path="anchors.f32", count=len(anchors())),
            score_threshold=0.5,
        ),
        "segmentation": SegmentationTask(classes=len(LABELS)),
        "image_to_image": ImageToImageTask(upscale=2),
        "generation": GenerationTask(latent_size=LATENT),
        "reconstruction": ReconstructionTask(latent_size=5),
    }
    return tasks[name]


def preprocess_of(name: TaskName, *, flip: bool = False) -> Preprocess | None:
    """Detection keeps all of the photo; segmentation crops; the rest resizes exactly."""
    if name == "generation":
        return None
    unit = preprocess.NAMED["unit"][1]
    if name == "segmentation":
        return Preprocess(
            resize=ResizeShorterSide(size=40),
            crop=CenterCrop(height=HEIGHT, width=WIDTH),
            flip_horizontal=flip,
            normalization=unit,
        )
    normal = Normalization(scale=127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0))
    return Preprocess(
        resize=ResizeExact(height=HEIGHT, width=WIDTH),
        flip_horizontal=flip,
        normalization=normal if name in ("classification", "detection") else unit,
    )


def input_spec(name: TaskName, mode: InputMode = "float") -> TensorSpec:
    if name == "generation":
        return TensorSpec(name="latent", dtype="float32", shape=(1, LATENT, 1, 1), layout="OTHER")
    return TensorSpec(
        name="image",
        dtype="float32" if mode == "float" else "uint8",
        shape=(1, 3, HEIGHT, WIDTH),
        layout="NCHW",
    )


def _float(name: str, shape: tuple[int, ...], layout: Any = "OTHER") -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape, layout=layout)


def output_specs(name: TaskName, ending: Ending = "") -> tuple[TensorSpec, ...]:
    count, classes = len(anchors()), len(LABELS)
    if ending == "argmax":
        shape = (1, HEIGHT, WIDTH)
        return (TensorSpec(name="classes", dtype="int32", shape=shape, layout="OTHER"),)
    if ending == "nms":
        return (
            _float("boxes", (1, 4, 4)),
            _float("scores", (1, 4)),
            _float("classes", (1, 4)),
        )
    sizes: dict[TaskName, tuple[TensorSpec, ...]] = {
        "classification": (_float("logits", (1, classes), "NC"),),
        "detection": (_float("deltas", (1, count, 4)), _float("logits", (1, count, classes))),
        "segmentation": (_float("scores", (1, classes, HEIGHT, WIDTH), "NCHW"),),
        "image_to_image": (_float("image", (1, 3, 2 * HEIGHT, 2 * WIDTH), "NCHW"),),
        "generation": (_float("image", (1, 3, 16, 20), "NCHW"),),
        "reconstruction": (
            _float("image", (1, 3, HEIGHT, WIDTH), "NCHW"),
            _float("latent", (1, 5), "NC"),
        ),
    }
    specs = sizes[name]
    if ending == "nhwc":
        batch, channels, height, width = specs[0].shape
        last = (batch, height, width, channels)
        return (_float(specs[0].name, last, "NHWC"), *specs[1:])
    return specs


def net(name: TaskName, *, mode: InputMode = "float", ending: Ending = "") -> Any:
    """The task's net: an nn.Module with fixed random weights."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, len(LABELS))

        def forward(self, x: Any) -> Any:
            return 3.0 * self.head(x.mean((2, 3)))

    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Conv2d(3, 8, 5, stride=4, padding=2)
            self.pool = torch.nn.AvgPool2d(2, stride=(3, 2), padding=(0, 0))
            self.heads = torch.nn.Conv2d(8, 2 * (4 + len(LABELS)), 1)

        def forward(self, x: Any) -> Any:
            cells = self.heads(torch.tanh(4.0 * self.pool(self.body(x)))[:, :, :2, :3])
            per_anchor = cells.permute(0, 2, 3, 1).reshape(x.shape[0], 12, 4 + len(LABELS))
            deltas, logits = per_anchor[:, :, :4], 4.0 * per_anchor[:, :, 4:]
            if ending != "nms":
                return deltas, logits
            # Not NMS, but outputs of its form: four anchors as they are, the last suppressed.
            best, index = torch.sigmoid(logits[:, ::3]).max(2)
            keep = torch.tensor([1.0, 1.0, 1.0, 0.0])
            boxes = torch.from_numpy(anchors()[::3])[None] + 0.0 * best[:, :, None]
            order = torch.argsort(best * keep, descending=True)
            return (
                boxes[:, order[0]],
                (best * keep)[:, order[0]],
                index[:, order[0]].float(),
            )

    class Segmenter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = torch.nn.Conv2d(3, len(LABELS), 3, padding=1)

        def forward(self, x: Any) -> Any:
            scores = 8.0 * self.scores(x)
            return scores.argmax(1).to(torch.int32) if ending == "argmax" else scores

    class Upscaler(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            large = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            return 1.0 - large

    class Generator(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(LATENT, 3 * 4 * 5)

        def forward(self, x: Any) -> Any:
            small = torch.tanh(self.body(x.flatten(1))).reshape(-1, 3, 4, 5)
            return torch.nn.functional.interpolate(small, scale_factor=4.0, mode="nearest")

    class Autoencoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Linear(3, 5)
            self.up = torch.nn.Linear(5, 3)

        def forward(self, x: Any) -> Any:
            latent = self.down(x.mean((2, 3)))
            return 0.5 * x + 0.5 * torch.sigmoid(self.up(latent))[:, :, None, None], latent

    class Around(torch.nn.Module):
        """Normalization in front where pixels go in, channels last where wanted."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            if mode != "float":
                record = preprocess_of(name)
                assert record is not None
                x = x.float() / record.normalization.scale - record.normalization.mean[0]
            answer = self.inner(x)
            if ending == "nhwc":
                first, rest = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
                moved = first.permute(0, 2, 3, 1).contiguous()
                return (moved, *rest) if rest else moved
            return answer

    kinds: dict[TaskName, Any] = {
        "classification": Classifier,
        "detection": Detector,
        "segmentation": Segmenter,
        "image_to_image": Upscaler,
        "generation": Generator,
        "reconstruction": Autoencoder,
    }
    with torch.random.fork_rng():
        torch.manual_seed(11)
        inner = kinds[name]().eval()
    return Around(inner).eval()


def reference_outputs(name: TaskName, array: np.ndarray) -> list[np.ndarray]:
    """What the float net gives for an input ``[n, ...]``, by torch alone."""
    import torch

    with torch.inference_mode():
        answer = net(name)(torch.from_numpy(array))
    return [tensor.numpy() for tensor in (answer if isinstance(answer, tuple) else (answer,))]


def reference_pixels(output: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """An image output ``[3, H, W]`` as 8-bit RGB, written out once more."""
    values = np.rint(output.astype(np.float64) * scale + offset)
    return np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _labels(root: Path, task: Task) -> Labels | None:
    if not has_labels(task):
        return None
    (root / "labels.txt").write_text("".join(label + "\n" for label in LABELS))
    return Labels(path="labels.txt", count=len(LABELS), sha256=labels_digest(LABELS))


def _anchors(root: Path, task: Task) -> None:
    if isinstance(task, DetectionTask):
        (root / task.anchors.path).write_bytes(anchors().astype("<f4").tobytes())


@functools.cache
def task_bundle(
    name: TaskName, *, mode: InputMode = "float", ending: Ending = "", flip: bool = False
) -> Path:
    """A bundle with one TorchScript variant, cached by the digest of this file."""
    source = Path(__file__).read_bytes() + Path(str(manifest_module.__file__)).read_bytes()
    source += repr((name, mode, ending, flip)).encode()
    return cached(
        f"task-{hashlib.sha256(source).hexdigest()[:16]}",
        MANIFEST_NAME,
        lambda root: _write_bundle(root, name, mode, ending, flip),
    )


def _write_bundle(root: Path, name: TaskName, mode: InputMode, ending: Ending, flip: bool) -> None:
    import torch

    task, record = task_of(name), preprocess_of(name, flip=flip)
    spec = input_spec(name, mode)
    example = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
    with torch.inference_mode():
        traced = torch.jit.trace(net(name, mode=mode, ending=ending), example)
    traced._save_for_lite_interpreter(str(root / "fp32.ptl"))
    _anchors(root, task)
    labels = _labels(root, task)
    entries = file_entries(root)
    own = [entry for entry in entries if entry.path == "fp32.ptl"]
    variant = Variant(
        id="torchscript-fp32",
        format="torchscript",
        precision="fp32",
        path="fp32.ptl",
        sha256=variant_digest(own),
        size_bytes=own[0].size_bytes,
        inputs=(spec,),
        outputs=output_specs(name, ending),
        preprocess=record,
        input_mode=mode,
        min_os=MinOs(android_api=21, ios="12.0"),
        min_runtime="PyTorch Mobile",
        peak_ram_bytes=own[0].size_bytes,
        accelerators=("cpu",),
        quality=Quality(
            data="golden",
            images=1,
            sqnr_db_mean=200.0,
            sqnr_db_min=200.0,
            max_abs=0.0,
            size_ratio=1.0,
            passed=True,
        ),
    )
    manifest = Manifest(
        name=f"tiny-{name.replace('_', '-')}",
        version="1.0.0",
        task=task,
        preprocess=record,
        labels=labels,
        variants=(variant,),
        provenance=Provenance(
            source="tests/support/tasks.py", weights="random", nearfar="0.1.0", tools={}
        ),
        files=entries,
    )
    manifest.check()
    (root / MANIFEST_NAME).write_bytes(canonical_json(manifest))


@functools.cache
def task_servable(name: TaskName, *, mode: InputMode = "float") -> Path:
    """The same net as a servable, cached likewise."""
    source = Path(__file__).read_bytes() + repr((name, mode)).encode()
    return cached(
        f"task-servable-{hashlib.sha256(source).hexdigest()[:16]}",
        SERVABLE_NAME,
        lambda root: write_task_servable(root, name, mode=mode),
    )


def write_task_servable(
    root: Path, name: TaskName, *, mode: InputMode = "float", module: Any = None
) -> None:
    """Fill an empty folder; ``module``: another net under the same manifest."""
    import torch

    task, record = task_of(name), preprocess_of(name)
    spec = input_spec(name, mode)
    exported = torch.export.export(
        module or net(name, mode=mode),
        (torch.zeros((2, *spec.shape[1:]), dtype=getattr(torch, spec.dtype)),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    inputs, outputs = (spec,), output_specs(name)
    inside = ReferenceRecord(task=task, preprocess=record, inputs=inputs, outputs=outputs)
    extra = {REFERENCE_RECORD_NAME: canonical_json(inside).decode()}
    torch.export.save(exported, root / "model.pt2", extra_files=extra)
    _anchors(root, task)
    manifest = Servable(
        name=f"large-{name.replace('_', '-')}",
        version="1.0.0",
        task=task,
        preprocess=record,
        labels=_labels(root, task),
        model=Reference(path="model.pt2", inputs=inputs, outputs=outputs),
        provenance=Provenance(source="test", weights="random", nearfar="0.1.0", tools={}),
        files=file_entries(root),
    )
    manifest.check()
    (root / SERVABLE_NAME).write_bytes(canonical_json(manifest))


def rewrite_servable(folder: Path, **changes: object) -> None:
    """Change keys of a servable's manifest, unchecked."""
    manifest = msgspec.json.decode((folder / SERVABLE_NAME).read_bytes(), type=Servable)
    (folder / SERVABLE_NAME).write_bytes(
        canonical_json(msgspec.structs.replace(manifest, **changes))
    )
