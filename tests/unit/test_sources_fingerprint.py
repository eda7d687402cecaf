"""Every child process must build the same net, whatever was imported before."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

from converters.jobs import SourceRequest
from converters.sources import keras_models
from converters.sources.fingerprint import fingerprint, require_same
from converters.sources.load import load_source
from edge_runtime.contract.errors import SourceError


def drawn(seed: int, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, width, 3), norm=nn.BatchNorm2d(width), head=nn.Linear(width, 9)
        )
    )


def test_the_same_net_passes_and_so_does_one_with_other_last_digits() -> None:
    found = fingerprint(drawn(0))
    again = drawn(0)
    require_same(again, found)
    with torch.no_grad():
        for value in again.parameters():
            value.mul_(1 + 1e-6)
    require_same(again, found)
    require_same(again, ())  # nobody knows


@pytest.mark.parametrize("width", [4, 64, 512])
def test_another_draw_of_the_same_distribution_is_refused(width: int) -> None:
    found = fingerprint(drawn(0, width))
    for seed in range(1, 6):
        with pytest.raises(SourceError, match="other weights in each process"):
            require_same(drawn(seed, width), found)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(SourceError):
        require_same(nn.Linear(3, 3), fingerprint(drawn(0)))


def test_a_keras_net_is_the_same_whatever_its_imports_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = SourceRequest(
        source="keras:MobileNetV2", weights="random:3", input_height=32, input_width=32
    )
    first = fingerprint(load_source(request).module)
    load = keras_models._keras

    def load_and_draw() -> object:
        random.random()  # as an import does that another process has behind it
        torch.rand(7)
        return load()

    monkeypatch.setattr(keras_models, "_keras", load_and_draw)
    require_same(load_source(request).module, first)
