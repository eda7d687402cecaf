"""TorchScript for PyTorch Mobile (``.ptl``, lite interpreter).

Two failures that raise no error, both avoided here and both caught by ``verify``:

* ``optimize_for_mobile`` on a trace that is not frozen folds batch norms wrongly;
* QNNPACK's clamp on a channels-last tensor permutes it, which every quantized ReLU6 meets.
  ReLU6 becomes ReLU whose output range ends at 6: saturation of uint8 is the clamp.
"""

from __future__ import annotations

import warnings
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
from edge_runtime.contract.errors import UnsupportedOperator
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["TorchScriptBackend"]

_BATCH = 8


class TorchScriptBackend:
    """Trace, freeze, optimize for mobile; int8 by FX graph mode with the QNNPACK engine."""

    format = "torchscript"
    suffix = ".ptl"

    def availability(self) -> Availability:
        """Whether torch is installed."""
        if find_spec("torch") is None:
            return Availability(
                available=False,
                reason="torch is not installed",
                install="pip install 'nearfar[convert]'",
            )
        return Availability(available=True, version=installed_version("torch"))

    def convert(self, job: ConvertJob) -> Artifact:
        """Write ``model.ptl``."""
        import torch
        from torch.jit.mobile import _get_model_bytecode_version
        from torch.utils.mobile_optimizer import optimize_for_mobile

        recipe = find_recipe("torchscript", job.precision)
        rounded = Path(job.rounded) if job.rounded else None
        module, rewrites = prepared_module(load_source(job.source), rounded)
        example = torch.zeros(job.inputs[0].shape)
        if job.precision == "int8":
            module, more = _quantize(module, example, job)
            rewrites += more
        report_progress("tracing and freezing")
        try:
            with torch.no_grad():
                traced = torch.jit.trace(module, example, check_trace=False)
                frozen = torch.jit.freeze(traced)  # before optimize_for_mobile: see above
                optimized = optimize_for_mobile(frozen)
        except Exception as error:  # the tracer raises many types
            raise unsupported("torchscript", error) from error
        path = Path(job.out_dir) / "model.ptl"
        full = Path(job.out_dir) / "with_debug.ptl"
        optimized._save_for_lite_interpreter(str(full))
        _without_debug_records(full, path)
        return Artifact(
            path=path.name,
            inputs=job.inputs,
            outputs=job.outputs,
            min_os=recipe.min_os,
            min_runtime=f"PyTorch Mobile, bytecode {_get_model_bytecode_version(str(path))}",
            accelerators=recipe.accelerators,
            rewrites=tuple(rewrites),
            tools={"torch": installed_version("torch")},
        )


def _without_debug_records(source: Path, target: Path) -> None:
    """Copy a ``.ptl`` without its stack traces: paths of this machine, no use on a phone."""
    import torch

    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    version = reader.get_record("version")
    writer.set_min_version(int(version))
    own = {"version", "byteorder", ".data/serialization_id"}  # the writer adds these itself
    for name in reader.get_all_records():
        if name not in own and not name.endswith(".debug_pkl"):
            data = reader.get_record(name)
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def _quantize(module: Any, example: Any, job: ConvertJob) -> tuple[Any, list[str]]:
    """Static int8: per-channel symmetric weights, per-tensor min/max activations."""
    import torch
    from torch import nn
    from torch.ao.quantization import QConfig, QConfigMapping
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = "qnnpack"
    capped = _replace_relu6(module)
    module = _without_identities(module)
    weights = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
    activation = MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    per_channel = QConfig(
        activation=activation,
        weight=PerChannelMinMaxObserver.with_args(
            qscheme=torch.per_channel_symmetric, ch_axis=0, **weights
        ),
    )
    per_tensor = QConfig(
        activation=activation,
        weight=MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **weights),
    )
    mapping = QConfigMapping().set_global(per_channel)
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        mapping.set_object_type(kind, per_tensor)  # QNNPACK has no per-channel transposed conv
    prepared = prepare_fx(module.eval(), mapping, (example,))
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: output.clamp(max=6.0))
        for layer in prepared.modules()
        if getattr(layer, "nearfar_cap", None)
        or (isinstance(layer, nn.Sequential) and getattr(layer[-1], "nearfar_cap", None))
    ]
    pixels = calibration_batches(job)
    with torch.no_grad():
        for start in range(0, pixels.shape[0], _BATCH):
            report_progress("calibrating", start, pixels.shape[0])
            prepared(torch.from_numpy(np.array(pixels[start : start + _BATCH])))
    for hook in hooks:
        hook.remove()
    quantized = convert_fx(prepared)
    return quantized, ["cap_relu6"] if capped else []


def _without_identities(module: Any) -> Any:
    """The traced module without ``Identity``, which folded batch norms leave behind.

    One between a convolution and its ReLU would keep them from fusing, and the ReLU6 cap
    from reaching the convolution's output. Raises ``UnsupportedOperator``.
    """
    from torch import fx, nn

    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # torch.fx raises many types on dynamic control flow
        raise UnsupportedOperator(
            "torchscript int8 needs a model that torch.fx can trace: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200]}. "
            "Remove data-dependent control flow, or leave torchscript int8 out"
        ) from error
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _replace_relu6(module: Any) -> int:
    """Put ReLU, marked ``nearfar_cap``, in the place of every ReLU6; returns how many."""
    from torch import nn

    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            is_relu6 = isinstance(child, nn.ReLU6) or (
                isinstance(child, nn.Hardtanh) and (child.min_val, child.max_val) == (0.0, 6.0)
            )
            if is_relu6:
                relu = nn.ReLU()
                relu.nearfar_cap = 6.0
                setattr(parent, name, relu)
                count += 1
    return count
