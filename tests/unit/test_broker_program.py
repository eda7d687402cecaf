"""Loading and running an exported program: what is refused, and what each image gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.executors.base import BatchItem
from broker.executors.program import TorchProgram
from broker.models.servable import open_servable
from edge_runtime.contract import errors as e
from edge_runtime.contract.manifest import ReferenceRecord
from tests.support import broker_images as images
from tests.support.servables import shared_servable, tiny_net, write_servable


@pytest.fixture(scope="module")
def program() -> TorchProgram:
    return TorchProgram.load(open_servable(shared_servable()), "cpu")


def other_record() -> ReferenceRecord:
    manifest = open_servable(shared_servable()).manifest
    return ReferenceRecord(
        task=manifest.task,
        preprocess=manifest.preprocess,
        inputs=manifest.model.outputs,
        outputs=manifest.model.outputs,
    )


def net_that(behavior: str):
    """A module that goes wrong in one way."""
    import torch

    class Odd(torch.nn.Module):
        def forward(self, batch):
            scores = batch.mean((2, 3)).repeat(1, 2)[:, :5]
            if behavior == "gives two tensors":
                return scores, scores
            if behavior == "gives no tensor":
                return scores, 3
            if behavior == "gives four classes":
                return scores[:, :4]
            return scores * float("nan")

    return Odd().eval()


@pytest.mark.parametrize(
    ("harm", "expected", "says"),
    [
        ("other record", e.ManifestError, "export it again"),
        ("no record", e.ManifestError, "holds no"),
        ("static batch", e.ModelLoadError, "dynamic batch axis"),
        ("gives two tensors", e.ModelLoadError, r"gives \[1, 5\], \[1, 5\] for a batch of 1"),
        ("gives no tensor", e.ModelLoadError, "no tensor"),
        ("gives four classes", e.ModelLoadError, r"its manifest says \[1, 5\]"),
    ],
)
def test_a_program_that_is_not_what_its_manifest_says_does_not_load(
    tmp_path: Path, harm: str, expected: type[e.NearfarError], says: str
):
    folder = write_servable(
        tmp_path / "tiny",
        net_that(harm) if harm.startswith("gives") else tiny_net(),
        record=other_record() if harm == "other record" else None,
        with_record=harm != "no record",
        dynamic_batch=harm != "static batch",
    )
    with pytest.raises(expected, match=says):
        TorchProgram.load(open_servable(folder), "cpu")


def test_junk_does_not_load_and_no_traceback_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    servable = open_servable(write_servable(tmp_path / "tiny", tiny_net()))
    servable.program_path.write_bytes(b"junk")
    with pytest.raises(e.ModelLoadError, match="cannot load the program of 'tiny'"):
        TorchProgram.load(servable, "cpu")
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_a_model_that_answers_nan_is_an_inference_error(tmp_path: Path):
    folder = write_servable(tmp_path / "tiny", net_that("gives NaN"))
    program = TorchProgram.load(open_servable(folder), "cpu")
    (result,) = program.run([BatchItem(images.png())])
    assert isinstance(result, e.InferenceError)
    assert "NaN" in result.detail


def test_signs_of_life_come_after_each_image_after_the_model_and_after_each_answer(
    program: TorchProgram,
):
    signs = []
    program.run([BatchItem(images.png())] * 3, lambda: signs.append(1))
    assert len(signs) == 3 + 1 + 3


def test_an_unforeseen_failure_costs_one_image_and_names_nothing(
    program: TorchProgram, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from edge_runtime.contract.imaging import decode_scaled

    poison = images.png(1)

    def failing(data: bytes, *others):
        if data == poison:
            raise ZeroDivisionError("/secret/path")
        return decode_scaled(data, *others)

    monkeypatch.setattr("broker.executors.decoding.decode_scaled", failing)
    good, bad = program.run([BatchItem(images.png(0)), BatchItem(poison)])
    assert not isinstance(good, e.NearfarError)
    assert isinstance(bad, e.BrokerFault)
    assert "/secret" not in bad.detail
    assert "ZeroDivisionError" in caplog.text


def test_a_program_moves_to_its_device_with_all_its_constants(tmp_path: Path):
    """On torch's meta device, which every machine has: a tensor left behind would not mix."""
    import torch

    from broker.executors.runtimes.eager import TorchRuntime

    class WithConstant(torch.nn.Module):
        def forward(self, batch):
            offsets = torch.arange(5, dtype=torch.float32)
            return batch.mean((2, 3)).repeat(1, 2)[:, :5] + offsets

    folder = write_servable(tmp_path / "tiny", WithConstant().eval())
    exported = torch.export.load(folder / "model.pt2")
    runtime = TorchRuntime(exported, "meta", "fp32")
    answer = runtime._module(torch.zeros(3, 3, 32, 32, device="meta"))
    assert answer.device.type == "meta"
    assert tuple(answer.shape) == (3, 5)
