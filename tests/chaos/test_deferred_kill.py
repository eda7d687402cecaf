"""An app that is killed at any point while it defers images and has them sent.

Every image whose ``defer`` returned is answered, once; the broker runs none twice.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.broker import broker_process
from tests.support.bundles import photo, servable, tiny_bundle

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("NEARFAR_KILL_ROUNDS", "12"))

APP = """
import sys, time
from edge_runtime import EdgeRuntime, SettableSignals
bundle, url, state = sys.argv[1:4]
signals = SettableSignals(link_type="wifi")
with EdgeRuntime(bundle, url, "ONLY_IN_CLOUD", conditions=signals, state=state) as runtime:
    print("ready", flush=True)
    for image in sys.argv[4:]:
        job = runtime.defer(image)
        print("deferred", job.id, image, flush=True)
        time.sleep(0.01)
    for job in runtime.jobs():
        print("answered", job.id, job.result(60).label, flush=True)
"""


def app(url: str, state: Path, images: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APP, str(tiny_bundle()), url, str(state), *images]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_deferred_image_is_lost_or_run_twice_however_the_app_ends(tmp_path: Path) -> None:
    draw = random.Random(20)
    models = servable(tmp_path / "servable" / "same")
    images = []
    for seed in range(6):
        path = tmp_path / f"{seed}.jpg"
        path.write_bytes(photo(seed, width=1600, height=1200))
        images.append(str(path))
    accepted: dict[str, str] = {}
    state = tmp_path / "state"
    arguments = ("--models", str(models), "--jobs", str(tmp_path / "journal"))
    with broker_process(tmp_path, *arguments) as broker:
        for _ in range(ROUNDS):
            process = app(broker.url, state, images)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.0, 0.6))
            process.kill()
            said, _ = process.communicate(timeout=30)
            for line in said.splitlines():
                if line.startswith("deferred ") and len(line.split()) == 3:
                    accepted[line.split()[1]] = line.split()[2]
        last = app(broker.url, state, [])
        said, errors = last.communicate(timeout=240)
        assert last.returncode == 0, errors
        answered = [line.split()[1:] for line in said.splitlines() if line.startswith("answered")]
        ended = broker.logged("job_ended", len(answered))
    assert len({job for job, _ in answered}) == len(answered)
    labels = dict(answered)
    assert set(accepted) <= set(labels)
    assert len(accepted) > ROUNDS
    expected: dict[str, str] = {}
    for job, image in accepted.items():
        assert expected.setdefault(image, labels[job]) == labels[job]
    assert {event["state"] for event in ended} == {"done"}
    assert len(ended) == len({event["job"] for event in ended}) == len(answered)
    print(json.dumps({"accepted": len(accepted), "answered": len(answered)}))  # noqa: T201
