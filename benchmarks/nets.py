"""Small nets of every task, as SOURCE: ``benchmarks/nets.py:NAME``.

Each factory gives a fresh ``nn.Module`` in eval mode, the same one every time: its weights
come from a fixed seed, drawn without touching torch's global generator state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "dcgan_generator",
    "espcn",
    "small_cnn",
    "small_cnn_224",
    "style_transfer",
    "tiny_detector",
    "tiny_segmenter",
    "vae",
    "vae_decoder",
]

N = TypeVar("N", bound=nn.Module)


def _seeded(build: Callable[[], N], seed: int) -> N:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class SmallCnn(nn.Module):
    """Classification. ``[B, channels, S, S]`` to logits ``[B, classes]``."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(channels, width, stride=2),
            _conv(width, 2 * width),
            nn.MaxPool2d(2),
            _conv(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).mean((2, 3)))


def small_cnn() -> nn.Module:
    """Ten classes of gray 28x28 images."""
    return _seeded(lambda: SmallCnn(1, 8, 10), 11)


def small_cnn_224() -> nn.Module:
    """Ten classes of 224x224 photos."""
    return _seeded(lambda: SmallCnn(3, 16, 10), 12)


class Generator(nn.Module):
    """Generation, as in DCGAN: latents ``[B, L, 1, 1]`` to images ``[B, 3, 64, 64]`` in -1..1."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [latent, 8 * width, 4 * width, 2 * width, width]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            stride, padding = (1, 0) if number == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        layers += [nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.layers(latent)


def dcgan_generator() -> nn.Module:
    """64x64 color images from ``--latent 100,1,1``."""
    return _seeded(lambda: Generator(100, 16), 13)


class Decoder(nn.Module):
    """Latents ``[B, L]`` to images ``[B, 3, 64, 64]`` in 0..1."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.expand = nn.Linear(latent, 4 * width * 64)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.layers(self.expand(latent).reshape(-1, 4 * self.width, 8, 8))


class Vae(nn.Module):
    """Reconstruction: image ``[B, 3, 64, 64]`` to (image, mean, log-variance).

    In eval mode the decoder gets the mean; while training it gets a sample around it.
    """

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.mean = nn.Linear(4 * width * 64, latent)
        self.log_variance = nn.Linear(4 * width * 64, latent)
        self.decoder = Decoder(latent, width)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.encoder(image)
        mean, log_variance = self.mean(features), self.log_variance(features)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(latent), mean, log_variance


def vae() -> nn.Module:
    """64x64 color images through 32 numbers."""
    return _seeded(lambda: Vae(32, 16), 14)


def vae_decoder() -> nn.Module:
    """The decoder of ``vae`` alone, as a generator of ``--latent 32``."""
    whole = vae()
    assert isinstance(whole, Vae)
    return whole.decoder


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.body(features)


class StyleTransfer(nn.Module):
    """Image to image, same size: downsample, residual blocks, transposed convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 9, padding=4),
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.InstanceNorm2d(2 * width, affine=True),
            nn.ReLU(),
            _Residual(2 * width),
            _Residual(2 * width),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(),
            nn.Conv2d(width, 3, 9, padding=4),
            nn.Sigmoid(),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def style_transfer() -> nn.Module:
    """Any even size; answers 0..1."""
    return _seeded(lambda: StyleTransfer(8), 15)


class Espcn(nn.Module):
    """Super-resolution: ``[B, 3, H, W]`` to ``[B, 3, 2H, 2W]``, by pixel shuffle.

    The net adds detail to the image enlarged by nearest neighbor.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.interpolate(image, scale_factor=2.0, mode="nearest") + 0.1 * self.layers(image)


def espcn() -> nn.Module:
    """Twice the size; takes and answers 0..1."""
    return _seeded(lambda: Espcn(32), 16)


class Segmenter(nn.Module):
    """Scores ``[B, classes, H, W]`` for images ``[B, 3, H, W]``, H and W multiples of 4."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.down = nn.Sequential(_conv(3, width, stride=2), _conv(width, 2 * width, stride=2))
        self.middle = _conv(2 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.middle(self.down(image)))
        return F.interpolate(scores, scale_factor=4.0, mode="bilinear", align_corners=False)


def tiny_segmenter() -> nn.Module:
    """Three classes."""
    return _seeded(lambda: Segmenter(8, 3), 17)


class Heads(nn.Module):
    """Detection: one anchor for each cell of a stride-8 grid."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            _conv(3, width, stride=2), _conv(width, 2 * width, stride=2),
            _conv(2 * width, 2 * width, stride=2),
        )  # fmt: skip
        self.boxes = nn.Conv2d(2 * width, 4, 1)
        self.scores = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(image)
        deltas = self.boxes(features).flatten(2).transpose(1, 2)
        return deltas, self.scores(features).flatten(2).transpose(1, 2)


def tiny_detector(size: int = 64) -> object:
    """Two classes in ``size`` x ``size`` pixels: a ``converters.sources.Detector``."""
    import numpy as np

    from converters.sources import Detector

    centers = np.arange(size // 8, dtype=np.float32) * 8 + 4
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centers, centers, indexing="ij"))
    anchors = np.stack([x - 12, y - 12, x + 12, y + 12], axis=1)
    return Detector(
        module=_seeded(lambda: Heads(8, 2), 18), anchors=anchors, classes=2, activation="sigmoid"
    )
