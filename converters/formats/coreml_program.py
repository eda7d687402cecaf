"""From a torch module to an ML program: ends, deployment target, where fp32 stays."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from converters.formats.base import unsupported
from converters.formats.coreml_gaps import fill_gaps
from converters.formats.coreml_half import is_beside
from converters.ready import ReadyModule
from converters.worker import report_progress
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.coreml import CLASSIFIER_OUTPUTS, package_name

__all__ = [
    "add_classifier",
    "label_names",
    "name_relu6",
    "rebuild",
    "with_probabilities",
    "write_program",
]

_SCORES = "probabilities"
"""The tensor that the classifier's end takes; no output of the file."""


def label_names(labels: Iterable[str]) -> list[str]:
    """Labels as the keys of a dictionary: a repeated one gets its class number behind it.

    ImageNet has two cranes and two maillots.
    """
    listed = list(labels)
    seen: set[str] = set()
    names = []
    for number, label in enumerate(listed):
        name = f"{label} ({number})" if listed.count(label) > 1 else label
        while name in seen:
            name = f"{name} ({number})"
        seen.add(name)
        names.append(name)
    return names


def with_probabilities(module: Any, task: ClassificationTask) -> Any:
    """``module`` with a second answer: probabilities, as a Core ML classifier has to give.

    softmax(z / T) or sigmoid(z / T), with the task's activation and temperature T. The
    logits stay an output of their own.
    """
    import torch
    from torch import nn

    class LabeledScores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, image: Any) -> Any:
            logits = self.model(image)
            scaled = logits if task.temperature == 1.0 else logits / task.temperature
            if task.activation == "softmax":
                return logits, torch.softmax(scaled, dim=-1)
            if task.activation == "sigmoid":
                return logits, torch.sigmoid(scaled)
            return logits, logits + 0.0

    return LabeledScores().eval()


def name_relu6(module: Any) -> int:
    """Make every clamp to [0, 6] reach Core ML as ``relu6``; returns how many there were.

    ``torch.nn.ReLU6`` traces as hardtanh and becomes ``clip``, which Core ML does not take
    for an activation that follows a quantized layer.
    """
    import torch.nn.functional as F
    from torch import nn

    class NamedReLU6(nn.Module):
        def forward(self, x: Any) -> Any:
            return F.relu6(x)

    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6) or (
                isinstance(child, nn.Hardtanh) and (child.min_val, child.max_val) == (0.0, 6.0)
            ):
                setattr(parent, name, NamedReLU6())
                count += 1
    return count


def write_program(
    coremltools: Any,
    ready: ReadyModule,
    module: Any,
    *,
    ios: int,
    half: bool,
    classifier: bool = False,
    wide: frozenset[str] = frozenset(),
) -> Any:
    """An ``MLModel`` that is not loaded, from a trace or else from ``torch.export``.

    ``module``: what to write, in place of ``ready.module``. ``ios``: the deployment target.
    ``half``: compute in fp16, except in what decodes boxes or makes probabilities, and beside
    the values in ``wide`` (see ``wide_values``).
    ``classifier``: ``module`` answers probabilities on top, for ``add_classifier``. The
    trace is twice as fast and gives the same program. Raises ``UnsupportedOperator``.
    """
    import torch

    fill_gaps()
    taken = [spec.name for spec in ready.inputs]
    outputs = [
        coremltools.TensorType(name=package_name(spec.name, taken), dtype=np.dtype(spec.dtype).type)
        for spec in ready.outputs
    ]
    if classifier:
        outputs.append(coremltools.TensorType(name=_SCORES, dtype=np.float32))

    def write(program: Any, float_paths: set[str]) -> Any:
        precision = coremltools.precision.FLOAT32
        if half:
            precision = coremltools.transform.FP16ComputePrecision(
                op_selector=lambda op: not (_stays_float(op, float_paths) or is_beside(op, wide))
            )
        return coremltools.convert(
            program,
            inputs=[_input_type(coremltools, ready.inputs[0])],
            outputs=outputs,
            convert_to="mlprogram",
            compute_precision=precision,
            minimum_deployment_target=getattr(coremltools.target, f"iOS{ios}"),
            skip_model_load=True,
        )

    paths = float_paths(module)
    example = torch.zeros(ready.inputs[0].shape)
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        try:
            return write(torch.jit.trace(module, example, check_trace=False), paths)
        except Exception as error:  # coremltools raises many types
            first = error
        report_progress("converting to Core ML from torch.export")
        try:
            exported = torch.export.export(module, (example,))
            return write(exported.run_decompositions({}), paths)
        except Exception:  # the trace's own failure says more
            raise unsupported("coreml", first) from first


