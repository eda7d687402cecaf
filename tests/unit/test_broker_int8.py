"""int8 in OpenVINO: learned on photos, proved on others, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from broker.executors.base import BatchItem, LoadedModel, Precision, RuntimeName
from broker.executors.program import TorchProgram
from broker.executors.runtimes.calibration import LEAST_PHOTOS
from broker.executors.runtimes.choose import LEAST_INT8_SQNR_DB
from broker.executors.runtimes.openvino import _import_openvino
from broker.executors.runtimes.quantize import quantize
from broker.models.servable import open_servable
from broker.settings import build_settings
from edge_runtime.contract import errors as e
from edge_runtime.contract.wire import EncodedAnswer
from tests.support import broker_images as images
from tests.support.servables import shared_servable, tiny_net, write_servable

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(LEAST_PHOTOS):
        (folder / f"{number:02}.jpg").write_bytes(images.jpeg(number))
    return folder


def load(
    servable: Path, photos: Path | None, *, runtime: RuntimeName = "openvino", **asked: LoadedModel
) -> TorchProgram:
    return TorchProgram.load(
        open_servable(servable),
        "cpu",
        runtime=runtime,
        precision="int8",
        calibration=None if photos is None else str(photos),
        **asked,
    )


def test_the_answers_are_those_of_fp32_within_what_8_bits_can_say(photos: Path):
    program = load(shared_servable(), photos)
    assert (program.loaded.runtime, program.loaded.precision) == ("openvino", "int8")
    assert program.loaded.sqnr_db is not None
    assert program.loaded.sqnr_db >= LEAST_INT8_SQNR_DB
    exact = TorchProgram.load(open_servable(shared_servable()), "cpu", precision="fp32")
    batch = [BatchItem(images.png(100 + number), 5) for number in range(6)]
    off = []
    for given, expected in zip(program.run(batch), exact.run(batch), strict=True):
        assert isinstance(given, EncodedAnswer)
        assert isinstance(expected, EncodedAnswer)
        assert given.predictions is not None
        assert expected.predictions is not None
        scores = {one.index: one.score for one in expected.predictions}
        off += [abs(one.score - scores[one.index]) for one in given.predictions]
    assert 0.0 < max(off) < 0.03


def test_another_process_learns_and_compares_again(photos: Path):
    known = LoadedModel("openvino", "int8", 99.0)
    assert load(shared_servable(), photos, known=known).loaded.sqnr_db != 99.0


def net_that_8_bits_ruin():
    """Answers by the small pixels of an image with one number a million times theirs."""
    import torch

    class Drowned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()

        def forward(self, batch):
            loud = torch.nn.functional.pad(batch, (1, 0), value=1e6)
            return self.inner(loud)[:, :5] * 0 + self.quiet(loud)

        def quiet(self, loud):
            hidden = torch.relu(self.inner.first(loud))[:, :, :, 1:]
            return self.inner.head(torch.relu(self.inner.second(hidden)).mean((2, 3)))

    return Drowned().eval()


def test_a_model_that_does_not_bear_it_is_refused_with_the_figures(photos: Path, tmp_path: Path):
    servable = write_servable(tmp_path / "tiny", net_that_8_bits_ruin())
    with pytest.raises(
        e.ModelLoadError,
        match=r"int8 is -?\d+\.\d dB off fp32 and has the same best class for \d+% of 16 photos",
    ):
        load(servable, photos)


def test_it_is_learned_on_enough_photos_or_not_at_all(photos: Path, tmp_path: Path):
    with pytest.raises(e.ModelLoadError, match="pass --calibration"):
        load(shared_servable(), None)
    with pytest.raises(e.ModelLoadError, match=r"cannot read .*: FileNotFoundError"):
        load(shared_servable(), tmp_path / "none")
    with pytest.raises(e.ModelLoadError, match="has 0 photos, int8 needs 32"):
        load(shared_servable(), tmp_path)
    for path in photos.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "00-notes.txt").write_text("no photo")
    with pytest.raises(e.ModelLoadError, match=r"cannot calibrate with .*00-notes\.txt"):
        load(shared_servable(), tmp_path)


def test_it_is_for_openvino(photos: Path):
    with pytest.raises(e.ModelLoadError, match="pass --runtime openvino"):
        load(shared_servable(), photos, runtime="eager")


@pytest.mark.parametrize(
    ("precision", "calibration", "runtime", "message"),
    [
        ("int8", None, "openvino", "go together"),
        ("bf16", "photos", "openvino", "go together"),
        ("int8", "photos", "auto", "pass --runtime openvino"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_before_anything_loads(
    precision: Precision, calibration: str | None, runtime: RuntimeName, message: str
):
    with pytest.raises(e.ConfigError, match=message):
        build_settings(models=("m",), precision=precision, calibration=calibration, runtime=runtime)


def test_convolutions_by_group_and_products_are_quantized_and_what_multiplies_two_inputs_is_not():
    import torch

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = torch.nn.Conv2d(4, 4, 3, groups=4)
            self.pointwise = torch.nn.Conv2d(4, 6, 1)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, batch):
            rows = self.pointwise(torch.relu(self.depthwise(batch))).flatten(2).transpose(1, 2)
            return self.linear((rows @ rows.transpose(1, 2)) @ rows)

    torch.manual_seed(0)
    net = Mixed().eval()
    openvino = _import_openvino()
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(4)]
    exported = torch.export.export(net, (torch.from_numpy(inputs[0]),))
    model = openvino.convert_model(exported)
    assert quantize(openvino, model, inputs) == 3
    kinds = [operator.get_type_name() for operator in model.get_ordered_ops()]
    assert kinds.count("FakeQuantize") == 6  # what goes in and the weights, three times
    given = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.inference_mode():
        exact = net(torch.from_numpy(inputs[0])).numpy()
    noise = given([inputs[0]])[0] - exact
    assert 10 * np.log10((exact**2).sum() / (noise**2).sum()) > 20.0
