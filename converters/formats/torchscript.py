"""TorchScript for PyTorch Mobile (``.ptl``, lite interpreter).

Failures that raise no error, all avoided here and caught again by ``verify``:

* ``optimize_for_mobile`` on a trace that is not frozen folds batch norms wrongly;
* QNNPACK computes some quantized operators wrongly: see ``converters.formats.fx_quantize``.
  What remains unknown is caught before the file leaves: it is run, and compared with its
  own arithmetic done in float.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from converters.formats.base import unsupported
from converters.formats.engine_check import compare_with_reference
from converters.formats.fx_quantize import Quantized, quantize_dynamic, quantize_static
from converters.formats.inner import kept_modules
from converters.jobs import Artifact, ConvertJob
from converters.ready import ReadyModule, ready_module
from converters.recipes import find_recipe
from converters.worker import report_progress
from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.runtimes.base import Availability, installed_version

__all__ = ["TorchScriptBackend"]

_METADATA = "nearfar.json"


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
        from torch.jit.mobile import _get_model_bytecode_version

        recipe = find_recipe("torchscript", job.precision)
        ready = ready_module(job)
        quantized = _quantize(ready, job)
        path = Path(job.out_dir) / "model.ptl"
        _write(quantized.module, ready.example, job.metadata, path)
        if quantized.reference is not None:
            _check_engine(path, quantized.reference, ready)
        return Artifact(
            path=path.name,
            inputs=ready.inputs,
            outputs=ready.outputs,
            preprocess=ready.preprocess,
            min_os=recipe.min_os,
            min_runtime=f"PyTorch Mobile, bytecode {_get_model_bytecode_version(str(path))}",
            accelerators=recipe.accelerators,
            rewrites=(*ready.rewrites, *quantized.rewrites),
            kept=quantized.kept,
            tools={"torch": installed_version("torch")},
        )


def _quantize(ready: ReadyModule, job: ConvertJob) -> Quantized:
    if job.precision == "int8":
        return quantize_static(ready, job.keep)
    if job.precision == "int8-dyn":
        return quantize_dynamic(ready, job.keep)
    kept = kept_modules(ready.source.module, job.keep)
    return Quantized(module=ready.module, reference=None, rewrites=[], kept=kept)


def _write(module: Any, example: Any, metadata: str, path: Path) -> None:
    import torch
    from torch.utils.mobile_optimizer import optimize_for_mobile

    report_progress("tracing and freezing")
    try:
        with torch.no_grad():
            traced = torch.jit.trace(module, example, check_trace=False)
            frozen = torch.jit.freeze(traced)  # before optimize_for_mobile: see above
            optimized = optimize_for_mobile(frozen)
    except Exception as error:  # the tracer raises many types
        raise unsupported("torchscript", error) from error
    full = path.with_name("with_debug.ptl")
    optimized._save_for_lite_interpreter(str(full), _extra_files={_METADATA: metadata})
    _without_debug_records(full, path)
    full.unlink()


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


def _check_engine(path: Path, reference: Any, ready: ReadyModule) -> None:
    """Run the saved file against ``reference``. Raises ``ConversionError``."""
    import torch
    from torch.jit.mobile import _load_for_lite_interpreter

    report_progress("running the file against its own arithmetic")
    try:
        module = _load_for_lite_interpreter(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"torch cannot load the file it wrote: {reason}") from None

    def runner(model: Any) -> Any:
        def run(index: int) -> list[Any]:
            values = torch.from_numpy(ready.calibration(index, index + 1))
            with torch.no_grad():
                answer = model(values.to(ready.example.dtype))
            parts = answer if isinstance(answer, tuple | list) else (answer,)
            return [part.numpy() for part in parts]

        return run

    compare_with_reference(
        "torchscript",
        engine=runner(module),
        reference=runner(reference),
        exact=runner(ready.module),
        count=ready.calibration_count,
    )
