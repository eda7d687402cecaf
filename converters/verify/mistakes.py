"""The reference with a mistake of a converter built in: what would such a file answer?

Where it answers what the doubtful file answers, the mistake has a name, in every format and
without a look inside the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from converters.verify.metrics import sqnr_db
from converters.verify.values import Value, as_reference, sampled

__all__ = ["Mistake", "Mistaken", "mistakes"]

_BATCH_NORM = "batch_norm"
_CONVOLUTIONS = ("conv1d", "conv2d")
_TRAINING = 5
"""Places of arguments in ``aten.batch_norm``: ..., running mean, running variance, training."""
_MEAN, _VARIANCE = 3, 4


class Mistaken(fx.Interpreter):
    """Runs the exported reference with one mistake in each place where it can occur."""

    def __init__(self, program: fx.GraphModule, mistake: Callable[[Mistaken, fx.Node], Any]):
        super().__init__(program, garbage_collect_values=False)
        self._mistake = mistake
        self.made = 0
        """How often the mistake was made in the last run."""

    def answer(self, batch: torch.Tensor) -> list[torch.Tensor] | None:
        """All outputs; None where the mistake cannot occur, or breaks the shapes."""
        self.made = 0
        try:
            with torch.no_grad():
                result = self.run(batch)
        except (RuntimeError, TypeError, ValueError):
            return None
        if not self.made:
            return None
        return list(result) if isinstance(result, tuple | list) else [result]

    def run_node(self, n: fx.Node) -> Any:
        """The node's own value, or the mistaken one."""
        changed = self._mistake(self, n) if n.op == "call_function" else None
        if changed is None:
            return super().run_node(n)
        self.made += 1
        return changed

    def arguments(self, node: fx.Node) -> list[Any]:
        """The node's arguments as they are in this run."""
        return list(self.fetch_args_kwargs_from_env(node)[0])


def _name(node: Any) -> str:
    return str(getattr(getattr(node, "target", None), "__name__", "")).partition(".")[0]


class _LostShift:
    """A batch norm folded into a convolution without bias, whose bias then stays missing.

    ``optimize_for_mobile`` does so to a trace that is not frozen, where convolution and batch
    norm lie side by side; elsewhere it folds nothing. Which were hit is read off the file's
    inner values; without any, all were.
    """

    def __init__(self, values: Sequence[Value]) -> None:
        self._values = [value.array for value in values]
        self._hit: dict[str, bool] = {}
        self._sampled: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}

    def __call__(self, run: Mistaken, node: fx.Node) -> Any:
        if _name(node) != _BATCH_NORM or not node.args:
            return None
        before = node.args[0]
        bias = before.args[2] if isinstance(before, fx.Node) and len(before.args) > 2 else None
        if not isinstance(before, fx.Node) or "conv" not in _name(before) or bias is not None:
            return None
        values = run.arguments(node)
        shape = [1, values[0].shape[1], *[1] * (values[0].ndim - 2)]
        target: Any = node.target
        sound = target(*values)
        lost = sound - target(torch.zeros(shape), *values[1:])
        if node.name not in self._hit:
            self._hit[node.name] = self._closest(lost) > self._closest(sound)
        return lost if self._hit[node.name] or not self._values else None

    def _closest(self, value: torch.Tensor) -> float:
        """SQNR in dB of the file's value that comes closest, with any usual activation."""
        best = -np.inf
        shape = tuple(value.shape)
        few = sampled(value.numpy())
        for activation in _ACTIVATIONS:
            exact: NDArray[Any] = activation(torch.from_numpy(few)).numpy()[None]
            for other in self._alike(shape):
                best = max(best, float(sqnr_db(exact, other)[0]))
        return best

    def _alike(self, shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
        """A sample ``[1, n]`` of each of the file's values that has this shape."""
        if shape not in self._sampled:
            found = [as_reference(array, shape) for array in self._values]
            self._sampled[shape] = [sampled(one)[None] for one in found if one is not None]
        return self._sampled[shape]


_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda value: value,
    torch.relu,
    torch.nn.functional.relu6,
    torch.nn.functional.hardswish,
    torch.nn.functional.silu,
)


def _batch_statistics(run: Mistaken, node: fx.Node) -> Any:
    """A batch norm that still is in training mode: it normalizes by the input's own values."""
    if _name(node) != _BATCH_NORM:
        return None
    values = run.arguments(node)
    if len(values) <= _TRAINING or values[_TRAINING]:
        return None
    values[_MEAN] = values[_VARIANCE] = None
    values[_TRAINING] = True
    target: Any = node.target
    return target(*values)


def _symmetric(run: Mistaken, node: fx.Node) -> Any:
    """Zero padding on one side before a convolution, made the same on both."""
    if _name(node) not in ("pad", "constant_pad_nd"):
        return None
    users = list(node.users)
    if not users or not all(_name(user) in _CONVOLUTIONS for user in users):
        return None
    values = run.arguments(node)
    sides = list(values[1])
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    if all(low == high for low, high in pairs):
        return None
    same = [max(pair) for pair in pairs for _ in pair]
    return torch.nn.functional.pad(values[0], same)


def _right_and_bottom(run: Mistaken, node: fx.Node) -> Any:
    """Symmetric padding of a strided convolution, made TensorFlow's "SAME": more at the end."""
    if _name(node) != "conv2d":
        return None
    values = run.arguments(node)
    rest = [[1, 1], [0, 0], [1, 1]][max(len(values) - 3, 0) :]
    stride, padding, dilation = (*values[3:6], *rest)[:3]
    if max(stride) == 1 or not any(padding):
        return None
    sides: list[int] = []
    moved = False
    for axis in (1, 0):  # torch pads the last axis first
        size, kernel = values[0].shape[2 + axis], values[1].shape[2 + axis]
        reach = (kernel - 1) * dilation[axis] + 1
        count = -(-size // stride[axis])
        total = max((count - 1) * stride[axis] + reach - size, 0)
        sides += [total // 2, total - total // 2]
        moved = moved or total // 2 != padding[axis]
    if not moved:
        return None
    padded = torch.nn.functional.pad(values[0], sides)
    groups = values[6] if len(values) > 6 else 1
    return torch.nn.functional.conv2d(padded, values[1], values[2], stride, 0, dilation, groups)


Mistake = Callable[[Mistaken, fx.Node], Any]
"""What a node gives by mistake; None where the mistake does not apply."""


def mistakes(values: Sequence[Value]) -> list[tuple[str, str, Mistake]]:
    """Name of the finding, what to say, and how the mistake is made.

    ``values``: the file's inner values on the first input that ``Mistaken`` then runs.
    """
    return [(_UNFROZEN[0], _UNFROZEN[1], _LostShift(values)), *_EVERYWHERE]


_UNFROZEN = (
    "unfrozen-batch-norm",
    (
        "it answers as if each batch norm after a convolution had lost its shift: the trace "
        "was not frozen before optimize_for_mobile; freeze it first"
    ),
)
_EVERYWHERE: tuple[tuple[str, str, Mistake], ...] = (
    (
        "unfrozen-batch-norm",
        (
            "it answers as if its batch norms were still in training mode, normalizing by the "
            "input's own statistics: put the model into eval mode before it is exported"
        ),
        _batch_statistics,
    ),
    (
        "padding",
        "it answers as if the padding on one side (right and bottom) were the same on both",
        _symmetric,
    ),
    (
        "padding",
        (
            "it answers as if strided convolutions padded more at the right and bottom, where the "
            "reference pads the same on all sides"
        ),
        _right_and_bottom,
    ),
)
