"""Real, tiny classification bundles for tests, made without torch or TensorFlow.

The ``.tflite`` files are written with the schema that ships in the ``ai-edge-litert``
wheel, run by its interpreter, and recorded in a real manifest with measured quality.
Bundles are cached under ``build/test-cache`` by the digest of this file
and of the manifest's definition.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_runtime.contract import manifest as manifest_module
from edge_runtime.contract import preprocess
from edge_runtime.contract.files import atomic_directory, file_entries
from edge_runtime.contract.manifest import (
    MANIFEST_NAME,
    REFERENCE_RECORD_NAME,
    SERVABLE_NAME,
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
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec, pack_image
from tests.support.cache import cached

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
SIZE = 32
_POOL = 4
_FEATURES = (SIZE // _POOL) ** 2 * 3


@cache
def tiny_bundle(*, slow_fp32_layers: int = 0, scale: float = 40.0) -> Path:
    """A bundle with tflite variants fp32, fp16 and int8-dyn of one linear classifier.

    ``slow_fp32_layers`` puts so many 64-channel convolutions of no effect into the fp32
    file (about 10 ms each on one core): a model that really is slow. ``scale`` sets how
    sure the model is: its logits are multiplied by it.
    """
    source = Path(__file__).read_bytes() + Path(str(manifest_module.__file__)).read_bytes()
    key = hashlib.sha256(source + repr((slow_fp32_layers, scale)).encode()).hexdigest()[:16]
    return cached(
        f"bundle-{key}", MANIFEST_NAME, lambda root: _write(root, slow_fp32_layers, scale)
    )


@cache
def photo(seed: int = 0, *, width: int = 320, height: int = 240, quality: int = 90) -> bytes:
    """A JPEG of smooth color fields with some texture; another one for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _weights(scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    weights = rng.normal(0, scale / _FEATURES, (len(LABELS), _FEATURES)).astype(np.float32)
    return weights, rng.normal(0, 0.05, len(LABELS)).astype(np.float32)


def _record() -> preprocess.Preprocess:
    return preprocess.named("tf", SIZE, SIZE)


def _write(root: Path, slow_fp32_layers: int, scale: float) -> None:
    (root / "labels.txt").write_text("".join(label + "\n" for label in LABELS), encoding="utf-8")
    for precision in ("fp32", "fp16", "int8-dyn"):
        folder = root / "tflite"
        folder.mkdir(exist_ok=True)
        layers = slow_fp32_layers if precision == "fp32" else 0
        (folder / f"{precision}.tflite").write_bytes(_tflite(precision, scale, layers))
    entries = file_entries(root)
    fp32_bytes = next(e.size_bytes for e in entries if e.path.endswith("fp32.tflite"))
    variants = []
    for precision in ("fp32", "fp16", "int8-dyn"):
        path = f"tflite/{precision}.tflite"
        own = [entry for entry in entries if entry.path == path]
        variants.append(
            Variant(
                id=f"tflite-{precision}",
                format="tflite",
                precision=precision,
                path=path,
                sha256=variant_digest(own),
                size_bytes=own[0].size_bytes,
                inputs=(
                    TensorSpec(
                        name="image", dtype="float32", shape=(1, SIZE, SIZE, 3), layout="NHWC"
                    ),
                ),
                outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 10), layout="NC"),),
                preprocess=_record(),
                min_os=MinOs(android_api=21, ios="12.0"),
                min_runtime="LiteRT 1.0",
                peak_ram_bytes=4 * own[0].size_bytes,
                accelerators=("cpu",),
                quality=_quality(root / path, scale, own[0].size_bytes / fp32_bytes),
            )
        )
    manifest = Manifest(
        name="tiny",
        version="1.0.0",
        task=ClassificationTask(classes=len(LABELS), top_k=3),
        preprocess=_record(),
        labels=Labels(path="labels.txt", count=len(LABELS), sha256=labels_digest(LABELS)),
        variants=tuple(variants),
        provenance=Provenance(
            source="tests/support/bundles.py", weights="random", nearfar="0.1.0", tools={}
        ),
        files=entries,
    )
    manifest.check()
    (root / MANIFEST_NAME).write_bytes(canonical_json(manifest))


