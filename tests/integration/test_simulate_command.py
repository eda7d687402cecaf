"""``nearfar simulate`` as a person calls it: traces of two kinds, the whole world, real files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.simulation.cli import simulate

pytestmark = pytest.mark.slow

_SHORT = "[run]\nduration_s = 60.0\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTE uplink that fades, a Wi-Fi one, round trips, and a downlink that is not to be used."""
    root = tmp_path_factory.mktemp("traces")
    fades = [12.0 if i % 200 < 150 else 0.4 for i in range(600)]
    (root / "lte.up").write_text("".join(f"{i / 10:.1f} {r}\n" for i, r in enumerate(fades)))
    (root / "lte.ping").write_text("".join(f"{40 + i % 7}\n" for i in range(300)))
    wifi = sorted(i * 3 // 10 for i in range(200_000))
    (root / "uplink-wifi.txt").write_text("\n".join(map(str, wifi)))
    (root / "lte.down").write_text("".join(f"{i / 10:.1f} 50\n" for i in range(600)))
    (root / "notes.md").write_text("# My walk\nIt rained.\n")
    (root.parent / "short.toml").write_text(_SHORT)
    return root


def _call(folder: Path, *arguments: str | Path) -> Result:
    constants = folder.parent / "short.toml"
    return CliRunner().invoke(
        simulate,
        ["--traces", str(folder), "--constants", str(constants), "--jobs", "1",
         *map(str, arguments)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[Result, dict[str, Any], str]:
    json_path, html_path = folder.parent / "o.json", folder.parent / "o.html"
    done = _call(folder, "--seeds", "2", "--json", json_path, "--html", html_path)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done, json.loads(json_path.read_text()), html_path.read_text()


def test_every_policy_of_the_line_up_is_scored(ran: tuple[Result, dict[str, Any], str]) -> None:
    _, found, _ = ran
    policies = found["policies"]
    assert {"LocalOnly", "CloudOnly", "Hedged", "Cascade(0.9)", "ExpectedUtility:balanced",
            "Oracle", "Oracle:net", "Oracle:saver"} <= set(policies)  # fmt: skip
    assert policies["Oracle"]["gain_capture"]["mean"] == pytest.approx(1.0)
    assert policies["LocalOnly"]["gain_capture"]["mean"] == 0.0
    # Nothing that a device can run beats a clairvoyant one at accuracy.
    best = max(p["accuracy_in_deadline"] for p in policies.values())
    assert best <= policies["Oracle"]["accuracy_in_deadline"] + 1e-9
    assert policies["LocalOnly"]["kb_per_request"] == 0.0
    assert policies["Hedged"]["kb_per_request"] > 30
    assert found["constants"]["run"]["duration_s"] == 60.0
    assert found["seeds"] == [0, 1]


def test_what_was_read_and_what_was_not_is_in_the_json(
    ran: tuple[Result, dict[str, Any], str],
) -> None:
    done, found, _ = ran
    used = {trace["name"]: trace for trace in found["traces"]["used"]}
    assert set(used) == {"lte.up", "uplink-wifi"}
    assert (used["lte.up"]["format"], used["lte.up"]["rtt"]) == ("seconds Mbit/s", "lte.ping")
    assert (used["uplink-wifi"]["format"], used["uplink-wifi"]["radio"]) == ("mahimahi", "wifi")
    skipped = {entry["path"]: entry["reason"] for entry in found["traces"]["skipped"]}
    assert skipped["lte.down"] == "a downlink's rate is never an uplink's"
    assert set(skipped) == {"lte.down", "notes.md"}
    assert "lte.down: a downlink's rate is never an uplink's" in done.stderr


def test_the_page_has_every_chart(ran: tuple[Result, dict[str, Any], str]) -> None:
    done, _, page = ran
    assert page.count("<svg") == 4
    assert "A minute of ExpectedUtility:balanced" in page
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 80


def test_the_same_seeds_give_the_same_figures(
    folder: Path, ran: tuple[Result, dict[str, Any], str]
) -> None:
    again = _call(folder, "--seeds", "2", "--jobs", "2", "--json", "-", "--quiet")
    assert again.exit_code == 0, again.output
    first, second = ran[1]["policies"], json.loads(again.stdout)["policies"]
    for policy, figures in first.items():
        timed = {"decision_us", "decision_p50_us"}
        assert {k: v for k, v in figures.items() if k not in timed} == {
            k: v for k, v in second[policy].items() if k not in timed
        }


def test_named_policies_bring_what_they_are_measured_by(folder: Path) -> None:
    done = _call(folder, "--seeds", "1", "--policies", "Cascade(0.85),Hedged", "--quiet",
                 "--cells", "mid:400:poisson,pi:600:bursty", "--json", "-")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [cell["cell"]["device"] for cell in found["cells"]] == ["mid", "pi"]
    for cell in found["cells"]:
        assert list(cell["policies"]) == [
            "LocalOnly", "Cascade(0.85)", "Hedged", "Oracle", "Oracle:net", "Oracle:saver",
        ]  # fmt: skip
        assert cell["policies"]["Hedged"]["gain_capture"]["mean"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "Psychic"], "no policy 'Psychic'"),
        (["--policies", ","], "names no policy"),
        (["--cells", "mid:400"], "no cell 'mid:400'"),
        (["--json", "nowhere/out.json"], "there is no folder"),
        (["--constants", "missing.toml"], "cannot read constants"),
    ],
)
def test_bad_input_is_a_typed_error_before_any_work(
    folder: Path, arguments: list[str], message: str
) -> None:
    done = _call(folder, "--seeds", "1", "--quiet", *arguments)
    assert isinstance(done.exception, ConfigError), done.output
    assert message in done.exception.detail


