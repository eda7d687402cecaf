"""Even out the channels of a tensor before it gets its 8 bits, by moving factors into weights.

An int8 format stores a tensor with one range. A channel that spans a tenth of it is left with
25 of the 255 steps. Factors move through whatever is linear in each channel: s > 0 times a
channel's producer (a row of its weight, and its bias) is undone by 1 / s on what its
consumers take from it (a column). ReLU lets factors through; ReLU6 does so for values that
stay below its cap, as those of the calibration inputs do.

Factors move weights apart in cross-layer equalization (Nagel et al., ICCV 2019, section 4.1);
these formats have a range for each output channel of a weight, and need none. Chosen by
activations, as in SmoothQuant (Xiao et al., ICML 2023), they help. As there the exponent is
one half: with the whole factor every channel reaches the end of the range on the calibration
inputs, and clips on others. MobileNetV2, photos not used, 8-bit activations alone: 23.0 dB
becomes 25.0 with one half and 22.2 with the whole; with the weights 22.4 becomes 24.2.

Tensors that are added share their factors, so a residual stream is evened out as a whole.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from converters.restore.sensitivity import simulated_sqnr_db
from converters.rewrites.fold import check_equal
from edge_runtime.contract.errors import ConversionError

__all__ = ["Factors", "apply_factors", "equalize", "find_factors"]

Factors: TypeAlias = dict[str, torch.Tensor]
"""``NAME.out`` and ``NAME.in`` of a layer to a factor for each of its channels."""

_MAX_ROOM = 64.0
_EXPONENT = 0.5
_LEAST_FACTOR = 1.05
_LEAST_GAIN_DB = 0.5
"""Of the simulated answer: what gains less may lose as much on other inputs."""
_SIMULATED = 16
_BATCH = 8
_LAYERS = (nn.Conv2d, nn.Linear)
_THROUGH_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)  # fmt: skip
_THROUGH: frozenset[Any] = frozenset(
    {
        F.relu, torch.relu, F.relu6, F.dropout, F.max_pool2d, F.avg_pool2d,
        F.adaptive_avg_pool2d, torch.flatten, torch.mean, "mean", "flatten", "relu", "relu_",
        "contiguous",
    }
)  # fmt: skip
_SUMS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


@dataclasses.dataclass
class _Bounds:
    """Smallest and largest value of each channel of one tensor."""

    low: torch.Tensor
    high: torch.Tensor

    def widen(self, value: torch.Tensor) -> None:
        axes = [axis for axis in range(value.dim()) if axis != 1]
        self.low = torch.minimum(self.low, value.amin(axes))
        self.high = torch.maximum(self.high, value.amax(axes))

    def room(self) -> torch.Tensor:
        """By how much each channel may grow before it leaves the tensor's range."""
        room = torch.full_like(self.low, _MAX_ROOM)
        for own, most in ((self.low, self.low.min()), (self.high, self.high.max())):
            growth = torch.where(own != 0.0, most / own, torch.full_like(own, _MAX_ROOM))
            room = torch.minimum(room, growth)
        return room.clamp(1.0, _MAX_ROOM)


