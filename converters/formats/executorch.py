"""ExecuTorch (``.pte``): what can be on XNNPACK, the rest on ExecuTorch's own kernels.

int8 is static, per-channel weights; quantize and dequantize at the ends are in the graph, so
the file takes and gives what the fp32 file does. Every file written is run at once and
compared with the module it was written from: an engine that computes something else is an
error here, not a surprise on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.formats.base import unsupported
from converters.formats.engine_check import compare_with_reference
from converters.formats.inner import fold_inner
from converters.jobs import Artifact, ConvertJob
from converters.ready import ReadyModule, ready_module
from converters.recipes import find_recipe
from converters.worker import report_progress
from edge_runtime.contract.errors import ConversionError, NearfarError
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["ExecuTorchBackend"]

_INSTALL = "pip install 'nearfar[convert]'"
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
        import torchvision  # noqa: F401  # registers operators, before anything else does

        from converters.formats.executorch_file import read_pte
        from converters.formats.executorch_graph import simplify
        from converters.formats.executorch_lower import export_module, lower

        recipe = find_recipe("executorch", job.precision)
        ready = ready_module(job)
        reference: Any = ready.module
        kept: tuple[str, ...] = ()
        try:
            report_progress("exporting")
            if fold_inner(ready.module, ready.inputs[0].shape):
                ready.rewrites.append("fold_batch_norm")
            program = export_module(ready.module, ready.example)
            simplify(program)
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
    """Run the saved file beside ``reference``, the module it was written from.

    Inputs are calibration inputs, or random ones of a fixed seed where there are none.
    Raises ``ConversionError`` when ExecuTorch refuses its own file, or computes something
    else.
    """
    import torch
    from executorch.runtime import Runtime

    inputs = _engine_inputs(ready)
    names = [spec.name for spec in ready.outputs]
    try:
        method = Runtime.get().load_program(path).load_method("forward")
        assert method is not None  # noqa: S101  # load_method raises instead
        given = [[one.clone() for one in method.execute([value])] for value in inputs]
    except RuntimeError as error:
        raise ConversionError(
            f"ExecuTorch refuses the file it wrote ({str(error).splitlines()[0]}): an operator "
            "is outside of XNNPACK's limits. Keep the layer in float with --keep, take "
            "another precision, or leave executorch out of --to"
        ) from error

    def answers(module: Any, index: int) -> list[NDArray[np.generic]]:
        with torch.no_grad():
            answer = module(inputs[index])
        return _comparable(names, answer if isinstance(answer, tuple | list) else [answer])

    compare_with_reference(
        "executorch",
        engine=lambda index: _comparable(names, given[index]),
        reference=lambda index: answers(reference, index),
        exact=lambda index: answers(ready.module, index),
        count=len(inputs),
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


def _comparable(names: list[str], answers: Sequence[Any]) -> list[NDArray[np.generic]]:
    """What can be compared number by number.

    Boxes after NMS come in another order when two scores are close, so there the sorted
    scores count; of a map of classes, each pixel's class as a one among zeros.
    """
    if names == ["boxes", "scores", "classes"]:
        return [np.sort(answers[1].numpy(), axis=None)]
    if names == ["classes"]:
        classes = answers[0].numpy()
        return [classes[..., None] == np.arange(256)]
    return [answer.numpy() for answer in answers]
