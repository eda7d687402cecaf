"""From a module to a ``Flat`` graph, by ``torch.export`` with a dynamic batch axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from converters.sources.graphs.flat import Flat, opname
from edge_runtime.contract import limits
from edge_runtime.contract.errors import SourceError

__all__ = ["capture", "flatten_program"]

_ASSERTIONS = frozenset(
    {
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
_VIEWS = frozenset(
    {"alias", "as_strided", "chunk", "detach", "diagonal", "expand", "flatten", "movedim", "narrow",
     "permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
     "unflatten", "unsqueeze", "view"}
)  # fmt: skip


def capture(module: Any, example: torch.Tensor) -> Flat:
    """``module`` as a graph for any batch size.

    ``example``: a batch of two or more. Raises ``SourceError`` when ``torch.export`` cannot
    follow the model.
    """
    batch = torch.export.Dim("batch", min=1, max=limits.MAX_BATCH)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, (example,), dynamic_shapes=({0: batch},), strict=False
            )
    except Exception as error:  # torch.export raises many types
        raise SourceError(
            "torch.export cannot follow the model with a dynamic batch: "
            f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"
        ) from error
    flat = flatten_program(program)
    known = {
        value.data_ptr(): name
        for name, value in [*module.named_buffers(), *module.named_parameters()]
        if value.numel()
    }
    for name, value in flat.tensors.items():  # Keras hands out its variables without names
        flat.origins[name] = known.get(value.data_ptr(), name)
    return flat


def flatten_program(program: Any) -> Flat:
    """An ``ExportedProgram`` as a graph without side effects.

    Raises ``SourceError`` for more than one input, or control flow in the graph.
    """
    flat = _copy(program)
    if not _functionalize(flat):  # a view is written to: leave that to torch
        flat = _copy(program.run_decompositions({}))
        if not _functionalize(flat):
            raise SourceError("the program writes into views of its tensors: export it anew")
    flat.clean()
    return flat


def _copy(program: Any) -> Flat:
    source = program.module(check_guards=False)
    graph, tensors = fx.Graph(), {}
    copies: dict[fx.Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "output":
            leaves = [copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]
            graph.output(_structure(leaves, program.call_spec.out_spec))
        elif node.op == "placeholder":
            if copies and any(copy.op == "placeholder" for copy in copies.values()):
                raise SourceError("the program takes more than one input: nearfar feeds one image")
            copies[node] = graph.placeholder("image")
        elif node.op == "get_attr":
            value = _attribute(source, str(node.target))
            if not isinstance(value, torch.Tensor):
                raise SourceError(
                    f"the program holds a {type(value).__name__} ({node.target}): control flow "
                    "and custom objects cannot be converted"
                )
            name = str(node.target)
            tensors[name] = value.detach()
            copies[node] = graph.create_node("get_attr", name)
        elif node.op == "call_function":
            if opname(node) in _ASSERTIONS:
                continue
            copies[node] = graph.node_copy(node, lambda old: copies[old])
        else:
            raise SourceError(f"the program calls {node.target}: it cannot be converted")
    return Flat(graph=graph, tensors=tensors, origins={name: name for name in tensors})


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _structure(leaves: list[Any], spec: Any) -> Any:
    """The answer as the model gives it: a tensor, or a tuple, list or dict of tensors."""
    answer = pytree.tree_unflatten(leaves, spec)
    if isinstance(answer, dict):
        return {str(key): value for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return tuple(answer)
    if not isinstance(answer, fx.Node):
        raise SourceError(f"the program answers a {type(answer).__name__}: tensors are needed")
    return answer


def _functionalize(flat: Flat) -> bool:
    """Replace ``relu_`` by ``relu`` and so on; False when a view of a tensor is written to."""
    for node in list(flat.graph.nodes):
        name = opname(node)
        if not name.endswith("_") or name.endswith("__"):
            continue
        target = node.args[0]
        packet = getattr(torch.ops.aten, name[:-1], None)
        overload = getattr(packet, node.target._overloadname or "default", None)
        if (
            overload is None
            or target.op == "placeholder"
            or opname(target) in _VIEWS
            or any(opname(user) in _VIEWS for user in target.users)
        ):
            return False
        new = flat.call(node, overload, *node.args, **node.kwargs)
        new.meta = dict(node.meta)
        later, reached = [], False
        for other in flat.graph.nodes:
            reached = reached or other is node
            if reached and other is not node and other in target.users:
                later.append(other)
        for user in later:
            user.replace_input_with(target, new)
        flat.replace(node, new)
    return True
