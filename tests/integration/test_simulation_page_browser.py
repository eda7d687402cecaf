"""The page of a simulation in a real browser: quiet, and as wide as a phone's screen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.simulation.cli import simulate

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells over two short links, one with a name that is no markup."""
    root = tmp_path_factory.mktemp("page")
    (root / "traces").mkdir()
    for name, rate in {"lte & <b>fast<b>.up": 9.0, "uplink-wifi-of-a-long-name.txt": 30.0}.items():
        text = "".join(f"{i / 10:.1f} {rate if i % 300 < 200 else 0.2}\n" for i in range(600))
        (root / "traces" / name).write_text(text)
    (root / "short.toml").write_text("[run]\nduration_s = 60.0\n")
    arguments = [
        "--traces", root / "traces", "--constants", root / "short.toml", "--seeds", "1",
        "--jobs", "1", "--quiet", "--cells", "mid:400:poisson,mid:800:poisson",
        "--html", root / "page.html",
    ]  # fmt: skip
    simulate.main([str(a) for a in arguments], standalone_mode=False)
    text = (root / "page.html").read_text().replace("<details>", "<details open>")
    (root / "page.html").write_text(text)
    return root / "page.html"


def _browse(page: Path, folder: Path, *arguments: str) -> tuple[str, str]:
    """Its DOM, and the console's lines."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars", "--enable-logging=stderr",
            "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}",
            *arguments, page.as_uri(),
        ],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    errors = done.stderr.decode(errors="replace").splitlines()
    return done.stdout.decode(errors="replace"), "\n".join(e for e in errors if ":CONSOLE" in e)


def test_the_page_loads_without_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    dom, console = _browse(page, tmp_path / "own", "--dump-dom")
    assert console == ""
    assert "lte &amp; &lt;b&gt;fast&lt;b&gt;" in dom
    planted = tmp_path / "planted.html"
    planted.write_text(
        page.read_text().replace("<h1>", "<script>document.title='owned'</script><h1>")
    )
    dom, console = _browse(planted, tmp_path / "planted", "--dump-dom")
    assert "Content Security Policy" in console
    assert "<title>owned" not in dom


@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_a_phone_shows_it_without_scrolling_sideways_in_its_own_colors(
    page: Path, tmp_path: Path, scheme: str, bright: bool
) -> None:
    """Charts and tables scroll inside themselves: nothing is painted right of the margin."""
    shot = tmp_path / f"{scheme}.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if not bright else []
    _browse(page, tmp_path / scheme, "--window-size=400,9000", f"--screenshot={shot}", *dark)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert pixels.shape[1] == 400
    background = int(np.median(pixels[:, 1]))
    assert (background > 200) is bright
    assert (background < 60) is not bright
    assert np.abs(pixels[:, :10] - background).max() <= 2, "the left margin"
    assert np.abs(pixels[:, -10:] - background).max() <= 2, "the right margin"
    assert pixels[:, 24:376].std() > 10, "and something between them"
