"""``nearfar.toml`` with real conversions: bundles, proofs and one exit status."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from converters.project import convert_project
from edge_runtime.bundle import Bundle
from tests.support.bundles import photo

pytestmark = pytest.mark.slow

NETS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )
"""
MODEL = """
[[model]]
source = "nets.py:small"
weights = "random:1"
preprocess = "unit"
input_size = 24
to = ["torchscript"]
precision = ["fp32"]
"""


def test_every_model_is_converted_and_proven_and_a_failed_gate_decides_the_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        (tmp_path / "photos" / f"{seed}.jpg").write_bytes(photo(seed, width=48, height=40))
    (tmp_path / "gates.toml").write_text("[fp32]\nsqnr_db_mean = 500\n")
    (tmp_path / "nearfar.toml").write_text(
        MODEL + 'output = "build/strict"\ngates = "gates.toml"\neval = "photos"\n'
        + MODEL + 'output = "build/fair"\nname = "fair-one"\n'
    )  # fmt: skip
    reports = tmp_path / "reports"
    status = convert_project(tmp_path / "nearfar.toml", ["--jobs=1", "--quiet"], reports=reports)
    assert status == 1, "the strict model's, though the fair one came after it"
    assert "model 2 of 2: fair-one" in capfd.readouterr().err
    fair = Bundle.open(tmp_path / "build" / "fair").manifest
    assert fair.name == "fair-one"
    assert fair.variants[0].ship
    assert not Bundle.open(tmp_path / "build" / "strict").manifest.variants[0].ship
    assert sorted(path.name for path in reports.iterdir()) == [
        "strict.html", "strict.json", "strict.xml",
    ]  # fmt: skip
    proof = json.loads((reports / "strict.json").read_text())
    assert proof["variants"][0]["findings"][0]["name"] == "parity"
    suite = ET.parse(reports / "strict.xml").getroot()  # noqa: S314  # our own file
    assert suite.get("failures") == "1"
    page = (reports / "strict.html").read_text()
    assert "1 of 1 variants failed and must not ship." in page
    assert page.count("<img") == 3, "the three photos"
