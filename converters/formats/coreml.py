"""Core ML ML programs (``.mlpackage``), written and calibrated on Linux.

coremltools calibrates activations by running the model, which only macOS can. Here the
MIL interpreter of ``edge_runtime.runtimes`` runs it, and coremltools' own graph passes
then insert the quantize and dequantize operators.
"""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats.base import unsupported
from converters.formats.coreml_gaps import fill_gaps
from converters.jobs import Artifact, ConvertJob
from converters.ready import ReadyModule, ready_module
from converters.recipes import find_recipe
from converters.worker import report_progress
from edge_runtime.runtimes.base import Availability, installed_version
from edge_runtime.runtimes.mil.program import model_file, read_program, read_spec
from edge_runtime.runtimes.mil.schema import import_coremltools

__all__ = ["CoreMLBackend"]


class CoreMLBackend:
    """iOS 17 ML programs; int8 is W8A8."""

    format = "coreml"
    suffix = ".mlpackage"

    def availability(self) -> Availability:
        """Whether coremltools is installed."""
        for package in ("coremltools", "torch", "torchvision"):
            if find_spec(package) is None:
                return Availability(
                    available=False,
                    reason=f"{package} is not installed",
                    install="pip install 'nearfar[convert]'",
                )
        return Availability(available=True, version=installed_version("coremltools"))

    def convert(self, job: ConvertJob) -> Artifact:
        """Write ``model.mlpackage``."""
        coremltools = import_coremltools()
        recipe = find_recipe("coreml", job.precision)
        ready = ready_module(job)
        module, rewrites = ready.module, ready.rewrites
        if job.precision == "int8" and _name_relu6(module):
            rewrites.append("name_relu6")
        half = job.precision != "fp32"  # quantize's scales must have the type of its input
        report_progress("converting to Core ML")
        model = _to_program(coremltools, module, ready, half=half)
        if job.precision == "int8":
            scratch = Path(job.out_dir) / "calibration.mlpackage"
            model = _quantize(coremltools, model, ready, scratch)
        path = Path(job.out_dir) / "model.mlpackage"
        model.save(str(path))
        make_reproducible(path)
        return Artifact(
            path=path.name,
            inputs=ready.inputs,
            outputs=ready.outputs,
            preprocess=ready.preprocess,
            min_os=recipe.min_os,
            min_runtime=f"Core ML specification {model.get_spec().specificationVersion}",
            accelerators=recipe.accelerators,
            rewrites=tuple(rewrites),
            tools={name: installed_version(name) for name in ("coremltools", "torch")},
        )


def _to_program(coremltools: Any, module: Any, ready: ReadyModule, *, half: bool) -> Any:
    """From a trace, or where coremltools cannot read that, from ``torch.export``.

    The trace is twice as fast and gives the same program.
    """
    import torch

    fill_gaps()
    spec = ready.inputs[0]
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    tensors = coremltools.TensorType(name=spec.name, shape=spec.shape, dtype=np.float32)

    def write(program: Any) -> Any:
        return coremltools.convert(
            program,
            inputs=[tensors],
            outputs=[
                coremltools.TensorType(name=output.name, dtype=np.float32)
                for output in ready.outputs
            ],
            convert_to="mlprogram",
            compute_precision=precision,
            minimum_deployment_target=coremltools.target.iOS17,
            skip_model_load=True,
        )

    example = torch.zeros(spec.shape)
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        try:
            return write(torch.jit.trace(module, example, check_trace=False))
        except Exception:  # coremltools raises many types
            report_progress("converting to Core ML from torch.export")
        try:
            exported = torch.export.export(module, (example,))
            return write(exported.run_decompositions({}))
        except Exception as error:
            raise unsupported("coreml", error) from error


def _name_relu6(module: Any) -> int:
    """Make every ReLU6 reach Core ML as ``relu6``; returns how many there were.

    ``torch.nn.ReLU6`` traces as hardtanh and becomes ``clip``, which coremltools' pass does
    not take for an activation: it would quantize the unclamped range before it, which can
    be 40 times wider (1 dB instead of 22 dB on MobileNetV1).
    """
    import torch.nn.functional as F
    from torch import nn

    class NamedReLU6(nn.Module):
        def forward(self, x: Any) -> Any:
            return F.relu6(x)

    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, NamedReLU6())
                count += 1
    return count


def _quantize(coremltools: Any, model: Any, ready: ReadyModule, scratch: Path) -> Any:
    """W8A8: ranges from the MIL interpreter, operators from coremltools' passes."""
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils as model_utils

    quantization = coremltools.optimize.coreml
    config = quantization.OptimizationConfig(
        global_config=quantization.OpLinearQuantizerConfig(mode="linear", dtype="int8")
    )
    model.save(str(scratch))
    ranges = _activation_ranges(scratch, ready)
    passes = []
    for name in ("insert_prefix", "insert_suffix"):
        graph_pass = PASS_REGISTRY[f"compression::{name}_quantize_dequantize_pair"]
        graph_pass.set_options(
            [PassOption("config", config), PassOption("activation_stats", ranges)]
        )
        passes.append(graph_pass)
    passes.append(PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    report_progress("quantizing activations")
    with contextlib.redirect_stderr(io.StringIO()):
        activations = model_utils._apply_graph_pass(
            model,
            passes,
            spec_version=coremltools._SPECIFICATION_VERSION_IOS_17,
            pymil_load_func=milproto.load,
            skip_model_load=True,
        )
        report_progress("quantizing weights")
        weights = quantization.OptimizationConfig(
            global_config=quantization.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype="int8", weight_threshold=0
            )
        )
        return quantization.linear_quantize_weights(activations, weights)


def _activation_ranges(package: Path, ready: ReadyModule) -> dict[str, dict[str, float]]:
    """Minimum and maximum of every float value over the calibration images."""
    from edge_runtime.runtimes.mil.interpreter import Interpreter

    interpreter = Interpreter(read_program(package))
    ranges: dict[str, dict[str, float]] = {}

    def observe(name: str, value: Any) -> None:
        if not value.is_floating_point():
            return
        low, high = float(value.min()), float(value.max())
        known = ranges.get(name)
        if known is None:
            ranges[name] = {"rmin": low, "rmax": high}
        else:
            known["rmin"] = min(known["rmin"], low)
            known["rmax"] = max(known["rmax"], high)

    count = ready.calibration_count
    for index in range(count):
        report_progress("calibrating", index + 1, count)
        interpreter.run({ready.inputs[0].name: ready.calibration(index, index + 1)}, observe)
    return ranges


def make_reproducible(package: Path) -> None:
    """Take clock and chance out of an ``.mlpackage``: same model, same bytes.

    Map order in the protobuf, the random identifiers of ``Manifest.json`` and the
    conversion date differ from run to run otherwise.
    """
    spec = read_spec(package)
    user = spec.description.metadata.userDefined
    for key in list(user):
        if "date" in key:
            del user[key]
    model_file(package).write_bytes(spec.SerializeToString(deterministic=True))
    model_file(package).chmod(0o644)
    manifest_file = package / "Manifest.json"
    manifest = json.loads(manifest_file.read_text())
    renamed = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper()
        for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {
        renamed[old]: entry for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True))
