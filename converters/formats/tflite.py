"""TensorFlow Lite (``.tflite``) through litert-torch, quantized by ai-edge-quantizer.

The quantizer's own ``calibrate`` keeps a moving average of the ranges and so clips real
activations (15 dB instead of 30 dB on a trained net); here the ranges are the true minimum
and maximum. Inputs and outputs stay float32, the one type that every target takes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats.base import calibration_batches, unsupported
from converters.jobs import Artifact, ConvertJob
from converters.prepare import prepared_module
from converters.recipes import find_recipe
from converters.sources import load_source
from converters.worker import report_progress
from edge_runtime.contract.errors import ConversionError
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["TFLiteBackend"]


class TFLiteBackend:
    """NHWC in, float32 in and out."""

    format = "tflite"
    suffix = ".tflite"

    def availability(self) -> Availability:
        """Whether litert-torch and ai-edge-quantizer are installed."""
        for package in ("litert_torch", "ai_edge_quantizer"):
            if find_spec(package) is None:
                return Availability(
                    available=False,
                    reason=f"{package} is not installed",
                    install="pip install 'nearfar[convert]'",
                )
        return Availability(available=True, version=installed_version("litert-torch"))

    def convert(self, job: ConvertJob) -> Artifact:
        """Write ``model.tflite``."""
        recipe = find_recipe("tflite", job.precision)
        path = Path(job.out_dir) / "model.tflite"
        rewrites: list[str] = []
        if job.precision == "fp16":
            assert job.base is not None  # noqa: S101  # planned so by the recipe
            path.write_bytes(_to_fp16(Path(job.base)))
        else:
            rounded = Path(job.rounded) if job.rounded else None
            module, rewrites = prepared_module(load_source(job.source), rounded)
            report_progress("converting to LiteRT")
            _write_fp32(module, job.inputs[0].shape, path)
            if job.precision == "int8":
                path.write_bytes(_to_int8(path, job))
        return Artifact(
            path=path.name,
            inputs=(_nhwc(job.inputs[0]),),
            outputs=job.outputs,
            min_os=recipe.min_os,
            min_runtime="LiteRT 1.0",
            accelerators=recipe.accelerators,
            rewrites=tuple(rewrites),
            tools={
                name: installed_version(name)
                for name in ("litert-torch", "litert-converter", "ai-edge-quantizer")
            },
        )


def _nhwc(spec: TensorSpec) -> TensorSpec:
    batch, channels, height, width = spec.shape
    return TensorSpec(
        name=spec.name, dtype="float32", shape=(batch, height, width, channels), layout="NHWC"
    )


def _write_fp32(module: Any, shape: tuple[int, ...], path: Path) -> None:
    import litert_torch
    import torch
    import torchvision  # noqa: F401  # before anything that loads TensorFlow

    batch, channels, height, width = shape
    channel_last = litert_torch.to_channel_last_io(module, args=[0]).eval()
    try:
        with torch.no_grad():
            edge = litert_torch.convert(
                channel_last, (torch.zeros(batch, height, width, channels),)
            )
    except Exception as error:  # litert-torch raises many types
        raise unsupported("tflite", error) from error
    edge.export(str(path))


def _to_fp16(base: Path) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    worker = quantizer.Quantizer(str(base))
    worker.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        algorithm_key=AlgorithmName.FLOAT_CASTING,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(
                num_bits=16, dtype=qtyping.TensorDataType.FLOAT
            ),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
    )
    return _quantized_bytes(worker.quantize(enable_progress_report=False))


def _to_int8(base: Path, job: ConvertJob) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils import qsv_utils

    worker = quantizer.Quantizer(str(base))
    worker.load_quantization_recipe(recipe.static_wi8_ai8())
    for operation in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        worker.update_quantization_recipe(
            regex=".*", operation_name=operation, algorithm_key=AlgorithmName.NO_QUANTIZE
        )
    ranges = Calibrator(str(base), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    pixels = calibration_batches(job)
    name, signature = _signature(base)

    def images() -> Any:
        for index in range(pixels.shape[0]):
            report_progress("calibrating", index + 1, pixels.shape[0])
            nhwc = np.ascontiguousarray(pixels[index].transpose(1, 2, 0))[None]
            yield {signature: nhwc}

    # Calibrator wants the recipe manager, which Quantizer keeps to itself.
    ranges.calibrate({name: list(images())}, worker._recipe_manager)
    return _quantized_bytes(worker.quantize(ranges.get_model_qsvs(), enable_progress_report=False))


def _signature(path: Path) -> tuple[str, str]:
    """Name of the file's only signature, and of its only input."""
    from ai_edge_litert.interpreter import Interpreter

    signatures = Interpreter(model_path=str(path)).get_signature_list()
    name, signature = next(iter(signatures.items()))
    return name, signature["inputs"][0]


def _quantized_bytes(result: Any) -> bytes:
    data = result.quantized_model
    if not data:
        raise ConversionError("ai-edge-quantizer gave no model: report this model")
    return bytes(data)
