"""README's code blocks, run as a new user would: top to bottom, in an empty folder."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README, re.S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        assert server.poll() is None, "the broker ended"
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail("the broker did not become ready")


def _make_uplinks(folder: Path) -> None:
    """Two minutes of an LTE uplink that comes and goes, as "seconds Mbps"."""
    folder.mkdir()
    lines = [f"{0.1 * k:.1f} {8.0 + 6.0 * math.sin(k / 40):.3f}" for k in range(1200)]
    (folder / "walk-lte-uplink.txt").write_text("\n".join(lines) + "\n")


def test_readme_blocks_run_from_top_to_bottom(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port = _free_port()

    def shell(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    scripts = [text for kind, text in BLOCKS if kind == "sh"]
    programs = [text for kind, text in BLOCKS if kind == "python"]
    assert len(scripts) == 3
    assert len(programs) == 1

    out = shell(scripts[0])
    assert "tflite-int8" in out
    photo = next(iter(sorted((tmp_path / "photos" / "test").glob("*.jpg"))))
    shutil.copyfile(photo, tmp_path / "photo.jpg")
    (tmp_path / "ten_lines.py").write_text(programs[0])
    assert "ON_DEVICE" in shell("python ten_lines.py")

    server = None
    try:
        for line in scripts[1].replace("\\\n", "").replace("8080", str(port)).splitlines():
            if line.startswith("nearfar serve"):
                server = subprocess.Popen(
                    line.split(), cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
                )
                _wait_until_ready(f"http://127.0.0.1:{port}", server)
            else:
                answer = shell(line.replace("X-Deadline-Ms: 300", "X-Deadline-Ms: 20000"))
        assert '"predictions":[{"index":' in answer
        _make_uplinks(tmp_path / "my-uplinks")
        quick = "--deadline-ms 400 --seeds 1 --policies Hedged"
        told = shell(scripts[2].replace("8080", str(port)).replace("--deadline-ms 400", quick))
        for name in ("digits-large", "Hedged", "LocalOnly", "Oracle"):
            assert name in told
        assert (tmp_path / "decisions.html").stat().st_size > 10_000
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(timeout=30) == 0
