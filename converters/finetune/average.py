"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["MovingAverage", "cloned"]

State = dict[str, torch.Tensor]


def cloned(module: nn.Module) -> State:
    """A copy of ``state_dict`` that later training does not touch."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class MovingAverage:
    """a <- d a + (1 - d) w after each step, d = min(decay, (1 + n) / (10 + n)).

    The second term lets the average follow quickly at first. Integer buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.steps = 0
        self.values = cloned(module)

    def update(self) -> None:
        """Take the module's weights after one step in."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value.detach(), 1.0 - decay)
            else:
                self.values[name].copy_(value)

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def restore(self, state: dict[str, object]) -> None:
        """Undo ``state``."""
        steps, values = state["steps"], state["values"]
        assert isinstance(steps, int)  # noqa: S101  # written by ``state``
        assert isinstance(values, dict)  # noqa: S101
        self.steps, self.values = steps, values

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside the block."""
        own = cloned(self.module)
        self.module.load_state_dict(self.values)
        try:
            yield
        finally:
            self.module.load_state_dict(own)
