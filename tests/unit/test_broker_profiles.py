"""T(b) over a restart: the same forecasts as before, and never a start that fails for the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.scheduling.latency import LatencyModel
from broker.scheduling.profiles import Profiles
from edge_runtime.contract.errors import ConfigError
from tests.support.broker import Events, broker_here
from tests.support.servables import shared_servable


def learned() -> LatencyModel:
    model = LatencyModel()
    for run in range(100):
        model.observe(1, 10.0 + run % 7, now_s=float(run))
        model.observe(8, 40.0 + run % 11, now_s=float(run))
    return model


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"format": "nearfar.keys"}',
        b'{"schema_version": 2}',
        json.dumps({"profiles": {"m": [{"batch": 0, "mean_ms": 1, "runs_ms": [1]}]}}).encode(),
        json.dumps({"profiles": {"m": [{"batch": 1, "mean_ms": -1, "runs_ms": [1]}]}}).encode(),
        json.dumps({"profiles": {"m": [{"batch": 1, "mean_ms": 1, "runs_ms": []}]}}).encode(),
        json.dumps({"profiles": {"m": [{"batch": 1, "mean_ms": 1, "runs_ms": [1] * 65}]}}).encode(),
    ],
)
def test_a_file_that_makes_no_sense_is_left_aside_with_the_reason(tmp_path: Path, text: bytes):
    (tmp_path / "latency.json").write_bytes(text)
    profiles = Profiles(tmp_path)
    reason = profiles.read()
    assert reason is not None
    assert "latency.json" in reason
    assert profiles.recall("m") is None


def test_a_folder_that_is_none_stops_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="latency"):
        Profiles(tmp_path / "file").read()


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path):
    with (tmp_path / "latency.json").open("wb") as file:
        file.truncate(5 * 2**20)
    assert "bytes" in (Profiles(tmp_path).read() or "")


def test_forecasts_are_the_same_after_a_restart(tmp_path: Path):
    before = learned()
    Profiles(tmp_path).write({"m": before})
    profiles = Profiles(tmp_path)
    assert profiles.read() is None
    after = profiles.recall("m")
    assert after is not None
    for batch in range(1, 12):
        assert after.mean_ms(batch) == pytest.approx(before.mean_ms(batch))
        assert after.high_ms(batch) == pytest.approx(before.high_ms(batch))
    assert after.age_s(0.0) == float("inf")  # known, and worth a probe
    assert profiles.recall("another") is None


def test_what_is_known_of_other_models_stays_in_the_file(tmp_path: Path):
    Profiles(tmp_path).write({"a": learned()})
    second = Profiles(tmp_path)
    second.read()
    second.write({"b": learned()})
    third = Profiles(tmp_path)
    third.read()
    assert third.recall("a") is not None
    assert third.recall("b") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.slow
async def test_a_broker_begins_with_what_the_one_before_it_learned(tmp_path: Path):
    state = tmp_path / "state"
    async with broker_here(shared_servable(), state=str(state)) as first:
        key = first.services.repository.keys[0]
        lane = first.services.scheduler.learned()[key]
        for _ in range(64):
            lane.observe(4, 123.0, now_s=0.0)
    async with broker_here(shared_servable(), state=str(state)) as second:
        assert second.services.scheduler.learned()[key].high_ms(4) == pytest.approx(123.0)
        # Measured at the start too, and weighed like any other run.
        assert second.services.scheduler.learned()[key].mean_ms(4) < 123.0
    # A broken file is no reason not to start.
    (state / "latency.json").write_text("{")
    events = Events()
    from broker.server import serving
    from broker.settings import build_settings

    settings = build_settings(
        models=(str(shared_servable()),), executor="inline", port=0, state=str(state)
    )
    async with serving(settings, events):
        assert len(events.named("state_ignored")) == 1
