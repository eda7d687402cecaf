"""The meaning of each MIL operator, in torch.

Each function takes the operator's inputs by name, as torch tensors (data), or Python and
numpy values (constants), and returns one tensor or a tuple. Source of the semantics: the
operator reference in ``coremltools.converters.mil.mil.ops.defs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["OPERATORS"]

Operator = Callable[[dict[str, Any]], Any]
Inputs = dict[str, Any]
OPERATORS: dict[str, Operator] = {}


def _operator(*names: str) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        for name in names:
            if name in OPERATORS:
                raise RuntimeError(f"MIL operator {name} is defined twice")
            OPERATORS[name] = function
        return function

    return register


def _ints(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _tensor(value: Any, like: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype in (np.float16, np.float64):
        array = array.astype(np.float32)
    tensor = torch.from_numpy(np.array(array))
    if like is not None and like.is_floating_point() and not tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    return tensor


# Elementwise --------------------------------------------------------------------


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    def run(i: Inputs) -> torch.Tensor:
        x, y = _tensor(i["x"]), _tensor(i["y"])
        return function(x, y)

    return run


for _name, _function in {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "real_div": lambda x, y: torch.div(x, y),
}.items():
    _operator(_name)(_binary(_function))


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda i: function(_tensor(i["x"]))


for _name, _unary_function in {
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softsign": F.softsign,
    "exp": torch.exp,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "sign": torch.sign,
    "erf": torch.erf,
    "cos": torch.cos,
    "sin": torch.sin,
    "logical_not": torch.logical_not,
    "identity": lambda x: x,
}.items():
    _operator(_name)(_unary(_unary_function))


@_operator("clip")
def _clip(i: Inputs) -> torch.Tensor:
    return torch.clamp(_tensor(i["x"]), float(i["alpha"]), float(i["beta"]))


@_operator("sigmoid_hard")
def _sigmoid_hard(i: Inputs) -> torch.Tensor:
    return torch.clamp(float(i["alpha"]) * i["x"] + float(i["beta"]), 0.0, 1.0)


@_operator("thresholded_relu")
def _thresholded_relu(i: Inputs) -> torch.Tensor:
    # Core ML: x where x >= alpha, else 0.
    x = i["x"]
    return torch.where(x >= float(i["alpha"]), x, torch.zeros_like(x))


@_operator("leaky_relu")
def _leaky_relu(i: Inputs) -> torch.Tensor:
    return F.leaky_relu(i["x"], float(i["alpha"]))


@_operator("elu")
def _elu(i: Inputs) -> torch.Tensor:
    return F.elu(i["x"], float(i["alpha"]))


@_operator("prelu")
def _prelu(i: Inputs) -> torch.Tensor:
    return F.prelu(i["x"], _tensor(i["alpha"]))


@_operator("softplus")
def _softplus(i: Inputs) -> torch.Tensor:
    return F.softplus(i["x"])


@_operator("gelu")
def _gelu(i: Inputs) -> torch.Tensor:
    mode = str(i.get("mode", "EXACT"))
    if mode == "EXACT":
        return F.gelu(i["x"])
    if mode == "TANH_APPROXIMATION":
        return F.gelu(i["x"], approximate="tanh")
    return i["x"] * torch.sigmoid(1.702 * i["x"])


@_operator("rsqrt")
def _rsqrt(i: Inputs) -> torch.Tensor:
    return torch.rsqrt(_tensor(i["x"]) + float(i.get("epsilon") or 0.0))


@_operator("inverse")
def _inverse(i: Inputs) -> torch.Tensor:
    return torch.reciprocal(_tensor(i["x"]) + float(i.get("epsilon") or 0.0))


@_operator("log")
def _log(i: Inputs) -> torch.Tensor:
    return torch.log(_tensor(i["x"]) + float(i.get("epsilon") or 0.0))


@_operator("cast")
def _cast(i: Inputs) -> torch.Tensor:
    kinds = {
        "fp32": torch.float32,
        "fp16": torch.float32,  # rounded by the interpreter
        "int32": torch.int32,
        "int16": torch.int16,
        "int8": torch.int8,
        "uint8": torch.uint8,
        "bool": torch.bool,
    }
    return _tensor(i["x"]).to(kinds[str(i["dtype"])])


@_operator("select")
def _select(i: Inputs) -> torch.Tensor:
    return torch.where(_tensor(i["cond"]).bool(), _tensor(i["a"]), _tensor(i["b"]))


# Convolution, pooling, linear ----------------------------------------------------


def _same_padding(
    size: int, kernel: int, stride: int, dilation: int, lower: bool
) -> tuple[int, int]:
    span = (kernel - 1) * dilation + 1
    total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
    small, large = total // 2, total - total // 2
    return (large, small) if lower else (small, large)


def _padding(
    i: Inputs, sizes: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, from ``pad_type`` and ``pad``."""
    kind = str(i.get("pad_type", "valid"))
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        flat = _ints(i["pad"])
        return [(flat[2 * n], flat[2 * n + 1]) for n in range(len(sizes))]
    return [
        _same_padding(s, k, t, d, kind == "same_lower")
        for s, k, t, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]


