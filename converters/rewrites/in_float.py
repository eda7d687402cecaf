"""Operators that a quantizer must leave alone, hidden from it.

FX graph mode lowers any operator that only moves numbers (a clamp, for one) to its
quantized form where it stands between quantized tensors, whatever its configuration says.
Behind a module of a class it does not know, it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["InFloat", "hide"]


class InFloat(nn.Module):
    """Calls ``operator``, a module or a function, as it is."""

    def __init__(self, operator: Callable[..., Any]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``operator`` answers."""
        return self.operator(*args, **kwargs)


class _Method:
    """A method of the first argument, by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, self.name)(*args, **kwargs)


def hide(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Put the operator of ``node`` behind ``InFloat``, in place; the node that stands for it."""
    if node.op == "call_module":
        target = traced.get_submodule(str(node.target))
    elif node.op == "call_method":
        target = _Method(str(node.target))
    else:
        target = node.target
    path = f"in_float_{node.name}"
    traced.add_submodule(path, InFloat(target).eval())
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(path, node.args, node.kwargs)
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    traced.recompile()
    return new
