"""The zoo: a small and a large digit classifier, trained here, with nothing to download.

``digits-small`` is for the device, ``digits-large`` for the broker. Both read the same
photos; the large one sees nine times the pixels and is clearly better.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from converters.zoo.digits import Progress
from converters.zoo.weights import WeightsRecord, ensure_weights
from edge_runtime.contract.preprocess import Preprocess, named
from edge_runtime.contract.tasks import ClassificationTask

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ZOO", "ZooModel"]

LABELS: Final = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooModel:
    """One model of the zoo. Whatever needs its weights trains them when they are missing."""

    name: str
    network: str
    """The class in ``converters.zoo.nets``."""
    labels: tuple[str, ...]
    preprocess: Preprocess
    input_size: int
    """Height and width of the input in pixels."""
    parameters: int

    def build(self) -> nn.Module:
        """The network in eval mode, with random weights. Imports torch."""
        from converters.zoo import nets

        network: nn.Module = getattr(nets, self.network)()
        return network.eval()

    def weights_path(self, progress: Progress | None = None) -> Path:
        """The checked safetensors file with the trained weights.

        Training takes about a minute. Raises ``ConfigError`` when the cache folder cannot
        be written, ``SourceError`` when training fails.
        """
        return ensure_weights(self.name, progress)[0]

    def record(self, progress: Progress | None = None) -> WeightsRecord:
        """Temperature and measured accuracy of the trained weights."""
        return ensure_weights(self.name, progress)[1]

    def temperature(self) -> float:
        """The temperature fitted on the calibration split."""
        return self.record().temperature

    def task(self) -> ClassificationTask:
        """The classification task, with the fitted temperature."""
        return ClassificationTask(classes=len(self.labels), temperature=self.temperature())


def _model(name: str, network: str, input_size: int, parameters: int) -> ZooModel:
    return ZooModel(
        name=name,
        network=network,
        labels=LABELS,
        preprocess=named("torchvision", input_size, input_size),
        input_size=input_size,
        parameters=parameters,
    )


ZOO: Final[dict[str, ZooModel]] = {
    model.name: model
    for model in (
        _model("digits-small", "DigitsSmall", 32, 12_962),
        _model("digits-large", "DigitsLarge", 96, 218_378),
    )
}
