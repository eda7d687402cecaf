"""Fine-tuning for real: small pictures, a small net, every promise of ``nearfar finetune``."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.finetune.checkpoint import CHECKPOINT
from converters.finetune.run import Request, Tuning, finetune
from converters.finetune.settings import EpochReport, FinetuneReport
from converters.jobs import SourceRequest
from converters.sources import load_source
from edge_runtime.contract import preprocess
from edge_runtime.contract.errors import ConfigError, EvaluationError
from edge_runtime.contract.imaging import decode_image
from tests.support.digits import nearfar
from tests.support.shapes import SHAPES, draw, write_net, write_shapes

pytestmark = pytest.mark.slow

TUNING = Tuning(
    epochs=6, batch=16, learning_rate=0.02, crop_scale=0.7, patience=6, threads=1, warmup_epochs=0.5
)


class Quiet:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[EpochReport] = []

    def phase(self, message: str, done: int, total: int) -> None:
        pass

    def step(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        pass

    def epoch(self, report: EpochReport, epochs: int) -> None:
        self.reports.append(report)


class Power(Quiet):
    """Fails after an epoch, like a power cut."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def epoch(self, report: EpochReport, epochs: int) -> None:
        super().epoch(report, epochs)
        if report.epoch == self.last:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), 30)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_net(tmp_path_factory.mktemp("nets"))


def request_for(nets: Path, pictures: Path, output: Path, **changes: Any) -> Request:
    return dataclasses.replace(
        Request(
            source=SourceRequest(
                source=f"{nets}:net", weights="random:0", preprocess="torchvision",
                input_height=32, input_width=32,
            ),
            data=pictures,
            output=output,
            tuning=TUNING,
        ),
        **changes,
    )  # fmt: skip


def weights(output: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(output / "model.safetensors"))


