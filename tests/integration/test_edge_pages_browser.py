"""Pages of gains, replays and decisions in a real browser: quiet, alone, as wide as the screen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_runtime.gain.fit import reliability
from edge_runtime.gain.model import GainBin, GainFigures, Spending
from edge_runtime.gain.report import to_html
from edge_runtime.gain.scores import Calibration, Reliability
from edge_runtime.gain.store import CloudModel, GainProvenance, GainRecord
from edge_runtime.log.lines import PolicyLine, encode
from edge_runtime.log.reader import read_log
from edge_runtime.log.replay import compare, replay
from edge_runtime.log.report import explain_html, replay_html
from edge_runtime.policies import find_policy
from edge_runtime.policies.adaptive import GainPrior
from tests.support.log_entries import entry
from tests.support.reports import HOSTILE

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
PAGES = ("gain", "decision", "replay")


def _gain_page() -> str:
    rng = np.random.default_rng(1)
    confidence = rng.beta(2, 0.8, 500)
    right = (rng.random(500) < confidence).astype(float)
    shown = Reliability(ece=0.1, brier=0.2, nll=0.3, bins=reliability(confidence, right))
    figures = GainFigures(
        error=0.1,
        squared_error=0.2,
        bins=(GainBin(images=500, predicted=0.1, measured=0.1),),
        spending=(Spending(price=0.1, uploaded=0.3, right=0.9),),
    )
    return to_html(
        GainRecord(
            bundle=HOSTILE, variant=HOSTILE, variant_sha256="a" * 64,
            cloud=CloudModel(name=HOSTILE, version=HOSTILE, sha256="b" * 64),
            task="classification", evidence="labels", agreement_metric=HOSTILE,
            knots=((0.1, 0.5), (0.9, -0.1)), local_right=0.7, cloud_right=0.9, agreement=0.8,
            prior=GainPrior(),
            calibration=Calibration(
                method="temperature", temperature=2.0, before=shown, after=shown
            ),
            held_out=figures, held_out_prior=figures,
            provenance=GainProvenance(
                images=500, skipped=0, data_sha256="c" * 64, split=HOSTILE[:100],
                date="2026-01-02", nearfar="0.1.0",
            ),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    one = msgspec.structs.replace(entry("x"), bundle=HOSTILE, variant=HOSTILE)
    path = folder / "log.jsonl"
    path.write_bytes(encode(PolicyLine.of(one.policy)) + encode(one))
    log = read_log(path)
    other = compare(log, find_policy("PREFER_IN_CLOUD"), GainPrior())
    (folder / "gain.html").write_text(_gain_page())
    (folder / "decision.html").write_text(explain_html(log.find()))
    (folder / "replay.html").write_text(replay_html(log, replay(log), other))
    return folder


def browse(page: Path, profile: Path, *arguments: str) -> tuple[str, str]:
    """Its DOM, and the console's lines."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--enable-logging=stderr",
            "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
            *arguments, page.as_uri(),
        ],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    console = [line for line in done.stderr.decode(errors="replace").splitlines()
               if ":CONSOLE" in line]  # fmt: skip
    return done.stdout.decode(errors="replace"), "\n".join(console)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_a_word_on_the_console(pages: Path, tmp_path: Path, name: str) -> None:
    dom, console = browse(pages / f"{name}.html", tmp_path, "--dump-dom")
    assert "</main>" in dom
    assert "<script" not in dom
    assert console == ""
    planted = pages / f"planted-{name}.html"
    planted.write_text((pages / f"{name}.html").read_text().replace(
        "<main>", '<main><script>document.title = "owned"</script>'))  # fmt: skip
    dom, console = browse(planted, tmp_path, "--dump-dom")
    assert "<title>owned" not in dom
    assert "Content Security Policy" in console


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_it_without_scrolling_sideways(
    pages: Path, tmp_path: Path, name: str
) -> None:
    shot = tmp_path / "shot.png"
    browse(pages / f"{name}.html", tmp_path, "--window-size=400,2500", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    background = int(np.median(pixels[:, 1]))
    assert background > 200
    assert np.abs(pixels[:, :10] - background).max() <= 2, "the left margin"
    assert np.abs(pixels[:, -10:] - background).max() <= 2, "the right margin"
    assert pixels[:, 12:388].std() > 10, "and something between them"
