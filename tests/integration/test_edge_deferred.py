"""``EdgeRuntime.defer``: kept on disk, sent when it costs the user little, answered once."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime import (
    Bundle,
    Conditions,
    ConfigError,
    DeadlineExceeded,
    EdgeRuntime,
    SettableSignals,
)
from edge_runtime.contract.errors import LimitExceeded
from edge_runtime.jobs.deferral import waits_for
from edge_runtime.jobs.job import Job
from edge_runtime.jobs.store import Deferral
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport, problem
from tests.support.bundles import LABELS, photo, tiny_bundle

pytestmark = pytest.mark.slow

BUNDLE = Bundle.open(tiny_bundle())
CREATED = "2026-01-01T00:00:00Z"


class JobBroker:
    """Answers jobs at once, one for each key."""

    def __init__(self) -> None:
        self.base = ScriptedTransport.for_bundle(BUNDLE, lambda _: LABELS[4])
        self.transport = ScriptedTransport(self._handle)
        self.keys: list[str] = []
        self.down = False

    async def _handle(self, request: HttpRequest) -> HttpResponse:
        if self.down:
            return problem(503, "overloaded", headers={"retry-after": "0"})
        if request.path.endswith("/result"):
            predict = HttpRequest(
                method="POST", path="/v1/models/scripted:predict", headers={},
                body=b"", max_answer_bytes=1 << 20,
            )  # fmt: skip
            return await self.base.send(predict)
        if "/jobs" not in request.path:
            return await self.base.send(request)
        if request.method == "POST":
            self.keys.append(request.headers["Idempotency-Key"])
        job = self.keys[-1] if request.method == "POST" else request.path.split("/")[-1]
        info = {"id": job, "model": "scripted", "state": "done", "created": CREATED}
        return HttpResponse(status=202, headers={}, body=json.dumps(info).encode())


@pytest.fixture
def broker() -> JobBroker:
    return JobBroker()


def runtime(broker: JobBroker, state: Path, signals: SettableSignals | None) -> EdgeRuntime:
    return EdgeRuntime(
        BUNDLE, transport=broker.transport, policy="ONLY_IN_CLOUD", conditions=signals, state=state
    )


def waiting(job: Job, limit_s: float = 5.0) -> None:
    end_s = time.monotonic() + limit_s
    while job.status().trouble != "deferred":
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.jobs.hold._LOOK_EVERY_S", 0.02)


def test_what_cannot_be_deferred_is_refused_and_leaves_nothing(
    broker: JobBroker, tmp_path: Path
) -> None:
    wifi = SettableSignals(link_type="wifi")
    with runtime(broker, tmp_path, wifi) as edge:
        with pytest.raises(ConfigError, match="private"):
            edge.defer(photo(0), private=True)
        with pytest.raises(ConfigError, match="ttl_s"):
            edge.defer(photo(0), ttl_s=0)
        with pytest.raises(ConfigError, match="top_k"):
            edge.defer(photo(0), top_k=0)
        assert edge.jobs() == []
    with (
        runtime(broker, tmp_path, None) as edge,
        pytest.raises(ConfigError, match="nobody tells this runtime"),
    ):
        edge.defer(photo(0))
    with (
        EdgeRuntime(BUNDLE, state=tmp_path, conditions=wifi) as edge,
        pytest.raises(ConfigError, match="by a broker"),
    ):
        edge.defer(photo(0))
    with (
        EdgeRuntime(BUNDLE, transport=broker.transport, conditions=wifi) as edge,
        pytest.raises(ConfigError, match="state=FOLDER"),
    ):
        edge.defer(photo(0))
    assert list((tmp_path / "jobs").iterdir()) == []
    assert broker.keys == []


@pytest.mark.parametrize(
    ("signals", "wanted", "missing"),
    [
        ({"link_type": "none", "metered": False}, {}, "a network"),
        ({"link_type": "lte", "metered": True}, {}, "a network that is not metered"),
        ({"link_type": "lte"}, {}, "a network that is not metered"),
        ({"link_type": "unknown"}, {}, "a network that is not metered"),
        ({"link_type": "wifi", "metered": True}, {}, "a network that is not metered"),
        ({"link_type": "wifi", "data_saver": True}, {}, "a network that is not metered"),
        ({"link_type": "wifi"}, {"charging": True}, "a charger"),
        ({"link_type": "wifi", "charging": False}, {"charging": True}, "a charger"),
        ({"link_type": "wifi", "charging": True}, {"charging": True}, None),
        ({"link_type": "wifi"}, {}, None),
        ({"link_type": "lte", "metered": False}, {}, None),
        ({"link_type": "lte", "metered": True}, {"unmetered": False}, None),
        ({"link_type": "unknown"}, {"unmetered": False}, None),
    ],
)
def test_what_is_not_known_to_hold_is_missing(
    signals: dict[str, object], wanted: dict[str, bool], missing: str | None
) -> None:
    deferral = Deferral(expires_s=2e9, **({"unmetered": True, "charging": False} | wanted))
    assert waits_for(deferral, Conditions(**signals)) == missing  # type: ignore[arg-type]


def test_it_waits_for_its_conditions_and_is_sent_then(broker: JobBroker, tmp_path: Path) -> None:
    signals = SettableSignals(link_type="lte", metered=True)
    with runtime(broker, tmp_path, signals) as edge:
        job = edge.defer(photo(0))
        waiting(job)
        time.sleep(0.1)
        assert broker.keys == []
        signals.update(link_type="wifi", metered=False)
        result = job.result(10)
        assert (result.label, result.decision.reason) == (LABELS[4], "deferred")
        assert broker.keys == [job.id]


def test_nothing_is_sent_when_the_conditions_end_before_a_retry(
    broker: JobBroker, tmp_path: Path
) -> None:
    signals = SettableSignals(link_type="wifi")
    broker.down = True
    with runtime(broker, tmp_path, signals) as edge:
        job = edge.defer(photo(0))
        while job.status().trouble != "overloaded":
            time.sleep(0.005)
        signals.update(link_type="lte", metered=True)
        broker.down = False
        while job.status().trouble != "network_unreachable":
            time.sleep(0.005)
        assert broker.keys == []
        signals.update(link_type="wifi", metered=False)
        assert job.result(30).label == LABELS[4]


def test_one_that_was_not_sent_in_its_time_fails_and_is_removed(
    broker: JobBroker, tmp_path: Path
) -> None:
    signals = SettableSignals(link_type="none")
    with runtime(broker, tmp_path, signals) as edge:
        job = edge.defer(photo(0), ttl_s=1)
        with pytest.raises(DeadlineExceeded, match="not sent in its time"):
            job.result(10)
        end_s = time.monotonic() + 5
        while list((tmp_path / "jobs").iterdir()):
            assert time.monotonic() < end_s
            time.sleep(0.01)
    assert broker.keys == []


def test_the_next_runtime_sends_it_without_being_asked(broker: JobBroker, tmp_path: Path) -> None:
    signals = SettableSignals(link_type="none")
    with runtime(broker, tmp_path, signals) as edge:
        first = edge.defer(photo(0), top_k=2).id
    signals.update(link_type="wifi")
    with runtime(broker, tmp_path, signals) as edge:
        end_s = time.monotonic() + 10
        jobs = tmp_path / "jobs"
        while not list(jobs.glob("*.answer")) or list(jobs.glob("*.body")):
            assert time.monotonic() < end_s
            time.sleep(0.01)
        assert broker.keys == [first]
    broker.down = True  # the answer is on the disk: nobody need be asked
    with runtime(broker, tmp_path, signals) as edge:
        (job,) = edge.jobs()
        assert job.id == first
        assert job.result(5).label == LABELS[4]
        job.forget()
        assert edge.jobs() == []
    assert list((tmp_path / "jobs").iterdir()) == []
    assert broker.keys == [first]


def test_number_and_bytes_are_bounded(
    broker: JobBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = SettableSignals(link_type="none")
    with runtime(broker, tmp_path, signals) as edge:
        edge.defer(photo(0))
        monkeypatch.setattr("edge_runtime.jobs.store._MAX_BYTES", len(photo(0)) + 100)
        with pytest.raises(LimitExceeded, match="forget"):
            edge.defer(photo(1))
        monkeypatch.setattr("edge_runtime.jobs.store._MAX_BYTES", 1 << 20)
        monkeypatch.setattr("edge_runtime.jobs.store._MAX_JOBS", 1)
        with pytest.raises(LimitExceeded, match="forget"):
            edge.defer(photo(1))
        assert len(edge.jobs()) == 1


def test_no_metadata_is_written(broker: JobBroker, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "my address"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo(0))).save(buffer, "JPEG", exif=exif)
    with runtime(broker, tmp_path, SettableSignals(link_type="none")) as edge:
        edge.defer(buffer.getvalue())
        (stored,) = (tmp_path / "jobs").glob("*.body")
        assert b"my address" not in stored.read_bytes()
        assert stored.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("left", ["body", "answer"])
def test_what_a_crash_left_without_a_record_is_removed(
    broker: JobBroker, tmp_path: Path, left: str
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / f"{'a' * 32}.{left}").write_bytes(photo(0))
    (folder / ".new-1234").write_bytes(b"half")
    with runtime(broker, tmp_path, SettableSignals(link_type="wifi")) as edge:
        assert edge.jobs() == []
    assert list(folder.iterdir()) == []


def test_a_record_without_its_body_is_given_up(
    broker: JobBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with runtime(broker, tmp_path, SettableSignals(link_type="none")) as edge:
        job = edge.defer(photo(0)).id
    (tmp_path / "jobs" / f"{job}.body").unlink()
    with runtime(broker, tmp_path, SettableSignals(link_type="wifi")) as edge:
        assert edge.jobs() == []
    assert "is lost" in caplog.text


async def test_deferring_does_not_block_an_event_loop(broker: JobBroker, tmp_path: Path) -> None:
    async with runtime(broker, tmp_path, SettableSignals(link_type="wifi")) as edge:
        job = await edge.adefer(photo(0), unmetered=False)
        assert (await job.result(10)).label == LABELS[4]