class _Groups:
    """Tensors whose channels must share their factors: union-find over graph nodes."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._fixed: set[fx.Node] = set()

    def root(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent.get(node, node)) is not node:
            node = parent
        return node

    def join(self, nodes: Iterable[fx.Node]) -> None:
        first, *rest = [self.root(node) for node in nodes]
        for node in rest:
            if node is not first:
                self._parent[node] = first
                if node in self._fixed:
                    self._fixed.add(first)

    def fix(self, node: fx.Node) -> None:
        """No factors here."""
        self._fixed.add(self.root(node))

    def free(self, node: fx.Node) -> bool:
        return self.root(node) not in self._fixed


def equalize(module: nn.Module, samples: torch.Tensor) -> Factors:
    """Even out the channels of ``module``, in place, where a simulation says that it helps.

    ``module``: in eval mode, batch norms folded. ``samples``: calibration inputs, float32
    ``[N, ...]``. Returns the factors; {} for a module left as it is: nothing would be gained,
    ``torch.fx`` cannot trace it, or a sample's answer would change.
    """
    factors = find_factors(module, samples)
    if not factors:
        return {}
    changed = copy.deepcopy(module)
    apply_factors(changed, factors)
    with torch.no_grad():
        for batch in samples.split(_BATCH):
            try:
                check_equal("equalize_channels", _flat(module(batch)), _flat(changed(batch)))
            except ConversionError:
                return {}
    few = samples[:: max(1, len(samples) // _SIMULATED)][:_SIMULATED]
    before, after = (
        simulated_sqnr_db(one, few, activations_only=True) for one in (module, changed)
    )
    if after < before + _LEAST_GAIN_DB:
        return {}
    apply_factors(module, factors)
    return factors


def apply_factors(module: nn.Module, factors: Mapping[str, torch.Tensor]) -> None:
    """Scale the layers of ``module`` in place by what ``find_factors`` found."""
    for key, factor in factors.items():
        name, _, side = key.rpartition(".")
        layer: Any = module.get_submodule(name)
        weight = layer.weight.data
        shape = [-1, *[1] * (weight.dim() - 1)]
        if side == "out":
            layer.weight.data = weight * factor.reshape(shape)
            if layer.bias is not None:
                layer.bias.data = layer.bias.data * factor
        else:  # a group of a convolution sees its own part of the channels
            groups = getattr(layer, "groups", 1)
            rows = weight.shape[0] // groups
            inverse = (1.0 / factor).reshape(groups, -1).repeat_interleave(rows, dim=0)
            layer.weight.data = weight * inverse.reshape(*inverse.shape, *[1] * (weight.dim() - 2))


def find_factors(module: nn.Module, samples: torch.Tensor) -> Factors:
    """For each layer the factors of the channels it gives and takes; see ``equalize``.

    The square root of what would make a channel as wide as its tensor's range.
    """
    try:
        traced = fx.symbolic_trace(module)
    except Exception:  # data-dependent control flow raises many types
        return {}
    modules = dict(traced.named_modules())
    groups, layers = _group(traced, modules)
    room = _room(traced, samples, groups)
    factors: Factors = {}
    for node in layers:
        name = str(node.target)
        for side, tensor in (("out", node), ("in", node.args[0])):
            assert isinstance(tensor, fx.Node)  # noqa: S101  # _group asked
            found = room.get(groups.root(tensor))
            if found is not None and float(found.max()) > _LEAST_FACTOR:
                factors[f"{name}.{side}"] = found**_EXPONENT
    return factors


def _group(
    traced: fx.GraphModule, modules: Mapping[str, nn.Module]
) -> tuple[_Groups, list[fx.Node]]:
    """Which tensors share factors, and the layers that can take them in."""
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    owners: dict[int, int] = {}
    for other in modules.values():
        for parameter in other.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    groups, layers = _Groups(), []
    for node in traced.graph.nodes:
        sources = list(node.all_input_nodes)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        own = module is not None and all(owners[id(p)] == 1 for p in module.parameters())
        once = own and calls[str(node.target)] == 1
        if type(module) in _LAYERS and once and len(sources) == 1:
            layers.append(node)
        elif len(sources) == 1 and (
            isinstance(module, _THROUGH_MODULES)
            or (node.op in ("call_function", "call_method") and node.target in _THROUGH)
        ):
            groups.join([sources[0], node])
        elif len(sources) == 2 and node.target in _SUMS and not node.kwargs:
            groups.join([*sources, node])
        else:  # placeholders, outputs, and all that mixes channels in other ways
            for other in (*sources, node):
                groups.fix(other)
    return groups, layers


def _room(
    traced: fx.GraphModule, samples: torch.Tensor, groups: _Groups
) -> dict[fx.Node, torch.Tensor]:
    """By group: the growth that leaves every one of its tensors within its range."""
    seen: dict[fx.Node, _Bounds] = {}
    shapes: dict[fx.Node, set[int]] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if not groups.free(n) or not isinstance(value, torch.Tensor):
                return value
            if value.dim() not in (2, 4):
                groups.fix(n)
                return value
            shapes.setdefault(groups.root(n), set()).add(value.shape[1])
            if _is_stored(n):
                if n not in seen:
                    seen[n] = _Bounds(*[torch.zeros(value.shape[1]) for _ in range(2)])
                seen[n].widen(value)
            return value

    with torch.no_grad():
        for batch in samples.split(_BATCH):
            Observer(traced).run(batch)
    room: dict[fx.Node, torch.Tensor] = {}
    for node, bounds in seen.items():
        root = groups.root(node)
        if groups.free(root) and len(shapes[root]) == 1:  # flattening may mix axes
            own = bounds.room()
            room[root] = torch.minimum(room[root], own) if root in room else own
    return room


def _is_stored(node: fx.Node) -> bool:
    """Whether an int8 format gives this tensor a range: not before a ReLU, which fuses."""
    users: list[Any] = list(node.users)
    return not (len(users) == 1 and _name(users[0]) in ("relu", "relu6", "relu_"))


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        owner: Any = node.graph.owning_module
        return type(owner.get_submodule(str(node.target))).__name__.lower()
    return str(getattr(node.target, "__name__", node.target))


def _flat(answer: Any) -> torch.Tensor:
    parts = answer if isinstance(answer, tuple | list) else (answer,)
    return torch.cat([part.reshape(-1).float() for part in parts])
