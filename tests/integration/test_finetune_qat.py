"""Training with the formats' rounding: better than rounding afterwards, on unseen pictures."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from converters.finetune.run import Request, Tuning, finetune
from converters.finetune.settings import EpochReport
from converters.jobs import SourceRequest
from converters.restore.post_training import round_unfolded
from converters.restore.simulate import QuantizedModel
from converters.rewrites.fold import fold_batch_norm
from converters.rewrites.rounding import round_weights
from converters.sources import load_source
from edge_runtime.contract import preprocess
from tests.support.digits import nearfar
from tests.support.shapes import SHAPES, draw, write_net, write_shapes

pytestmark = pytest.mark.slow

FLOAT = Tuning(epochs=12, batch=16, learning_rate=0.02, crop_scale=0.7, patience=12, threads=1)
ROUNDED = dataclasses.replace(FLOAT, learning_rate=2e-3, distill=True)


class Quiet:
    def phase(self, message: str, done: int, total: int) -> None:
        pass

    def step(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        pass

    def epoch(self, report: EpochReport, epochs: int) -> None:
        pass


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def pixels(seeds: range) -> torch.Tensor:
    """float32 ``[N, 3, 32, 32]`` of shapes drawn here, pre-processed."""
    record = preprocess.named("torchvision", 32, 32)
    images = [
        preprocess.apply(record, np.asarray(draw(kind, seed))) for kind in SHAPES for seed in seeds
    ]
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


@dataclasses.dataclass
class Case:
    """A net trained in float, and pictures that no training saw."""

    source: SourceRequest
    pictures: Path
    folder: Path
    calibration: torch.Tensor
    unseen: torch.Tensor

    def module(self, weights: Path | None = None) -> Any:
        request = self.source
        if weights is not None:
            request = msgspec.structs.replace(request, weights=str(weights))
        return load_source(request).module

    def tune(self, name: str, tuning: Tuning) -> Any:
        output = self.folder / name
        report = finetune(
            Request(source=self.source, data=self.pictures, output=output, tuning=tuning), Quiet()
        )
        assert report.improved
        return self.module(output / "model.safetensors")

    def distance(self, module: Any, bits: int) -> tuple[float, float]:
        """KL from the float net's answers in nats, and agreement, of the rounded module."""
        model = QuantizedModel(module, self.calibration[:1], bits=bits, activations=bits == 8)
        model.measure([self.calibration])
        with torch.no_grad():
            wanted, answer = self.module()(self.unseen), model(self.unseen)
        gap = F.kl_div(
            answer.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        same = (answer.argmax(1) == wanted.argmax(1)).float().mean()
        return float(gap), float(same)


def unbalance(path: Path, spread: float) -> None:
    """Make the first layer's channels differ by ``10 ** spread``; the depthwise one undoes it.

    The float answers stay (ReLU commutes with a positive factor), but one 8-bit range for all
    channels leaves few steps to the small ones: the trouble of real depthwise nets.
    """
    state = load_file(path)
    gain = torch.logspace(0, spread, 8)
    for name in ("weight", "bias"):
        state[f"features.0.1.{name}"] *= gain
    state["features.1.0.weight"] /= gain.reshape(-1, 1, 1, 1)
    save_file(state, path)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("qat")
    pictures = write_shapes(folder / "shapes", 30)
    source = SourceRequest(
        source=f"{write_net(folder)}:uncapped", weights="random:0", preprocess="torchvision",
        input_height=32, input_width=32,
    )  # fmt: skip
    request = Request(source=source, data=pictures, output=folder / "float", tuning=FLOAT)
    assert finetune(request, Quiet()).improved
    unbalance(folder / "float/model.safetensors", 2.5)
    trained = msgspec.structs.replace(source, weights=str(folder / "float/model.safetensors"))
    return Case(
        source=trained,
        pictures=pictures,
        folder=folder,
        calibration=pixels(range(30)),
        unseen=pixels(range(1000, 1075)),
    )


def test_qat_beats_post_training_with_4_bits(case: Case) -> None:
    before, agreed_before = case.distance(case.module(), 4)
    tuned = case.tune("four", dataclasses.replace(ROUNDED, qat_bits=4))
    after, agreed_after = case.distance(tuned, 4)
    assert after < 0.7 * before, (before, after, agreed_before, agreed_after)
    assert agreed_after >= agreed_before


def test_qat_beats_post_training_with_8_bits(case: Case) -> None:
    """Against the weights that ``convert`` would choose, not against nearest rounding."""
    start = copy.deepcopy(case.module())
    with torch.no_grad():
        round_unfolded(start, case.calibration)
    before, agreed_before = case.distance(start, 8)
    tuned = case.tune("eight", dataclasses.replace(ROUNDED, qat_bits=8, learning_rate=3e-4))
    after, agreed_after = case.distance(tuned, 8)
    assert after < 0.85 * before, (before, after, agreed_before, agreed_after)
    assert agreed_after >= agreed_before


def test_the_weights_that_are_written_need_no_more_rounding(case: Case) -> None:
    """``convert --precision int8`` folds, rounds, and finds every integer in its place."""
    tuned = case.tune(
        "snapped", dataclasses.replace(ROUNDED, qat_bits=8, learning_rate=3e-4, epochs=3)
    )
    with torch.no_grad():
        wanted = tuned(case.unseen)
        fold_batch_norm(tuned, case.calibration[:2])
        round_weights(tuned, case.calibration)
        answer = tuned(case.unseen)
    assert float((answer - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_the_converted_file_answers_as_training_promised(case: Case, tmp_path: Path) -> None:
    """A real .tflite file, judged by ``verify`` on unseen pictures against the float net."""
    unseen = write_shapes(tmp_path / "unseen", 40, first=2000)
    tuning = dataclasses.replace(ROUNDED, qat_bits=8, learning_rate=3e-4)
    _, promised = case.distance(case.tune("file", tuning), 8)
    bundle, report = tmp_path / "qat.bundle", tmp_path / "qat.json"
    done = nearfar(
        "convert", case.source.source, "--weights", case.folder / "file" / "model.safetensors",
        "--preprocess", "torchvision", "--input-size", "32", "--to", "tflite",
        "--precision", "int8", "--calib", case.pictures, "-o", bundle, "--quiet",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    done = nearfar(
        "verify", bundle, "--eval", unseen, "--reference", case.source.source,
        "--weights", str(case.source.weights), "--json", report, "--quiet",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    (figures,) = json.loads(report.read_text())["variants"]
    assert figures["images"] == 160
    assert promised > 0.95
    assert figures["agreement"] >= promised - 0.03, "five images of 160: others than it promised on"
