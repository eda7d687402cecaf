"""Terminal tables and JUnit: every name and reason arrives, none of it is obeyed."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from converters.report.junit import write_junit
from converters.report.layers_table import print_layers
from converters.report.records import LayerRow
from converters.report.table import print_manifest, print_report
from converters.verify.checks import Check
from converters.verify.figures import Finding
from converters.verify.outcome import Report
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError
from tests.support.bundles import tiny_bundle
from tests.support.reports import HOSTILE, entry, hostile_report, report

MARKUP = "[/red] [link=http://x]click[/link] [parity]"


def printed(proof: Report, width: int, seconds: dict[str, float] | None = None) -> str:
    file = io.StringIO()
    print_report(proof, Console(file=file, width=width, color_system=None), seconds)
    return file.getvalue()


def test_findings_are_printed_with_their_names() -> None:
    proof = report(
        entry("tflite-int8", Finding(name="parity", detail="mean SQNR 9.0 dB is below 16.0 dB")),
        checks=(Check(name="labels", passed=False, detail="no better than chance"),),
    )
    text = printed(proof, 160)
    assert "tflite-int8 [parity] mean SQNR 9.0 dB is below 16.0 dB\n" in text
    assert "labels: FAILED: no better than chance\n" in text


def test_brackets_in_a_reason_are_text_and_control_characters_are_not_sent() -> None:
    proof = report(
        entry("tflite-int8", Finding(name="x", detail=MARKUP)),
        checks=(Check(name="labels", passed=True, detail=MARKUP),),
        bundle=MARKUP,
    )
    text = printed(proof, 200)
    assert text.count(MARKUP) == 3
    assert "\x1b" not in printed(hostile_report(), 200)
    assert "\u202e" not in printed(hostile_report(), 200)
    file = io.StringIO()
    layers = {"tflite-int8": [LayerRow(name=MARKUP + HOSTILE, op=HOSTILE, sqnr_db=1.0)]}
    print_layers(report(entry("tflite-int8"), layers=layers), Console(file=file, width=300))
    assert MARKUP in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40, 30])
def test_a_narrow_terminal_gets_whole_columns_only(width: int) -> None:
    proof = report(
        entry("torchscript-fp32", sqnr_db=123.4, accuracy=0.95),
        entry("tflite-int8", sqnr_db=34.5, accuracy=0.94),
        reference_accuracy=0.95,
    )
    text = printed(proof, width, {"tflite-int8": 3.25})
    assert "…" not in text
    assert "torchscript-fp32" in text
    assert all(len(line) <= width for line in text.splitlines())
    columns = ["gate", "size", "SQNR dB", "agree", "accuracy", "ratio", "worst dB", "ms here"]
    header = next(line for line in text.splitlines() if line.strip().startswith("variant"))
    shown = [title in header for title in columns]
    assert shown == sorted(shown, reverse=True), "the least telling go first"
    assert ("no room for:" in text) is not all([*shown, "made in s" in header])


def test_columns_that_no_variant_has_are_not_there() -> None:
    text = printed(report(entry("tflite-fp16"), task="image_to_image"), 160)
    assert "agree" not in text
    assert "accuracy" not in text
    image = entry("tflite-fp16", metrics={"psnr_db": 48.29, "ssim": 0.998})
    text = printed(report(image, task="image_to_image"), 160)
    assert "PSNR dB" in text
    assert "48.3" in text


def test_a_manifest_prints_within_the_terminal() -> None:
    manifest = Bundle.open(tiny_bundle()).manifest
    origin = msgspec.structs.replace(manifest.provenance, source=f"{MARKUP} \x1b[2J")
    manifest = msgspec.structs.replace(manifest, provenance=origin)
    for width in (200, 80, 40):
        file = io.StringIO()
        print_manifest(manifest, Console(file=file, width=width, color_system=None))
        text = file.getvalue()
        assert "tflite-int8-dyn" in text
        assert "\x1b" not in text
        assert "…" not in text
        assert "".join(MARKUP.split()) in "".join(text.split())
        assert all(len(line) <= width for line in text.splitlines())


def suite_of(proof: Report, path: Path) -> ET.Element:
    write_junit(proof, path)
    return ET.parse(path).getroot()  # noqa: S314  # our own file


def test_junit_tells_failures_from_missing_backends(tmp_path: Path) -> None:
    missing = Finding(name="backend_unavailable", detail="install it")
    proof = report(
        entry("tflite-fp16", sqnr_db=61.25),
        entry(
            "tflite-int8", Finding(name="parity", detail="a"), Finding(name="parity", detail="b")
        ),
        entry("coreml-fp16", missing, sqnr_db=None, backend_missing=True),
        checks=(
            Check(name="labels", passed=False, detail="chance"),
            Check(name="io-contract", passed=True, detail="fine"),
        ),
    )
    suite = suite_of(proof, tmp_path / "deep" / "v.xml")
    assert (suite.tag, suite.get("name")) == ("testsuite", "nearfar verify tiny 1.0.0")
    assert [suite.get(key) for key in ("tests", "failures", "errors")] == ["5", "2", "1"]
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == [
        "variant.tflite-fp16", "variant.tflite-int8", "variant.coreml-fp16", "check.labels",
        "check.io-contract",
    ]  # fmt: skip
    failure = cases["variant.tflite-int8"].find("failure")
    assert failure is not None
    assert failure.attrib == {"type": "parity", "message": "parity: a; parity: b"}
    error = cases["variant.coreml-fp16"].find("error")
    assert error is not None
    assert error.get("type") == "backend_unavailable"
    assert cases["check.io-contract"].find("failure") is None
    figures = cases["variant.tflite-fp16"].findtext("system-out")
    assert figures is not None
    assert "SQNR 61.2 dB, worst 56.2 dB" in figures


def test_junit_of_hostile_names_is_well_formed(tmp_path: Path) -> None:
    bad = "\x00\x0b\x1b\ufffe\ud800 ]]> <!-- & \U0001f600"
    proof = report(entry("tflite-int8", Finding(name=bad, detail=bad)), bundle="b<&>")
    suite = suite_of(proof, tmp_path / "v.xml")
    failure = suite[0].find("failure")
    assert failure is not None
    assert failure.get("type") == "\ufffd\ufffd\ufffd\ufffd\ufffd ]]> <!-- & \U0001f600"
    assert suite_of(hostile_report(), tmp_path / "h.xml").get("failures") == "2"


def test_junit_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another file"):
        write_junit(report(entry("tflite-fp16")), tmp_path)
