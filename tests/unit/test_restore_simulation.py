"""int8 as every format rounds it, simulated in float; and which layer suffers from it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from converters.restore.post_training import round_unfolded
from converters.restore.sensitivity import layer_sensitivity, simulated_sqnr_db
from converters.restore.simulate import (
    INPUT,
    QuantizedModel,
    fake_quantize_weight,
    snap_weights,
)
from converters.restore.tape import record
from converters.rewrites.compensate import compressible
from converters.rewrites.fold import fold_batch_norm
from converters.rewrites.rounding import round_weights, sample_count
from edge_runtime.contract.errors import SourceError


class Net(nn.Module):
    """Conv, BN, ReLU6; a residual branch; a functional ReLU; pooling; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem_norm(self.stem(image)))
        x = F.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for value in (net.stem_norm.weight, net.stem_norm.running_var):
            value.uniform_(0.5, 2.0)
        net.stem_norm.weight[3] *= -1.0
        net.stem_norm.bias.normal_()
        net.stem_norm.running_mean.normal_(0.0, 0.1)
    return net


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_results_are_stored_behind_the_activation_that_follows(
    net: Net, images: torch.Tensor
) -> None:
    tape = record(net, images[:1])
    names = [call.name for call in tape.calls]
    assert names == [
        "conv2d", "batch_norm", "relu6", "conv2d", "add", "relu", "mean", "linear",
    ]  # fmt: skip
    assert [names[index] for index in tape.stored] == ["relu6", "conv2d", "relu", "mean", "linear"]
    assert tape.layers == ("stem", "branch", "head")
    norm = tape.norm_after(0)
    assert norm is not None
    assert norm.norm is not None
    assert norm.norm["running_mean"] == "stem_norm.running_mean"


def test_rounding_a_weight_and_folding_its_batch_norm_commute(
    net: Net, images: torch.Tensor
) -> None:
    rounded = copy.deepcopy(net)
    rounded.stem.weight.data = fake_quantize_weight(net.stem.weight.detach())
    fold_batch_norm(rounded, images[:2])
    folded = copy.deepcopy(net)
    fold_batch_norm(folded, images[:2])
    wanted = fake_quantize_weight(folded.stem.weight.detach())
    assert not torch.allclose(folded.stem.weight, wanted, rtol=1e-5)
    torch.testing.assert_close(rounded.stem.weight, wanted, rtol=1e-5, atol=1e-7)


def test_weights_lie_on_255_steps_of_their_channel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded = fake_quantize_weight(weight)
    scale = weight.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) / 127
    steps = rounded / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert torch.equal(steps.round().abs().flatten(1).amax(1), torch.full((4,), 127.0))
    four = fake_quantize_weight(weight, 7)
    assert all(len(channel.unique()) <= 15 for channel in four)
    one = fake_quantize_weight(weight, 7, per_tensor=True)
    assert len(one.unique()) <= 15


