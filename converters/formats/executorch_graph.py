"""Write an exported graph with the operators that XNNPACK has, before anything is quantized.

Each rewrite keeps the answer:

* ReLU6, and clamps with two bounds, become the one clamp that is fused into a layer;
* a global average pool, or a mean over height and width, becomes a mean that keeps its
  axes, reshaped where they were dropped;
* zeros padded alike on opposite sides before a convolution become the convolution's own;
* whole numbers in float arithmetic become floats: ExecuTorch would store them as int64 and
  convert them at every run;
* what depends on weights alone is computed once, here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["simplify"]


def simplify(program: Any) -> None:
    """Rewrite the graph of an ``ExportedProgram`` in place."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        _name_clamp(node)
        _pool_as_mean(node)
        _keep_axes(graph, node)
        _pad_in_convolution(node)
        _float_scalars(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    constant_prop_pass(program, custom_skip_targets=_not_constant(graph))


def _not_constant(graph: Any) -> set[Any]:
    """Operators to leave although their inputs are constants: random, or they grow the file."""
    import torch

    aten = torch.ops.aten
    random = {
        node.target
        for node in graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    }
    return {aten.full.default, aten.expand.default, aten.repeat.default, *random}


def _float_scalars(node: Any) -> None:
    import torch

    aten = torch.ops.aten
    if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return
    if node.meta["val"].is_floating_point():
        node.args = tuple(float(one) if type(one) is int else one for one in node.args)


def _retarget(node: Any, target: Any, *arguments: Any) -> None:
    """Make ``node`` another operator.

    XNNPACK's quantizer finds pools by the function, or else the class of the innermost
    module, that a node came from: a function named here keeps it from looking further.
    """
    node.target, node.args, node.kwargs = target, arguments, {}
    node.meta["source_fn_stack"] = [(node.name, target)]


def _name_clamp(node: Any) -> None:
    import torch

    aten = torch.ops.aten
    in_place = node.target in (aten.relu6_.default, aten.clamp_.default)
    if in_place and len(node.args[0].users) > 1:
        return  # the tensor that it changes is read elsewhere
    if node.target in (aten.relu6.default, aten.relu6_.default):
        bounds: tuple[Any, ...] = (0.0, 6.0)
    elif node.target in (aten.clamp.default, aten.clamp_.default) and len(node.args) == 3:
        bounds = node.args[1:]
        if any(isinstance(one, bool) or not isinstance(one, int | float) for one in bounds):
            return
        if not node.meta["val"].is_floating_point():
            return
    else:
        return
    _retarget(node, aten.hardtanh.default, node.args[0], float(bounds[0]), float(bounds[1]))


def _pool_as_mean(node: Any) -> None:
    import torch

    if node.target != torch.ops.aten.adaptive_avg_pool2d.default:
        return
    if node.args[0].meta["val"].dim() == 4 and list(node.meta["val"].shape[2:]) == [1, 1]:
        _retarget(node, torch.ops.aten.mean.dim, node.args[0], [2, 3], True)


def _keep_axes(graph: Any, node: Any) -> None:
    """The mean of ``[N, C, H, W]`` over H and W, with its axes; ``[N, C]`` is a view of it."""
    import torch

    if node.target != torch.ops.aten.mean.dim or node.kwargs.get("dtype") is not None:
        return
    value, axes, *rest = node.args
    if value.meta["val"].dim() != 4 or not axes or {axis % 4 for axis in axes} != {2, 3}:
        return
    node.args = (value, [2, 3], True)
    if rest and rest[0]:
        return
    shape = list(node.meta["val"].shape)
    with graph.inserting_after(node):
        view = graph.call_function(torch.ops.aten.view.default, (node, shape))
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
    node.meta = {**node.meta, "val": node.meta["val"].reshape(*shape, 1, 1)}


def _pad_in_convolution(node: Any) -> None:
    import torch

    aten = torch.ops.aten
    pad: Any = node.args[0] if node.args else None
    if node.target != aten.conv2d.default or getattr(pad, "target", None) not in (
        aten.pad.default,
        aten.constant_pad_nd.default,
    ):
        return
    value, sides, *rest = pad.args
    if pad.target == aten.pad.default:
        mode, fill = [*rest, *("constant", None)[len(rest) :]][:2]
        if mode != "constant" or fill:
            return
    elif rest and rest[0]:
        return
    left, right, top, bottom = sides if len(sides) == 4 else (-1, 0, 0, 0)
    own = list(node.args[4]) if len(node.args) > 4 else [0]
    if left < 0 or top < 0 or (left, top) != (right, bottom):
        return
    arguments = [*node.args, *(None, [1, 1], [0, 0])[len(node.args) - 2 :]]
    if len(node.args) < 3:
        arguments = [*node.args, None, [1, 1], [0, 0]]
    arguments[0] = value
    arguments[4] = [own[0] + top, own[-1] + left]
    node.args = tuple(arguments)
