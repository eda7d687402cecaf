"""Device and the real broker, over a real socket and a worker process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import (
    Bundle,
    DeadlineExceeded,
    EdgeRuntime,
    InferenceSource,
    LabelsMismatch,
)
from edge_runtime.contract.tasks.classification import probabilities
from edge_runtime.contract.wire import ModelRef
from tests.support.bundles import LABELS, photo, reference_logits, servable, tiny_bundle

pytestmark = pytest.mark.slow
BUNDLE = Bundle.open(tiny_bundle())


def serve(folder: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", "serve", "--models", str(folder), "--port", "0",
         "--device", "cpu", "--threads", "1", "--precision", "fp32", "--json-ready"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(servable(tmp_path_factory.mktemp("servable") / "same"))


@pytest.fixture(scope="module")
def broker_of_others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    labels = tuple(reversed(LABELS))
    yield from serve(servable(tmp_path_factory.mktemp("servable") / "others", labels=labels))


def expected(data: bytes) -> list[tuple[str, float]]:
    rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    scores = probabilities(BUNDLE.manifest.task, reference_logits(rgb))  # type: ignore[arg-type]
    order = np.argsort(-scores, kind="stable")[:3]
    return [(LABELS[i], float(scores[i])) for i in order]


def test_a_broker_of_other_labels_is_refused(broker_of_others: str) -> None:
    with EdgeRuntime(BUNDLE, broker_of_others, "ONLY_IN_CLOUD") as runtime:
        with pytest.raises(LabelsMismatch):
            runtime.run(photo(0), deadline_ms=5000)
        assert runtime.status().counts.uploads == 0


def test_no_time_is_a_missed_deadline(broker: str) -> None:
    with EdgeRuntime(BUNDLE, broker, "ONLY_IN_CLOUD") as runtime:
        runtime.prewarm(wait_ms=5000)
        with pytest.raises(DeadlineExceeded):
            runtime.run(photo(0), deadline_ms=1)
        status = runtime.status().broker
        assert status is not None
        assert status.breaker == "CLOSED"


def test_the_cloud_gives_the_models_own_answer(broker: str) -> None:
    with EdgeRuntime(BUNDLE, broker, "ONLY_IN_CLOUD") as runtime:
        for seed in range(4):
            result = runtime.run(photo(seed), deadline_ms=5000)
            got = [(p.label, p.score) for p in result.predictions]
            assert [label for label, _ in got] == [label for label, _ in expected(photo(seed))]
            assert [s for _, s in got] == pytest.approx(
                [s for _, s in expected(photo(seed))], abs=1e-4
            )
            assert isinstance(result.model, ModelRef)
            assert result.model.name == "full-size"
            assert result.timings.server_inference_ms is not None
            assert result.timings.upload_ms is not None
        status = runtime.status().broker
        assert status is not None
        assert status.model == "full-size@1.0.0"
        assert status.rtt_samples > 0
        assert status.rate_samples == 4


def test_adaptive_uses_it_and_device_only_agrees(broker: str) -> None:
    with EdgeRuntime(BUNDLE, broker, variant="tflite-fp32") as runtime:
        runtime.prewarm(wait_ms=5000)
        cloud = runtime.run(photo(1), deadline_ms=3000)
        local = runtime.run(photo(1), private=True)
    assert cloud.inference_source is InferenceSource.IN_CLOUD
    assert local.inference_source is InferenceSource.ON_DEVICE
    assert (cloud.label, cloud.score) == (local.label, pytest.approx(local.score, abs=1e-3))
