"""A sound broker over real sockets: what is sent, reused, learned, and trusted."""

from __future__ import annotations

import io
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import (
    Bundle,
    ConfigError,
    EdgeRuntime,
    InferenceSource,
    LabelsMismatch,
    NetworkUnreachable,
)
from edge_runtime.offload.client import AiohttpTransport
from tests.support.bundles import LABELS, photo, tiny_bundle
from tests.support.certificates import certificate
from tests.support.fault_broker import FaultBroker

BUNDLE = Bundle.open(tiny_bundle())


def connect(url: str, mode: str = "ONLY_IN_CLOUD", **options: object) -> EdgeRuntime:
    runtime = EdgeRuntime(BUNDLE, url, mode, variant="tflite-fp32", **options)  # type: ignore[arg-type]
    runtime.prewarm(wait_ms=3000)
    return runtime


def by_content(body: bytes) -> str:
    return LABELS[sha256(body).digest()[0] % len(LABELS)]


def test_a_redirect_is_not_followed_and_the_key_stays() -> None:
    with FaultBroker("redirect") as broker, connect(broker.url, api_key="k3y") as runtime:
        with pytest.raises(Exception, match="final URL"):
            runtime.run(photo(0))
        assert len([path for path in broker.paths() if path.endswith(":predict")]) == 1


def test_other_labels_in_the_answer_are_refused_though_the_list_was_right() -> None:
    with FaultBroker("wrong_labels") as broker, connect(broker.url) as runtime:
        with pytest.raises(LabelsMismatch):
            runtime.run(photo(0))
        with pytest.raises(LabelsMismatch):
            runtime.run(photo(0))
        assert broker.paths().count("/v1/models/cloud:predict") == 1  # held: not asked again


def test_two_models_that_fit_need_a_choice() -> None:
    with FaultBroker() as broker:
        broker.models = ["one", "two"]
        with connect(broker.url) as runtime, pytest.raises(ConfigError, match="cloud_model"):
            runtime.run(photo(0))
        with connect(broker.url, cloud_model="two") as runtime:
            assert runtime.run(photo(0)).label == "jay"


def test_a_request_carries_deadline_id_key_and_type() -> None:
    with FaultBroker() as broker, connect(broker.url, api_key="k3y") as runtime:
        runtime.run(photo(0), deadline_ms=700)
        runtime.run(photo(0), deadline_ms=700)
        (_, path, first, length), (_, _, second, _) = broker.requests[-2:]
    assert path == "/v1/models/cloud:predict"
    assert 500 < int(first["x-deadline-ms"]) <= 700
    assert first["x-request-id"] != second["x-request-id"]
    assert first["authorization"] == "Bearer k3y"
    assert first["content-type"] == "image/jpeg"
    assert length == len(broker.bodies[-1]) > 10_000
    assert all(headers["authorization"] == "Bearer k3y" for _, _, headers, _ in broker.requests)


def test_metadata_never_reaches_the_broker() -> None:
    block = Image.Exif()
    block[0x0112] = 6
    block.get_ifd(0x8825)[29] = "2026:11:21"
    block[0x010F] = "SECRET-CAMERA"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo(0))).save(buffer, "JPEG", exif=block.tobytes())
    assert b"SECRET" in buffer.getvalue()
    with FaultBroker() as broker, connect(broker.url) as runtime:
        runtime.run(buffer.getvalue())
        body = broker.bodies[-1]
    assert b"SECRET" not in body
    assert b"2026:11:21" not in body
    assert Image.open(io.BytesIO(body)).getexif()[0x0112] == 6


def test_pixels_are_uploaded_as_jpeg() -> None:
    rgb = np.asarray(Image.open(io.BytesIO(photo(0))).convert("RGB"))
    with FaultBroker() as broker, connect(broker.url) as runtime:
        runtime.run(rgb)
        sent = Image.open(io.BytesIO(broker.bodies[-1]))
    assert (sent.format, sent.size) == ("JPEG", (rgb.shape[1], rgb.shape[0]))


def test_one_connection_serves_all_and_survives_a_pause() -> None:
    with FaultBroker() as broker, connect(broker.url) as runtime:
        for seed in range(5):
            runtime.run(photo(seed))
        status = runtime.status().broker
        assert status is not None
        assert status.connection_open
        assert broker.connections == 1
        link = runtime.run(photo(0)).situation.link
        assert link is not None
        assert (link.connection_open, link.setup_round_trips) == (True, 0)


async def test_idle_connections_are_kept_far_longer_than_the_clients_default() -> None:
    transport = AiohttpTransport("http://127.0.0.1:1")
    session = transport._open()
    try:
        assert session.connector is not None
        assert session.connector._keepalive_timeout >= 300
        opened = transport._socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ()))
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert transport.open_connections == 1
        opened.close()
        assert transport.open_connections == 0
    finally:
        await transport.aclose()


