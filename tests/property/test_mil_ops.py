"""MIL operators against torch and numpy, on drawn shapes and attributes.

Arguments come as a program holds them: numpy arrays and numbers, no torch attributes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.runtimes.mil.ops import OPERATORS

few = settings(max_examples=25, deadline=None)
small = st.integers(1, 4)


def run(name: str, **arguments: Any) -> Any:
    return OPERATORS[name](**arguments)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual: torch.Tensor, expected: Any) -> None:
    wanted = expected if isinstance(expected, np.ndarray) else expected.numpy()
    assert tuple(actual.shape) == wanted.shape
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-4, atol=1e-5)


@few
@given(st.data(), st.integers(0, 99))
def test_convolution(data: st.DataObject, seed: int) -> None:
    groups, per_in, per_out = data.draw(small), data.draw(small), data.draw(small)
    kernel = [data.draw(small), data.draw(small)]
    stride, dilation = [data.draw(small)] * 2, [data.draw(st.integers(1, 2))] * 2
    pad = data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    x = numbers(seed, 1, groups * per_in, 9, 11)
    weight = numbers(seed + 1, groups * per_out, per_in, *kernel)
    bias = numbers(seed + 2, groups * per_out) if data.draw(st.booleans()) else None
    padded = F.pad(torch.from_numpy(x), [pad[2], pad[3], pad[0], pad[1]])
    assume(
        all((k - 1) * dilation[0] < size for k, size in zip(kernel, padded.shape[2:], strict=True))
    )
    expected = F.conv2d(
        padded, torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        stride, 0, dilation, groups,
    )  # fmt: skip
    actual = run(
        "conv", x=x, weight=weight, bias=bias, strides=np.array(stride), pad_type="custom",
        pad=np.array(pad), dilations=np.array(dilation), groups=np.int32(groups),
    )  # fmt: skip
    close(actual, expected)


@few
@given(st.integers(3, 12), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2))
def test_same_padding_keeps_ceil_of_size_over_stride(
    size: int, kernel: int, stride: int, dilation: int
) -> None:
    x, weight = numbers(0, 1, 2, size, size), numbers(1, 3, 2, kernel, kernel)
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    for kind, before in (("same", total // 2), ("same_lower", total - total // 2)):
        pads = [before, total - before] * 2
        expected = F.conv2d(
            F.pad(torch.from_numpy(x), pads), torch.from_numpy(weight), None, stride, 0, dilation
        )
        actual = run(
            "conv", x=x, weight=weight, strides=np.array([stride] * 2), pad_type=kind,
            dilations=np.array([dilation] * 2),
        )  # fmt: skip
        assert actual.shape[2] == -(-size // stride)
        close(actual, expected)


@few
@given(st.data(), st.integers(0, 99))
def test_transposed_convolution(data: st.DataObject, seed: int) -> None:
    groups, per_in, per_out, kernel = (data.draw(small) for _ in range(4))
    stride = data.draw(st.integers(1, 3))
    pad = data.draw(st.integers(0, (kernel - 1) // 2))
    extra = data.draw(st.integers(0, stride - 1))
    x = numbers(seed, 1, groups * per_in, 5, 4)
    weight = numbers(seed + 1, groups * per_in, per_out, kernel, kernel)
    bias = numbers(seed + 2, groups * per_out)
    expected = F.conv_transpose2d(
        torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias), stride, pad, extra,
        groups,
    )  # fmt: skip
    actual = run(
        "conv_transpose", x=x, weight=weight, bias=bias, pad=np.array([pad] * 4),
        output_shape=np.array(expected.shape), pad_type="custom", strides=np.array([stride] * 2),
        groups=np.int32(groups),
    )  # fmt: skip
    close(actual, expected)


@few
@given(st.data())
def test_pooling(data: st.DataObject) -> None:
    kernel = data.draw(st.integers(1, 4))
    stride = data.draw(st.integers(1, kernel))
    pad = data.draw(st.integers(0, kernel // 2))
    ceil, exclude = data.draw(st.booleans()), data.draw(st.booleans())
    x = numbers(3, 1, 2, data.draw(st.integers(4, 9)), 7)
    shared = {
        "x": x, "kernel_sizes": np.array([kernel] * 2), "strides": np.array([stride] * 2),
        "pad_type": "custom", "pad": np.array([pad] * 4), "ceil_mode": np.bool_(ceil),
    }  # fmt: skip
    tensor = torch.from_numpy(x)
    close(run("max_pool", **shared), F.max_pool2d(tensor, kernel, stride, pad, 1, ceil))
    expected = F.avg_pool2d(tensor, kernel, stride, pad, ceil, not exclude)
    close(run("avg_pool", exclude_padding_from_average=np.bool_(exclude), **shared), expected)


@few
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.booleans())
def test_upsampling(height: int, width: int, factor: int, corners: bool) -> None:
    x = numbers(5, 1, 3, height, width)
    scale = {
        "x": x, "scale_factor_height": np.float32(factor), "scale_factor_width": np.float32(factor)
    }  # fmt: skip
    expected = F.interpolate(
        torch.from_numpy(x), scale_factor=factor, mode="bilinear", align_corners=corners
    )
    close(run("upsample_bilinear", align_corners=np.bool_(corners), **scale), expected)
    nearest = F.interpolate(torch.from_numpy(x), scale_factor=factor, mode="nearest")
    close(run("upsample_nearest_neighbor", **scale), nearest)


@few
@given(st.integers(2, 8), st.integers(1, 13))
def test_resize_sampling_modes(length: int, target: int) -> None:
    x = numbers(7, 1, 1, length, length)
    for mode, corners in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)):
        expected = F.interpolate(
            torch.from_numpy(x), (target, target), mode="bilinear", align_corners=corners
        )
        actual = run(
            "resize_bilinear", x=x, target_size_height=np.int32(target),
            target_size_width=np.int32(target), sampling_mode=mode,
        )  # fmt: skip
        close(actual, expected)


@few
@given(st.data())
def test_slicing_is_numpys(data: st.DataObject) -> None:
    x = numbers(11, 5, 6, 4)
    begin, end, stride, masks, index = [], [], [], [], []
    for length in x.shape:
        step = data.draw(st.sampled_from([1, 2, 3, -1, -2]))
        first, last = data.draw(st.integers(-length, length - 1)), data.draw(st.integers(-7, 7))
        flags = [data.draw(st.booleans()) for _ in range(2)] + [data.draw(st.integers(0, 4)) == 0]
        begin.append(first), end.append(last), stride.append(step), masks.append(flags)
        if flags[2]:
            index.append(first)
        else:
            index.append(slice(None if flags[0] else first, None if flags[1] else last, step))
    expected = x[tuple(index)]
    assume(expected.size > 0)
    actual = run(
        "slice_by_index", x=x, begin=np.array(begin), end=np.array(end), stride=np.array(stride),
        begin_mask=np.array([m[0] for m in masks]), end_mask=np.array([m[1] for m in masks]),
        squeeze_mask=np.array([m[2] for m in masks]),
    )  # fmt: skip
    np.testing.assert_array_equal(actual.numpy(), expected)


@few
@given(st.data())
def test_padding_modes_are_numpys(data: st.DataObject) -> None:
    x = numbers(13, 2, 4, 5)
    count = data.draw(st.integers(1, 3))
    pairs = [(data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))) for _ in range(count)]
    full = [(0, 0)] * (3 - count) + pairs
    flat = np.array(pairs).reshape(-1)
    close(
        run("pad", x=x, pad=flat, mode="constant", constant_val=np.float32(2.5)),
        np.pad(x, full, constant_values=2.5),
    )
    close(run("pad", x=x, pad=flat, mode="reflect"), np.pad(x, full, mode="reflect"))
    close(run("pad", x=x, pad=flat, mode="replicate"), np.pad(x, full, mode="edge"))


@few
@given(st.integers(-3, 2), st.data())
def test_gathering(axis: int, data: st.DataObject) -> None:
    x = numbers(17, 3, 4, 5)
    length = x.shape[axis]
    places = data.draw(st.lists(st.integers(-length, length - 1), min_size=1, max_size=6))
    indices = np.array(places, dtype=np.int32)
    close(run("gather", x=x, indices=indices, axis=np.int32(axis)), np.take(x, indices, axis))
    order = np.argsort(numbers(19, *x.shape), axis=axis).astype(np.int32)
    along = run("gather_along_axis", x=x, indices=order, axis=np.int32(axis))
    close(along, np.take_along_axis(x, order, axis))


@few
@given(st.data(), st.booleans(), st.sampled_from([0, 1, -1]))
def test_topk_keeps_the_order_of_equal_values(
    data: st.DataObject, ascending: bool, axis: int
) -> None:
    values = data.draw(st.lists(st.integers(-3, 3), min_size=24, max_size=24))
    x = np.array(values, dtype=np.float32).reshape(4, 6)
    k = data.draw(st.integers(1, x.shape[axis]))
    order = np.argsort(x if ascending else -x, axis=axis, kind="stable").take(range(k), axis)
    found, indices = run("topk", x=x, k=np.int32(k), axis=np.int32(axis), ascending=ascending)
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(x, order, axis))
    # A short list out of a long one takes another way.
    flat = np.tile(x.reshape(-1), 4)
    few_found, few_indices = run("topk", x=flat, k=np.int32(5), ascending=ascending)
    wanted = np.argsort(flat if ascending else -flat, kind="stable")[:5]
    np.testing.assert_array_equal(few_indices.numpy(), wanted)
    np.testing.assert_array_equal(few_found.numpy(), flat[wanted])


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.booleans())
def test_reductions(axes: list[int], keep: bool) -> None:
    x = numbers(23, 2, 3, 4, 2)
    for name, function in (
        ("mean", np.mean), ("sum", np.sum), ("max", np.max), ("min", np.min), ("prod", np.prod),
    ):  # fmt: skip
        expected = np.asarray(function(x, axis=tuple(axes), keepdims=keep))
        close(run(f"reduce_{name}", x=x, axes=np.array(axes), keep_dims=np.bool_(keep)), expected)
    expected = np.argmax(x, axis=axes[0])
    np.testing.assert_array_equal(run("reduce_argmax", x=x, axis=np.int32(axes[0])), expected)


@few
@given(st.floats(-4, 4), st.floats(0.01, 3))
def test_activations(alpha: float, beta: float) -> None:
    x = numbers(29, 2, 3, 4) * 3
    tensor = torch.from_numpy(x)
    a, b = np.float32(alpha), np.float32(beta)
    close(run("clip", x=x, alpha=a, beta=a + b), np.clip(x, a, a + b))
    close(run("leaky_relu", x=x, alpha=b), F.leaky_relu(tensor, float(b)))
    close(run("elu", x=x, alpha=b), F.elu(tensor, float(b)))
    close(run("thresholded_relu", x=x, alpha=a), np.where(x >= a, x, 0).astype(np.float32))
    close(run("sigmoid_hard", x=x, alpha=b, beta=a), np.clip(b * x + a, 0, 1))
    close(run("gelu", x=x, mode="TANH_APPROXIMATION"), F.gelu(tensor, approximate="tanh"))
    close(run("prelu", x=x, alpha=np.array([a, b, 0.5], np.float32)),
          np.where(x > 0, x, x * np.array([a, b, 0.5], np.float32)[None, :, None]))  # fmt: skip
    close(run("softplus", x=x * 20), F.softplus(tensor.double() * 20).float())


@few
@given(st.floats(1e-3, 10), st.integers(-128, 127), st.integers(0, 99))
def test_quantization_in_one_step_is_bit_for_bit_the_two_operators(
    scale: float, zero: int, seed: int
) -> None:
    from edge_runtime.runtimes.mil.quantization import round_trip

    x, step = numbers(seed, 400) * 50, np.float32(scale)
    levels = run("quantize", input=x, scale=step, zero_point=np.int8(zero), output_dtype="int8")
    expected = np.clip(np.round(x / step) + np.float32(zero), -128, 127)
    np.testing.assert_array_equal(levels.numpy(), expected.astype(np.int8))
    back = run("dequantize", input=levels, scale=step, zero_point=np.int8(zero))
    together = round_trip(torch.from_numpy(x), float(step), zero, "int8")
    np.testing.assert_array_equal(together.numpy(), back.numpy())


def test_unknown_and_missing_arguments_are_named() -> None:
    with pytest.raises(ModelLoadError, match="weight is missing"):
        run("conv", x=numbers(0, 1, 1, 3, 3))
    with pytest.raises(ModelLoadError, match="'slope' is unknown"):
        run("relu", x=numbers(0, 3), slope=np.float32(1))
