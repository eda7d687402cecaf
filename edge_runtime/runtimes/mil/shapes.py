"""MIL operators that move, cut or join numbers without changing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_runtime.runtimes.mil.registry import Bools, Function, Ints, Tensor

__all__ = ["OPERATORS"]


def _reshape(x: Tensor, shape: Ints) -> Tensor:
    return x.reshape([x.shape[n] if size == 0 else size for n, size in enumerate(shape)])


def _reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: Ints, ends: Ints, end_masks: Bools
) -> Tensor:
    shape: list[int] = []
    for reference, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += list(reference.shape)[begin : None if masked else end]
    return x.reshape(shape)


def _transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


def _expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        if x.shape[axis] != 1:
            raise ValueError(f"axis {axis} has length {x.shape[axis]}, not 1")
        x = x.squeeze(axis)
    return x


def _flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    before = list(x.shape)[:axis]
    rows = 1
    for size in before:
        rows *= size
    return x.reshape(rows, -1)


def _concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    stacked = torch.stack(values, axis + 1)
    return stacked.flatten(axis, axis + 1)


def _stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, split_sizes, axis)
    count = num_splits or 0
    if count < 1 or x.shape[axis] % count:
        raise ValueError(f"{x.shape[axis]} numbers do not split into {count} equal parts")
    return torch.split(x, x.shape[axis] // count, axis)


def _tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat([x.shape[n] if count == 0 else count for n, count in enumerate(reps)])


def _pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    pairs = [(pad[n], pad[n + 1]) for n in range(0, len(pad), 2)]  # of the last axes
    if mode == "constant":
        flat = [n for pair in reversed(pairs) for n in pair]
        return F.pad(x, flat, value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"mode {mode!r}")
    first = x.dim() - len(pairs)
    for number, (before, after) in enumerate(pairs):  # axis by axis: any rank, any axis
        if before or after:
            axis = first + number
            length = x.shape[axis]
            if mode == "reflect" and max(before, after) >= length:
                raise ValueError(f"cannot reflect {max(before, after)} of {length} numbers")
            places = torch.arange(-before, length + after)
            if mode == "reflect":
                places = places.abs()
                places = torch.where(places >= length, 2 * (length - 1) - places, places)
            else:
                places = places.clamp(0, length - 1)
            x = x.index_select(axis, places)
    return x


def _slices(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> list[range]:
    rank = x.dim()
    steps = stride or [1] * rank
    no = [False] * rank
    from_start, to_end, single = begin_mask or no, end_mask or no, squeeze_mask or no
    chosen = []
    for axis in range(rank):
        length = x.shape[axis]
        if single[axis]:
            place = begin[axis] % length
            chosen.append(range(place, place + 1))
            continue
        first = None if from_start[axis] else begin[axis]
        last = None if to_end[axis] else end[axis]
        chosen.append(range(length)[slice(first, last, steps[axis])])
    return chosen


def _take(x: Tensor, axis: int, places: range) -> Tensor:
    if len(places) == x.shape[axis] and places.step == 1:
        return x
    if places.step == 1:
        return x.narrow(axis, places.start, len(places))
    if places.step > 0:
        index = [slice(None)] * x.dim()
        index[axis] = slice(places.start, places.stop, places.step)
        return x[tuple(index)]
    return x.index_select(axis, torch.tensor(list(places), dtype=torch.long))


def _slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    chosen = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, places in enumerate(chosen):
        x = _take(x, axis, places)
    for axis in reversed(range(x.dim())):
        if squeeze_mask is not None and squeeze_mask[axis]:
            x = x.squeeze(axis)
    return x


def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    chosen = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.clone()
    grid = torch.meshgrid(*(torch.tensor(list(places)) for places in chosen), indexing="ij")
    result[grid] = update.reshape([len(places) for places in chosen])
    return result


def _slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
        first %= max(x.shape[axis], 1)
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def _crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    top, bottom = crop_height
    left, right = crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(axes if axes is not None else list(range(x.dim())))


def _shape(x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=torch.int32)


def _pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


def _depth_to_space(x: Tensor, block_size: int) -> Tensor:
    # Unlike pixel_shuffle, the block is the slow part of the channel axis.
    batch, channels, height, width = x.shape
    depth = channels // (block_size * block_size)
    x = x.reshape(batch, block_size, block_size, depth, height, width)
    x = x.permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, depth, height * block_size, width * block_size)


def _space_to_depth(x: Tensor, block_size: int) -> Tensor:
    batch, depth, height, width = x.shape
    rows, columns = height // block_size, width // block_size
    x = x.reshape(batch, depth, rows, block_size, columns, block_size)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, depth * block_size * block_size, rows, columns)


def _space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    # paddings comes flat, [[top, bottom], [left, right]]
    rows, columns = block_shape
    x = F.pad(x, [paddings[2], paddings[3], paddings[0], paddings[1]])
    batch, depth, height, width = x.shape
    x = x.reshape(batch, depth, height // rows, rows, width // columns, columns)
    x = x.permute(3, 5, 0, 1, 2, 4)
    return x.reshape(batch * rows * columns, depth, height // rows, width // columns)


def _batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    rows, columns = block_shape
    batch, depth, height, width = x.shape
    x = x.reshape(rows, columns, batch // (rows * columns), depth, height, width)
    x = x.permute(2, 3, 4, 0, 5, 1)
    x = x.reshape(batch // (rows * columns), depth, height * rows, width * columns)
    return _crop(x, crops[:2], crops[2:])


def _sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def _band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    if lower >= 0:
        x = torch.triu(x, -lower)
    return torch.tril(x, upper) if upper >= 0 else x


OPERATORS: dict[str, Function] = {
    "band_part": _band_part,
    "batch_to_space": _batch_to_space,
    "concat": _concat,
    "crop": _crop,
    "depth_to_space": _depth_to_space,
    "expand_dims": _expand_dims,
    "flatten2d": _flatten2d,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "reshape": _reshape,
    "reshape_like": _reshape_like,
    "reverse": _reverse,
    "shape": _shape,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "sliding_windows": _sliding_windows,
    "space_to_batch": _space_to_batch,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