def _flat_pad(pads: list[tuple[int, int]]) -> list[int]:
    """torch.nn.functional.pad order: last axis first."""
    return [n for pair in reversed(pads) for n in pair]


@_operator("conv")
def _conv(i: Inputs) -> torch.Tensor:
    x, weight = i["x"], _tensor(i["weight"])
    rank = x.dim() - 2
    stride = _ints(i["strides"]) if i.get("strides") is not None else [1] * rank
    dilation = _ints(i["dilations"]) if i.get("dilations") is not None else [1] * rank
    pads = _padding(i, list(x.shape[2:]), list(weight.shape[2:]), stride, dilation)
    if any(before or after for before, after in pads):
        x = F.pad(x, _flat_pad(pads))
    bias = _tensor(i["bias"]) if i.get("bias") is not None else None
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    groups = int(i["groups"]) if i.get("groups") is not None else 1
    return function(x, weight, bias, stride, 0, dilation, groups)


@_operator("conv_transpose")
def _conv_transpose(i: Inputs) -> torch.Tensor:
    x, weight = i["x"], _tensor(i["weight"])
    rank = x.dim() - 2
    stride = _ints(i["strides"]) if i.get("strides") is not None else [1] * rank
    dilation = _ints(i["dilations"]) if i.get("dilations") is not None else [1] * rank
    groups = int(i["groups"]) if i.get("groups") is not None else 1
    bias = _tensor(i["bias"]) if i.get("bias") is not None else None
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    full = function(x, weight, bias, stride, 0, 0, groups, dilation)
    kind = str(i.get("pad_type", "valid"))
    if kind == "custom":
        flat = _ints(i["pad"])
        pads = [(flat[2 * n], flat[2 * n + 1]) for n in range(rank)]
    elif kind == "valid":
        pads = [(0, 0)] * rank
    else:
        pads = []
        for axis in range(rank):
            extra = full.shape[2 + axis] - x.shape[2 + axis] * stride[axis]
            pads.append((extra // 2, extra - extra // 2))
    shape = i.get("output_shape")
    sizes = _ints(shape)[-rank:] if shape is not None else None
    index: list[slice] = [slice(None), slice(None)]
    for axis, (before, after) in enumerate(pads):
        length = full.shape[2 + axis]
        stop = before + sizes[axis] if sizes is not None else length - after
        if stop > length:  # output padding reaches past the transposed kernel
            full = F.pad(full, [0, 0] * (rank - 1 - axis) + [0, stop - length])
        index.append(slice(before, stop))
    return full[tuple(index)]


@_operator("linear")
def _linear(i: Inputs) -> torch.Tensor:
    bias = _tensor(i["bias"]) if i.get("bias") is not None else None
    return F.linear(i["x"], _tensor(i["weight"]), bias)


@_operator("matmul")
def _matmul(i: Inputs) -> torch.Tensor:
    x, y = _tensor(i["x"]), _tensor(i["y"])
    if i.get("transpose_x"):
        x = x.transpose(-1, -2)
    if i.get("transpose_y"):
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def _pool_setup(i: Inputs) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:
    kernel = _ints(i["kernel_sizes"])
    stride = _ints(i["strides"]) if i.get("strides") is not None else [1] * len(kernel)
    sizes = list(i["x"].shape[2:])
    pads = _padding(i, sizes, kernel, stride, [1] * len(kernel))
    extra = []
    for size, k, s, (before, after) in zip(sizes, kernel, stride, pads, strict=True):
        rest = (size + before + after - k) % s
        extra.append((s - rest) % s if i.get("ceil_mode") and rest else 0)
    return kernel, stride, pads, extra


@_operator("max_pool")
def _max_pool(i: Inputs) -> torch.Tensor:
    kernel, stride, pads, extra = _pool_setup(i)
    total = [(before, after + more) for (before, after), more in zip(pads, extra, strict=True)]
    x = F.pad(i["x"], _flat_pad(total), value=float("-inf"))
    return {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)](x, kernel, stride)


@_operator("avg_pool")
def _avg_pool(i: Inputs) -> torch.Tensor:
    kernel, stride, pads, extra = _pool_setup(i)
    total = [(before, after + more) for (before, after), more in zip(pads, extra, strict=True)]
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    summed = pool(F.pad(i["x"], _flat_pad(total)), kernel, stride)
    # What counts as an element: real ones, and declared padding unless excluded; the
    # extension that ceil_mode adds never does.
    ones = torch.ones(1, 1, *i["x"].shape[2:])
    counted = 0.0 if i.get("exclude_padding_from_average") else 1.0
    ones = F.pad(ones, _flat_pad(pads), value=counted)
    ones = F.pad(ones, _flat_pad([(0, more) for more in extra]))
    share = pool(ones, kernel, stride)
    return summed / share


# Normalization -------------------------------------------------------------------


def _per_channel(value: Any, x: torch.Tensor) -> torch.Tensor:
    return _tensor(value).reshape(1, -1, *([1] * (x.dim() - 2)))


@_operator("batch_norm")
def _batch_norm(i: Inputs) -> torch.Tensor:
    x = i["x"]
    scale = torch.rsqrt(_per_channel(i["variance"], x) + float(i.get("epsilon") or 1e-5))
    result = (x - _per_channel(i["mean"], x)) * scale
    if i.get("gamma") is not None:
        result = result * _per_channel(i["gamma"], x)
    if i.get("beta") is not None:
        result = result + _per_channel(i["beta"], x)
    return result


@_operator("instance_norm")
def _instance_norm(i: Inputs) -> torch.Tensor:
    x = i["x"]
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + float(i.get("epsilon") or 1e-5))
    if i.get("gamma") is not None:
        result = result * _per_channel(i["gamma"], x)
    if i.get("beta") is not None:
        result = result + _per_channel(i["beta"], x)
    return result


