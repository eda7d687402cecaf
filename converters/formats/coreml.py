"""Core ML ML programs (``.mlpackage``), written, calibrated and compressed on Linux.

``--input uint8`` and ``--input image`` both give an image input (RGB or grayscale, 8 bits):
an ML program takes no 8-bit tensors otherwise. With ``image``, a classifier with labels also
answers ``classLabel`` and ``classLabel_probs``, as Vision and Xcode expect; its ``logits``
stay an output, and the runtime reads those, so the task's activation holds as before. The
probabilities carry the task's temperature; a repeated label has its class number behind it.

The weights of every compressed precision are layers' weights; biases, tables and what lies
around the net (normalization, NMS) keep their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from converters.formats.coreml_activations import Range, measure_ranges, quantize_activations
from converters.formats.coreml_half import wide_values
from converters.formats.coreml_package import make_reproducible
from converters.formats.coreml_program import (
    add_classifier,
    name_relu6,
    rebuild,
    with_probabilities,
    write_program,
)
from converters.formats.coreml_weights import compress_weights, weight_key
from converters.formats.inner import fold_inner, inner_module, kept_modules
from converters.jobs import Artifact, ConvertJob
from converters.ready import ready_module
from converters.recipes import find_recipe
from converters.recipes.coreml import deployment_ios
from converters.worker import report_progress
from edge_runtime.contract.manifest import MinOs, Precision
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.runtimes.base import Availability, installed_version
from edge_runtime.runtimes.mil.program import Function, read_function
from edge_runtime.runtimes.mil.schema import import_coremltools

__all__ = ["CoreMLBackend"]

_FLOAT: tuple[Precision, ...] = ("fp32", "fp16")


class CoreMLBackend:
    """iOS 15 to 18, by precision and ``--min-ios``; int8 is W8A8."""

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
        ios = deployment_ios(job.precision, job.min_os)
        recipe = find_recipe("coreml", job.precision)
        coremltools = import_coremltools()
        ready = ready_module(job)
        rewrites = ready.rewrites
        if job.precision == "int8" and name_relu6(ready.module):
            rewrites.append("name_relu6")
        kept: tuple[str, ...] = ()
        grids: Mapping[str, Any] = {}
        sparsity = 0.0
        if job.precision not in _FLOAT:
            if job.rounded is None and fold_inner(ready.module, ready.inputs[0].shape):
                rewrites.insert(0, "fold_batch_norm")
            kept = kept_modules(inner_module(ready.module), job.keep)
            from converters.formats.coreml_choose import choose_weights

            chosen = choose_weights(ready, job, kept)
            grids, sparsity = chosen.grids, chosen.sparsity
            rewrites += chosen.rewrites
        module, labels = ready.module, None
        if (
            job.input_mode == "image"
            and isinstance(job.task, ClassificationTask)
            and job.labels is not None
        ):
            module, labels = with_probabilities(module, job.task), job.labels
            rewrites.append("classifier")
        report_progress("converting to Core ML")
        half = job.precision != "fp32"

        def write(wide: frozenset[str] = frozenset()) -> tuple[Any, Function]:
            model = write_program(
                coremltools,
                ready,
                module,
                ios=ios,
                half=half,
                classifier=labels is not None,
                wide=wide,
            )
            weights_dir = Path(model.weights_dir)
            return model, read_function(model.get_spec(), weights_dir, "the float program")

        model, program = write()
        if half and (wide := wide_values(program, ready)):
            report_progress("converting again: some values are too large for fp16")
            model, program = write(wide)
            rewrites.append("keep_wide_values_fp32")
        if labels is not None or job.precision not in _FLOAT:
            skip = _keys_below(inner_module(ready.module), kept)
            ranges: Mapping[str, Range] | None = None
            if job.precision == "int8":
                ranges = measure_ranges(program, ready)

            def edit(function: Any, description: Any) -> None:
                if ranges is not None:
                    quantize_activations(function, ranges, skip)
                if job.precision not in _FLOAT:
                    compress_weights(
                        function, job.precision, ios=ios, grids=grids, skip=skip, sparsity=sparsity
                    )
                if labels is not None:
                    add_classifier(function, description, labels)

            report_progress("finishing the program")
            model = rebuild(model, edit)
        path = Path(job.out_dir) / "model.mlpackage"
        model.save(str(path))
        make_reproducible(path, job.metadata)
        return Artifact(
            path=path.name,
            inputs=ready.inputs,
            outputs=ready.outputs,
            preprocess=ready.preprocess,
            min_os=MinOs(ios=f"{ios}.0"),
            min_runtime=f"Core ML specification {model.get_spec().specificationVersion}",
            accelerators=recipe.accelerators,
            rewrites=tuple(rewrites),
            kept=kept,
            tools={name: installed_version(name) for name in ("coremltools", "torch")},
        )


def _keys_below(inner: Any, kept: tuple[str, ...]) -> set[str]:
    """Keys of all weights of the modules in ``kept`` and below them."""
    return {
        weight_key(parameter.detach().numpy())
        for name, parameter in inner.named_parameters()
        if parameter.dim() > 1
        and any(name == prefix or name.startswith(f"{prefix}.") for prefix in kept)
    }
