"""Train one network of the zoo: ``python -m converters.zoo.train NAME OUT.safetensors``.

A process of its own, so that its seeds, its single thread and torch's deterministic mode
touch nobody else. Prints progress as JSON lines on stdout. The same recipe on the same
torch and CPU gives the same weights, bit for bit.

Training happens in two stages. First on crops around the digit: cheap, and the strokes
are learned fast. Then on whole photos, where the digit must be told from the clutter.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from converters.zoo import nets
from converters.zoo.digits import Progress, Split, indices, load_scans, photo_seed, render
from converters.zoo.photo import Scene, draw_scene, rasterize
from converters.zoo.weights import WeightsRecord, save_weights
from edge_runtime.contract import preprocess
from edge_runtime.contract.errors import SourceError
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.preprocess import Preprocess

__all__ = ["RECIPES", "Recipe", "evaluate", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every number that training depends on."""

    network: type[torch.nn.Module]
    input_size: int
    render_side_px: int
    """Training photos are rasterized at this shorter side, then pre-processed as usual."""
    copies: int
    """Photos of each training scan."""
    crop_epochs: int
    crop_px: int
    photo_epochs: int
    batch: int = 32
    learning_rate: float
    weight_decay: float = 0.05
    seed: int = 20
    least_accuracy: float
    """Below this on the test split, something is broken, and nothing is saved."""


RECIPES: Final[dict[str, Recipe]] = {
    "digits-small": Recipe(
        network=nets.DigitsSmall,
        input_size=32,
        render_side_px=64,
        copies=6,
        crop_epochs=4,
        crop_px=20,
        photo_epochs=4,
        learning_rate=0.006,
        least_accuracy=0.80,
    ),
    "digits-large": Recipe(
        network=nets.DigitsLarge,
        input_size=96,
        render_side_px=128,
        copies=4,
        crop_epochs=5,
        crop_px=56,
        photo_epochs=2,
        learning_rate=0.004,
        least_accuracy=0.94,
    ),
}

_TEMPERATURE_COPIES: Final = 4
"""Photos of each calibration scan that set the temperature."""


def _silent(message: str, done: int, total: int) -> None:
    """Report nothing."""


def train(
    name: str,
    record: Preprocess,
    *,
    recipe: Recipe | None = None,
    progress: Progress = _silent,
) -> tuple[torch.nn.Module, WeightsRecord]:
    """Train a network, fit its temperature, and measure it on the test photos.

    Sets torch's seed, thread count and deterministic mode for the whole process. Raises
    ``SourceError`` when the result is far worse than it must be.
    """
    recipe = recipe or RECIPES[name]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    network = recipe.network().to(memory_format=torch.channels_last)
    _fit(network, record, recipe, progress)
    network = network.to(memory_format=torch.contiguous_format).eval()

    _, digits = load_scans()
    temperature = _fit_temperature(network, record, recipe)
    photos = indices("test")
    pixels = _photos("test", record, progress)
    accuracy = float((evaluate(network, record, pixels).argmax(axis=1) == digits[photos]).mean())
    if accuracy < recipe.least_accuracy:
        raise SourceError(
            f"training {name} reached only {accuracy:.1%} on the test split, "
            f"{recipe.least_accuracy:.0%} is the least: check the torch installation"
        )
    return network, WeightsRecord(
        name=name, temperature=temperature, test_accuracy=accuracy, test_photos=len(photos)
    )


