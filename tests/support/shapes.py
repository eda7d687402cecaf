"""Small pictures of four shapes, drawn here, and a small net that tells them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square", "triangle")

NET = """
import torch
from torch import nn


def block(inputs, outputs, stride, groups=1, act=nn.ReLU6):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        act(),
    )


class Net(nn.Module):
    def __init__(self, classes, act=nn.ReLU6):
        super().__init__()
        self.features = nn.Sequential(
            block(3, 8, 2, 1, act), block(8, 8, 1, 8, act), block(8, 16, 2, 1, act)
        )
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(16, classes)

    def forward(self, image):
        return self.classifier(self.dropout(self.features(image).amax((2, 3))))


def net():
    torch.manual_seed(0)
    return Net(4)


def uncapped():
    torch.manual_seed(0)
    return Net(4, nn.ReLU)


def net6():
    torch.manual_seed(0)
    return Net(6)
"""


def draw(kind: str, seed: int, side: int = 40) -> Image.Image:
    """One noisy shape; the same for the same arguments."""
    rng = np.random.default_rng([SHAPES.index(kind), seed])
    dark = tuple(int(value) for value in rng.integers(0, 120, 3))
    light = tuple(int(value) for value in rng.integers(130, 256, 3))
    picture = Image.new("RGB", (side, side), dark)
    pen = ImageDraw.Draw(picture)
    r = int(rng.integers(8, 14))
    x, y = (int(value) for value in rng.integers(r, side - r, 2))
    box = (x - r, y - r, x + r, y + r)
    if kind == "circle":
        pen.ellipse(box, fill=light)
    elif kind == "square":
        pen.rectangle(box, fill=light)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=light)
    else:
        pen.line(box, fill=light, width=4)
        pen.line((x - r, y + r, x + r, y - r), fill=light, width=4)
    noisy = np.asarray(picture).astype(int) + rng.integers(-12, 13, (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_shapes(
    folder: Path, count: int, *, kinds: tuple[str, ...] = SHAPES, first: int = 0
) -> Path:
    """``folder/<kind>/<number>.png``, ``count`` of each, from number ``first`` on."""
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(first, first + count):
            draw(kind, number).save(folder / kind / f"{number:03d}.png")
    return folder


def write_net(folder: Path) -> Path:
    """``nets.py`` with the factories ``net`` (4 classes), ``uncapped`` and ``net6``."""
    path = folder / "nets.py"
    path.write_text(NET)
    return path