@_operator("layer_norm")
def _layer_norm(i: Inputs) -> torch.Tensor:
    x = i["x"]
    axes = [a % x.dim() for a in _ints(i["axes"])] if i.get("axes") is not None else [x.dim() - 1]
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + float(i.get("epsilon") or 1e-5))
    shape = [x.shape[a] if a in axes else 1 for a in range(x.dim())]
    if i.get("gamma") is not None:
        result = result * _tensor(i["gamma"]).reshape(shape)
    if i.get("beta") is not None:
        result = result + _tensor(i["beta"]).reshape(shape)
    return result


@_operator("softmax")
def _softmax(i: Inputs) -> torch.Tensor:
    return torch.softmax(i["x"], int(i.get("axis", -1)))


# Reductions ----------------------------------------------------------------------


def _reduction(function: Callable[..., torch.Tensor]) -> Operator:
    def run(i: Inputs) -> torch.Tensor:
        x = _tensor(i["x"])
        axes = _ints(i["axes"]) if i.get("axes") is not None else list(range(x.dim()))
        return function(x, axes, keepdim=bool(i.get("keep_dims", False)))

    return run


for _name, _reduce in {
    "reduce_mean": torch.mean,
    "reduce_sum": torch.sum,
    "reduce_max": torch.amax,
    "reduce_min": torch.amin,
    "reduce_l2_norm": lambda x, axes, keepdim: torch.sqrt(torch.sum(x * x, axes, keepdim=keepdim)),
    "reduce_sum_square": lambda x, axes, keepdim: torch.sum(x * x, axes, keepdim=keepdim),
}.items():
    _operator(_name)(_reduction(_reduce))


