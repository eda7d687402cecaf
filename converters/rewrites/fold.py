"""Fold batch normalization into the convolution or linear layer before it.

y = g (W x + b - m) / sqrt(v + e) + h  becomes  W' = W g / sqrt(v + e),
b' = (b - m) g / sqrt(v + e) + h. Quantizers need it: a batch norm left alone keeps a
second, per-channel range, and behind a transposed convolution LiteRT rejects the file.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from edge_runtime.contract.errors import ConversionError

__all__ = ["check_equal", "fold_batch_norm"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


Answer: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


def check_equal(name: str, before: Answer, after: Answer, tolerance: float = 1e-4) -> None:
    """Raise ``ConversionError`` when a rewrite changed the answer.

    Tolerance is relative to the largest magnitude of each output before.
    """
    if not isinstance(before, torch.Tensor):
        for one, other in zip(before, after, strict=True):
            check_equal(name, one, other, tolerance)
        return
    assert isinstance(after, torch.Tensor)  # noqa: S101  # a rewrite keeps the form
    scale = float(before.abs().max()) or 1.0
    error = float((before - after).abs().max()) / scale
    if not error <= tolerance:  # catches NaN
        raise ConversionError(
            f"rewrite {name} changed the model's answer by {error:.2e} of its range: "
            "report this model; the original was not harmed"
        )


def _set_child(root: nn.Module, path: str, child: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent_path), name, child)


def fold_batch_norm(model: nn.Module, example: torch.Tensor) -> int:
    """Fold in place every batch norm whose input is one layer's only use.

    ``example``: one input batch for the equality check. Returns how many were folded; a
    model that ``torch.fx`` cannot trace is left as it is (0).
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # data-dependent control flow raises many types
        return 0
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _NORMS):
            continue
        source = node.args[0]
        if (
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and len(source.users) == 1
            and calls[str(source.target)] == calls[str(node.target)] == 1
            and isinstance(modules[str(source.target)], (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))
            and modules[str(node.target)].track_running_stats
        ):
            pairs.append((str(source.target), str(node.target)))
    if not pairs:
        return 0
    with torch.no_grad():
        before = model(example)
        for layer_path, norm_path in pairs:
            layer, norm = modules[layer_path], modules[norm_path]
            if isinstance(layer, nn.Linear):
                fused: nn.Module = fuse_linear_bn_eval(layer, norm)
            else:
                fused = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))
            _set_child(model, layer_path, fused)
            _set_child(model, norm_path, nn.Identity())
        check_equal("fold_batch_norm", before, model(example))
    return len(pairs)