def assert_equal_runs(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    reports = [json.loads((path / "report.json").read_text()) for path in (first, second)]
    for report in reports:
        for epoch in report["epochs"]:
            del epoch["seconds"]
        for key in ("seconds", "next_command", "verify_command"):
            del report[key]
    assert reports[0] == reports[1]


@pytest.fixture(scope="module")
def tuned(nets: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with a moving average and a thawing backbone."""
    output = tmp_path_factory.mktemp("tuned") / "o"
    report = finetune(request_for(nets, pictures, output), Quiet())
    assert report.improved
    return output


def test_it_learns_the_shapes_and_says_how_well(tuned: Path) -> None:
    report = msgspec.json.decode((tuned / "report.json").read_bytes(), type=FinetuneReport)
    best = report.epochs[report.best_epoch]
    assert best.top1 is not None
    assert best.top1 >= 0.7
    assert (report.data.train, report.data.heldout, report.data.split) == (96, 24, "seeded")
    assert [epoch.epoch for epoch in report.epochs] == list(range(len(report.epochs)))
    assert not (tuned / CHECKPOINT).exists(), "a finished run needs none"
    assert (tuned / "labels.txt").read_text().split() == list(SHAPES)


@pytest.mark.parametrize("stop", [0, 2])
def test_resume_equals_uninterrupted(
    nets: Path, pictures: Path, tuned: Path, tmp_path: Path, stop: int
) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    with pytest.raises(KeyboardInterrupt):
        finetune(request, Power(stop))
    assert (tmp_path / "o" / CHECKPOINT).is_file()
    assert not (tmp_path / "o" / "model.safetensors").exists()
    told = Quiet()
    finetune(dataclasses.replace(request, resume=True), told)
    assert told.reports[0].epoch == stop + 1
    assert_equal_runs(tmp_path / "o", tuned)


def test_resume_equals_uninterrupted_with_every_option(
    nets: Path, pictures: Path, tmp_path: Path
) -> None:
    tuning = dataclasses.replace(
        TUNING, ema_decay=0.9, freeze="backbone", unfreeze_at=(2, 3), rand_augment=1,
        optimizer="sgd", epochs=4,
    )  # fmt: skip
    whole = request_for(nets, pictures, tmp_path / "whole", tuning=tuning, head="replace")
    first = finetune(whole, Quiet())
    assert [epoch.trained_layers for epoch in first.epochs] == [0, 1, 4, 7, 7]
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, Power(2))
    second = finetune(dataclasses.replace(broken, resume=True), Quiet())
    assert [e.train_loss for e in first.epochs] == [e.train_loss for e in second.epochs]
    assert [e.loss for e in first.epochs] == [e.loss for e in second.epochs]


def test_resume_with_other_settings_or_data_is_refused(
    nets: Path, pictures: Path, tmp_path: Path
) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    with pytest.raises(KeyboardInterrupt):
        finetune(request, Power(0))
    other = dataclasses.replace(request, resume=True, tuning=dataclasses.replace(TUNING, seed=1))
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        finetune(other, Quiet())
    fewer = write_shapes(tmp_path / "fewer", 6)
    with pytest.raises(ConfigError, match="belongs to another run: folder was"):
        finetune(dataclasses.replace(request, resume=True, data=fewer), Quiet())


def test_minutes_stop_in_time_and_resume_goes_on(
    nets: Path, pictures: Path, tuned: Path, tmp_path: Path
) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    report = finetune(dataclasses.replace(request, minutes=1e-4), Quiet())
    assert (report.stopped, report.improved) == ("minutes", False)
    assert (tmp_path / "o" / CHECKPOINT).is_file()
    finetune(dataclasses.replace(request, resume=True), Quiet())
    assert_equal_runs(tmp_path / "o", tuned)


def test_early_stopping_keeps_the_best(nets: Path, pictures: Path, tmp_path: Path) -> None:
    """A rate that ruins the net again: the best epoch's weights are what is written."""
    tuning = dataclasses.replace(TUNING, epochs=40, patience=3, learning_rate=0.1)
    report = finetune(request_for(nets, pictures, tmp_path / "o", tuning=tuning), Quiet())
    assert report.stopped == "patience"
    assert len(report.epochs) - 1 == report.best_epoch + 3 < 40
    figures = [(epoch.top1 or 0.0, -epoch.loss) for epoch in report.epochs]
    assert max(figures) == figures[report.best_epoch]
    assert heldout_loss(nets, pictures, tmp_path / "o") == pytest.approx(
        report.epochs[report.best_epoch].loss, rel=1e-5
    )


def heldout_loss(nets: Path, pictures: Path, output: Path, name: str = "torchvision") -> float:
    """Cross-entropy computed here from the written files, on the written split."""
    source = load_source(
        SourceRequest(
            source=f"{nets}:net", weights=str(output / "model.safetensors"),
            preprocess="torchvision", input_height=32, input_width=32,
        )
    )  # fmt: skip
    record = preprocess.named(name, 32, 32)
    rows = [line.split(",") for line in (output / "split.csv").read_text().splitlines()[1:]]
    held = [(row[0], int(row[1])) for row in rows if row[2] == "val"]
    assert len(held) == 24
    pixels = [
        preprocess.apply(record, decode_image((pictures / file).read_bytes())) for file, _ in held
    ]
    with torch.no_grad():
        logits = source.module(torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()))
    classes = torch.tensor([label for _, label in held])
    return float(torch.nn.functional.cross_entropy(logits.double(), classes))


def test_evaluation_uses_the_declared_preprocess(nets: Path, pictures: Path, tuned: Path) -> None:
    """The reported figure is that of the contract's own pre-processing, and of no other."""
    report = json.loads((tuned / "report.json").read_text())
    wanted = report["epochs"][report["best_epoch"]]["loss"]
    assert heldout_loss(nets, pictures, tuned) == pytest.approx(wanted, rel=1e-5)
    assert heldout_loss(nets, pictures, tuned, "caffe") != pytest.approx(wanted, rel=0.05)


def test_replaced_head_is_named_and_the_written_source_loads(
    nets: Path, pictures: Path, tmp_path: Path
) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    six = msgspec.structs.replace(request.source, source=f"{nets}:net6")
    report = finetune(dataclasses.replace(request, source=six), Quiet())
    assert (report.head.name, report.head.kind) == ("classifier", "Linear")
    assert (report.head.classes_before, report.head.classes) == (6, 4)
    assert report.head.replaced
    assert report.head.reason == "another number of classes"
    words = shlex.split(report.next_command)
    assert words[:3] == ["nearfar", "convert", f"{tmp_path / 'o' / 'model.py'}:model"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    source = load_source(
        SourceRequest(
            source=words[2],
            weights=options["--weights"],
            labels=options["--labels"],
            preprocess=options["--preprocess"],
        )
    )
    assert source.labels == SHAPES
    assert source.preprocess == preprocess.named("torchvision", 32, 32)
    with torch.no_grad():
        assert source.module(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_torchvision_head_follows_the_labels(pictures: Path, tmp_path: Path) -> None:
    """The weights that come out go straight back in, also for a second run."""
    tuning = dataclasses.replace(TUNING, epochs=1, learning_rate=1e-3)
    request = Request(
        source=SourceRequest(
            source="torchvision:squeezenet1_1", weights="random:0", preprocess="torchvision",
            input_height=40, input_width=40,
        ),
        data=pictures, output=tmp_path / "o", tuning=tuning,
    )  # fmt: skip
    listener = Power(1)
    with pytest.raises(KeyboardInterrupt):
        finetune(request, listener)
    state = torch.load(tmp_path / "o" / CHECKPOINT, weights_only=True)["model"]
    from safetensors.torch import save_file

    save_file(state, tmp_path / "four.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join(SHAPES))
    source = load_source(
        msgspec.structs.replace(
            request.source,
            weights=str(tmp_path / "four.safetensors"),
            labels=str(tmp_path / "labels.txt"),
        )
    )
    assert source.labels == SHAPES
    again = dataclasses.replace(
        request,
        source=msgspec.structs.replace(request.source, weights=str(tmp_path / "four.safetensors")),
        output=tmp_path / "again",
    )
    with pytest.raises(KeyboardInterrupt):
        finetune(again, Power(0))
    identity = json.loads(
        torch.load(tmp_path / "again" / CHECKPOINT, weights_only=True)["identity"]
    )
    assert identity["data"]["classes"] == 4


def test_no_improvement_writes_no_weights(
    nets: Path, pictures: Path, tuned: Path, tmp_path: Path
) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    source = msgspec.structs.replace(request.source, weights=str(tuned / "model.safetensors"))
    tuning = dataclasses.replace(TUNING, epochs=2, learning_rate=5.0, optimizer="sgd")
    report = finetune(dataclasses.replace(request, source=source, tuning=tuning), Quiet())
    assert not report.improved
    assert report.best_epoch == 0
    assert not (tmp_path / "o" / "model.safetensors").exists()
    assert json.loads((tmp_path / "o" / "report.json").read_text())["improved"] is False


def test_unreadable_images_stop_the_run_unless_they_may_be_skipped(
    nets: Path, tmp_path: Path
) -> None:
    pictures = write_shapes(tmp_path / "p", 5)
    (pictures / "circle" / "004.png").write_bytes(b"no picture")
    request = request_for(nets, pictures, tmp_path / "o")
    with pytest.raises(EvaluationError, match=r"1 images are unreadable: .*circle/004.png"):
        finetune(request, Quiet())
    skipping = dataclasses.replace(
        request, skip_unreadable=True, tuning=dataclasses.replace(TUNING, epochs=1)
    )
    report = finetune(skipping, Quiet())
    assert report.data.left_out == (str(pictures / "circle" / "004.png"),)
    assert report.data.train + report.data.heldout == 19


def test_rounding_needs_a_trained_head(nets: Path, pictures: Path, tmp_path: Path) -> None:
    request = request_for(nets, pictures, tmp_path / "o")
    six = msgspec.structs.replace(request.source, source=f"{nets}:net6")
    tuning = dataclasses.replace(TUNING, qat_bits=8)
    with pytest.raises(ConfigError, match="fine-tune without --qat first"):
        finetune(dataclasses.replace(request, source=six, tuning=tuning), Quiet())


def test_what_is_no_trainable_classifier_is_refused(pictures: Path, tmp_path: Path) -> None:
    for source, task, words in (
        ("keras:MobileNetV2", "classification", "with Keras"),
        (str(tmp_path / "model.pt2"), "classification", "has lost its training form"),
        ("torchvision:lraspp_mobilenet_v3_large", "segmentation", "trains classifiers"),
    ):
        request = Request(
            source=SourceRequest(source=source, task=task, weights="random:0"),  # type: ignore[arg-type]
            data=pictures, output=tmp_path / "o", tuning=TUNING, force=True,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            finetune(request, Quiet())


def _hears_ctrl_c() -> None:
    """A shell's background job, as these tests may be one, starts with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_checkpoint_that_resume_finishes(
    nets: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    command = [
        sys.executable, "-m", "edge_runtime", "finetune", f"{nets}:net", "--weights", "random:0",
        "--preprocess", "torchvision", "--input-size", "32", "--data", str(pictures),
        "--epochs", "40", "--patience", "40", "--batch", "16", "--lr", "0.02",
        "--crop-scale", "0.7", "--threads", "1", "--warmup", "0.5",
    ]  # fmt: skip
    whole = nearfar(*command[3:], "-o", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(
        [*command, "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears_ctrl_c,
    ) as process:
        deadline = time.monotonic() + 240
        while not (output / CHECKPOINT).exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert "interrupted; the last whole epoch is kept: go on with --resume" in errors
    assert "Traceback" not in errors
    assert not list(output.glob(".checkpoint*"))
    done = nearfar(*command[3:], "-o", str(output), "--resume", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["improved"]
    assert "nearfar convert" in done.stderr
    assert_equal_runs(output, tmp_path / "whole")


def test_drawn_pictures_are_what_the_tests_think() -> None:
    assert draw("circle", 1).tobytes() == draw("circle", 1).tobytes()
    assert draw("circle", 1).tobytes() != draw("circle", 2).tobytes()
