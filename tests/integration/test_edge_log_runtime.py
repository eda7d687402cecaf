"""The decision log of a real runtime: complete, private, replayable, never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime import (
    Bundle,
    Conditions,
    ConfigError,
    EdgeRuntime,
    NearfarError,
    Prediction,
)
from edge_runtime.contract.errors import DeadlineExceeded
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.gain import GainCurve
from edge_runtime.log import DecisionLog, LogEntry, read_log
from edge_runtime.log.cli import explain, replay
from edge_runtime.log.replay import replay as replayed
from edge_runtime.policies.adaptive import Adaptive
from edge_runtime.testing import HttpResponse, ScriptedTransport, problem
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FaultBroker
from tests.support.tasks import task_bundle

pytestmark = pytest.mark.slow
BUNDLE = Bundle.open(tiny_bundle())


def broker(
    answer: Callable[[bytes], str | Answer | HttpResponse] = lambda _: "gnu", delay_ms: float = 0.0
) -> ScriptedTransport:
    return ScriptedTransport.for_bundle(BUNDLE, answer, delay_ms=delay_ms)


def runtime(log: object, transport: ScriptedTransport | None, policy: object) -> EdgeRuntime:
    edge = EdgeRuntime(
        BUNDLE,
        policy=policy,  # type: ignore[arg-type]
        variant="tflite-fp32",
        transport=transport,
        log=log,  # type: ignore[arg-type]
    )
    edge.prewarm(wait_ms=2000)
    return edge


def entries(path: Path) -> list[LogEntry]:
    return [one.entry for one in read_log(path).entries]


def test_every_way_a_request_can_end_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)

    asked: list[str] = []

    def one(policy: str, transport: ScriptedTransport | None, **options: object) -> None:
        asked.append(policy)
        with runtime(log, transport, policy) as edge, contextlib.suppress(NearfarError):
            edge.run(photo(0), **options)  # type: ignore[arg-type]

    one("ONLY_ON_DEVICE", None)
    one("ONLY_IN_CLOUD", broker())
    one("PREFER_IN_CLOUD", broker(delay_ms=60_000), deadline_ms=300)
    one("PREFER_IN_CLOUD", broker(lambda _: problem(500, "broker_fault")), deadline_ms=2000)
    one("ONLY_IN_CLOUD", broker(lambda _: problem(429, "overloaded")))
    one("ONLY_IN_CLOUD", broker(delay_ms=60_000), deadline_ms=100)
    one("PREFER_IN_CLOUD", broker(), private=True)
    log.close()
    found = entries(path)
    assert [entry.policy.name for entry in found] == asked
    told = [
        (e.outcome.source, e.outcome.cloud, e.outcome.error, e.outcome.other_error, e.action)
        for e in found
    ]
    assert told == [
        ("ON_DEVICE", "not_asked", None, None, "LOCAL"),
        ("IN_CLOUD", "answered", None, None, "CLOUD_ONLY"),
        ("ON_DEVICE", "late", None, "deadline_exceeded", "CLOUD_FIRST"),
        ("ON_DEVICE", "failed", None, "broker_fault", "CLOUD_FIRST"),
        (None, "failed", "overloaded", None, "CLOUD_ONLY"),
        (None, "late", "deadline_exceeded", None, "CLOUD_ONLY"),
        ("ON_DEVICE", "not_asked", None, None, "LOCAL"),
    ]
    size = len(photo(0))
    uploaded = [e.outcome.uploaded_bytes > 0.9 * size for e in found]
    assert uploaded == [False, True, True, True, True, True, False]
    assert found[0].outcome.confidence is not None
    assert found[1].outcome.cloud_model == "scripted@1"
    assert found[1].variant is None
    assert found[0].variant == "tflite-fp32"
    private = found[-1].steps[0]
    assert private.situation.private
    assert all(e.outcome.timings.total_ms > 0 for e in found)
    assert all(abs(e.unix_s - time.time()) < 120 for e in found)
    assert len({e.request for e in found}) == len(found)


async def test_a_caller_who_leaves_is_told_apart_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    edge = await asyncio.to_thread(runtime, path, broker(delay_ms=60_000), "ONLY_IN_CLOUD")
    async with edge:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await edge.arun(photo(0), deadline_ms=60_000)
    (entry,) = entries(path)
    assert (entry.outcome.error, entry.outcome.cloud) == ("abandoned", "cancelled")


def test_a_log_of_a_busy_runtime_replays_bit_for_bit(tmp_path: Path) -> None:
    """Many threads, real estimators, deadlines from hopeless to ample, a gain of its own."""
    path = tmp_path / "log.jsonl"
    curve = GainCurve(knots=((0.2, 0.4), (0.95, -0.02)), local_right=0.6)
    with (
        FaultBroker(delay_ms=5, recv_ms=4) as far,
        EdgeRuntime(
            BUNDLE,
            far.url,
            Adaptive(curve),  # type: ignore[arg-type]
            "tflite-fp32",
            log=path,
        ) as edge,
    ):
        edge.prewarm(wait_ms=2000)
        deadlines = [2, 10, 40, 150, 600]

        def ask(first: int) -> None:
            for number in range(25):
                with contextlib.suppress(DeadlineExceeded):  # hopeless, and others waited
                    edge.run(
                        photo((first + number) % 6), deadline_ms=deadlines[(first + number) % 5]
                    )

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    log = read_log(path)
    assert (len(log.entries), log.notices) == (100, ())
    found = replayed(log)
    assert found.mismatched == 0
    assert found.decisions > 100
    assert len({one.entry.action for one in log.entries}) >= 2
    assert CliRunner().invoke(replay, [str(path)]).exit_code == 0
    told = CliRunner().invoke(explain, [str(path)])
    assert told.exit_code == 0
    assert max(map(len, told.output.splitlines())) <= 80
    for policy in ("ONLY_IN_CLOUD", "PREFER_ON_DEVICE", "ADAPTIVE"):
        assert CliRunner().invoke(replay, [str(path), "--policy", policy]).exit_code == 0


def test_no_label_no_file_name_and_no_image_is_in_the_log_unless_asked_for(
    tmp_path: Path,
) -> None:
    image = tmp_path / "SECRET-name.jpg"
    image.write_bytes(photo(0))

    class Told:
        def read(self) -> Conditions:
            return Conditions(link_type="wifi", battery_percent=50.0)

    for labels in (False, True):
        path = tmp_path / f"log-{labels}.jsonl"
        log = DecisionLog(path, labels=labels)
        with EdgeRuntime(
            BUNDLE, policy="ONLY_IN_CLOUD", transport=broker(), conditions=Told(), log=log
        ) as edge:
            result = edge.run(image)
        log.close()
        assert result.label == "gnu"
        text = path.read_text()
        assert "SECRET" not in text
        assert ("gnu" in text) is labels
        assert '"battery_percent":50.0' in text
        assert len(text) < 4000, "no room for an image"


def test_a_function_gets_each_entry_and_its_failures_cost_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken: list[LogEntry] = []
    with runtime(taken.append, None, "ONLY_ON_DEVICE") as edge:
        for _ in range(3):
            edge.run(photo(0))
    assert [entry.action for entry in taken] == ["LOCAL"] * 3
    assert taken[0].outcome.label is None

    def broken(_: LogEntry) -> None:
        raise RuntimeError("the disk of the app")

    with runtime(broken, None, "ONLY_ON_DEVICE") as edge:
        for _ in range(3):
            assert edge.run(photo(0)).label is not None
    assert caplog.text.count("the log's sink failed") == 1
    with pytest.raises(ConfigError, match="log must be a path"):
        EdgeRuntime(BUNDLE, log=3)  # type: ignore[arg-type]


def test_answers_that_are_no_labels_are_logged_as_well(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with EdgeRuntime(task_bundle("image_to_image"), log=path) as edge:
        edge.run(np.zeros((24, 32, 3), dtype=np.uint8))
    with EdgeRuntime(task_bundle("generation"), log=path) as edge:
        edge.generate(7)
    found = entries(path)
    assert [entry.task for entry in found] == ["image_to_image", "generation"]
    assert [entry.outcome.confidence for entry in found] == [None, None]
    assert replayed(read_log(path)).mismatched == 0


def test_closing_the_runtime_writes_every_entry_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with runtime(path, broker(), "ADAPTIVE") as edge:
        for number in range(50):
            edge.run(photo(number % 4))
    assert len(entries(path)) == 50
    assert not [t for t in threading.enumerate() if t.name.startswith("nearfar-")]
    with runtime(path, None, "ONLY_ON_DEVICE") as edge:
        edge.run(photo(0))
    assert len(entries(path)) == 51


_KILLED = """
import os, sys
from edge_runtime import EdgeRuntime
from tests.support.bundles import photo, tiny_bundle
edge = EdgeRuntime(tiny_bundle(), variant="tflite-fp32", log=sys.argv[1])
print("ready", flush=True)
while True:
    edge.run(photo(0))