@_operator("reduce_argmax")
def _reduce_argmax(i: Inputs) -> torch.Tensor:
    keep = bool(i.get("keep_dims", False))
    return torch.argmax(i["x"], int(i.get("axis", -1)), keepdim=keep).to(torch.int32)


# Shape ---------------------------------------------------------------------------


@_operator("reshape")
def _reshape(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    shape = _ints(i["shape"])
    return x.reshape([x.shape[n] if size == 0 else size for n, size in enumerate(shape)])


@_operator("transpose")
def _transpose(i: Inputs) -> torch.Tensor:
    return _tensor(i["x"]).permute(_ints(i["perm"]))


@_operator("expand_dims")
def _expand_dims(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    axes = _ints(i["axes"])
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@_operator("squeeze")
def _squeeze(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    if i.get("axes") is None:
        return x.squeeze()
    for axis in sorted((a % x.dim() for a in _ints(i["axes"])), reverse=True):
        x = x.squeeze(axis)
    return x


@_operator("concat")
def _concat(i: Inputs) -> torch.Tensor:
    return torch.cat([_tensor(v) for v in i["values"]], int(i["axis"]))


@_operator("stack")
def _stack(i: Inputs) -> torch.Tensor:
    return torch.stack([_tensor(v) for v in i["values"]], int(i["axis"]))


@_operator("split")
def _split(i: Inputs) -> tuple[torch.Tensor, ...]:
    x, axis = i["x"], int(i["axis"])
    if i.get("split_sizes") is not None:
        return torch.split(x, _ints(i["split_sizes"]), axis)
    return torch.chunk(x, int(i["num_splits"]), axis)


@_operator("tile")
def _tile(i: Inputs) -> torch.Tensor:
    return _tensor(i["x"]).repeat(_ints(i["reps"]))


@_operator("pad")
def _pad(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    flat = _ints(i["pad"])
    pairs = [(flat[n], flat[n + 1]) for n in range(0, len(flat), 2)]
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}[
        str(i.get("mode", "constant"))
    ]
    if mode == "constant":
        return F.pad(x, _flat_pad(pairs), value=float(i.get("constant_val") or 0.0))
    while len(pairs) > 1 and pairs[0] == (0, 0) and len(pairs) > x.dim() - 2:
        pairs = pairs[1:]
    return F.pad(x, _flat_pad(pairs), mode=mode)


def _slice_mask(i: Inputs, name: str, rank: int) -> list[bool]:
    value = i.get(name)
    return [bool(b) for b in np.asarray(value).reshape(-1)] if value is not None else [False] * rank


@_operator("slice_by_index")
def _slice_by_index(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    rank = x.dim()
    begin, end = _ints(i["begin"]), _ints(i["end"])
    stride = _ints(i["stride"]) if i.get("stride") is not None else [1] * rank
    begin_mask = _slice_mask(i, "begin_mask", rank)
    end_mask = _slice_mask(i, "end_mask", rank)
    squeeze_mask = _slice_mask(i, "squeeze_mask", rank)
    for axis in range(rank):
        first = None if begin_mask[axis] else begin[axis]
        if squeeze_mask[axis]:
            x = x.index_select(axis, torch.tensor([begin[axis] % x.shape[axis]]))
            continue
        last = None if end_mask[axis] else end[axis]
        picked = range(x.shape[axis])[slice(first, last, stride[axis])]
        x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.long))
    for axis in reversed(range(rank)):
        if squeeze_mask[axis]:
            x = x.squeeze(axis)
    return x


@_operator("slice_by_size")
def _slice_by_size(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    for axis, (begin, size) in enumerate(zip(_ints(i["begin"]), _ints(i["size"]), strict=True)):
        length = x.shape[axis] - begin if size == -1 else size
        x = x.narrow(axis, begin, length)
    return x


@_operator("crop")
def _crop(i: Inputs) -> torch.Tensor:
    x = i["x"]
    top, bottom = _ints(i["crop_height"])
    left, right = _ints(i["crop_width"])
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@_operator("shape")
def _shape(i: Inputs) -> torch.Tensor:
    return torch.tensor(list(i["x"].shape), dtype=torch.int32)


@_operator("gather")
def _gather(i: Inputs) -> torch.Tensor:
    x, indices = _tensor(i["x"]), _tensor(i["indices"]).long()
    axis = int(i.get("axis", 0)) % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    flat = x.index_select(axis, indices.reshape(-1))
    return flat.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@_operator("gather_along_axis")
def _gather_along_axis(i: Inputs) -> torch.Tensor:
    x = _tensor(i["x"])
    return torch.gather(x, int(i.get("axis", 0)), _tensor(i["indices"]).long())


@_operator("topk")
def _topk(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    # Stable: equal values keep the order of their index.
    x, axis, k = _tensor(i["x"]), int(i.get("axis", -1)), int(i["k"])
    ascending = bool(i.get("ascending", False))
    values, order = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    return values.narrow(axis, 0, k), order.narrow(axis, 0, k).to(torch.int32)


@_operator("fill")
def _fill(i: Inputs) -> torch.Tensor:
    return torch.full(_ints(i["shape"]), _tensor(i["value"]).item())


@_operator("fill_like")
def _fill_like(i: Inputs) -> torch.Tensor:
    return torch.full(tuple(_tensor(i["ref_tensor"]).shape), _tensor(i["value"]).item())


@_operator("pixel_shuffle")
def _pixel_shuffle(i: Inputs) -> torch.Tensor:
    return F.pixel_shuffle(i["x"], int(i["upscale_factor"]))


@_operator("upsample_nearest_neighbor")
def _upsample_nearest(i: Inputs) -> torch.Tensor:
    x = i["x"]
    height = round(x.shape[2] * float(i["scale_factor_height"]))
    width = round(x.shape[3] * float(i["scale_factor_width"]))
    return F.interpolate(x, size=(height, width), mode="nearest")


@_operator("upsample_bilinear")
def _upsample_bilinear(i: Inputs) -> torch.Tensor:
    x = i["x"]
    height = round(x.shape[2] * float(i["scale_factor_height"]))
    width = round(x.shape[3] * float(i["scale_factor_width"]))
    align = bool(i.get("align_corners", False))
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=align)


# Quantization --------------------------------------------------------------------


def _along(value: Any, x: torch.Tensor, axis: Any) -> torch.Tensor:
    tensor = _tensor(value)
    if tensor.dim() == 0 or axis is None:
        return tensor.float()
    shape = [1] * x.dim()
    shape[int(axis)] = -1
    return tensor.reshape(shape).float()


@_operator("quantize")
def _quantize(i: Inputs) -> torch.Tensor:
    x = i["input"]
    kind = str(i["output_dtype"])
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[kind]
    scale = _along(i["scale"], x, i.get("axis"))
    zero = _along(i["zero_point"], x, i.get("axis")) if i.get("zero_point") is not None else 0.0
    levels = torch.clamp(torch.round(x / scale) + zero, low, high)
    return levels.to(torch.int8 if kind == "int8" else torch.uint8)


@_operator("dequantize")
def _dequantize(i: Inputs) -> torch.Tensor:
    x = _tensor(i["input"]).float()
    scale = _along(i["scale"], x, i.get("axis"))
    zero = _along(i["zero_point"], x, i.get("axis")) if i.get("zero_point") is not None else 0.0
    return (x - zero) * scale