def rebuild(model: Any, edit: Callable[[Any, Any], None]) -> Any:
    """A new model from ``model`` after ``edit(function, description)``.

    ``function``: coremltools' pymil form of ``main``; ``description``: the protobuf one of
    inputs and outputs. Both are to be changed in place.
    """
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, str(model.weights_dir))
    edit(program.functions["main"], spec.description)
    with contextlib.redirect_stderr(io.StringIO()):
        return mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=spec.specificationVersion,
            compute_units=model.compute_unit,
            model_description=spec.description,
            skip_model_load=True,
        )


def add_classifier(function: Any, description: Any, labels: Iterable[str]) -> None:
    """Turn the last output, probabilities, into a label and a dictionary.

    Not through coremltools' ``ClassifierConfig``, which fails for a model that has a
    tensor to answer besides.
    """
    from coremltools.converters.mil.mil import Builder, mil_list

    *tensors, scores = function.outputs
    with function:
        classes = Builder.const(val=mil_list(label_names(labels)))
        label, table = Builder.classify(probabilities=scores, classes=classes)
        label.name, table.name = CLASSIFIER_OUTPUTS
        function.set_outputs([label, table, *tensors])
    kept = [item for item in description.output if item.name != scores.name]
    del description.output[:]
    first, second = description.output.add(), description.output.add()
    first.name, second.name = CLASSIFIER_OUTPUTS
    first.type.stringType.SetInParent()
    second.type.dictionaryType.stringKeyType.SetInParent()
    description.output.extend(kept)
    description.predictedFeatureName, description.predictedProbabilitiesName = CLASSIFIER_OUTPUTS


def _input_type(coremltools: Any, spec: TensorSpec) -> Any:
    if spec.dtype != "uint8":
        return coremltools.TensorType(name=spec.name, shape=spec.shape, dtype=np.float32)
    # Pixels as they are: the module normalizes.
    layout = coremltools.colorlayout
    return coremltools.ImageType(
        name=spec.name,
        shape=spec.shape,
        scale=1.0,
        bias=0.0 if spec.shape[1] == 1 else [0.0, 0.0, 0.0],
        color_layout=layout.GRAYSCALE if spec.shape[1] == 1 else layout.RGB,
    )


def float_paths(module: Any) -> set[str]:
    """Module paths whose own arithmetic (not that of their children) stays in fp32.

    fp16 has 11 bits: box corners would move by half a pixel at 1024, and near-ties of
    overlaps and scores flip.
    """
    from converters.rewrites.in_graph import NmsDetector

    return {
        name
        for name, child in module.named_modules()
        if isinstance(child, NmsDetector) or type(child).__name__ == "LabeledScores"
    }


_FLOAT_FILES = re.compile(r"converters[/\\](rewrites[/\\]in_graph|formats[/\\]coreml_program)\.py")


def _stays_float(op: Any, paths: set[str]) -> bool:
    """Whether a MIL operator comes from one of ``paths`` itself."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    if not paths:
        return False
    names = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME)
    if names:
        return ".".join(names[:-1]) in paths  # the last is the value's own name
    frames = op.scopes.get(ScopeSource.EXIR_STACK_TRACE)
    if frames and frames[-1]:
        innermost = [line for line in str(frames[-1]).splitlines() if "File " in line][-1:]
        return bool(innermost and _FLOAT_FILES.search(innermost[0]))
    return False