def test_snapped_weights_survive_the_conversion_that_follows(
    net: Net, images: torch.Tensor
) -> None:
    """What ``convert --precision int8`` does to the weights is nothing any more."""
    snap_weights(QuantizedModel(net, images[:1]))
    with torch.no_grad():
        wanted = net(images)
        fold_batch_norm(net, images[:2])
        before = {name: value.clone() for name, value in net.state_dict().items()}
        assert round_weights(net, images) == 3
        for name in ("stem.weight", "branch.weight", "head.weight"):
            torch.testing.assert_close(net.state_dict()[name], before[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(net(images), wanted, rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_conversion_come_back_unfolded(net: Net, images: torch.Tensor) -> None:
    folded = copy.deepcopy(net)
    with torch.no_grad():
        fold_batch_norm(folded, images[:2])
        round_weights(folded, images)
        names = set(net.state_dict())
        assert round_unfolded(net, images) == 3
        torch.testing.assert_close(net(images), folded(images), rtol=1e-4, atol=1e-5)
    assert set(net.state_dict()) == names


def test_ranges_are_the_true_extremes_and_contain_zero(net: Net, images: torch.Tensor) -> None:
    model = QuantizedModel(net, images[:1])
    model.measure(images.split(4))
    assert model.ranges[INPUT] == (float(images.min()), float(images.max()))
    assert model.ranges[model.tape.stored[0]][1] <= 6.0
    assert set(model.ranges) == {INPUT, *model.tape.stored}


def test_rounding_costs_something_and_gradients_pass(net: Net, images: torch.Tensor) -> None:
    model = QuantizedModel(net, images[:1])
    model.measure([images])
    answer = model(images)
    exact = net(images)
    error = (answer - exact).detach().abs().max()
    assert 0 < float(error) < 0.1 * float(exact.detach().abs().max())
    answer.square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_the_model_itself_stays_as_it_is(net: Net, images: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = QuantizedModel(net, images[:1])
    model.measure([images])
    with torch.no_grad():
        model(images)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_four_bits_round_weights_alone(net: Net, images: torch.Tensor) -> None:
    model = QuantizedModel(net, images[:1], bits=4, activations=False)
    model.measure([images])
    with torch.no_grad():
        answer = model(images)
        snap_weights(model)
        assert torch.equal(answer, net(images))


def test_calls_that_depend_on_the_data_are_refused(images: torch.Tensor) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.layer(image)
            return torch.sigmoid(x) if float(image.mean()) > 0 else torch.tanh(x)

    model = QuantizedModel(Moody().eval(), torch.ones(1, 3, 4, 4))
    model.measure([torch.ones(2, 3, 4, 4)])
    with pytest.raises(SourceError, match="control flow depends on the data"):
        model(-torch.ones(2, 3, 4, 4))


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(SourceError, match="calls no convolution or linear layer"):
        record(nn.ReLU(), torch.rand(1, 3))


class Deep(nn.Module):
    """The third layer's channels differ by ``10 ** spread``; the fourth undoes it.

    The fourth is depthwise: its per-channel scales absorb the difference, so that only the
    one range of the third layer's output suffers.
    """

    def __init__(self, spread: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        shapes = [(3, 8, 1), (8, 8, 1), (8, 8, 1), (8, 8, 8)]
        self.layers = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False)
            for inputs, outputs, groups in shapes
        )
        self.head = nn.Linear(8, 4, bias=False)
        gain = torch.logspace(0, spread, 8).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            self.layers[2].weight *= gain
            self.layers[3].weight /= gain

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            image = F.relu(layer(image))
        return self.head(image.mean((2, 3)))


def test_the_hostile_layer_is_named_first(images: torch.Tensor) -> None:
    hostile, kind = Deep(3.0).eval(), Deep(0.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(hostile(images), kind(images), rtol=1e-4, atol=1e-5)
    order = layer_sensitivity(hostile, images)
    assert sorted(name for name, _ in order) == sorted(
        ["layers.0", "layers.1", "layers.2", "layers.3", "head"]
    )
    assert [figure for _, figure in order] == sorted(figure for _, figure in order)
    assert order[0][0] == "layers.2"
    assert order[1][1] - order[0][1] > 10, "far worse than any other"
    calm = dict(layer_sensitivity(kind, images))
    assert calm["layers.2"] - order[0][1] > 15


def test_keeping_the_hostile_layer_gives_the_answer_back(images: torch.Tensor) -> None:
    net = Deep(3.0).eval()
    nothing = simulated_sqnr_db(net, images)
    assert simulated_sqnr_db(net, images, ["head"]) < nothing + 3
    assert simulated_sqnr_db(net, images, ["layers.2"]) > nothing + 10


def test_sensitivity_is_deterministic_and_reports_progress(images: torch.Tensor) -> None:
    net = Deep(1.0).eval()
    told: list[tuple[int, int]] = []
    first = layer_sensitivity(net, images, lambda done, total: told.append((done, total)))
    assert first == layer_sensitivity(net, images)
    assert told == [(done, 5) for done in range(5)]


def test_a_model_with_several_outputs_is_judged_by_all(images: torch.Tensor) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.one = nn.Conv2d(4, 2, 1)
            self.two = nn.Conv2d(4, 3, 1)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = F.relu(self.body(image))
            return self.one(x), self.two(x)

    figures = dict(layer_sensitivity(Heads().eval(), images))
    assert set(figures) == {"body", "one", "two"}
    assert all(20 < figure < 80 for figure in figures.values())


def test_latents_without_positions_are_counted_like_images() -> None:
    assert sample_count((64, 32)) == 64
    assert sample_count((500, 100, 1, 1)) == 128
    assert sample_count((96, 3, 224, 224)) == 32


def test_a_very_wide_layer_lies_on_the_grid_too() -> None:
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    pixels = images[0].numel()
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(pixels, 5), nn.ReLU(), nn.Linear(5, 2)
    ).eval()
    wide = net[2]
    assert isinstance(wide, nn.Linear)
    assert "2" not in compressible(net)
    before = wide.weight.detach().clone()
    assert round_weights(net, images) == 3
    scale = wide.weight.abs().amax(1, keepdim=True) / 127
    steps = wide.weight / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert (wide.weight - before).abs().max() <= 0.501 * scale.max()
    assert not torch.equal(wide.weight, before)
