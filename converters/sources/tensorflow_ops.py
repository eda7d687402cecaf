"""TensorFlow operators, one small rule each, in channels-last order on ATen calls.

Padding "SAME" follows TensorFlow's definition: out = ceil(in / stride), the surplus
max((out - 1) stride + (kernel - 1) dilation + 1 - in, 0) split with the larger half behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from converters.sources.graphs.flat import Flat

__all__ = ["OPERATORS", "Node", "Operator", "Unsupported"]

_aten = torch.ops.aten
_FIRST, _LAST = [0, 3, 1, 2], [0, 2, 3, 1]
Shape = list[int | None]


class Unsupported(Exception):
    """What the graph has that torch cannot be given."""


@dataclasses.dataclass(kw_only=True)
class Node:
    """One TensorFlow operation and what its inputs became."""

    name: str
    flat: Flat
    inputs: list[Any]
    input_shapes: list[Shape | None]
    shapes: list[Shape | None]
    attributes: dict[str, Any]
    constants: list[torch.Tensor | None]
    """Value of each input that is constant."""

    def call(self, target: Any, *args: Any) -> Any:
        """An ATen call."""
        return self.flat.graph.call_function(target, args)

    def constant(self, value: torch.Tensor, role: str) -> Any:
        """A tensor named after this operation's layer."""
        target = f"c{len(self.flat.tensors)}"
        self.flat.tensors[target] = value.detach().contiguous()
        parts = self.name.split("/")
        self.flat.origins[target] = f"{parts[-2] if len(parts) > 1 else parts[-1]}/{role}"
        return self.flat.graph.create_node("get_attr", target)

    def known(self, index: int) -> torch.Tensor:
        """A constant input's value, or ``Unsupported``."""
        value = self.constants[index]
        if value is None:
            raise Unsupported(f"computed weights or axes ({self.name})")
        return value

    def numbers(self, index: int) -> list[int]:
        """A constant integer input as a list."""
        return [int(number) for number in self.known(index).reshape(-1)]

    def sides(self) -> tuple[int, int]:
        """Height and width of the first input."""
        shape = self.input_shapes[0]
        if shape is None or len(shape) != 4 or shape[1] is None or shape[2] is None:
            raise Unsupported(f"images of no known size ({self.name})")
        return shape[1], shape[2]

    def spatial(self, key: str) -> list[int]:
        """The height and width entries of an attribute such as ``strides``."""
        self.channels_last()
        values = list(self.attributes.get(key) or [1, 1, 1, 1])
        return [int(value) for value in values[1:3]]

    def channels_last(self) -> None:
        """Raise ``Unsupported`` for a channels-first operation."""
        if self.attributes.get("data_format", "NHWC") != "NHWC":
            raise Unsupported(f"channels-first data ({self.name})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """How to build one kind of operation."""

    build: Callable[[Node], Any]
    inputs: tuple[int, ...] | None = None
    """Which inputs are tensors to compute; None: all. The others must be constants."""


def _same(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    out = math.ceil(size / stride)
    surplus = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return surplus // 2, surplus - surplus // 2


def _pads(node: Node, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """left, right, top, bottom."""
    padding = node.attributes["padding"]
    if padding == "VALID":
        return [0, 0, 0, 0]
    if padding == "EXPLICIT":
        explicit = [int(value) for value in node.attributes["explicit_paddings"]]
        return [*explicit[4:6], *explicit[2:4]]
    height, width = node.sides()
    top, bottom = _same(height, kernel[0], strides[0], dilations[0])
    left, right = _same(width, kernel[1], strides[1], dilations[1])
    return [left, right, top, bottom]


def _padded(node: Node, pads: list[int], value: float = 0.0) -> tuple[Any, list[int]]:
    """The input, channels first, and the padding that is left to the operator itself."""
    image = node.call(_aten.permute.default, node.inputs[0], _FIRST)
    left, right, top, bottom = pads
    if left == right and top == bottom:
        return image, [top, left]
    return node.call(_aten.constant_pad_nd.default, image, pads, value), [0, 0]


def _back(node: Node, image: Any) -> Any:
    return node.call(_aten.permute.default, image, _LAST)


def _conv(node: Node, kernel: torch.Tensor, groups: int) -> Any:
    """``kernel``: torch's order, [out, in / groups, height, width]."""
    strides, dilations = node.spatial("strides"), node.spatial("dilations")
    size = [int(kernel.shape[2]), int(kernel.shape[3])]
    image, padding = _padded(node, _pads(node, size, strides, dilations))
    weight = node.constant(kernel, "kernel")
    return _back(
        node,
        node.call(_aten.conv2d.default, image, weight, None, strides, padding, dilations, groups),
    )


def _conv2d(node: Node) -> Any:
    kernel = node.known(1).permute(3, 2, 0, 1)
    shape = node.input_shapes[0]
    channels = shape[3] if shape is not None and len(shape) == 4 else None
    return _conv(node, kernel, (channels or kernel.shape[1]) // int(kernel.shape[1]))


def _depthwise(node: Node) -> Any:
    height, width, channels, times = node.known(1).shape
    kernel = node.known(1).permute(2, 3, 0, 1).reshape(channels * times, 1, height, width)
    return _conv(node, kernel, int(channels))


def _transposed(node: Node) -> Any:
    """Conv2DBackpropInput: (output sizes, kernel [h, w, out, in], image)."""
    strides = node.spatial("strides")
    if node.spatial("dilations") != [1, 1]:
        raise Unsupported(f"a dilated transposed convolution ({node.name})")
    kernel = node.known(1).permute(3, 2, 0, 1)
    shape, source = node.shapes[0], node.input_shapes[2]
    if shape is None or source is None or None in (*shape[1:3], *source[1:3]):
        raise Unsupported(f"images of no known size ({node.name})")
    crops, extra = [], []
    for axis in (0, 1):
        full = (int(source[axis + 1] or 0) - 1) * strides[axis] + int(kernel.shape[2 + axis])
        surplus = full - int(shape[axis + 1] or 0)
        crop = max(surplus, 0) // 2 if node.attributes["padding"] == "SAME" else 0
        crops.append(crop)
        extra.append(max(2 * crop - surplus, 0))
    image = node.call(_aten.permute.default, node.inputs[2], _FIRST)
    weight = node.constant(kernel, "kernel")
    answer = node.call(
        _aten.conv_transpose2d.input, image, weight, None, strides, crops, extra, 1, [1, 1]
    )
    for axis in (0, 1):  # an odd surplus leaves one row or column behind
        answer = node.call(_aten.slice.Tensor, answer, 2 + axis, 0, int(shape[axis + 1] or 0))
    return _back(node, answer)


def _batch_norm(node: Node) -> Any:
    node.channels_last()
    if node.attributes.get("is_training"):
        raise Unsupported(f"a batch norm in training mode ({node.name})")
    scale, offset, mean, variance = (node.known(index).float() for index in range(1, 5))
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    values = [
        node.constant(value, role)
        for value, role in zip((scale, offset, mean, variance), names, strict=True)
    ]
    image = node.call(_aten.permute.default, node.inputs[0], _FIRST)
    epsilon = float(node.attributes["epsilon"])
    return _back(
        node,
        node.call(_aten.batch_norm.default, image, *values, False, 0.1, epsilon, False),
    )


def _max_pool(node: Node) -> Any:
    kernel, strides = node.spatial("ksize"), node.spatial("strides")
    image, padding = _padded(node, _pads(node, kernel, strides, [1, 1]), float("-inf"))
    return _back(node, node.call(_aten.max_pool2d.default, image, kernel, strides, padding))


def _avg_pool(node: Node) -> Any:
    """Padding does not count; where it is uneven, a constant map undoes the count."""
    kernel, strides = node.spatial("ksize"), node.spatial("strides")
    pads = _pads(node, kernel, strides, [1, 1])
    image, padding = _padded(node, pads)
    pooled = node.call(
        _aten.avg_pool2d.default, image, kernel, strides, padding, False, False, None
    )
    if any(pads) and padding == [0, 0]:
        ones = torch.nn.functional.pad(torch.ones(1, 1, *node.sides()), pads)
        share = torch.nn.functional.avg_pool2d(ones, kernel, strides)
        pooled = node.call(_aten.mul.Tensor, pooled, node.constant(1.0 / share, "share"))
    return _back(node, pooled)


def _reduce(target: Any) -> Callable[[Node], Any]:
    def build(node: Node) -> Any:
        keep = bool(node.attributes.get("keep_dims"))
        return node.call(target, node.inputs[0], sorted(node.numbers(1)), keep)

    return build


def _unary(target: Any, *args: Any) -> Callable[[Node], Any]:
    return lambda node: node.call(target, node.inputs[0], *args)


def _binary(target: Any) -> Callable[[Node], Any]:
    return lambda node: node.call(target, node.inputs[0], node.inputs[1])


def _bias(node: Node) -> Any:
    node.channels_last()
    return node.call(_aten.add.Tensor, node.inputs[0], node.constant(node.known(1), "bias"))


def _complement(node: Node) -> Any:
    """Erfc x = 1 - erf x."""
    return node.call(_aten.rsub.Scalar, node.call(_aten.erf.default, node.inputs[0]), 1.0)


def _squared_difference(node: Node) -> Any:
    return node.call(_aten.square.default, node.call(_aten.sub.Tensor, *node.inputs))


def _matmul(node: Node) -> Any:
    if node.attributes.get("transpose_a") or node.attributes.get("adj_x"):
        raise Unsupported(f"a transposed matrix product ({node.name})")
    flip = node.attributes.get("transpose_b") or node.attributes.get("adj_y")
    if node.constants[1] is not None:
        matrix = node.constants[1].t() if flip else node.constants[1]
        return node.call(_aten.matmul.default, node.inputs[0], node.constant(matrix, "kernel"))
    if flip:
        raise Unsupported(f"a transposed matrix product ({node.name})")
    return node.call(_aten.matmul.default, *node.inputs)


def _reshape(node: Node) -> Any:
    """By the shape that TensorFlow inferred: only the batch may be open."""
    shape = node.shapes[0]
    if shape is None or None in shape[1:]:
        raise Unsupported(f"a reshape to no known shape ({node.name})")
    first = -1 if shape[0] is None else shape[0]
    return node.call(_aten.reshape.default, node.inputs[0], [first, *shape[1:]])


def _pad(node: Node) -> Any:
    pads = node.numbers(1)
    value = float(node.known(2)) if len(node.inputs) > 2 else 0.0
    pairs = [pads[index : index + 2] for index in range(0, len(pads), 2)]
    flat = [number for pair in reversed(pairs) for number in pair]
    return node.call(_aten.constant_pad_nd.default, node.inputs[0], flat, value)


def _mirror(node: Node) -> Any:
    pads = node.numbers(1)
    if len(pads) != 8 or any(pads[:2]) or any(pads[6:]) or node.attributes["mode"] != "REFLECT":
        raise Unsupported(f"mirror padding of this kind ({node.name})")
    image = node.call(_aten.permute.default, node.inputs[0], _FIRST)
    padded = node.call(_aten.pad.default, image, [*pads[4:6], *pads[2:4]], "reflect")
    return _back(node, padded)


def _concat(node: Node) -> Any:
    return node.call(_aten.cat.default, node.inputs[:-1], node.numbers(len(node.inputs) - 1)[0])


def _resize(mode: str) -> Callable[[Node], Any]:
    def build(node: Node) -> Any:
        size, attributes = node.numbers(1), node.attributes
        whole = all(out % side == 0 for out, side in zip(size, node.sides(), strict=True))
        image = node.call(_aten.permute.default, node.inputs[0], _FIRST)
        if mode == "bilinear":
            if not attributes.get("align_corners") and not attributes.get("half_pixel_centers"):
                raise Unsupported(f"bilinear resizing without half pixels ({node.name})")
            corners = bool(attributes.get("align_corners"))
            answer = node.call(_aten.upsample_bilinear2d.vec, image, size, corners, None)
        elif attributes.get("align_corners") or not (whole or attributes.get("half_pixel_centers")):
            raise Unsupported(f"nearest resizing of this kind ({node.name})")
        elif whole:
            answer = node.call(_aten.upsample_nearest2d.vec, image, size, None)
        else:
            answer = node.call(_aten._upsample_nearest_exact2d.vec, image, size, None)
        return _back(node, answer)

    return build


def _depth_to_space(node: Node) -> Any:
    """Channels are [row, column, depth] here and [depth, row, column] in pixel_shuffle."""
    node.channels_last()
    block, shape = int(node.attributes["block_size"]), node.input_shapes[0]
    if shape is None or shape[3] is None:
        raise Unsupported(f"images of no known size ({node.name})")
    depth = shape[3] // block**2
    order = torch.arange(shape[3]).reshape(block * block, depth).t().reshape(-1)
    image = node.call(_aten.permute.default, node.inputs[0], _FIRST)
    if depth > 1:
        image = node.call(_aten.index_select.default, image, 1, node.constant(order, "order"))
    return _back(node, node.call(_aten.pixel_shuffle.default, image, block))


def _slice(node: Node) -> Any:
    """Plain ranges: no new or dropped axes but by ``shrink_axis_mask``."""
    attributes = node.attributes
    if attributes.get("ellipsis_mask") or attributes.get("new_axis_mask"):
        raise Unsupported(f"a slice of this kind ({node.name})")
    begins, ends, steps = (node.numbers(index) for index in (1, 2, 3))
    value, dropped = node.inputs[0], 0
    for axis, (begin, end, step) in enumerate(zip(begins, ends, steps, strict=True)):
        bit = 1 << axis
        if attributes.get("shrink_axis_mask", 0) & bit:
            value = node.call(_aten.select.int, value, axis - dropped, begin)
            dropped += 1
            continue
        low = None if attributes.get("begin_mask", 0) & bit else begin
        high = None if attributes.get("end_mask", 0) & bit else end
        if step < 1:
            raise Unsupported(f"a slice that runs backwards ({node.name})")
        if (low, high, step) != (None, None, 1):
            value = node.call(_aten.slice.Tensor, value, axis - dropped, low, high, step)
    return value


def _cast(node: Node) -> Any:
    if node.attributes.get("DstT") not in ("float32", "float16", "bfloat16", "float64"):
        raise Unsupported(f"a cast to {node.attributes.get('DstT')} ({node.name})")
    return node.call(_aten.to.dtype, node.inputs[0], torch.float32)


def _leaky(node: Node) -> Any:
    return node.call(_aten.leaky_relu.default, node.inputs[0], float(node.attributes["alpha"]))


def _squeeze(node: Node) -> Any:
    axes = [int(axis) for axis in node.attributes.get("squeeze_dims") or []]
    if not axes:
        raise Unsupported(f"a squeeze without axes ({node.name})")
    return node.call(_aten.squeeze.dims, node.inputs[0], axes)


def _transpose(node: Node) -> Any:
    return node.call(_aten.permute.default, node.inputs[0], node.numbers(1))


def _expand(node: Node) -> Any:
    return node.call(_aten.unsqueeze.default, node.inputs[0], node.numbers(1)[0])


def _first(build: Callable[[Node], Any]) -> Operator:
    return Operator(build=build, inputs=(0,))


def _every(build: Callable[[Node], Any]) -> Operator:
    return Operator(build=build)


OPERATORS: dict[str, Operator] = {
    "Abs": _first(_unary(_aten.abs.default)),
    "Add": _every(_binary(_aten.add.Tensor)),
    "AddV2": _every(_binary(_aten.add.Tensor)),
    "AvgPool": _first(_avg_pool),
    "BatchMatMulV2": _every(_matmul),
    "BiasAdd": _first(_bias),
    "Cast": _first(_cast),
    "ConcatV2": _every(_concat),
    "Conv2D": _first(_conv2d),
    "Conv2DBackpropInput": Operator(build=_transposed, inputs=(2,)),
    "DepthToSpace": _first(_depth_to_space),
    "DepthwiseConv2dNative": _first(_depthwise),
    "Elu": _first(_unary(_aten.elu.default)),
    "Erf": _first(_unary(_aten.erf.default)),
    "Erfc": _first(_complement),
    "Exp": _first(_unary(_aten.exp.default)),
    "ExpandDims": _first(_expand),
    "FusedBatchNormV3": _first(_batch_norm),
    "IdentityN": _every(lambda node: node.inputs),
    "LeakyRelu": _first(_leaky),
    "Log": _first(_unary(_aten.log.default)),
    "MatMul": _every(_matmul),
    "Max": _first(_reduce(_aten.amax.default)),
    "MaxPool": _first(_max_pool),
    "Maximum": _every(_binary(_aten.maximum.default)),
    "Mean": _first(_reduce(_aten.mean.dim)),
    "Min": _first(_reduce(_aten.amin.default)),
    "Minimum": _every(_binary(_aten.minimum.default)),
    "MirrorPad": _first(_mirror),
    "Mul": _every(_binary(_aten.mul.Tensor)),
    "Neg": _first(_unary(_aten.neg.default)),
    "Pad": _first(_pad),
    "PadV2": _first(_pad),
    "Pow": _every(_binary(_aten.pow.Tensor_Tensor)),
    "RealDiv": _every(_binary(_aten.div.Tensor)),
    "Relu": _first(_unary(_aten.relu.default)),
    "Relu6": _first(_unary(_aten.relu6.default)),
    "Reshape": _first(_reshape),
    "ResizeBilinear": _first(_resize("bilinear")),
    "ResizeNearestNeighbor": _first(_resize("nearest")),
    "Rsqrt": _first(_unary(_aten.rsqrt.default)),
    "Selu": _first(_unary(_aten.selu.default)),
    "Sigmoid": _first(_unary(_aten.sigmoid.default)),
    "Softmax": _first(_unary(_aten.softmax.int, -1)),
    "Softplus": _first(_unary(_aten.softplus.default)),
    "Sqrt": _first(_unary(_aten.sqrt.default)),
    "Square": _first(_unary(_aten.square.default)),
    "SquaredDifference": _every(_squared_difference),
    "Squeeze": _first(_squeeze),
    "StridedSlice": _first(_slice),
    "Sub": _every(_binary(_aten.sub.Tensor)),
    "Sum": _first(_reduce(_aten.sum.dim_IntList)),
    "Tanh": _first(_unary(_aten.tanh.default)),
    "Transpose": _first(_transpose),
}
"""By TensorFlow's name."""
