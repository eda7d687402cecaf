"""Run a float model as an int8 format would: what every format rounds, rounded here.

* Weights: symmetric, one scale for each output channel, largest magnitude = 127 steps (one
  scale for a transposed convolution). Scaling a channel scales its grid, so rounding the
  weight before its batch norm equals rounding the folded weight: the batch norm stays where
  it is and uses its running statistics, as folding does.
* Activations: unsigned 8-bit with a zero point, one range a tensor, from the true minimum
  and maximum over the calibration images; zero is always in the range. They are rounded at
  the model's input and where an operator stores its result: behind the ReLU or ReLU6 that
  follows a layer, not before it, so a ReLU6's range ends at 6.

Rounding passes gradients on unchanged inside the range and stops them outside
(straight-through estimator, Bengio et al., 2013; Jacob et al., CVPR 2018).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from converters.restore.tape import TRANSPOSED, WEIGHTED, Tape, argument, is_tracked, record
from edge_runtime.contract.errors import SourceError

__all__ = ["INPUT", "LEVELS", "QuantizedModel", "fake_quantize_weight", "snap_weights"]

LEVELS = {8: 127, 4: 7}
"""Steps on each side of zero, by bits of a weight."""
INPUT = -1
"""The model's input among the stored tensors."""

_SMALLEST = 1e-12

Range = tuple[float, float]


def fake_quantize_weight(
    weight: torch.Tensor, levels: int = 127, *, per_tensor: bool = False
) -> torch.Tensor:
    """``weight`` ``[outputs, ...]`` on its grid, float32, with straight-through gradients."""
    magnitude = weight.detach().abs()
    if per_tensor:
        scale = (magnitude.amax() / levels).clamp(min=_SMALLEST)
        zero = torch.zeros((), dtype=torch.int32)
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -levels, levels)
    scale = (magnitude.flatten(1).amax(dim=1) / levels).clamp(min=_SMALLEST)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -levels, levels)


def _fake_quantize_activation(values: torch.Tensor, bounds: Range) -> torch.Tensor:
    low, high = min(0.0, bounds[0]), max(0.0, bounds[1])
    scale = max((high - low) / 255.0, _SMALLEST)
    zero = min(255, max(0, round(-low / scale)))
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)


