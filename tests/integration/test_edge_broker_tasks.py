"""Device and real broker, for every task: the same net gives the same answer on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime import EdgeRuntime, InferenceSource, Result
from edge_runtime.commands import run
from edge_runtime.contract.tasks import TaskName
from edge_runtime.contract.wire import ModelRef
from tests.support.broker import broker_process
from tests.support.bundles import photo
from tests.support.tasks import TASKS, task_bundle, task_servable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``nearfar serve`` with one model of each task, in a worker process."""
    folder = tmp_path_factory.mktemp("models")
    for name in TASKS:
        shutil.copytree(task_servable(name), folder / name)
    with broker_process(tmp_path_factory.mktemp("broker"), "--models", str(folder)) as process:
        yield process.url


def ask(edge: EdgeRuntime, name: TaskName) -> Result:
    if name == "generation":
        return edge.generate(7, deadline_ms=20_000)
    return edge.run(photo(5), deadline_ms=20_000)


@pytest.mark.parametrize("name", TASKS)
def test_the_cloud_answers_as_the_device_does(url: str, name: TaskName) -> None:
    with EdgeRuntime(task_bundle(name), policy="ONLY_ON_DEVICE") as edge:
        local = ask(edge, name)
    with EdgeRuntime(task_bundle(name), url, "ONLY_IN_CLOUD") as edge:
        cloud = ask(edge, name)
        status = edge.status().broker
    assert cloud.inference_source is InferenceSource.IN_CLOUD
    assert isinstance(cloud.model, ModelRef)
    assert cloud.model.name == f"large-{name.replace('_', '-')}"
    assert status is not None
    assert status.breaker == "CLOSED"
    assert cloud.label == local.label
    assert cloud.score == pytest.approx(local.score, abs=1e-5)
    assert len(cloud.boxes) == len(local.boxes)
    for ours, theirs in zip(cloud.boxes, local.boxes, strict=True):
        assert ours.label == theirs.label
        for field in ("x_min", "y_min", "x_max", "y_max"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), abs=1e-2)
    assert cloud.region == pytest.approx(local.region)
    if local.class_map is not None:
        assert (cloud.class_map == local.class_map).mean() > 0.99
    if local.image is not None:
        assert cloud.image is not None
        assert np.abs(cloud.image.astype(int) - local.image).max() <= 1


def test_a_jpeg_answer_is_near_the_exact_one(url: str) -> None:
    bundle = task_bundle("image_to_image")
    with EdgeRuntime(bundle, url, "ONLY_IN_CLOUD", jpeg_answers=True) as edge:
        near = ask(edge, "image_to_image").image
    with EdgeRuntime(bundle, url, "ONLY_IN_CLOUD") as edge:
        exact = ask(edge, "image_to_image").image
    assert near is not None
    assert exact is not None
    assert 0 < np.abs(near.astype(int) - exact).mean() < 8


def test_the_command_saves_what_the_cloud_generates(url: str, tmp_path: Path) -> None:
    arguments = [str(task_bundle("generation")), "--seed", "7", "--broker", url, "--json"]
    more = ["--mode", "ONLY_IN_CLOUD", "--deadline-ms", "20000", "--save", str(tmp_path)]
    done = CliRunner().invoke(run, [*arguments, *more])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["inference_source"] == "IN_CLOUD"
    assert Path(document["saved"]["image"]).read_bytes().startswith(b"\x89PNG")