def test_rate_round_trip_and_broker_times_are_learned_from_the_receiver() -> None:
    with FaultBroker(delay_ms=20, recv_ms=40.0) as broker, connect(broker.url) as runtime:
        before = runtime.status().broker
        for seed in range(4):
            result = runtime.run(photo(seed))
        after = runtime.status().broker
    assert before is not None
    assert after is not None
    assert (before.rate_samples, after.rate_samples) == (0, 4)
    # 19 kB in 40 ms, though the loopback took it in no time.
    assert 3e5 < after.rate_bytes_per_s < 8e5
    assert after.rate_log_deviation < before.rate_log_deviation
    assert after.inference_ms == pytest.approx(20)
    assert after.queue_ms < 1
    assert after.rtt_samples >= 1
    assert result.timings.upload_ms == pytest.approx(40.0)
    assert result.timings.server_inference_ms == pytest.approx(20)


def test_threads_get_their_own_answers() -> None:
    photos = [photo(seed) for seed in range(24)]
    with connect("http://127.0.0.1:9", "ONLY_ON_DEVICE") as runtime:
        alone = [runtime.run(data).predictions for data in photos]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda data: runtime.run(data).predictions, photos * 4))
    assert together == alone * 4
    with FaultBroker(label=by_content) as broker, connect(broker.url) as runtime:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda data: runtime.run(data, deadline_ms=5000), photos))
        bodies = Counter(by_content(body) for body in broker.bodies if body)
    assert Counter(result.label for result in results) == bodies
    assert [result.label for result in results] == [by_content(_sent(data)) for data in photos]
    assert broker.connections <= 9


def _sent(data: bytes) -> bytes:
    from edge_runtime.offload.metadata import strip_metadata

    return strip_metadata(data)


def test_adaptive_from_many_threads_meets_its_deadlines() -> None:
    with FaultBroker(delay_ms=5) as broker, connect(broker.url, "ADAPTIVE") as runtime:
        with ThreadPoolExecutor(6) as pool:
            results = list(
                pool.map(lambda seed: runtime.run(photo(seed % 10), deadline_ms=2000), range(60))
            )
        counts = runtime.status().counts
    assert all(result.deadline_met for result in results)
    assert counts.requests == counts.on_device + counts.in_cloud == 60
    assert counts.in_cloud > 0
    assert {r.label for r in results if r.inference_source is InferenceSource.IN_CLOUD} == {"jay"}


# TLS ------------------------------------------------------------------------------------


def test_an_unknown_certificate_is_refused(tmp_path: Path) -> None:
    _, server = certificate(tmp_path, "IP:127.0.0.1")
    with FaultBroker(tls=server) as broker:
        with connect(broker.url) as runtime, pytest.raises(NetworkUnreachable, match="TLS"):
            runtime.run(photo(0))
        assert broker.requests == []
        with connect(broker.url, "ADAPTIVE") as runtime:
            assert runtime.run(photo(0)).inference_source is InferenceSource.ON_DEVICE


def test_a_private_authority_is_trusted_for_its_own_names_only(tmp_path: Path) -> None:
    cert, server = certificate(tmp_path, "IP:127.0.0.1")
    trusted = ssl.create_default_context(cafile=str(cert))
    with (
        FaultBroker(tls=server) as broker,
        connect(broker.url, tls=trusted, api_key="k3y") as runtime,
    ):
        result = runtime.run(photo(0))
        assert result.label == "jay"
        assert result.situation.link is not None
        assert result.situation.link.connection_open
    (tmp_path / "other").mkdir()
    cert, server = certificate(tmp_path / "other", "DNS:broker.example")
    trusted = ssl.create_default_context(cafile=str(cert))
    with (
        FaultBroker(tls=server) as broker,
        connect(broker.url, tls=trusted) as runtime,
        pytest.raises(NetworkUnreachable, match="TLS"),
    ):
        runtime.run(photo(0))


# Ends -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ok", "black_hole"])
def test_a_program_that_forgets_to_close_still_ends(fault: str) -> None:
    script = (
        "from edge_runtime import EdgeRuntime\n"
        "import sys\n"
        f"runtime = EdgeRuntime({str(tiny_bundle())!r}, sys.argv[1], variant='tflite-fp32')\n"
        f"print(runtime.run({photo(0)!r}, deadline_ms=300).label)\n"
    )
    with FaultBroker(fault) as broker:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, broker.url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() in LABELS
    assert time.monotonic() - started < 30


def test_two_runtimes_share_nothing() -> None:
    before = threading.active_count()
    with FaultBroker() as broker:
        first, second = connect(broker.url, "ADAPTIVE"), connect(broker.url, "ADAPTIVE")
        first.close()
        assert second.run(photo(0)).inference_source is InferenceSource.IN_CLOUD
        second.close()
    assert threading.active_count() == before
