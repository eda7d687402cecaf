"""Which operators a model runs, in order, and where an int8 format stores an 8-bit tensor.

The model is run once under a ``TorchFunctionMode``, which sees every torch function that its
modules call, functional ones (``F.relu``, ``+``, ``torch.cat``) included: no tracer has to
understand the model's Python code. What counts is the order of the calls, so the model must
make the same calls every time, as every convertible model does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edge_runtime.contract.errors import SourceError

__all__ = ["NORM_ARGUMENTS", "TRANSPOSED", "WEIGHTED", "Call", "Tape", "argument", "is_tracked",
           "record"]  # fmt: skip

TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "linear"}) | TRANSPOSED
_CLAMPS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
_NORM = "batch_norm"
_COMPUTED = frozenset(
    {
        *("add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"),
        *("mul", "mul_", "__mul__", "__imul__", "__rmul__", "div", "__truediv__"),
        *("cat", "concat", "concatenate", "stack", "mean", "sum", "matmul", "__matmul__", "bmm"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("sigmoid", "hardsigmoid", "tanh", "silu", "hardswish", "gelu", "softmax"),
        *("leaky_relu", "elu", "prelu", "layer_norm", "group_norm", "instance_norm"),
        *("interpolate", "upsample"),
    }
)
_TRACKED = WEIGHTED | _CLAMPS | _COMPUTED | {_NORM}
# Nothing happens here in eval mode: an activation behind one still fuses.
_TRANSPARENT = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous"})

NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training",
                  "momentum", "eps")  # fmt: skip
"""Of ``torch.nn.functional.batch_norm``, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One tracked function call of a forward pass."""

    index: int
    """Its number among the tracked calls, from 0."""
    name: str
    """``conv2d``, ``add``, ..."""
    layer: str | None
    """For a weighted call: the module that owns the weight (``features.0``)."""
    weight: str | None
    """The name of that parameter; None where it is computed."""
    fused_into: int | None
    """The next call, which takes this result alone and becomes part of the same operator."""
    norm: Mapping[str, str | float] | None = None
    """For a batch norm: names of its tensors by argument, and ``eps``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tape:
    """The calls of one forward pass."""

    calls: tuple[Call, ...]

    def stored_at(self, index: int) -> int:
        """The call whose result is the stored output of the operator that ``index`` begins."""
        while (following := self.calls[index].fused_into) is not None:
            index = following
        return index

    @property
    def stored(self) -> tuple[int, ...]:
        """Calls whose results an int8 format stores with a range of their own."""
        return tuple(call.index for call in self.calls if call.fused_into is None)

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules with weights, in the order of their first call."""
        return tuple(dict.fromkeys(call.layer for call in self.calls if call.layer is not None))

    def norm_after(self, index: int) -> Call | None:
        """The batch norm that folds into the weighted call ``index``."""
        following = self.calls[index].fused_into
        if following is not None and self.calls[following].name == _NORM:
            return self.calls[following]
        return None


def is_tracked(function: Callable[..., Any], result: Any) -> str | None:
    """The call's name when it counts: a known function with a float tensor of rank 2 or more."""
    name = getattr(function, "__name__", "")
    if name not in _TRACKED or not isinstance(result, torch.Tensor):
        return None
    return str(name) if result.is_floating_point() and result.dim() >= 2 else None


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """A call's argument, given by position or by name; None when it is left out."""
    return args[position] if len(args) > position else kwargs.get(name)


def record(module: nn.Module, example: torch.Tensor) -> Tape:
    """Run ``module`` (in eval mode) on ``example`` ``[B, ...]`` and write down its calls.

    Raises ``SourceError`` for a model without a convolution or linear layer.
    """
    recorder = _Recorder(module)
    with torch.no_grad(), recorder:
        module(example)
    tape = recorder.tape()
    if not tape.layers:
        raise SourceError(
            "the model calls no convolution or linear layer that torch shows: int8 cannot be "
            "simulated on it"
        )
    return tape


@dataclasses.dataclass
class _Entry:
    name: str
    layer: str | None
    weight: str | None
    norm: dict[str, str | float] | None
    users: list[int | None] = dataclasses.field(default_factory=list)
    """Tracked calls that take the result; None stands for any other function."""


class _Recorder(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {
            id(tensor): name
            for name, tensor in [
                *module.named_buffers(remove_duplicate=False),
                *module.named_parameters(remove_duplicate=False),
            ]
        }
        self.entries: list[_Entry] = []
        self.producer: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # so that no id is given out twice

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        sources = self._sources([*args, *kwargs.values()])
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            # Tensor.shape and the like use nothing; chunk, split and max do.
            if isinstance(result, tuple | list) and any(
                isinstance(part, torch.Tensor) for part in result
            ):
                for source in sources:
                    self.entries[source].users.append(None)
            return result
        self.alive.append(result)
        name = is_tracked(func, result)
        if name is not None:
            index = len(self.entries)
            for source in sources:
                self.entries[source].users.append(index)
            self.entries.append(self._entry(name, args, kwargs))
            self.producer[id(result)] = index
        elif getattr(func, "__name__", "") in _TRANSPARENT and len(sources) == 1:
            self.producer[id(result)] = sources[0]
        else:
            for source in sources:
                self.entries[source].users.append(None)
        return result

    def _sources(self, values: Sequence[Any]) -> list[int]:
        found = []
        for value in values:
            parts = value if isinstance(value, tuple | list) else (value,)
            found += [self.producer[id(part)] for part in parts if id(part) in self.producer]
        return found

    def _entry(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Entry:
        layer = weight = norm = None
        if name in WEIGHTED:
            weight = self.names.get(id(argument(args, kwargs, 1, "weight")))
            layer = weight.rpartition(".")[0] if weight else None
        elif name == _NORM:
            norm = self._norm(args, kwargs)
        return _Entry(name=name, layer=layer, weight=weight, norm=norm)

    def _norm(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str | float]:
        values = {
            name: argument(args, kwargs, position, name)
            for position, name in enumerate(NORM_ARGUMENTS)
        }
        norm: dict[str, str | float] = {
            name: self.names[id(values[name])]
            for name in ("running_mean", "running_var", "weight", "bias")
            if id(values[name]) in self.names
        }
        norm["eps"] = float(values["eps"] if values["eps"] is not None else 1e-5)
        return norm

    def tape(self) -> Tape:
        return Tape(
            calls=tuple(
                Call(
                    index=index,
                    name=entry.name,
                    layer=entry.layer,
                    weight=entry.weight,
                    fused_into=self._fused_into(entry),
                    norm=entry.norm,
                )
                for index, entry in enumerate(self.entries)
            )
        )

    def _fused_into(self, entry: _Entry) -> int | None:
        if len(entry.users) != 1 or entry.users[0] is None:
            return None
        user = self.entries[entry.users[0]].name
        folds = user == _NORM and entry.name in WEIGHTED
        clamps = user in _CLAMPS and entry.name not in _CLAMPS
        return entry.users[0] if folds or clamps else None
