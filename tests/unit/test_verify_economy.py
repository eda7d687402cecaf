"""What verification leaves out to save time, and what it never does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.jobs import LayersJob, LayersResult, VariantRun
from converters.supervisor import Supervisor
from converters.verify.explain import look_into
from converters.verify.probes import probe
from edge_runtime.contract.manifest import Format, MinOs, Quality, Variant
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tensors import TensorSpec

INPUTS = 16
RNG = np.random.default_rng(4)
WANTED = RNG.normal(size=(INPUTS, 32)).astype(np.float32)


def feed(noise: float, *, only_first: int = INPUTS) -> Iterator[NDArray[Any]]:
    """The wanted answers themselves, with noise on the first of them."""
    for number, row in enumerate(WANTED):
        error = RNG.normal(size=row.shape) if number < only_first else np.zeros(row.shape)
        yield (row + noise * error).astype(np.float32)[None]


def test_a_record_far_behind_is_given_up_after_three_inputs() -> None:
    seen: list[int] = []

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        seen.append(1)
        return batch

    sound, wrong = probe([feed(0.01), feed(1.0)], run, WANTED)
    assert len(seen) == INPUTS + 3
    assert sound == pytest.approx(40.0, abs=1.5)
    assert wrong == pytest.approx(0.0, abs=2.5)


def test_a_record_that_is_ahead_later_stays_in_the_race() -> None:
    """The file's own record is off by 8 dB; another one, worse at first, explains it."""
    own, other = probe([feed(0.4), feed(0.6, only_first=3)], lambda batch: batch, WANTED)
    assert own == pytest.approx(8.0, abs=1.5)
    assert other > own + 100.0


def _run(format_name: Format) -> VariantRun:
    spec = TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8), layout="NCHW")
    variant = Variant(
        id=f"{format_name}-int8", format=format_name, precision="int8", path="x",
        sha256="0" * 64, size_bytes=1, inputs=(spec,), outputs=(spec,),
        preprocess=named("tf", 8, 8), min_os=MinOs(), min_runtime="1", peak_ram_bytes=1,
        accelerators=("cpu",),
        quality=Quality(
            data="golden", images=1, sqnr_db_mean=1.0, sqnr_db_min=1.0, max_abs=1.0,
            size_ratio=1.0, passed=True,
        ),
    )  # fmt: skip
    return VariantRun(path="x", variant=variant)


@pytest.mark.slow
def test_formats_whose_common_process_fails_are_asked_again_alone(tmp_path: Path) -> None:
    missing = LayersJob(reference=str(tmp_path / "missing.pt2"), images=[])
    runs = [_run("coreml"), _run("tflite"), _run("torchscript")]
    found = look_into(missing, runs, Supervisor(tmp_path, jobs=2))
    assert found == LayersResult()
    logs = {path.name.removesuffix(" layers.log") for path in (tmp_path / "jobs").glob("*.log")}
    assert logs == {"coreml+torchscript", "tflite", "coreml", "torchscript"}
