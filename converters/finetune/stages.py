"""Which parameters train in which epoch, and at what learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from converters.finetune.settings import Settings

__all__ = ["Stages", "learning_rate"]


def learning_rate(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Linear from 0 over ``warmup`` steps, then half a cosine to 0 at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Stages:
    """The layers of a net from the head down, and from which epoch on each trains."""

    def __init__(
        self, module: nn.Module, head: str, example: torch.Tensor, settings: Settings
    ) -> None:
        self.module = module
        self.head = head
        self.settings = settings
        order = [name for name in _execution_order(module, example) if name != head]
        order.reverse()
        starts = settings.unfreeze_at
        self._start: dict[str, int | None] = {head: 1}
        for number, name in enumerate(order):
            if settings.freeze == "none":
                self._start[name] = 1
            elif starts:
                self._start[name] = starts[number * len(starts) // len(order)]
            else:
                self._start[name] = None

    def trains(self, layer: str, epoch: int) -> bool:
        """Whether ``layer`` (a module with parameters of its own) changes in ``epoch``."""
        start = self._start.get(layer)
        return start is not None and epoch >= start

    def begin(self, epoch: int, *, statistics: bool) -> int:
        """Set what trains in ``epoch`` (from 1); returns how many layers do.

        ``statistics``: batch norms of training layers update their running statistics and
        dropout works; otherwise the whole net stays in eval mode.
        """
        self.module.train(statistics)
        count = 0
        for name, layer in self.module.named_modules():
            own = list(layer.parameters(recurse=False))
            if not own:
                continue
            active = self.trains(name, epoch)
            count += active
            for parameter in own:
                parameter.requires_grad_(active)
            if not active:
                layer.eval()  # a frozen batch norm keeps its statistics
        return count

    def groups(self) -> list[dict[str, object]]:
        """Optimizer parameter groups: head and backbone, with and without weight decay.

        Biases and the scales of norms (rank 1) get none.
        """
        chosen: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, layer in self.module.named_modules():
            for parameter in layer.parameters(recurse=False):
                if name in self._start:
                    key = (name == self.head, parameter.dim() > 1)
                    chosen.setdefault(key, []).append(parameter)
        return [
            {
                "params": _unique(parameters),
                "weight_decay": self.settings.weight_decay if decays else 0.0,
                "scale": 1.0 if is_head else self.settings.backbone_scale,
            }
            for (is_head, decays), parameters in chosen.items()
        ]


def _unique(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(parameters))


def _execution_order(module: nn.Module, example: torch.Tensor) -> list[str]:
    """Modules with parameters of their own, in the order of their first call."""
    ran: dict[str, None] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _m, _i, name=name: ran.setdefault(name))
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    # A weight that is used without its module's forward (attention's output layer) comes last.
    named = [
        n for n, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None
    ]
    return [*ran, *(name for name in named if name not in ran)]
