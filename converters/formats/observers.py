"""An observer of torch.ao or torchao that quantizes a clipped range."""

from __future__ import annotations

from typing import Any

from converters.ranges import Histogram, RangeMethod

__all__ = ["clipping"]


def clipping(observer: Any, method: RangeMethod) -> Any:
    """The min/max observer class itself, or one that clips as ``method`` says.

    torch.ao's and torchao's observers are two class trees with the same methods.
    """
    if method.kind == "minmax":
        return observer
    import torch

    class Clipping(observer):
        """Gathers a histogram beside the minimum and maximum."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.histogram = Histogram()

        def forward(self, x: Any) -> Any:
            """Observe, and hand the tensor on."""
            self.histogram.observe(x.detach().float().numpy())
            return super().forward(x)

        def calculate_qparams(self) -> Any:
            """Scale and zero point of the clipped range."""
            low, high = self.histogram.bounds(method)
            return self._calculate_qparams(torch.tensor(low), torch.tensor(high))

    return Clipping
