"""Parts of fine-tuning: the head, the schedule, checkpoints, what is written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from converters.finetune.average import MovingAverage
from converters.finetune.checkpoint import (
    Identity,
    State,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from converters.finetune.head import find_head, replace_head
from converters.finetune.objective import distillation, evaluate
from converters.finetune.output import FILES, open_folder, preprocess_toml
from converters.finetune.run import Tuning
from converters.finetune.settings import DataRecord
from converters.finetune.stages import Stages, learning_rate
from converters.preprocessing import declared
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.preprocess import (
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    named,
)


class Convolutional(nn.Module):
    """SqueezeNet's form: a 1x1 convolution, ReLU and pooling give the classes."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3, padding=1)  # as many outputs as classes: no head
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(5, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.classifier(self.body(image)), 1)


class Mixed(nn.Module):
    """As many inputs as outputs in the layer before the head, which is named first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.body = nn.Linear(27, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(image.flatten(1))))


def test_a_linear_head_is_found_by_execution_not_by_name() -> None:
    assert find_head(Mixed().eval(), torch.rand(2, 3, 3, 3)) == ("head", 4)


def test_a_convolutional_head_is_found_and_replaced() -> None:
    net = Convolutional().eval()
    assert find_head(net, torch.rand(2, 3, 6, 6)) == ("classifier.1", 5)
    replace_head(net, "classifier.1", 9)
    assert net(torch.rand(2, 3, 6, 6)).shape == (2, 9)
    assert net.get_submodule("classifier.1").get_parameter("bias").abs().max() == 0


def test_looking_for_a_head_changes_nothing() -> None:
    net = Convolutional().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    find_head(net, torch.rand(2, 3, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_net_that_mixes_its_classes_afterwards_has_no_head() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.layer(image.flatten(1)) * self.scale

    with pytest.raises(SourceError, match="no Linear or Conv2d layer of the model gives its 4"):
        find_head(Scaled().eval(), torch.rand(2, 3, 2, 2))


def test_a_model_that_answers_a_map_is_no_classifier() -> None:
    with pytest.raises(SourceError, match=r"this model \[2, 4, 5, 5\]"):
        find_head(nn.Conv2d(3, 4, 1), torch.rand(2, 3, 5, 5))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(s, total=100, warmup=10, peak=2.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_the_backbone_thaws_from_the_head_down() -> None:
    net = deep()
    settings = Tuning(freeze="backbone", unfreeze_at=(3, 5), epochs=9).settle(delicate=True)
    stages = Stages(net, "6", torch.rand(2, 3, 4, 4), settings)
    assert stages.begin(1, statistics=True) == 1
    assert trained(net) == {"6.weight", "6.bias"}
    assert not net[1].training, "a frozen batch norm keeps its statistics"
    assert stages.begin(3, statistics=True) == 3
    assert trained(net) == {"6.weight", "6.bias", "3.weight", "3.bias", "2.weight", "2.bias"}
    assert net[3].training
    assert not net[1].training
    assert stages.begin(5, statistics=True) == 5
    assert len(trained(net)) == 10


def test_a_frozen_backbone_never_thaws_unasked() -> None:
    net = deep()
    settings = Tuning(freeze="backbone").settle(delicate=True)
    stages = Stages(net, "6", torch.rand(2, 3, 4, 4), settings)
    assert stages.begin(20, statistics=True) == 1


def test_norms_and_biases_do_not_decay_and_the_backbone_learns_slower() -> None:
    net = deep()
    groups = Stages(net, "6", torch.rand(2, 3, 4, 4), Tuning().settle(delicate=True)).groups()
    found = {
        id(parameter): (group["weight_decay"], group["scale"])
        for group in groups
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    assert len(found) == len(list(net.parameters()))
    assert found[id(net[6].weight)] == (0.05, 1.0)
    assert found[id(net[6].bias)] == (0.0, 1.0)
    assert found[id(net[0].weight)] == (0.05, 0.1)
    assert found[id(net[1].weight)] == (0.0, 0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unfreeze_at": (3,)}, "--unfreeze-at needs --freeze backbone"),
        ({"unfreeze_at": (5, 3), "freeze": "backbone"}, "write rising epochs"),
        ({"unfreeze_at": (99,), "freeze": "backbone"}, "from 2 to 20"),
        ({"distill": True}, "--distill needs --qat"),
        ({"optimizer": "lion"}, "a setting makes no sense"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Tuning(**options).settle(delicate=False)


@pytest.mark.parametrize(
    "record",
    [
        named("torchvision", 224, 192, resize_shorter=256),
        named("caffe", 33, 33),
        Preprocess(
            resize=ResizeExact(height=48, width=64, algorithm="resize_bilinear@1"),
            crop=CenterCrop(height=31, width=17),
            flip_horizontal=True,
            color="GRAY",
            normalization=Normalization(scale=127.5, mean=(1 / 3,), std=(0.1 + 0.2,)),
        ),
        Preprocess(
            resize=ResizeExact(height=5, width=6),
            normalization=Normalization(scale=1.0, mean=(0, 1, 2), std=(1, 1, 1)),
        ),
    ],
)
def test_the_written_preprocessing_is_the_declared_one(record: Preprocess, tmp_path: Path) -> None:
    path = tmp_path / "preprocess.toml"
    path.write_text(preprocess_toml(record))
    assert declared(str(path), height=None, width=None, resize_size=None) == record


def identity(**changes: Any) -> Identity:
    data = DataRecord(
        folder="/d", train=2, heldout=1, classes=2, split="seeded", heldout_sha256="a",
        train_sha256="b", duplicates=0,
    )  # fmt: skip
    return msgspec.structs.replace(
        Identity(
            source="x.py:net", source_sha256=None, weights="w", weights_sha256=None,
            preprocess="{}", settings=Tuning(threads=1).settle(delicate=False), data=data, tools={},
        ),
        **changes,
    )  # fmt: skip


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    weights = {"w": torch.arange(3.0)}
    save_checkpoint(
        path, identity(), State(epoch=4, model=weights, optimizer={"state": {}}, best_epoch=2)
    )
    state = load_checkpoint(path, identity())
    assert (state.epoch, state.best_epoch) == (4, 2)
    assert torch.equal(state.model["w"], weights["w"])
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, identity(), State(model={}, optimizer={}))
    other = identity(settings=Tuning(threads=1, seed=7, batch=8).settle(delicate=False))
    with pytest.raises(ConfigError, match="batch was 32, is 8; seed was 0, is 7"):
        load_checkpoint(path, other)
    with pytest.raises(ConfigError, match="nothing to --resume"):
        load_checkpoint(tmp_path / "none.pt", other)


def test_a_damaged_checkpoint_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, identity(), State(model={"w": torch.zeros(9)}, optimizer={}))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="is damaged"):
        load_checkpoint(path, identity())


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "checkpoint.pt"
    torch.save({"identity": Attack()}, path)
    with pytest.raises(ConfigError, match="is damaged"):
        load_checkpoint(path, identity())
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ConfigError, match="is damaged"):
        load_checkpoint(path, identity())
    assert not (tmp_path / "owned").exists()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_force_removes_nothing_but_what_a_run_writes(tmp_path: Path) -> None:
    output = tmp_path / "o"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for name in FILES:
        (output / name).write_text("old")
    with pytest.raises(ConfigError, match=r"exists: .*--resume to go on, or --force"):
        open_folder(output, force=False, resume=False)
    open_folder(output, force=True, resume=False)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_the_average_follows_and_steps_aside() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average = MovingAverage(net, 0.9)
    net.weight.data.fill_(1.0)
    average.update()
    assert float(average.values["weight"]) == pytest.approx(0.9), "decay 1/10 at first"
    with average.applied():
        assert float(net.weight.detach()) == pytest.approx(0.9)
    assert float(net.weight.detach()) == 1.0


def test_distillation_is_zero_for_equal_answers_and_the_formula_otherwise() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(distillation(teacher, teacher, 4.0)) == pytest.approx(0.0, abs=1e-7)
    student = torch.zeros(2, 2)
    p = torch.softmax(teacher / 2.0, dim=1)
    wanted = 4.0 * float((p * (p.log() - torch.tensor(0.5).log())).sum(1).mean())
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(wanted, rel=1e-5)


def test_held_out_figures_count_what_they_say() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    figures = evaluate(
        logits, objective="labels", labels=torch.tensor([0, 1, 1, 1]), teacher=teacher
    )
    assert (figures.top1, figures.agreement) == (0.75, 0.75)
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 1]))
    assert figures.loss == pytest.approx(float(wanted), rel=1e-6)
    same = evaluate(teacher, objective="teacher", labels=None, teacher=teacher)
    assert (same.top1, same.agreement, same.loss) == (None, 1.0, pytest.approx(0.0, abs=1e-9))