def evaluate(
    network: torch.nn.Module, record: Preprocess, pixels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Logits float32 ``[N, 10]`` of pre-processed uint8 RGB ``[N, S, S, 3]``."""
    table = preprocess.normalization_table(record.normalization)
    answers = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 64):
            part = pixels[start : start + 64]
            channels = np.stack([table[c][part[:, :, :, c]] for c in range(3)], axis=1)
            answers.append(network(torch.from_numpy(channels)).numpy())
    return np.concatenate(answers)


def _fit(network: torch.nn.Module, record: Preprocess, recipe: Recipe, progress: Progress) -> None:
    """Minimize cross-entropy with AdamW and a one-cycle learning rate."""
    _, digits = load_scans()
    scans = indices("train") * recipe.copies
    pixels, centers = _training_set(record, recipe, progress)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(digits[scans])
    mean = torch.tensor(record.normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(record.normalization.std).view(1, 3, 1, 1)
    epochs = recipe.crop_epochs + recipe.photo_epochs
    steps = len(images) // recipe.batch
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=epochs * steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
            batch = images[chosen]
            if epoch < recipe.crop_epochs:
                batch = _crop(batch, centers[chosen], recipe.crop_px, generator)
            batch = (batch.float().div_(record.normalization.scale) - mean) / std
            batch = _vary_exposure(batch, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(_logits(network, batch), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 16 == 0:
                progress("training", epoch * steps + step, epochs * steps)


def _logits(network: Any, batch: torch.Tensor) -> torch.Tensor:
    """The network's answer at any input size: its pooling is a max over the whole map."""
    return network.classifier(network.features(batch).amax(dim=(2, 3)))


def _crop(
    batch: torch.Tensor, centers: torch.Tensor, side: int, generator: torch.Generator
) -> torch.Tensor:
    """A square around each digit, off center by up to an eighth of its side."""
    slack = side // 8
    jitter = torch.randint(-slack, slack + 1, centers.shape, generator=generator)
    corners = (centers + jitter - side // 2).clamp(0, batch.shape[2] - side)
    return torch.stack(
        [
            image[:, top : top + side, left : left + side]
            for image, (top, left) in zip(batch, corners.tolist(), strict=True)
        ]
    )


def _vary_exposure(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another contrast and brightness for each image."""
    shape = (len(batch), 1, 1, 1)
    gain = torch.empty(shape).uniform_(0.8, 1.2, generator=generator)
    offset = torch.empty(shape).uniform_(-0.3, 0.3, generator=generator)
    return batch * gain + offset


def _training_set(
    record: Preprocess, recipe: Recipe, progress: Progress
) -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Pre-processed training photos uint8 ``[N, S, S, 3]`` and digit centers ``[N, 2]``."""
    pixels, centers = [], []
    total = len(indices("train")) * recipe.copies
    copies = range(1, 1 + recipe.copies)
    for done, (scene, image) in enumerate(_small_photos("train", copies, record, recipe)):
        pixels.append(image)
        centers.append(_center(scene, recipe.input_size))
        if done % 64 == 0:
            progress("rendering training photos", done, total)
    return np.stack(pixels), torch.tensor(centers)


def _small_photos(
    split: Split, copies: Sequence[int], record: Preprocess, recipe: Recipe
) -> Iterator[tuple[Scene, NDArray[np.uint8]]]:
    """Photos rasterized small, pre-processed: what full-size ones look like to the net."""
    scans, _ = load_scans()
    for copy in copies:
        for index in indices(split):
            scene = draw_scene(photo_seed(index, copy))
            photo = rasterize(scene, scans[index], recipe.render_side_px)
            yield scene, preprocess.apply_uint8(record, photo)


def _center(scene: Scene, size: int) -> tuple[int, int]:
    """Row and column of the digit's middle once the photo is cropped to ``size``."""
    x = sum(corner[0] for corner in scene.corners) / 4
    y = sum(corner[1] for corner in scene.corners) / 4
    left = (max(scene.aspect, 1.0) - 1.0) / 2
    top = (max(1.0 / scene.aspect, 1.0) - 1.0) / 2
    return round((y - top) * size), round((x - left) * size)


def _photos(split: Split, record: Preprocess, progress: Progress) -> NDArray[np.uint8]:
    """The JPEG photos of a split, decoded and pre-processed as on a device."""
    scans, _ = load_scans()
    chosen = indices(split)
    pixels = []
    for done, index in enumerate(chosen):
        photo = decode_image(render(scans[index], photo_seed(index)))
        pixels.append(preprocess.apply_uint8(record, photo))
        progress(f"measuring on {split} photos", done, len(chosen))
    return np.stack(pixels)


def _fit_temperature(network: torch.nn.Module, record: Preprocess, recipe: Recipe) -> float:
    """The temperature of least cross-entropy on the calibration split, to 1 %.

    One scalar for all logits, found by a scan of its logarithm (Guo et al., ICML 2017).
    """
    _, digits = load_scans()
    copies = range(1, 1 + _TEMPERATURE_COPIES)
    pixels = np.stack([image for _, image in _small_photos("calib", copies, record, recipe)])
    truth = np.tile(digits[indices("calib")], _TEMPERATURE_COPIES)
    logits = evaluate(network, record, pixels).astype(np.float64)
    best, least = 1.0, math.inf
    for exponent in range(-150, 151):
        temperature = round(1.01**exponent, 4)
        scaled = logits / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        log_scores = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        entropy = float(-log_scores[np.arange(len(truth)), truth].mean())
        if entropy < least:
            best, least = temperature, entropy
    return best


def _print_progress(message: str, done: int, total: int) -> None:
    line = json.dumps({"message": message, "done": done, "total": total})
    print(line, flush=True)  # noqa: T201  # the parent reads it


def main() -> None:
    """Train, then write the weights file named on the command line."""
    from converters.zoo import ZOO

    name, path = sys.argv[1], Path(sys.argv[2])
    network, record = train(name, ZOO[name].preprocess, progress=_print_progress)
    tensors = {key: value.numpy() for key, value in network.state_dict().items()}
    save_weights(path, tensors, record)


if __name__ == "__main__":
    main()
