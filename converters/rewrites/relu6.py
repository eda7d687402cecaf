"""Clamps as capped ReLUs, so that saturation of uint8 does the clamping.

QNNPACK's clamp permutes a quantized channels-last tensor, which every quantized ReLU6
meets (accuracy .10 instead of .97 on a trained net). A ReLU is right, and fuses into the
convolution before it. When the range of its output ends at the cap, values above saturate
there: scale = cap / 255, zero point 0. So max(0, min(x, cap)) becomes a ReLU that carries
its cap as an attribute; while ranges are being calibrated ``apply_caps`` clamps its output.

Covered: ``ReLU6``, ``Hardtanh`` and their functions, ``clamp`` and ``clip`` as functions
and methods, wherever the lower bound is 0 and both bounds are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from converters.rewrites.fold import check_equal
from converters.rewrites.in_float import hide

__all__ = ["apply_caps", "cap_of", "cap_relus", "is_clamp", "uncap"]

_CAP = "nearfar_cap"
"""Attribute of a ReLU: its cap as a float."""
_PATH = "nearfar_path"

_FUNCTIONS: dict[Callable[..., Any], tuple[str, str, float | None, float | None]] = {
    F.relu6: ("", "", 0.0, 6.0),
    F.hardtanh: ("min_val", "max_val", -1.0, 1.0),
    torch.clamp: ("min", "max", None, None),
    torch.clip: ("min", "max", None, None),
}
_METHODS = ("clamp", "clamp_", "clip", "clip_")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _bounds(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[float | None, float | None]:
    """Lower and upper bound of a clamp; (None, None) for any other node."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return float(module.min_val), float(module.max_val)
        return None, None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        low_name, high_name, low, high = _FUNCTIONS[node.target]
        if not low_name:
            return low, high
    elif node.op == "call_method" and node.target in _METHODS:
        low_name, high_name, low, high = "min", "max", None, None
    else:
        return None, None
    given_low = node.args[1] if len(node.args) > 1 else node.kwargs.get(low_name, low)
    given_high = node.args[2] if len(node.args) > 2 else node.kwargs.get(high_name, high)
    return _number(given_low), _number(given_high)


def cap_relus(traced: fx.GraphModule, example: torch.Tensor) -> int:
    """Rewrite in place every clamp to [0, cap]; returns how many.

    ``example``: an input for the equality check, which runs with the caps applied. Raises
    ``ConversionError`` when the answer changed.
    """
    with torch.no_grad():
        before = _flat(traced(example))
    modules = dict(traced.named_modules())
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    count = 0
    for node in list(traced.graph.nodes):
        low, high = _bounds(node, modules)
        if low != 0.0 or high is None or high <= 0.0:
            continue
        path = str(node.target) if node.op == "call_module" else f"capped_{node.name}"
        if calls.get(path, 0) > 1:  # one module, used several times
            path = f"{path}_{count}"
        relu = nn.ReLU().eval()
        setattr(relu, _CAP, high)
        setattr(relu, _PATH, path)
        traced.add_submodule(path, relu)
        with traced.graph.inserting_before(node):
            new = traced.graph.call_module(path, (node.args[0] if node.args else _input(node),))
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
        count += 1
    if not count:
        return 0
    traced.graph.lint()
    traced.recompile()
    with torch.no_grad(), apply_caps(traced):
        check_equal("cap_relu6", before, _flat(traced(example)), tolerance=1e-6)
    return count


def _input(node: fx.Node) -> Any:
    return node.kwargs["input"]


def _flat(answer: Any) -> torch.Tensor:
    parts = answer if isinstance(answer, tuple | list) else (answer,)
    return torch.cat([part.reshape(-1).float() for part in parts])


def cap_of(module: nn.Module) -> tuple[float, str] | None:
    """The cap on a module's output, its own or that of the ReLU fused into it.

    With the path that ReLU has in the graph that ``cap_relus`` rewrote, for ``uncap``.
    """
    last = module[-1] if isinstance(module, nn.Sequential) and len(module) else module
    cap = getattr(last, _CAP, None)
    return None if cap is None else (float(cap), str(getattr(last, _PATH)))


@contextmanager
def apply_caps(module: nn.Module) -> Iterator[None]:
    """Clamp the output of every capped ReLU below ``module`` for the time of the block."""
    hooks = []
    for child in module.modules():
        cap = getattr(child, _CAP, None)
        if cap is not None:
            hooks.append(child.register_forward_hook(_clamp_to(float(cap))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _clamp_to(cap: float) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.clamp(max=cap)

    return hook


def uncap(traced: fx.GraphModule, path: str) -> None:
    """Put a real clamp, hidden from the quantizer, in the place of the ReLU at ``path``."""
    cap = float(getattr(traced.get_submodule(path), _CAP))
    traced.add_submodule(path, nn.Hardtanh(0.0, cap).eval())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target == path:
            hide(traced, node)


def is_clamp(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``node`` is any clamp at all. ``modules``: those of its graph, by path."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Hardtanh)
    return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)
