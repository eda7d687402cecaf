"""TensorFlow Lite (``.tflite``) through litert-torch, quantized by ai-edge-quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats.engine_check import compare_with_reference
from converters.formats.inner import fold_inner, inner_module, kept_modules
from converters.formats.tflite_export import channels_last, export_float
from converters.formats.tflite_file import finish
from converters.formats.tflite_quantize import quantize
from converters.jobs import Artifact, ConvertJob
from converters.ready import ReadyModule, ready_module
from converters.recipes import find_recipe
from converters.rewrites.compensate import WIDE
from converters.worker import report_progress
from edge_runtime.contract.errors import ConversionError
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["TFLiteBackend"]

_CHECKED = ("int8", "int8-dyn")
"""XNNPACK has kernels of its own for these."""


class TFLiteBackend:
    """NHWC images; float32, or uint8 pixels, in; float32 out."""

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
        ready = ready_module(job)
        kept = kept_modules(ready.source.module, job.keep)
        data, rewrites, least = _float_file(ready, job)
        if job.precision != "fp32":
            report_progress("quantizing")
            quantized = quantize(
                data,
                job.precision,
                _inputs(ready),
                job.keep,
                post_processed=bool(job.in_graph),
                method=ready.ranges,
                least=least,
            )
            data, kept = quantized.data, quantized.kept
            rewrites += quantized.rewrites
        data = finish(data, ready.inputs[0].name, [s.name for s in ready.outputs], job.metadata)
        path.write_bytes(data)
        if job.precision in _CHECKED and ready.calibration_count:
            _check_engine(path, ready)
        return Artifact(
            path=path.name,
            inputs=tuple(channels_last(spec) for spec in ready.inputs),
            outputs=tuple(channels_last(spec) for spec in ready.outputs),
            preprocess=ready.preprocess,
            min_os=recipe.min_os,
            min_runtime="LiteRT 1.0",
            accelerators=recipe.accelerators,
            rewrites=tuple(rewrites),
            kept=kept,
            tools={
                name: installed_version(name)
                for name in ("litert-torch", "litert-converter", "ai-edge-quantizer")
            },
        )


def _float_file(ready: ReadyModule, job: ConvertJob) -> tuple[bytes, list[str], int]:
    """The float file to start from, what was rewritten on the way, and where int4w begins.

    Batch norms are folded in every precision: quantized, one behind a transposed
    convolution makes a file that the interpreter rejects.
    """
    rewrites = list(ready.rewrites)
    if "fold_batch_norm" not in rewrites and fold_inner(ready.module, job.inputs[0].shape):
        rewrites.insert(0, "fold_batch_norm")
    chosen: tuple[str, ...] = ()
    least = WIDE  # inputs a group
    if job.precision == "int4w":
        from converters.formats.tflite_int4 import choose_int4

        least, chosen = choose_int4(ready, kept_modules(inner_module(ready.module), job.keep))
    rewrites += chosen
    if job.base is not None and job.rounded is None and not chosen:
        return Path(job.base).read_bytes(), rewrites, least
    report_progress("converting to LiteRT")
    return export_float(ready), rewrites, least


def _inputs(ready: ReadyModule) -> Iterator[Any]:
    """Calibration inputs as the file takes them."""
    count = ready.calibration_count
    for index in range(count):
        report_progress("calibrating", index + 1, count)
        yield _input(ready, index)


def _input(ready: ReadyModule, index: int) -> Any:
    spec = ready.inputs[0]
    values = ready.calibration(index, index + 1)
    if spec.layout == "NCHW":
        values = values.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(values, dtype=spec.dtype)


def _check_engine(path: Path, ready: ReadyModule) -> None:
    """XNNPACK against the reference kernels. Raises ``ConversionError``."""
    import torch
    from ai_edge_litert.interpreter import OpResolverType

    report_progress("running the file against reference kernels")

    def exact(index: int) -> list[Any]:
        values = torch.from_numpy(ready.calibration(index, index + 1))
        with torch.no_grad():
            answer = ready.module(values.to(ready.example.dtype))
        parts = answer if isinstance(answer, tuple | list) else (answer,)
        return [
            (part.permute(0, 2, 3, 1) if spec.layout == "NCHW" else part).numpy()
            for part, spec in zip(parts, ready.outputs, strict=True)
        ]

    compare_with_reference(
        "tflite",
        engine=_runner(path, ready, None),
        reference=_runner(path, ready, OpResolverType.BUILTIN_REF),
        exact=exact,
        count=ready.calibration_count,
    )


def _runner(path: Path, ready: ReadyModule, resolver: Any) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    options = {} if resolver is None else {"experimental_op_resolver_type": resolver}
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=1, **options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ConversionError(
            f"tflite: LiteRT rejects the file it was asked to write: {error}. "
            "Leave this precision out of --precision"
        ) from None
    source = interpreter.get_input_details()[0]["index"]
    targets = [detail["index"] for detail in interpreter.get_output_details()]

    def run(index: int) -> list[Any]:
        interpreter.set_tensor(source, _input(ready, index))
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise ConversionError(
                f"tflite: LiteRT cannot run the file it was asked to write: {error}. "
                "Leave the layer out with --keep, or this precision out of --precision"
            ) from None
        return [interpreter.get_tensor(target) for target in targets]

    return run
