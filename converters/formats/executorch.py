"""ExecuTorch (``.pte``): what can be on XNNPACK, the rest on ExecuTorch's own kernels.

int8 is static, per-channel weights; quantize and dequantize at the ends are in the graph, so
the file takes and gives what the fp32 file does. Every file written is run at once and
compared with the module it was written from: an engine that computes something else is an
error here, not a surprise on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats.base import unsupported
from converters.jobs import Artifact, ConvertJob
from converters.ready import ReadyModule, ready_module
from converters.recipes import find_recipe
from converters.worker import report_progress
from edge_runtime.contract.errors import ConversionError, NearfarError
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["ExecuTorchBackend"]

_INSTALL = "pip install 'nearfar[convert]'"
ENGINE_FLOOR_DB = 25.0
"""Saved file against the module it was written from, on the same inputs, each output."""
_ENGINE_INPUTS = 4


class ExecuTorchBackend:
    """NCHW in and out, as the reference."""

    format = "executorch"
    suffix = ".pte"

    def availability(self) -> Availability:
        """Whether ExecuTorch and torchao are installed."""
        for package in ("torch", "executorch", "torchao"):
            if find_spec(package) is None:
                return Availability(
                    available=False, reason=f"{package} is not installed", install=_INSTALL
                )
        return Availability(available=True, version=installed_version("executorch"))

    def convert(self, job: ConvertJob) -> Artifact:
        """Write ``model.pte``."""
        import torch
        import torchvision  # noqa: F401  # registers operators, before anything else does

        from converters.formats.executorch_file import read_pte
        from converters.formats.executorch_lower import export_module, lower

        recipe = find_recipe("executorch", job.precision)
        ready = ready_module(job)
        reference: Any = ready.module
        kept: tuple[str, ...] = ()
        try:
            report_progress("exporting")
            program = export_module(ready.module, ready.example)
            if job.precision == "int8":
                from converters.formats.executorch_quantize import quantize

                quantized = quantize(program.module(), ready, job.keep, rounded=bool(job.rounded))
                reference, kept = quantized.module, quantized.kept
                report_progress("exporting")
                program = export_module(reference, ready.example)
            report_progress("lowering to XNNPACK")
            data = lower(program, job.metadata)
        except NearfarError:
            raise
        except Exception as error:  # torch.export, torchao and ExecuTorch raise many types
            raise unsupported("executorch", error) from error
        path = Path(job.out_dir) / "model.pte"
        path.write_bytes(data)
        report_progress("comparing the engine with the module")
        with torch.no_grad():
            check_engine(path, reference, ready)
        file = read_pte(path)
        notes = [f"xnnpack_share={file.delegated_share:.3f}"]
        if file.kernels:
            notes.append("not_on_xnnpack=" + ",".join(sorted(file.kernels)))
        return Artifact(
            path=path.name,
            inputs=ready.inputs,
            outputs=ready.outputs,
            preprocess=ready.preprocess,
            min_os=recipe.min_os,
            min_runtime=f"ExecuTorch {_minor(installed_version('executorch'))}",
            accelerators=recipe.accelerators,
            rewrites=(*ready.rewrites, *notes),
            kept=kept,
            tools={name: installed_version(name) for name in ("torch", "executorch", "torchao")},
        )


def _minor(version: str) -> str:
    """``1.3`` of ``1.3.1``: a file loads in the release that wrote it and in later ones."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def check_engine(path: Path, reference: Any, ready: ReadyModule) -> None:
    """Run the saved file beside ``reference``. Raises ``ConversionError``.

    Inputs are calibration inputs, or random ones of a fixed seed where there are none. Boxes
    after NMS come in another order when two scores tie, and classes of pixels flip: there
    the sorted scores, and the share of equal pixels, are compared.
    """
    from executorch.runtime import Runtime

    try:
        method = Runtime.get().load_program(path).load_method("forward")
    except RuntimeError as error:
        raise ConversionError(
            f"ExecuTorch does not load the file it wrote ({str(error).splitlines()[0]}): an "
            "operator is outside of XNNPACK's limits. Take another precision, keep the layer "
            "in float with --keep, or leave executorch out"
        ) from error
    assert method is not None  # noqa: S101  # load_method raises instead
    inputs, names = _engine_inputs(ready), [spec.name for spec in ready.outputs]
    for value in inputs:
        wanted = reference(value)
        wanted = wanted if isinstance(wanted, tuple | list) else (wanted,)
        try:
            given = [tensor.clone() for tensor in method.execute([value])]
        except RuntimeError as error:
            raise ConversionError(
                f"ExecuTorch does not run the file it wrote ({str(error).splitlines()[0]}): "
                "take another precision, or leave executorch out"
            ) from error
        for name, ours, theirs in zip(names, wanted, given, strict=True):
            distance = _distance(name, names)(ours.detach().numpy(), theirs.numpy())
            if not distance >= ENGINE_FLOOR_DB:
                raise ConversionError(
                    f"output {name!r} of the saved file is {distance:.1f} dB from the module it "
                    f"was written from ({ENGINE_FLOOR_DB:.0f} are asked for): XNNPACK computes "
                    "something else. Take another precision, keep the layer at fault in float "
                    "with --keep, or leave executorch out"
                )


def _engine_inputs(ready: ReadyModule) -> list[Any]:
    import torch

    from converters.formats.executorch_quantize import calibration_input

    count = ready.calibration_count
    if count:
        chosen = np.unique(np.linspace(0, count - 1, min(count, _ENGINE_INPUTS)).astype(int))
        return [calibration_input(ready, int(index)) for index in chosen]
    generator = torch.Generator().manual_seed(0)
    spec = ready.inputs[0]
    if spec.dtype == "uint8":
        return [torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.uint8)]
    return [torch.randn(spec.shape, generator=generator)]


Distance = Callable[[Any, Any], float]


def _distance(name: str, names: list[str]) -> Distance:
    """How to compare one output; the answer is in dB."""
    if names == ["boxes", "scores", "classes"]:
        return _sorted_db if name == "scores" else _same
    return _pixels_db if names == ["classes"] else _db


def _db(wanted: Any, given: Any) -> float:
    """10 log10(sum wanted^2 / sum (wanted - given)^2), capped at 200."""
    wanted, given = wanted.astype(np.float64), given.astype(np.float64)
    noise = float(((wanted - given) ** 2).sum())
    signal = float((wanted**2).sum())
    if not noise:
        return 200.0
    return min(200.0, 10 * math.log10(signal / noise)) if signal and noise == noise else -200.0


def _sorted_db(wanted: Any, given: Any) -> float:
    return _db(np.sort(wanted, axis=None), np.sort(given, axis=None))


def _pixels_db(wanted: Any, given: Any) -> float:
    """Share of pixels with another class, as noise over signal: 25 dB is 0.3 %."""
    share = float((wanted != given).mean())
    return min(200.0, -10 * math.log10(share)) if share else 200.0


def _same(wanted: Any, given: Any) -> float:
    return 200.0 if wanted.shape == given.shape and np.isfinite(given).all() else -200.0
