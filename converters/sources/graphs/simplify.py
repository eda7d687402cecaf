"""Take out of a graph what changes nothing, and compute what never changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from converters.sources.graphs.flat import Flat, bound, opname

__all__ = ["drop_identities", "fold_constants"]

_COPIES = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh_copy"})
_CASTS = frozenset({"_to_copy", "to", "type_as"})
_SHAPES = frozenset(
    {"_unsafe_view", "expand", "flatten", "reshape", "squeeze", "unsqueeze", "view"}
)
_DROPOUTS = frozenset({"alpha_dropout", "dropout", "feature_dropout", "native_dropout"})
_MAX_FOLDED = 2**27
"""Numbers of one folded tensor."""


def drop_identities(flat: Flat) -> None:
    """Drop copies, casts to the same type, reshapes to the same shape, idle dropouts.

    Needs ``record_shapes``.
    """
    for node in list(flat.graph.nodes):
        name = opname(node)
        if not name or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        same_type = node.meta.get("dtype") == source.meta.get("dtype") is not None
        same_shape = node.meta.get("shape") == source.meta.get("shape")
        idle = (
            name in _COPIES
            or (name in _CASTS and same_type)
            or (name in _SHAPES and same_shape)
            or (name in _DROPOUTS and bound(node).get("train") is False)
            or (name in ("pad", "constant_pad_nd") and not any(bound(node)["pad"]))
            or (name == "slice" and same_shape)
            or (name == "permute" and _identity(node))
        )
        if idle and same_type:
            flat.replace(node, source)
    flat.clean()


def _identity(node: fx.Node) -> bool:
    dims = list(bound(node)["dims"])
    return dims == list(range(len(dims)))


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags


def fold_constants(flat: Flat) -> None:
    """Compute every call whose arguments are all constant, once."""
    known: dict[fx.Node, Any] = {}
    origins: dict[fx.Node, str] = {}
    for node in flat.graph.nodes:
        if node.op == "get_attr":
            known[node] = flat.tensors[str(node.target)]
            origins[node] = flat.origin(node)
            continue
        if node.op != "call_function" or not opname(node) or _random(node):
            continue
        if all(argument in known for argument in node.all_input_nodes):

            def value(old: fx.Node) -> Any:
                return known[old]

            with torch.no_grad():
                result = node.target(
                    *fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value)
                )
            if isinstance(result, torch.Tensor) and result.numel() > _MAX_FOLDED:
                continue
            known[node] = result
            named = [origins[old] for old in node.all_input_nodes if origins.get(old)]
            origins[node] = named[0] if named else ""
    for node in list(flat.graph.nodes):
        if node.op != "call_function" or node not in known:
            continue
        result = known[node]
        if all(user in known for user in node.users):
            continue
        if isinstance(result, torch.Tensor):
            node.replace_all_uses_with(
                flat.add_constant(result, origins[node] or node.name, node),
                delete_user_cb=lambda user: user not in known,
            )
    flat.clean()
