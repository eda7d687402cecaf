"""Model runtimes: each computes what PyTorch computes in fp32, or is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from broker.executors.base import BatchItem, LoadedModel
from broker.executors.program import TorchProgram
from broker.executors.runtimes.base import affine_of
from broker.executors.runtimes.choose import LEAST_SQNR_DB, sqnr_db
from broker.models.servable import open_servable
from edge_runtime.contract import errors as e
from edge_runtime.contract.preprocess import NAMED, Normalization, normalization_table
from edge_runtime.contract.tensors import TensorSpec
from tests.support import broker_images as images
from tests.support.images import encode
from tests.support.servables import shared_servable, tiny_net, write_servable


def needs_openvino() -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")


def scores(program: TorchProgram, batch: list[BatchItem]) -> list[list[float]]:
    found = []
    for outcome in program.run(batch):
        assert not isinstance(outcome, e.NearfarError)
        assert outcome.predictions is not None
        found.append([p.score for p in sorted(outcome.predictions, key=lambda p: p.index)])
    return found


BATCH = [BatchItem(images.png(number), 5) for number in range(6)]


@pytest.mark.parametrize(
    ("runtime", "precision", "tolerance"),
    [
        ("eager", "fp32", 1e-6),
        ("eager", "bf16", 0.02),
        ("openvino", "fp32", 1e-4),
        pytest.param("compile", "fp32", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_a_runtime_gives_the_scores_of_pytorch_in_fp32(
    runtime: str,
    precision: str,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if runtime == "openvino":
        needs_openvino()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    servable = open_servable(shared_servable())
    exact = TorchProgram.load(servable, "cpu", runtime="eager", precision="fp32")
    program = TorchProgram.load(servable, "cpu", runtime=runtime, precision=precision)
    assert (program.loaded.runtime, program.loaded.precision) == (runtime, precision)
    if (runtime, precision) != ("eager", "fp32"):
        assert program.loaded.sqnr_db is not None
        assert program.loaded.sqnr_db >= LEAST_SQNR_DB
    for given_scores, expected in zip(scores(program, BATCH), scores(exact, BATCH), strict=True):
        assert given_scores == pytest.approx(expected, abs=tolerance)


def net_that_bf16_ruins():
    """Subtracts two numbers that bfloat16 cannot tell apart."""
    import torch

    class Cancels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()
            self.base = torch.nn.Parameter(torch.full((5,), 4096.0))

        def forward(self, batch):
            return (self.inner(batch) + self.base) - self.base

    return Cancels().eval()


def test_a_precision_that_was_asked_for_and_ruins_the_model_is_refused_with_the_figure(
    tmp_path: Path,
):
    servable = open_servable(write_servable(tmp_path / "tiny", net_that_bf16_ruins()))
    with pytest.raises(e.ModelLoadError, match=r"eager in bf16 is -?\d+\.\d dB off fp32"):
        TorchProgram.load(servable, "cpu", precision="bf16")


def test_where_nothing_was_asked_for_it_falls_back_to_fp32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    servable = open_servable(write_servable(tmp_path / "tiny", net_that_bf16_ruins()))
    monkeypatch.setattr("broker.executors.runtimes.choose.cpu_has_amx", lambda: True)
    program = TorchProgram.load(servable, "cpu")
    assert (program.loaded.runtime, program.loaded.precision) == ("eager", "fp32")
    assert "fp32 instead of bf16" in caplog.text


def test_bf16_is_chosen_only_where_the_processor_has_amx(monkeypatch: pytest.MonkeyPatch):
    servable = open_servable(shared_servable())
    for has_amx, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(
            "broker.executors.runtimes.choose.cpu_has_amx", lambda found=has_amx: found
        )
        assert TorchProgram.load(servable, "cpu").loaded.precision == expected


def test_what_an_earlier_process_compared_is_taken_without_comparing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def compares(*_: object) -> float:
        raise AssertionError("compared again")

    monkeypatch.setattr("broker.executors.runtimes.choose._compare", compares)
    servable = open_servable(shared_servable())
    known = LoadedModel("eager", "bf16", 41.5)
    assert TorchProgram.load(servable, "cpu", known=known).loaded == known
    plain = LoadedModel("eager", "fp32")
    monkeypatch.setattr("broker.executors.runtimes.choose.cpu_has_amx", lambda: True)
    assert TorchProgram.load(servable, "cpu", known=plain).loaded == plain


def test_a_batch_that_was_begun_while_another_one_ran_gets_its_own_answers():
    program = TorchProgram.load(open_servable(shared_servable()), "cpu", precision="fp32")
    broken = BatchItem(images.png(9)[:200])
    later = [BATCH[4], broken, *BATCH[:3]]
    alone = [program.run(BATCH), program.run(later)]
    begun = program.begin(later)
    together = [program.run(BATCH), program.run(later, begun=begun)]
    assert list(map(repr, together)) == list(map(repr, alone))
    assert isinstance(together[1][1], e.ImageUnreadable)
    (single,) = program.run([broken], begun=program.begin([broken]))
    assert isinstance(single, e.ImageUnreadable)


def net_that_looks_beyond_its_table():
    """On an all-white image: an IndexError, where ``failing_net`` gives a RuntimeError."""
    import torch

    class Looks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()
            self.table = torch.nn.Parameter(torch.zeros(2))

        def forward(self, batch):
            white = (batch.amin((1, 2, 3)) >= 1.0).to(torch.int64) * 100
            return self.inner(batch) + self.table[white][:, None]

    return Looks().eval()


def test_what_a_model_raises_is_the_error_of_the_image_that_made_it_and_of_no_other(tmp_path: Path):
    servable = open_servable(write_servable(tmp_path / "tiny", net_that_looks_beyond_its_table()))
    program = TorchProgram.load(servable, "cpu", precision="fp32")
    white = BatchItem(encode(Image.new("RGB", (40, 40), "white")))
    outcomes = program.run([*BATCH[:3], white, *BATCH[3:]])
    failed = outcomes.pop(3)
    assert isinstance(failed, e.InferenceError)
    assert "IndexError" in failed.detail
    assert not any(isinstance(outcome, e.NearfarError) for outcome in outcomes)


def test_openvino_runs_with_the_stub_that_sends_nothing():
    """A child: the test process may have imported the real one."""
    needs_openvino()
    script = (
        "import sys\n"
        "from broker.executors.runtimes.openvino import _import_openvino\n"
        "_import_openvino()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "assert telemetry_utils.tm.__name__ == 'openvino.tools.ovc.telemetry_stub'\n"
        "assert 'openvino_telemetry.main' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_cuda_in_half_precision_gives_the_same_scores():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    servable = open_servable(shared_servable())
    exact = TorchProgram.load(servable, "cpu", precision="fp32")
    program = TorchProgram.load(servable, "cuda")
    assert program.loaded.precision in ("bf16", "fp16")
    for given_scores, expected in zip(scores(program, BATCH), scores(exact, BATCH), strict=True):
        assert given_scores == pytest.approx(expected, abs=0.02)


deviations = st.floats(0.01, 300.0)


@given(
    st.lists(st.tuples(st.floats(-300, 300), deviations), min_size=1, max_size=3),
    st.floats(0.1, 300.0),
    st.sampled_from(["NCHW", "NHWC"]),
)
def test_one_product_and_one_sum_stay_within_their_rounding_of_the_contracts_table(
    channels: list[tuple[float, float]], scale: float, layout: str
):
    record = Normalization(
        scale=scale, mean=tuple(m for m, _ in channels), std=tuple(s for _, s in channels)
    )
    count = len(channels)
    shape = (1, count, 1, 256) if layout == "NCHW" else (1, 1, 256, count)
    spec = TensorSpec(name="x", dtype="float32", shape=shape, layout=layout)
    affine = affine_of(record, spec)
    values = np.arange(256, dtype=np.float32)
    pixels = np.broadcast_to(values if layout == "NCHW" else values[:, None], shape)
    normalized = pixels * affine.scale + affine.shift
    table = normalization_table(record).reshape(count, 256)
    expected = table[None, :, None, :] if layout == "NCHW" else table.T[None, None]
    bound = 2.0**-22 * (np.abs(pixels * affine.scale) + np.abs(affine.shift)) + 1e-37
    assert (np.abs(normalized - expected) <= bound).all()


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_named_normalizations_are_off_the_table_by_less_than_a_millionth_of_their_range(
    name: str,
):
    record = NAMED[name][1]
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 3, 1, 256), layout="NCHW")
    affine = affine_of(record, spec)
    values = np.arange(256, dtype=np.float32)[None]
    table = normalization_table(record)
    normalized = (values * affine.scale[:, 0] + affine.shift[:, 0]).reshape(3, 256)
    assert np.abs(normalized - table).max() <= 1e-6 * np.ptp(table)


def test_sqnr_counts_nan_and_another_shape_as_no_signal():
    ones = np.ones((2, 3), dtype=np.float32)
    assert sqnr_db(ones, ones) == 200.0
    assert sqnr_db(ones, 0.9 * ones) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(ones, np.full((2, 3), np.nan)) == -200.0
    assert sqnr_db(ones, np.ones((3, 2))) == -200.0
