"""What the soak says of memory: the slope is a least-squares one, without the warm-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import growth, slope

ROOT = Path(__file__).parents[2]


def test_the_slope_is_that_of_a_line_and_of_noise_around_it():
    assert slope([(x, 7 * x + 3) for x in range(10)]) == pytest.approx(7.0)
    assert slope([(x, 5) for x in range(10)]) == 0.0
    assert slope([(1, 5), (1, 9)]) == 0.0
    zigzag = [(x, 2 * x + (-1) ** x) for x in range(100)]
    assert slope(zigzag) == pytest.approx(2.0, abs=1e-2)


def test_what_grows_while_caches_fill_is_no_leak():
    points = [(x, min(x, 30) * 1000) for x in range(101)]
    found = growth(points)
    assert (found.first_bytes, found.last_bytes, found.bytes_per_request) == (30_000, 30_000, 0.0)


@pytest.mark.slow
def test_a_short_soak_answers_everything_while_versions_change(tmp_path: Path):
    target = tmp_path / "soak.json"
    # Its exit status is about memory too, which so few requests say nothing of.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--json", str(target), "--requests", "600"],
        cwd=ROOT, timeout=300, check=False, capture_output=True,
    )  # fmt: skip
    found = json.loads(target.read_text())
    assert found["errors"] == {}
    assert found["statuses"] == {"200": 600}
    assert found["passed"]["every change was made"]
