"""Channels are evened out before they get 8 bits: the same answers, more steps for each."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from converters.ready import EQUALIZED, rounded_module
from converters.restore.sensitivity import simulated_sqnr_db
from converters.rewrites.equalize import apply_factors, equalize, find_factors

SAMPLES = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1


class Block(nn.Module):
    """An inverted residual: expand, depthwise, project, add; then pooling and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, width, 1)
        self.head = nn.Linear(width, 5)
        self.activation = nn.ReLU6()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        y = self.activation(self.depthwise(self.activation(self.expand(x))))
        x = x + self.project(y)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def uneven(module: nn.Module) -> nn.Module:
    """Channels of very different sizes, made up for by what reads them, as in trained nets."""
    generator = torch.Generator().manual_seed(5)
    for ends, width in (
        (("stem.out", "project.out", "expand.in", "head.in"), 8),
        (("expand.out", "depthwise.in"), 16),
        (("depthwise.out", "project.in"), 16),
    ):
        sizes = 10.0 ** (-1.5 * torch.rand(width, generator=generator))
        apply_factors(module, dict.fromkeys(ends, sizes))
    return module.eval()


def net(kind: type[nn.Module] = Block) -> nn.Module:
    torch.manual_seed(3)
    return uneven(kind())


def test_answers_stay_and_8_bits_hold_more_of_them() -> None:
    plain = net()
    changed = copy.deepcopy(plain)
    factors = equalize(changed, SAMPLES)
    assert set(factors) == {
        "stem.out", "expand.in", "expand.out", "depthwise.in", "depthwise.out", "project.in",
        "project.out", "head.in",
    }  # fmt: skip
    assert torch.equal(factors["stem.out"], factors["project.out"]), "added: one residual stream"
    with torch.no_grad():
        exact, answer = plain(SAMPLES), changed(SAMPLES)
    assert float((exact - answer).abs().max()) < 1e-4 * float(exact.abs().max())
    before, after = (
        simulated_sqnr_db(one, SAMPLES, activations_only=True) for one in (plain, changed)
    )
    assert after > before + 3.0


def test_no_tensor_leaves_its_range() -> None:
    plain = net()
    changed = copy.deepcopy(plain)
    apply_factors(changed, find_factors(plain, SAMPLES))

    def ends(module: Any) -> tuple[float, float]:
        with torch.no_grad():
            stem = module.stem(SAMPLES)
            return float(stem.min()), float(stem.max())

    low, high = ends(plain)
    assert ends(changed)[0] >= low * 1.0001
    assert ends(changed)[1] <= high * 1.0001


class Mixed(Block):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.stem(image))  # a factor does not pass through this
        y = torch.cat([self.expand(x), self.expand(x)], dim=1)[:, :16]  # called twice
        return self.head(self.project(F.relu(self.depthwise(y))).mean((2, 3)))


def test_factors_stop_at_what_is_not_linear_in_each_channel() -> None:
    factors = find_factors(net(Mixed), SAMPLES)
    assert set(factors) == {"depthwise.out", "project.in", "project.out", "head.in"}


class Tied(Block):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 8, 3, padding=1)
        self.again.weight = self.stem.weight

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head((self.stem(image) + self.again(image)).mean((2, 3)))


def test_a_weight_that_two_layers_share_stays() -> None:
    assert find_factors(net(Tied), SAMPLES) == {}


class Branches(Block):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image if float(image.sum()) > 0 else -image)


def test_a_model_that_cannot_be_traced_stays_as_it_is() -> None:
    module = net(Branches)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert equalize(module, SAMPLES) == {}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_channels_that_are_even_already_stay_as_they_are() -> None:
    torch.manual_seed(3)
    module = Block().eval()
    assert equalize(copy.deepcopy(module), 0.1 * SAMPLES) == {}


def test_a_layer_kept_in_floating_point_fits_its_evened_out_neighbors(tmp_path: Path) -> None:
    """Its own weight, with the factors of the tensors that it shares with rounded layers."""
    plain = net()
    changed = copy.deepcopy(plain)
    factors = equalize(changed, SAMPLES)
    rounded = copy.deepcopy(changed)
    rounded.get_submodule("project").weight.data.zero_()
    values = {name: value.contiguous() for name, value in rounded.state_dict().items()}
    values |= {EQUALIZED + name: factor for name, factor in factors.items()}
    save_file(values, tmp_path / "rounded.safetensors")
    source: Any = SimpleNamespace(module=plain)
    module, rewrites = rounded_module(
        source, tmp_path / "rounded.safetensors", SAMPLES.shape[1:], keep=("project",)
    )
    assert rewrites == ["equalize_channels", "round_weights"]
    with torch.no_grad():
        assert torch.allclose(module(SAMPLES), changed(SAMPLES), atol=1e-6)
