"""Estimates that outlive the process: what is believed again, how much, and what is not kept."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import Bundle, EdgeRuntime, SettableSignals
from edge_runtime.contract.errors import ConfigError
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.remembered import recall, remember
from edge_runtime.memory import Memory
from edge_runtime.state import FolderClaim
from edge_runtime.testing import ScriptedTransport
from tests.support.bundles import LABELS, photo, tiny_bundle

BUNDLE = Bundle.open(tiny_bundle())
DAY_S = 86_400.0
RATE = 400_000.0


def learned(rate: float = RATE, link_type: str = "wifi") -> PathEstimator:
    path = PathEstimator.prior(link_type)
    link = path.link
    for second in range(40):
        link = link.observe(rate * (1.1 if second % 2 else 0.9), float(second))
        path = path.pinged(35.0, float(second))
    return PathEstimator(link_type=link_type, link=link, rtt=path.rtt)


def store(
    folder: Path, *networks: str, clock_s: float = 1e9, path: PathEstimator | None = None
) -> None:
    memory = Memory(folder, clock=lambda: clock_s)
    for network in networks:
        memory.learned(path or learned(), 40.0, network, "https://b")
    memory.close()


def runtime(folder: Path, **options: object) -> EdgeRuntime:
    transport = ScriptedTransport.for_bundle(BUNDLE, lambda _: LABELS[1], delay_ms=1)
    return EdgeRuntime(BUNDLE, transport=transport, policy="PREFER_IN_CLOUD", state=folder,
                       variant="tflite-fp32", **options)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\x00" * 200, b"{}", b'{"format": "nearfar.estimates", "schema_version": 2}',
        b'{"format": "nearfar.estimates", "schema_version": 1, "networks": {"home": {}}}',
        b" " * (2 << 20),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_left_aside_and_every_decision_says_so(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path, "home")
    (tmp_path / "estimates.json").write_bytes(damage)
    with runtime(tmp_path) as edge:
        result = edge.run(photo(0), deadline_ms=2000)
        assert result.situation.link is not None
        assert result.situation.link.origin == "memory_unreadable"
    assert "cannot be read" in caplog.text
    assert (tmp_path / "estimates.unreadable").read_bytes() == damage
    assert Memory(tmp_path).fault is None  # written anew


@pytest.mark.parametrize("salt", [None, b"short"])
def test_without_its_salt_the_memory_is_of_no_use_and_a_new_one_begins(
    tmp_path: Path, salt: bytes | None
) -> None:
    store(tmp_path, "home")
    if salt is None:
        (tmp_path / "estimates.salt").unlink()
    else:
        (tmp_path / "estimates.salt").write_bytes(salt)
    memory = Memory(tmp_path)
    assert memory.fault == "memory_unreadable"
    assert memory.recall("wifi", "home", "https://b") is None
    assert len((tmp_path / "estimates.salt").read_bytes()) == 32


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use the folder"):
        Memory(tmp_path / "file" / "state")


def test_nothing_that_names_a_network_or_a_broker_is_written(tmp_path: Path) -> None:
    store(tmp_path, "Cafe Central", path=learned())
    text = (tmp_path / "estimates.json").read_text()
    assert "Cafe" not in text
    assert "https" not in text
    assert "wifi" not in text
    other = tmp_path / "other"
    store(other, "Cafe Central", path=learned())
    keys = [set((folder / "estimates.json").read_text().split('"')) for folder in (tmp_path, other)]
    assert not {word for word in keys[0] & keys[1] if len(word) == 32}  # another salt
    assert (tmp_path / "estimates.salt").stat().st_mode & 0o077 == 0


def test_at_most_64_networks_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    for number in range(70):
        store(tmp_path, f"net {number}", clock_s=1e9 + number)
    memory = Memory(tmp_path, clock=lambda: 1e9 + 70)
    known = [memory.recall("wifi", f"net {n}", "https://b") is not None for n in range(70)]
    assert known == [False] * 6 + [True] * 64


def test_networks_brokers_and_link_types_do_not_mix(tmp_path: Path) -> None:
    store(tmp_path, "home")
    memory = Memory(tmp_path)
    assert memory.recall("wifi", "home", "https://b") is not None
    assert memory.recall("wifi", "work", "https://b") is None
    assert memory.recall("lte", "home", "https://b") is None
    assert memory.recall("wifi", "home", "https://c") is None


def test_what_was_learned_is_the_prior_and_its_variance_grows_with_age() -> None:
    path = learned()
    kept = remember(path, 40.0, 0.0)
    assert kept is not None
    prior = PathEstimator.prior("wifi")
    ages = (0.0, 60.0, DAY_S, 7 * DAY_S, 400 * DAY_S)
    recalled = [recall(kept, "wifi", age_s) for age_s in ages]
    gaps = [abs(one.link.mean - math.log(RATE)) for one in recalled]
    assert gaps[1] < 0.2
    assert gaps[1:] == sorted(gaps[1:])
    assert recalled[0].link.variance < recalled[1].link.variance < recalled[2].link.variance
    assert recalled[-1].link.mean == pytest.approx(prior.link.mean, abs=1e-6)
    assert recalled[-1].link.variance == pytest.approx(prior.link.variance, abs=1e-6)
    assert recalled[-1].rtt.srtt_ms == pytest.approx(prior.rtt.srtt_ms)
    assert recalled[0].rtt.srtt_ms == pytest.approx(35.0, abs=0.5)
    assert recalled[0].rtt.observe(80.0).srtt_ms == 80.0  # the first sample still decides
    assert [one.link.samples for one in recalled] == [16, 16, 14, 6, 0]


def test_a_clock_that_went_back_is_no_age() -> None:
    kept = remember(learned(), 40.0, 1e9)
    assert kept is not None
    assert recall(kept, "wifi", -5.0) == recall(kept, "wifi", 0.0)


def test_next_to_nothing_is_not_worth_keeping(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.learned(PathEstimator.prior("wifi"), 0.0, "home", "")
    memory.close()
    assert not (tmp_path / "estimates.json").exists()


def test_a_runtime_begins_with_what_the_one_before_learned(tmp_path: Path) -> None:
    signals = SettableSignals(link_type="wifi", network_id="home")
    with runtime(tmp_path, conditions=signals) as edge:
        measured = edge._uplink._measured  # type: ignore[union-attr]
        measured.path = learned()
        before = edge.run(photo(0), deadline_ms=2000).situation.link
    assert before is not None
    assert before.origin == "network_new"
    with runtime(tmp_path, conditions=signals) as edge:
        link = edge.run(photo(0), deadline_ms=2000).situation.link
        assert link is not None
        assert link.origin == "network_remembered"
        assert link.log_rate_mean == pytest.approx(math.log(RATE), abs=0.3)
        signals.update(network_id="work")
        link = edge.run(photo(0), deadline_ms=2000).situation.link
        assert link is not None
        assert link.origin == "network_new"
        signals.update(network_id="home")
        link = edge.run(photo(0), deadline_ms=2000).situation.link
        assert link is not None
        assert link.origin == "network_remembered"


def test_the_local_latencies_of_a_file_are_known_at_the_next_start(tmp_path: Path) -> None:
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path) as edge:
        for seed in range(20):
            edge.run(photo(seed))
        made = edge._engine.local._estimator.latencies_ms  # type: ignore[union-attr]
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path) as edge:
        known = edge._engine.local._estimator.latencies_ms  # type: ignore[union-attr]
    assert set(made[-5:]) <= set(known)
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path, threads=2) as edge:
        other = edge._engine.local._estimator.latencies_ms  # type: ignore[union-attr]
    assert not set(made) & set(other)


def test_without_a_state_folder_nothing_is_claimed(tmp_path: Path) -> None:
    transport = ScriptedTransport.for_bundle(BUNDLE, lambda _: LABELS[1])
    with EdgeRuntime(BUNDLE, transport=transport, policy="PREFER_IN_CLOUD") as edge:
        link = edge.run(photo(0)).situation.link
        assert link is not None
        assert link.origin is None


def test_a_full_disk_costs_the_memory_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise ConfigError("no space")

    with runtime(tmp_path) as edge:
        edge._uplink._measured.path = learned(link_type="unknown")  # type: ignore[union-attr]
        monkeypatch.setattr("edge_runtime.memory.write_atomic", full)
        assert edge.run(photo(0), deadline_ms=2000).label == LABELS[1]
    assert "not kept: no space" in caplog.text


def test_a_state_folder_is_one_runtimes_at_a_time(tmp_path: Path) -> None:
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path):
        with pytest.raises(ConfigError, match="another runtime uses the folder"):
            EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path)
        with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path / "other"):
            pass
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path):
        pass


def test_a_runtime_that_could_not_be_made_claims_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        EdgeRuntime(BUNDLE, variant="none-such", state=tmp_path)
    with EdgeRuntime(BUNDLE, variant="tflite-fp32", state=tmp_path):
        pass


def test_a_killed_app_leaves_no_claim(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from edge_runtime.state import FolderClaim\n"
        "claim = FolderClaim(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".claim").exists()
    FolderClaim(tmp_path).close()
