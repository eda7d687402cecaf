"""The form that all passes work on: one ``torch.fx`` graph of ATen calls, and its tensors.

This module imports torch at its top: import it only where a model is built.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

__all__ = ["Flat", "bound", "opname", "record_shapes"]


@dataclasses.dataclass(kw_only=True)
class Flat:
    """One input, ATen calls, one answer (a tensor, or a tuple or dict of them)."""

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    """By the target of their ``get_attr`` node."""
    origins: dict[str, str]
    """Of a tensor: the name of the parameter it was made from; names the layer."""

    def constant(self, node: Any) -> torch.Tensor | None:
        """The tensor behind a ``get_attr`` node; None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.tensors.get(str(node.target))
        return None

    def origin(self, node: fx.Node) -> str:
        """The parameter name behind a ``get_attr`` node."""
        return self.origins.get(str(node.target), str(node.target))

    def add_constant(self, value: torch.Tensor, origin: str, before: fx.Node) -> fx.Node:
        """A new tensor, read by a new node before ``before``."""
        name = f"constant_{len(self.tensors)}"
        while name in self.tensors:
            name += "_"
        self.tensors[name] = value.detach().contiguous()
        self.origins[name] = origin
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        node.meta["shape"] = tuple(value.shape)
        node.meta["dtype"] = value.dtype
        return node

    def call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of ``target`` before ``before``."""
        with self.graph.inserting_before(before):
            return self.graph.call_function(target, args, kwargs)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let every user of ``node`` use ``by``, and drop ``node``."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def clean(self) -> None:
        """Drop nodes and tensors that nothing uses."""
        for node in reversed(list(self.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                self.graph.erase_node(node)
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.tensors = {name: value for name, value in self.tensors.items() if name in used}

    def module(self) -> fx.GraphModule:
        """The graph as a module that computes what the graph says now."""
        root: dict[str, Any] = dict(self.tensors)
        return fx.GraphModule(root, self.graph)


def opname(node: Any) -> str:
    """``conv2d`` of ``torch.ops.aten.conv2d.default``; empty for anything that is no ATen call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._opname)
    return ""


def bound(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by its schema name, defaults filled in."""
    values = {}
    for number, argument in enumerate(node.target._schema.arguments):
        if number < len(node.args):
            values[argument.name] = node.args[number]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


class _ShapeRecorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta = {}
        if isinstance(result, torch.Tensor):
            n.meta = {"shape": tuple(result.shape), "dtype": result.dtype}
        return result


def record_shapes(flat: Flat, example: torch.Tensor) -> Any:
    """Run ``flat`` on ``example``; every node then has ``meta["shape"]`` and ``["dtype"]``.

    Returns the answer.
    """
    with torch.no_grad():
        return _ShapeRecorder(flat.module()).run(example)
