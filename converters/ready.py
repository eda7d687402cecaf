"""The module that a format writer starts from: loaded, rounded, with its ends as asked for."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from converters.baked import baked_record, to_pixel_values
from converters.jobs import ConvertJob
from converters.ranges import MINMAX, RangeMethod
from converters.sources import Source, load_source
from converters.sources.fingerprint import require_same
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["EQUALIZED", "ReadyModule", "ready_module", "rounded_module"]

EQUALIZED = "equalized/"
"""Before the names of factors, beside the weights that ``round_for_int8`` chose."""


@dataclasses.dataclass(kw_only=True)
class ReadyModule:
    """What to convert. Tensors are batch 1, images NCHW: a writer may change the layout."""

    module: Any
    """In eval mode. ``forward(input)`` gives one tensor, or a tuple of them."""
    inputs: tuple[TensorSpec, ...]
    """uint8 when normalization is in the graph."""
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess | None
    """What the file will expect."""
    rewrites: list[str]
    source: Source
    ranges: RangeMethod = MINMAX
    """Of activations, from the calibration inputs."""
    _calibration: NDArray[np.float32] | None = None
    _baked: Preprocess | None = None

    @property
    def example(self) -> Any:
        """A blank input, of the input's dtype."""
        import torch

        spec = self.inputs[0]
        return torch.zeros(spec.shape, dtype=torch.uint8 if spec.dtype == "uint8" else None)

    @property
    def calibration_count(self) -> int:
        """How many calibration inputs there are."""
        return 0 if self._calibration is None else int(self._calibration.shape[0])

    def calibration(self, start: int, stop: int) -> NDArray[np.float32]:
        """Calibration inputs as the module takes them, float32 ``[n, ...]``, NCHW.

        With the normalization in the graph they are pixel values 0..255.
        """
        assert self._calibration is not None  # noqa: S101  # planned so by the recipe
        chosen = np.array(self._calibration[start:stop])
        if self._baked is None:
            return chosen
        return to_pixel_values(self._baked, chosen)


def ready_module(job: ConvertJob) -> ReadyModule:
    """Load the source and apply what every format needs alike.

    In this order: batch norms folded and the chosen int8 weights put in (with
    ``job.rounded``), NMS or argmax appended (``job.in_graph``), normalization baked in
    (``job.input_mode``). Raises the errors of ``load_source``, and ``PrecisionRefused``.
    """
    source = load_source(job.source)
    require_same(source.module, job.fingerprint)
    module = source.module
    rewrites: list[str] = []
    if job.rounded is not None:
        # A .tflite keeps the arithmetic of a layer in float, its weights have 8 bits all the same.
        keep = () if job.format == "tflite" else job.keep
        module, rewrites = rounded_module(source, Path(job.rounded), job.inputs[0].shape[1:], keep)
    inputs, outputs, preprocess = job.inputs, job.outputs, job.preprocess
    if job.in_graph:
        from converters.rewrites.in_graph import append_in_graph

        module, outputs = append_in_graph(module, job.task, job.in_graph, source, outputs)
        rewrites += [f"{name}_in_graph" for name in job.in_graph]
    baked = None
    if job.input_mode != "float":
        if preprocess is None:
            raise PrecisionRefused(f"--input {job.input_mode}: a generator takes no image")
        from converters.rewrites.bake import BakedInput

        module = BakedInput(module, preprocess).eval()
        baked, preprocess = preprocess, baked_record(preprocess)
        inputs = (msgspec.structs.replace(inputs[0], dtype="uint8"),)
        rewrites.append("bake_normalization")
    calibration = np.load(job.calibration, mmap_mode="r") if job.calibration else None
    return ReadyModule(
        module=module,
        inputs=inputs,
        outputs=outputs,
        preprocess=preprocess,
        rewrites=rewrites,
        source=source,
        ranges=job.ranges,
        _calibration=calibration,
        _baked=baked,
    )


def rounded_module(
    source: Source, weights: Path, shape: tuple[int, ...], keep: tuple[str, ...] = ()
) -> tuple[Any, list[str]]:
    """A copy with batch norms folded and the weights that ``round_for_int8`` chose.

    ``shape``: of one input. Layers to keep in floating point have their own weights, of evened
    out channels where the others have them. Also
    the names of the rewrites.
    """
    import torch
    from safetensors.torch import load_file

    from converters.rewrites.equalize import apply_factors
    from converters.rewrites.fold import fold_batch_norm

    module = copy.deepcopy(source.module)
    generator = torch.Generator().manual_seed(0)
    folded = fold_batch_norm(module, torch.rand((2, *shape), generator=generator))
    stored = load_file(str(weights))
    state = {name: value for name, value in stored.items() if not name.startswith(EQUALIZED)}
    factors = {
        name.removeprefix(EQUALIZED): value
        for name, value in stored.items()
        if name.startswith(EQUALIZED)
    }
    apply_factors(module, factors)
    own = module.state_dict()
    for name in state:
        if name.rpartition(".")[0] in keep and name in own:
            state[name] = own[name]
    for name, layer in module.named_modules():  # bias correction may add a bias
        if f"{name}.bias" in state and getattr(layer, "bias", False) is None:
            layer.bias = torch.nn.Parameter(state[f"{name}.bias"], requires_grad=False)
    module.load_state_dict(state, strict=True)
    names = ["round_weights"]
    if factors:
        names.insert(0, "equalize_channels")
    if folded:
        names.insert(0, "fold_batch_norm")
    return module, names
