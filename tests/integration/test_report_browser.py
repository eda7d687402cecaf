"""The HTML page of a proof in a real browser: quiet, alone, and as wide as the screen."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from converters.report.html import write_html
from converters.verify.gates import default_gates
from edge_runtime.bundle import Bundle
from tests.support.bundles import tiny_bundle
from tests.support.reports import hostile_layers, hostile_report, hostile_samples

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


def browse(page: Path, folder: Path, *arguments: str) -> tuple[str, str, list[str]]:
    """Load ``page``; its DOM, the console's lines, and every http(s) address it asked for."""
    folder.mkdir(exist_ok=True)
    log = folder / "net.json"
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}", *arguments, page.as_uri(),
        ],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    errors = done.stderr.decode(errors="replace")
    console = [line for line in errors.splitlines() if ":CONSOLE" in line]
    return done.stdout.decode(errors="replace"), "\n".join(console), _requests(log)


def _requests(log: Path) -> list[str]:
    """Addresses in a net log that a page asked for; the browser's own have no origin.

    A browser that is stopped leaves the closing brackets out.
    """
    text = log.read_text(errors="replace")
    try:
        document: dict[str, Any] = json.loads(text)
    except ValueError:
        document = json.loads(text.rstrip().rstrip(",") + "]}")
    found = [event.get("params", {}) for event in document["events"]]
    return sorted(
        {
            str(params["url"])
            for params in found
            if str(params.get("url", "")).startswith("http")
            and params.get("initiator", "not an origin") != "not an origin"
        }
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "proof.html"
    write_html(
        hostile_report(),
        path,
        bundle=Bundle.open(tiny_bundle()),
        samples=hostile_samples(),
        layers=hostile_layers(),
        seconds={"tflite-int8": 2.0},
        gates=default_gates("classification"),
    )
    return path


def test_the_page_loads_without_a_word_on_the_console_or_a_request(
    page: Path, tmp_path: Path
) -> None:
    dom, console, requests = browse(page, tmp_path / "own", "--dump-dom")
    assert "<script" not in dom
    assert "&lt;script&gt;alert(1)" in dom
    assert console == ""
    assert requests == []


def test_the_policy_holds_where_the_escaping_would_fail(page: Path, tmp_path: Path) -> None:
    """The same page with markup planted in it; also proves that this test can see."""
    planted = tmp_path / "planted.html"
    evil = (
        '<script>document.title = "owned"</script><p style="color: red">'
        '<img src="http://tracker.example/pixel.png">'
    )
    planted.write_text(page.read_text().replace("<main>", f"<main>{evil}"))
    dom, console, requests = browse(planted, tmp_path / "planted", "--dump-dom")
    assert "<title>owned" not in dom
    assert console.count("Content Security Policy") >= 3
    assert requests == []
    free = tmp_path / "free.html"
    free.write_text(planted.read_text().replace('http-equiv="Content-Security-Policy"', ""))
    dom, console, requests = browse(free, tmp_path / "free", "--dump-dom")
    assert "<title>owned" in dom
    assert requests == ["http://tracker.example/pixel.png"]


@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_a_phone_shows_it_without_scrolling_sideways_in_its_own_colors(
    page: Path, tmp_path: Path, scheme: str, bright: bool
) -> None:
    """The widest thing is no wider than 400 px: nothing is painted right of the margin."""
    shot = tmp_path / f"{scheme}.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if not bright else []
    browse(page, tmp_path / scheme, "--window-size=400,3000", f"--screenshot={shot}", *dark)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert pixels.shape[1] == 400
    background = int(np.median(pixels[:, 1]))
    assert (background > 200) is bright
    assert (background < 60) is not bright
    assert np.abs(pixels[:, :10] - background).max() <= 2, "the left margin"
    assert np.abs(pixels[:, -10:] - background).max() <= 2, "the right margin"
    assert pixels[:, 12:388].std() > 10, "and something between them"