@contextlib.contextmanager
def _under_way(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with two workers, all of which have started."""
    # The shell that runs the tests may ignore SIGINT, which children inherit.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from edge_runtime.simulation.cli import simulate; simulate()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "--traces", folder, "--seeds", "100", "--jobs", "2"],
        stderr=subprocess.PIPE, start_new_session=True, text=True,
    ) as process:  # fmt: skip
        until_s = time.monotonic() + 60
        # Itself, two workers, and the tracker of their resources.
        while len(_processes_of(process.pid)) < 4:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        yield process
    until_s = time.monotonic() + 5  # the tracker ends once it sees that nobody is left
    while _processes_of(process.pid) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert _processes_of(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_every_process_of_it(folder: Path, number: int) -> None:
    with _under_way(folder) as process:
        process.send_signal(number)
        assert process.stderr is not None
        assert process.wait(timeout=20) == 130
        assert "interrupted" in process.stderr.read()


def test_a_worker_that_dies_is_told_with_what_to_do(folder: Path) -> None:
    with _under_way(folder) as process:
        workers = [
            pid
            for pid in _processes_of(process.pid)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(int(workers[0]), signal.SIGKILL)
        assert process.stderr is not None
        assert process.wait(timeout=60) != 0
        assert "try fewer --jobs" in process.stderr.read()


def _processes_of(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(path.parent.name)
    return found


def test_a_cell_is_named_in_one_place(folder: Path) -> None:
    done = _call(folder, "--cells", "ten", "--deadline-ms", "400")
    assert done.exit_code == 2
    assert "leave --deadline-ms out" in done.output


def test_a_folder_without_uplinks_says_why(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "short.toml").write_text(_SHORT)
    (tmp_path / "t" / "x.down").write_text("".join(f"{i} 5\n" for i in range(60)))
    done = _call(tmp_path / "t")
    assert isinstance(done.exception, NearfarError)
    assert "no usable uplink trace" in done.exception.detail
    assert "x.down: a downlink's rate is never an uplink's" in done.exception.detail
