"""From an exported module to the bytes of a ``.pte``, as much of it as can be on XNNPACK.

Operators that XNNPACK's partitioner leaves to the portable kernels are first written as
those it takes; each rewrite is exact but for the order of float operations:

* instance and group norm: means, differences and a reciprocal square root;
* average pooling that counts padding: padding, then pooling without;
* hard sigmoid: a clamp; the stock decomposition brings integer constants and a copy each;
* attention without a mask: two products and a softmax; the stock decomposition guards
  against rows that are masked altogether.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from converters.formats.executorch_file import METADATA_METHOD

__all__ = ["export_module", "lower"]


def export_module(module: Any, example: Any) -> Any:
    """``torch.export`` with static shapes; an ``ExportedProgram``.

    The module becomes ``net`` of another, so that no weight's name starts with a digit, as
    those of a bare ``Sequential`` do: XNNPACK's folding of batch norms fails on them.
    """
    import torch

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x)

    holder = Holder()
    holder.training = False  # eval() would reach the module, and a converted one refuses it
    with torch.no_grad():
        return torch.export.export(holder, (example,))


def lower(program: Any, metadata: str) -> bytes:
    """The ``.pte`` of an exported program. ``metadata``: JSON that travels inside."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with _shared_provenance():
        edge = to_edge_transform_and_lower(
            program.run_decompositions(_decompositions()),
            partitioner=[XnnpackPartitioner()],
            constant_methods={METADATA_METHOD: metadata},
        )
        return bytes(edge.to_executorch().buffer)


@contextlib.contextmanager
def _shared_provenance() -> Iterator[None]:
    """Spare a fourth of the time: torch copies each node's whole history at every pass.

    The records are never changed once made, so that copies may be the record itself.
    """
    from torch.fx.traceback import NodeSource

    NodeSource.__deepcopy__ = lambda self, _memo: self
    try:
        yield
    finally:
        del NodeSource.__deepcopy__


Decomposition = Callable[..., Any]


def _decompositions() -> dict[Any, Decomposition]:
    """Operator to a function with the operator's own arguments; see the module."""
    import torch

    aten = torch.ops.aten
    return {
        aten.instance_norm.default: _instance_norm,
        aten.group_norm.default: _group_norm,
        aten.avg_pool2d.default: _avg_pool2d,
        aten.hardsigmoid.default: _hardsigmoid,
        aten.scaled_dot_product_attention.default: _attention,
    }


def _normalized(x: Any, eps: float) -> Any:
    """Zero mean and unit variance over the last two of four axes."""
    import torch

    difference = x - x.mean((2, 3), keepdim=True)
    variance = (difference * difference).mean((2, 3), keepdim=True)
    return difference * torch.rsqrt(variance + eps)


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        x = x * weight.reshape(1, -1, 1, 1)
    return x if bias is None else x + bias.reshape(1, -1, 1, 1)


def _instance_norm(
    x: Any, weight: Any, bias: Any, _mean: Any, _var: Any, own: bool, _momentum: Any, eps: float,
    _cudnn: bool,
) -> Any:  # fmt: skip
    if not own or x.dim() != 4:
        return NotImplemented
    return _affine(_normalized(x, eps), weight, bias)


def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if x.dim() != 4:
        return NotImplemented
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, groups, channels // groups * height, width)
    return _affine(_normalized(grouped, eps).reshape(x.shape), weight, bias)


def _avg_pool2d(
    x: Any,
    kernel: list[int],
    stride: list[int] | tuple[()] = (),
    padding: list[int] | int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    import torch

    if ceil_mode or divisor is not None or not count_include_pad:
        return NotImplemented
    pads = [padding] if isinstance(padding, int) else list(padding)
    if any(pads):
        around = [pads[-1], pads[-1], pads[0], pads[0]]
        x = torch.ops.aten.constant_pad_nd.default(x, around, 0.0)
    return torch.ops.aten.avg_pool2d.default(x, kernel, stride, [0, 0], False, False)


def _hardsigmoid(x: Any) -> Any:
    import torch

    return torch.ops.aten.hardtanh.default(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


def _attention(
    query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    import torch

    if mask is not None or dropout or causal or enable_gqa or query.dim() != 4:
        return NotImplemented
    factor = scale if scale is not None else query.shape[-1] ** -0.5
    weights = torch.softmax((query * factor) @ key.transpose(-1, -2), dim=-1)
    # Views that follow rely on the memory order of torch's own kernel: heads innermost.
    return (weights @ value).transpose(1, 2).contiguous().transpose(1, 2)