class QuantizedModel:
    """``module`` with rounded weights and, when ``activations``, rounded activations.

    The module itself is not changed: its parameters stay float and get the gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        example: torch.Tensor,
        *,
        bits: int | None = 8,
        activations: bool = True,
    ) -> None:
        """``example``: one input batch; ``bits``: 8 or 4, of the weights; None: as they are.

        Raises ``SourceError`` for a model with nothing to quantize.
        """
        self.module = module
        self.levels = None if bits is None else LEVELS[bits]
        self.activations = activations
        self.tape: Tape = record(module, example)
        self.ranges: dict[int, Range] = {}
        """By call (``INPUT`` for the model's input): lowest and highest value."""

    def measure(self, batches: Iterable[torch.Tensor], *, round_weights: bool = True) -> None:
        """Set the ranges to the true minimum and maximum over ``batches``.

        With the weights rounded, as in the file that calibration will see.
        """
        if not self.activations:
            return
        self.ranges = {}
        mode = _Measuring(self.tape, self.levels if round_weights else None, self.ranges)
        with torch.no_grad():
            for batch in batches:
                mode.widen(INPUT, batch)
                with mode:
                    self.module(batch)

    def __call__(
        self,
        batch: torch.Tensor,
        *,
        only: Collection[str] | None = None,
        keep: Collection[str] = (),
    ) -> Any:
        """The quantized answer to ``batch``.

        ``only``: round nothing but the weights and outputs of these layers; ``keep``: round
        everything but these. Raises ``SourceError`` when the model's calls differ from
        those recorded.
        """
        layers = frozenset(self.tape.layers if only is None else only) - frozenset(keep)
        mode = _Rounding(self.tape, self.levels, self._ranges_for(layers, only is None), layers)
        if only is None and self.activations:
            batch = _fake_quantize_activation(batch, self.ranges[INPUT])
        with mode:
            return self.module(batch)

    def _ranges_for(self, layers: Collection[str], others: bool) -> Mapping[int, Range]:
        """Of the outputs of ``layers``; with ``others`` also of what is no layer's output."""
        owners = {
            self.tape.stored_at(call.index): call.layer
            for call in self.tape.calls
            if call.layer is not None
        }
        return {
            index: bounds
            for index, bounds in self.ranges.items()
            if (owners[index] in layers if index in owners else others)
        }


def snap_weights(model: QuantizedModel) -> int:
    """Replace the module's weights by their rounded values, in place; returns how many.

    From then on rounding changes nothing: every exporter finds the same integers.
    """
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    assert model.levels is not None  # noqa: S101  # there is a grid to snap to
    done: set[str] = set()
    for call in model.tape.calls:
        if call.weight is None or call.weight in done:
            continue
        done.add(call.weight)
        weight = parameters[call.weight]
        weight.data = fake_quantize_weight(
            weight.detach(), model.levels, per_tensor=call.name in TRANSPOSED
        )
    return len(done)


class _Mode(TorchFunctionMode, ABC):
    """Counts tracked calls, rounds weights before them and hands over their results."""

    def __init__(self, tape: Tape, levels: int | None, layers: Collection[str] | None) -> None:
        super().__init__()
        self.tape = tape
        self.levels = levels
        self.layers = layers
        self.next = 0

    def __enter__(self) -> Any:
        self.next = 0
        return super().__enter__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WEIGHTED and self.levels is not None and self._chosen(self.next):
            args, kwargs = self._with_rounded_weight(name, args, kwargs)
        result = func(*args, **kwargs)
        if is_tracked(func, result) is None:
            return result
        index = self.next
        self.next += 1
        if index >= len(self.tape.calls) or self.tape.calls[index].name != name:
            raise SourceError(
                f"the model's call {index} was {name!r} this time: its control flow depends on "
                "the data, and no fixed int8 ranges fit it"
            )
        return self.stored(index, result)

    def _chosen(self, index: int) -> bool:
        if self.layers is None:
            return True
        layer = self.tape.calls[index].layer if index < len(self.tape.calls) else None
        return layer is None or layer in self.layers

    def _with_rounded_weight(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        weight = argument(args, kwargs, 1, "weight")
        assert self.levels is not None  # noqa: S101  # asked by the caller
        rounded = fake_quantize_weight(weight, self.levels, per_tensor=name in TRANSPOSED)
        if len(args) > 1:
            return (args[0], rounded, *args[2:]), kwargs
        return args, {**kwargs, "weight": rounded}

    @abstractmethod
    def stored(self, index: int, result: torch.Tensor) -> torch.Tensor:
        """What the next function gets in the place of ``result``."""


class _Measuring(_Mode):
    def __init__(self, tape: Tape, levels: int | None, ranges: dict[int, Range]) -> None:
        super().__init__(tape, levels, None)
        self.ranges = ranges
        self.points = frozenset(tape.stored)

    def widen(self, index: int, values: torch.Tensor) -> None:
        low, high = (float(value) for value in torch.aminmax(values.detach()))
        before = self.ranges.get(index, (low, high))
        self.ranges[index] = (min(low, before[0]), max(high, before[1]))

    def stored(self, index: int, result: torch.Tensor) -> torch.Tensor:
        if index in self.points:
            self.widen(index, result)
        return result


class _Rounding(_Mode):
    def __init__(
        self,
        tape: Tape,
        levels: int | None,
        ranges: Mapping[int, Range],
        layers: Collection[str] | None,
    ) -> None:
        super().__init__(tape, levels, layers)
        self.ranges = ranges

    def stored(self, index: int, result: torch.Tensor) -> torch.Tensor:
        bounds = self.ranges.get(index)
        return result if bounds is None else _fake_quantize_activation(result, bounds)
