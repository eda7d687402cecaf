"""``nearfar demo`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.digits import nearfar

_COMMAND = [sys.executable, "-m", "edge_runtime", "demo"]


def _processes_of(folder: Path) -> Iterator[int]:
    """Processes that name ``folder`` on their command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in command:
                yield int(entry.name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--requests", "3"], "--requests"),
        (["--seed", "-1"], "--seed"),
        (["--output", "{file}"], "--output"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments_end_with_2_and_start_nothing(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "file").write_text("mine")
    done = nearfar("demo", *(text.format(file=tmp_path / "file") for text in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_stage_that_fails_is_one_line_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("not a folder")
    monkeypatch.setenv("NEARFAR_CACHE", str(blocked))
    done = nearfar("demo", "--output", tmp_path / "out", timeout_s=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error [config]: train-digits-")
    assert "set NEARFAR_CACHE" in last
    log = Path(last.rpartition("log: ")[2])
    assert "cannot write to the cache folder" in log.read_text()
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "report.json").exists()
    assert not list(_processes_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    demo = subprocess.Popen(
        [*_COMMAND, "--output", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):  # until the trainers, grandchildren of the demo, are at work
        if sum("train" in _command(pid) for pid in _processes_of(tmp_path / "cache")) == 2:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no training was started")
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted: every child process was stopped"
    assert "Traceback" not in errors
    for _ in range(100):
        if not list(_processes_of(tmp_path)):
            break
        time.sleep(0.1)
    assert not list(_processes_of(tmp_path))
    assert not (tmp_path / "out" / "report.json").exists()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_request_is_answered_in_time_though_the_broker_is_killed(tmp_path: Path) -> None:
    done = nearfar(
        "demo", "--kill-broker", "--requests", "60", "--output", tmp_path, "--json",
        timeout_s=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["requests"] == report["answered"] == 180
    assert report["broken_promises"] == []
    assert report["broker_killed_after_request"] == 30
    modes = report["modes"]
    assert list(modes) == ["ONLY_ON_DEVICE", "ONLY_IN_CLOUD", "ADAPTIVE"]
    assert modes["ADAPTIVE"]["in_deadline_share"] == 1.0
    assert modes["ADAPTIVE"]["answered"] == 60
    assert modes["ONLY_ON_DEVICE"]["uploaded_bytes"] == 0
    assert modes["ONLY_ON_DEVICE"]["in_cloud_share"] == 0.0
    assert modes["ONLY_IN_CLOUD"]["in_cloud_share"] == 1.0
    assert modes["ONLY_IN_CLOUD"]["uploaded_bytes"] > 60 * 15_000
    assert modes["ONLY_IN_CLOUD"]["accuracy"] > modes["ONLY_ON_DEVICE"]["accuracy"]
    assert 0 < modes["ADAPTIVE"]["uploaded_bytes"] < modes["ONLY_IN_CLOUD"]["uploaded_bytes"]
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    killed = [line for line in lines if line["mode"] == "ADAPTIVE"][30:]
    assert {line["source"] for line in killed[10:]} == {"ON_DEVICE"}
    assert "broker killed" in (tmp_path / "report.html").read_text()
    assert not list(_processes_of(tmp_path))
