"""JUnit XML, as CI systems read it: one test case a variant and a check."""

from __future__ import annotations

import xml.etree.ElementTree as ET  # writes only
from pathlib import Path

from converters.verify.verify import Report

__all__ = ["write_junit"]


def write_junit(report: Report, path: Path) -> None:
    """Write ``report`` as one ``testsuite``."""
    cases = [
        (
            f"variant.{entry.id}",
            entry.passed,
            "; ".join(f"{finding.name}: {finding.detail}" for finding in entry.findings),
        )
        for entry in report.variants
    ]
    cases += [(f"check.{check.name}", check.passed, check.detail) for check in report.checks]
    suite = ET.Element(
        "testsuite",
        name=f"nearfar verify {report.bundle} {report.version}",
        tests=str(len(cases)),
        failures=str(sum(not passed for _, passed, _ in cases)),
    )
    for name, passed, reason in cases:
        case = ET.SubElement(suite, "testcase", classname=report.bundle, name=name)
        if not passed:
            ET.SubElement(case, "failure", message=_printable(reason))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