def servable(target: Path, *, labels: tuple[str, ...] = LABELS, scale: float = 40.0) -> Path:
    """The same classifier as a servable for the broker (imports torch)."""
    import torch

    weights, bias = _weights(scale)

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(_FEATURES, len(LABELS))
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(weights))
                self.head.bias.copy_(torch.from_numpy(bias))

        def forward(self, images: Any) -> Any:
            pooled = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), _POOL)
            return self.head(pooled.permute(0, 2, 3, 1).flatten(1))

    task = ClassificationTask(classes=len(labels), top_k=3)
    shape = (1, SIZE, SIZE, 3)
    inputs = (TensorSpec(name="image", dtype="float32", shape=shape, layout="NHWC"),)
    outputs = (TensorSpec(name="logits", dtype="float32", shape=(1, len(labels)), layout="NC"),)
    record = ReferenceRecord(task=task, preprocess=_record(), inputs=inputs, outputs=outputs)
    exported = torch.export.export(
        Linear().eval(),
        (torch.zeros(2, *shape[1:]),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    with atomic_directory(target) as root:
        text = canonical_json(record).decode()
        torch.export.save(exported, root / "model.pt2", extra_files={REFERENCE_RECORD_NAME: text})
        (root / "labels.txt").write_text("".join(label + "\n" for label in labels))
        manifest = Servable(
            name="full-size",
            version="1.0.0",
            task=task,
            preprocess=_record(),
            labels=Labels(path="labels.txt", count=len(labels), sha256=labels_digest(labels)),
            model=Reference(path="model.pt2", inputs=inputs, outputs=outputs),
            provenance=Provenance(source="test", weights="random", nearfar="0.1.0", tools={}),
            files=file_entries(root),
        )
        manifest.check()
        (root / SERVABLE_NAME).write_bytes(canonical_json(manifest))
    return target


def reference_logits(rgb: np.ndarray, scale: float = 40.0) -> np.ndarray:
    """What the model means, in plain numpy: float32 ``[10]`` for uint8 RGB of any size."""
    image = preprocess.apply(_record(), rgb)
    side = SIZE // _POOL
    pooled = image.reshape(side, _POOL, side, _POOL, 3).mean(axis=(1, 3)).reshape(-1)
    weights, bias = _weights(scale)
    return np.asarray(weights @ pooled + bias, dtype=np.float32)


def _quality(path: Path, scale: float, size_ratio: float) -> Quality:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    taken = interpreter.get_input_details()[0]["index"]
    given = interpreter.get_output_details()[0]["index"]
    spec = TensorSpec(name="image", dtype="float32", shape=(1, SIZE, SIZE, 3), layout="NHWC")
    decibels, errors, same = [], [], 0
    for seed in range(8):
        rgb = np.asarray(Image.open(io.BytesIO(photo(seed))).convert("RGB"))
        wanted = reference_logits(rgb, scale)
        interpreter.set_tensor(taken, pack_image(preprocess.apply(_record(), rgb), spec))
        interpreter.invoke()
        got = interpreter.get_tensor(given)[0]
        noise = max(float(np.sum((wanted - got) ** 2)), 1e-20)
        decibels.append(min(10 * np.log10(float(np.sum(wanted**2)) / noise), 200.0))
        errors.append(float(np.abs(wanted - got).max()))
        same += int(wanted.argmax() == got.argmax())
    return Quality(
        data="golden",
        images=8,
        sqnr_db_mean=float(np.mean(decibels)),
        sqnr_db_min=float(np.min(decibels)),
        max_abs=max(errors),
        agreement=same / 8,
        size_ratio=size_ratio,
        passed=True,
    )


# Writing a .tflite --------------------------------------------------------------------


class _Graph:
    """Tensors, operators and buffers of one subgraph, as schema objects."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.buffers = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[Any] = []

    def tensor(self, name: str, shape: tuple[int, ...], data: np.ndarray | None = None) -> int:
        schema = self.schema
        kinds = {
            "float32": schema.TensorType.FLOAT32,
            "float16": schema.TensorType.FLOAT16,
            "int32": schema.TensorType.INT32,
            "int8": schema.TensorType.INT8,
        }
        tensor = schema.TensorT()
        tensor.name = name
        tensor.shape = list(shape)
        tensor.type = kinds["float32" if data is None else str(data.dtype)]
        tensor.buffer = 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), dtype=np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def add(
        self,
        name: str,
        inputs: list[int],
        outputs: list[int],
        options: Any = None,
        version: int = 1,
    ) -> None:
        schema = self.schema
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.codes) - 1
        operator.inputs = inputs
        operator.outputs = outputs
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self.operators.append(operator)

    def pack(self, inputs: list[int], outputs: list[int]) -> bytes:
        import flatbuffers

        schema = self.schema
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = inputs, outputs
        model = schema.ModelT()
        model.version = 3
        model.description = "nearfar test model"
        model.operatorCodes, model.subgraphs, model.buffers = self.codes, [graph], self.buffers
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def _tflite(precision: str, scale: float, slow_layers: int) -> bytes:
    """Average pooling, flattening and one fully connected layer."""
    graph = _Graph()
    schema = graph.schema
    image = graph.tensor("image", (1, SIZE, SIZE, 3))
    source = _slow_detour(graph, image, slow_layers) if slow_layers else image
    side = SIZE // _POOL
    pooled = graph.tensor("pooled", (1, side, side, 3))
    pooling = schema.Pool2DOptionsT()
    pooling.padding = schema.Padding.VALID
    pooling.strideH = pooling.strideW = pooling.filterHeight = pooling.filterWidth = _POOL
    graph.add("AVERAGE_POOL_2D", [source], [pooled], pooling)
    shape = graph.tensor("shape", (2,), np.asarray([1, _FEATURES], dtype=np.int32))
    flat = graph.tensor("flat", (1, _FEATURES))
    reshape = schema.ReshapeOptionsT()
    reshape.newShape = [1, _FEATURES]
    graph.add("RESHAPE", [pooled, shape], [flat], reshape)

    weights, bias = _weights(scale)
    version = 1
    if precision == "fp32":
        matrix = graph.tensor("weights", weights.shape, weights)
    elif precision == "fp16":
        half = graph.tensor("weights_half", weights.shape, weights.astype(np.float16))
        matrix = graph.tensor("weights", weights.shape)
        graph.add("DEQUANTIZE", [half], [matrix], schema.DequantizeOptionsT(), version=3)
    else:
        step = float(np.abs(weights).max() / 127)
        matrix = graph.tensor("weights", weights.shape, np.round(weights / step).astype(np.int8))
        quantization = schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = [step], [0]
        graph.tensors[matrix].quantization = quantization
        version = 3
    offset = graph.tensor("bias", bias.shape, bias)
    logits = graph.tensor("logits", (1, len(LABELS)))
    graph.add(
        "FULLY_CONNECTED",
        [flat, matrix, offset],
        [logits],
        schema.FullyConnectedOptionsT(),
        version=version,
    )
    return graph.pack([image], [logits])


def _slow_detour(graph: _Graph, image: int, layers: int) -> int:
    """The image plus zero times a stack of real convolutions on it, 64 channels wide."""
    schema = graph.schema
    channels = 64
    rng = np.random.default_rng(3)

    def convolve(name: str, source: int, wide_in: int, wide_out: int, kernel: np.ndarray) -> int:
        weights = graph.tensor(f"{name}_weights", kernel.shape, kernel)
        zeros = graph.tensor(f"{name}_bias", (wide_out,), np.zeros(wide_out, np.float32))
        out = graph.tensor(name, (1, SIZE, SIZE, wide_out))
        options = schema.Conv2DOptionsT()
        options.padding = schema.Padding.SAME
        options.strideH = options.strideW = 1
        graph.add("CONV_2D", [source, weights, zeros], [out], options)
        return out

    def kernel(wide_out: int, wide_in: int, size: int = 9) -> np.ndarray:
        spread = 1.0 / (size * np.sqrt(wide_in))
        return rng.normal(0, spread, (wide_out, size, size, wide_in)).astype(np.float32)

    current = convolve("widen", image, 3, channels, kernel(channels, 3))
    shared = kernel(channels, channels)
    for layer in range(layers):
        current = convolve(f"layer{layer}", current, channels, channels, shared)
    narrow = convolve("narrow", current, channels, 3, np.zeros((3, 1, 1, channels), np.float32))
    total = graph.tensor("sum", (1, SIZE, SIZE, 3))
    graph.add("ADD", [image, narrow], [total], schema.AddOptionsT())
    return total
