"""What must stay on the device stays there: no socket is opened, watched by an audit hook."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FaultBroker

_SCRIPT = """
import sys, time
events = []
def watch(event, arguments):
    if event.startswith("socket."):
        events.append(event)
sys.addaudithook(watch)
from edge_runtime import Conditions, EdgeRuntime

class Saver:
    def read(self):
        return Conditions(data_saver=True)

bundle, url, image = sys.argv[1], sys.argv[2], open(sys.argv[3], "rb").read()
state = sys.argv[3] + ".state"
{body}
time.sleep(0.2)
print(*events)
"""

LOCAL = """
with EdgeRuntime(bundle) as runtime:
    runtime.run(image)
with EdgeRuntime(bundle, url, "ONLY_ON_DEVICE", api_key="k") as runtime:
    runtime.run(image)
    runtime.prewarm(wait_ms=100)
    runtime.status()
assert events == [], events

import asyncio
async def main():
    before = len(events)  # the event loop's own wake-up pair
    async with EdgeRuntime(bundle, url, "ONLY_ON_DEVICE") as runtime:
        await runtime.arun(image)
    assert events[before:] == [], events
    del events[:]
asyncio.run(main())

with EdgeRuntime(bundle, url, "ONLY_ON_DEVICE", state=state) as runtime:
    job = runtime.submit(image)
    assert job.result(30).inference_source == "ON_DEVICE"
    job.forget()
assert events == [], events
"""

PRIVATE = """
for mode in ("ADAPTIVE", "PREFER_IN_CLOUD", "PREFER_ON_DEVICE"):
    with EdgeRuntime(bundle, url, mode, conditions=Saver()) as runtime:
        time.sleep(0.1)
        before = len(events)
        for _ in range(3):
            assert runtime.run(image, private=True).inference_source == "ON_DEVICE"
        job = runtime.submit(image, private=True)
        assert job.result(30).inference_source == "ON_DEVICE"
        job.forget()
        time.sleep(0.1)
        assert events[before:] == [], events
    del events[:]
with EdgeRuntime(bundle, url, "ONLY_IN_CLOUD") as runtime:
    runtime.run(image)
assert "socket.connect" in events  # the hook does see one
del events[:]
"""


def sockets_of(body: str, url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    image = tmp_path_factory.mktemp("image") / "photo.jpg"
    image.write_bytes(photo(0))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(body=body), str(tiny_bundle()), url, str(image)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_nothing_local_ever_makes_a_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    with FaultBroker() as broker:
        assert sockets_of(LOCAL, broker.url, tmp_path_factory) == ""
        assert broker.connections == 0


def test_a_private_image_makes_no_socket_in_any_mode(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with FaultBroker() as broker:
        assert sockets_of(PRIVATE, broker.url, tmp_path_factory) == ""
        # Only of the last runtime, which may use the cloud.
        assert broker.paths().count("/v1/models/cloud:predict") == 1
