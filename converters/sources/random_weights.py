"""``--weights random:SEED``: weights that behave like trained ones as far as ranges go.

A batch norm fresh from its constructor claims mean 0 and variance 1 for activations that
have neither; over fifty layers a random net then fades to zero or overflows half precision,
and int8 ranges mean nothing. So its statistics are measured once, on smooth noise with the
1/f spectrum of photos. One thread, fixed seeds: every process gets the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.preprocess import Preprocess

__all__ = [
    "draw_blank_layers",
    "example_input",
    "random_seed",
    "set_seed",
    "settle_batch_norms",
]

_BATCH = 8
_PIXELS = 16 * 224 * 224
_MIN_IMAGES, _MAX_IMAGES = 16, 256
_GRIDS = (1, 2, 4, 8, 16, 32, 64)


def random_seed(weights: str | None) -> int | None:
    """SEED of ``random:SEED``; None for anything else. Raises ``ConfigError``."""
    if weights is None or not weights.startswith("random:"):
        return None
    number = weights.removeprefix("random:")
    if not (number.isascii() and number.isdigit() and len(number) <= 18):
        raise ConfigError(f"--weights {weights}: write random:SEED with a whole number")
    return int(number)


def set_seed(weights: str | None) -> None:
    """Seed every generator that a net may be drawn from: by ``random:SEED``, else by 0.

    Imports draw random numbers too, and which of them are still to come differs between child
    processes: seed behind them, right before the net is built.
    """
    import random

    import torch

    seed = random_seed(weights) or 0
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the one that libraries draw from


def example_input(
    shape: tuple[int, ...], preprocess: Preprocess | None, *, seed: int, count: int = 1
) -> Any:
    """``count`` inputs of ``shape``, float32 ``[count, *shape]``, from ``seed`` alone.

    Pre-processed smooth color noise, or for a generator (``preprocess`` None) normal
    latents.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if preprocess is None:
        return torch.randn((count, *shape), generator=generator)
    channels, height, width = shape
    noise = torch.zeros(count, channels, height, width)
    for grid in _GRIDS:
        if grid > max(height, width):
            break
        coarse = torch.randn((count, channels, grid, grid), generator=generator)
        # Colors of a photo go together: half of each pattern is shared by the channels.
        coarse = coarse + coarse.mean(dim=1, keepdim=True) * channels**0.5
        fine = torch.nn.functional.interpolate(
            coarse, size=(height, width), mode="bilinear", align_corners=False
        )
        noise += fine / grid**0.5
    contrast = 15.0 + 45.0 * torch.rand((count, 1, 1, 1), generator=generator)
    pixels = (127.5 + contrast * noise).clamp(0.0, 255.0)
    table = preprocess.normalization
    mean = torch.tensor(table.mean, dtype=torch.float32).reshape(1, -1, 1, 1)
    std = torch.tensor(table.std, dtype=torch.float32).reshape(1, -1, 1, 1)
    return (pixels / table.scale - mean) / std


def draw_blank_layers(module: Any, *, seed: int) -> int:
    """Draw the weights of layers that start as all zeros, in place; returns their number.

    A vision transformer's head is one: its net would answer zeros for every image, and
    nothing could be compared. Normal, with variance 1 / inputs, as other layers have.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    count = 0
    for layer in module.modules():
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        weight: Any = layer.weight
        if bool(weight.any()):
            continue
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = drawn * weight[0].numel() ** -0.5
        count += 1
    return count


def settle_batch_norms(
    module: Any, shape: tuple[int, ...], preprocess: Preprocess | None, *, seed: int
) -> int:
    """Measure the statistics of every batch norm of ``module``, in place.

    Running mean and variance become the averages over batches of ``example_input``.
    Returns the number of layers; everything else stays as it is.
    """
    import torch

    norms = [
        layer
        for layer in module.modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    if not norms:
        return 0
    area = shape[-1] * shape[-2] if preprocess is not None else 1
    count = max(_MIN_IMAGES, min(_MAX_IMAGES, _PIXELS // area)) // _BATCH * _BATCH
    batch = _BATCH if preprocess is not None else 64
    momenta = [layer.momentum for layer in norms]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on how many threads share them
    try:
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over the batches
            layer.train()
        with torch.no_grad():
            for start in range(0, count, batch):
                module(example_input(shape, preprocess, seed=seed + 1 + start, count=batch))
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
        torch.set_num_threads(threads)
    return len(norms)
