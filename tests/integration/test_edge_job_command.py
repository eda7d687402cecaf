"""``nearfar job``: submitted by one command, fetched or canceled by another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_runtime.contract.errors import ConfigError
from edge_runtime.jobs.cli import job
from tests.support.broker import broker_process
from tests.support.bundles import LABELS, photo, servable, tiny_bundle

pytestmark = pytest.mark.slow

BUNDLE = str(tiny_bundle())


def call(*arguments: str) -> Result:
    return CliRunner().invoke(job, arguments)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(0))
    return str(path)


def test_a_submission_of_nothing_is_a_wrong_use(tmp_path: Path) -> None:
    done = call("submit", BUNDLE, "--state", str(tmp_path))
    assert done.exit_code == 2
    assert "at least one IMAGE" in done.output


def test_a_job_that_is_not_kept_is_named(tmp_path: Path) -> None:
    done = call("result", BUNDLE, "0" * 32, "--state", str(tmp_path))
    assert isinstance(done.exception, ConfigError)
    assert "nearfar job list" in done.exception.detail


def test_without_a_broker_the_device_does_it(tmp_path: Path, image: str) -> None:
    state = ("--state", str(tmp_path / "state"))
    made = json.loads(call("submit", BUNDLE, image, *state).stdout)
    assert (made["state"], made["runs"]) == ("done", "ON_DEVICE")
    assert json.loads(call("list", BUNDLE, *state).stdout)["id"] == made["id"]
    said = json.loads(call("result", BUNDLE, made["id"], "--json", *state).stdout)
    assert said["job"] == made["id"]
    assert said["label"] in LABELS
    assert call("cancel", BUNDLE, made["id"], *state).exit_code == 0
    assert call("list", BUNDLE, *state).stdout == ""


@pytest.mark.slow
def test_a_broker_keeps_it_between_commands(tmp_path: Path, image: str) -> None:
    models = servable(tmp_path / "servable" / "same")
    with broker_process(tmp_path, "--models", str(models)) as broker:
        where = (
            *("--broker", broker.url, "--mode", "ONLY_IN_CLOUD"),
            *("--state", str(tmp_path / "state")),
        )
        made = json.loads(call("submit", BUNDLE, image, *where).stdout)
        assert made["runs"] == "IN_CLOUD"
        shown = call("result", BUNDLE, made["id"], *where)
        assert shown.exit_code == 0
        assert made["id"] in shown.stdout
        assert "IN_CLOUD full-size" in shown.stdout
        assert json.loads(call("status", BUNDLE, made["id"], *where).stdout)["state"] == "done"
        assert call("cancel", BUNDLE, made["id"], *where).exit_code == 0
        assert call("list", BUNDLE, *where).stdout == ""
