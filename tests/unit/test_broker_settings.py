"""Settings: unknown, senseless and contradictory ones stop the start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from broker.settings import build_settings, is_loopback, is_spec
from edge_runtime.contract.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "models"),
        ({"models": ()}, "models"),
        ({"models": ("m",), "debug": True}, "debug"),
        ({"models": ("m",), "port": 65_536}, "65535"),
        ({"models": ("m",), "port": -1}, "0"),
        ({"models": ("m",), "port": "8080"}, "port"),
        ({"models": ("m",), "device": "tpu"}, "tpu"),
        ({"models": ("m",), "max_batch": 0}, "1"),
        ({"models": ("m",), "max_batch": 257}, "256"),
        ({"models": ("m",), "threads": 0}, "1"),
        ({"models": ("m",), "hang_timeout_s": 0.0}, "0"),
        ({"models": ("m", "m")}, "twice"),
        ({"models": ("m",), "cors_origins": ("https://a.example/",)}, "without a path"),
        ({"models": ("m",), "cors_origins": ("null",)}, "https://app.example"),
        ({"models": ("m",), "cors_origins": ("https://a.example\r\nX: y",)}, "CORS"),
        ({"models": ("m",), "cors_origins": ("*", "https://a.example")}, "alone"),
        ({"models": ("m",), "host": "no such host"}, "no address"),
    ],
)
def test_senseless_settings_are_refused(values: dict[str, object], says: str):
    with pytest.raises(ConfigError) as caught:
        build_settings(**values)
    assert says in caught.value.detail


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"])  # noqa: S104
def test_an_address_others_can_reach_needs_keys(host: str):
    with pytest.raises(ConfigError, match="--keys"):
        build_settings(models=("m",), host=host)
    assert build_settings(models=("m",), host=host, keys="keys.json").host == host


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "::ffff:127.0.0.1"]
)
def test_loopback_needs_none(host: str):
    assert is_loopback(host)
    assert build_settings(models=("m",), host=host).keys is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("zoo:digits-large", True),
        ("torchvision:resnet18", True),
        ("build/digits", False),
        ("/abs/digits", False),
        ("Zoo:x", False),
        ("zoo:", False),
    ],
)
def test_a_spec_is_told_from_a_folder(model: str, expected: bool):
    assert is_spec(model) is expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "m", "--host", "0.0.0.0"], "--keys"),  # noqa: S104
        (["--models", "/nowhere"], "not a folder"),
        (["--models", "m", "--max-batch", "9999"], "max_batch"),
        (["--models", "m", "--keys", "/nowhere/keys.json", "--executor", "inline"], "folder"),
    ],
)
def test_the_command_exits_2_with_one_line(arguments: list[str], says: str):
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error [config]: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