"""


def test_a_killed_process_leaves_a_log_that_reads(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for round_number in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.kill()
        process.wait()
        process.stdout.close()
        log = read_log(path)
        assert len(log.entries) > 0
        assert len(log.notices) <= round_number + 1


_FULL = """
import resource, sys
from edge_runtime import EdgeRuntime
from edge_runtime.log import DecisionLog
from tests.support.bundles import photo, tiny_bundle
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = DecisionLog(sys.argv[1])
with EdgeRuntime(tiny_bundle(), variant="tflite-fp32", log=log) as edge:
    for _ in range(3):
        edge.run(photo(0))
    import time
    time.sleep(0.3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    for _ in range(5):
        assert edge.run(photo(0)).label is not None
        time.sleep(0.05)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    edge.run(photo(0))
log.close()
print(log.lost)
"""


def test_a_full_disk_costs_entries_and_no_answer(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "log.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lost = int(done.stdout)
    assert 0 < lost <= 8
    log = read_log(path)
    assert len(log.entries) == 9 - lost
    assert any(f"{lost} entries could not be written" in notice for notice in log.notices)
    assert done.stderr.count("loses entries") == 1


def test_a_log_costs_a_request_less_than_half_a_millisecond() -> None:
    """In the thread that answers; a ratio of medians, since the machine may be busy."""
    taken: list[LogEntry] = []

    def median_ms(edge: EdgeRuntime) -> float:
        return float(np.median([edge.run(photo(0)).timings.total_ms for _ in range(60)]))

    with runtime(taken.append, None, "ADAPTIVE") as logged, runtime(None, None, "ADAPTIVE") as bare:
        differences = [median_ms(logged) - median_ms(bare) for _ in range(3)]
    assert min(differences) < 0.5
    assert len(taken) == 180


def test_the_answer_of_another_model_is_named(tmp_path: Path) -> None:
    def said(_: bytes) -> Answer:
        return Answer(predictions=(Prediction(index=0, label=BUNDLE.labels[0], score=0.9),))

    path = tmp_path / "log.jsonl"
    with runtime(path, broker(said), "ONLY_IN_CLOUD") as edge:
        edge.run(photo(0))
    (entry,) = entries(path)
    assert entry.outcome.cloud_sha256 is not None
    assert len(entry.outcome.cloud_sha256) == 64
    assert os.environ.get("HOME", "/root") not in path.read_text()
