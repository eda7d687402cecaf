"""JUnit XML, as CI systems read it: one test case a variant and a check."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET  # writes only
from pathlib import Path
from typing import Literal, NamedTuple

from converters.report.numbers import format_bytes
from converters.verify.outcome import Report, VariantReport
from edge_runtime.contract.errors import ConfigError

__all__ = ["write_junit"]

# What XML 1.0 cannot hold (section 2.2), and lone surrogates.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Case(NamedTuple):
    name: str
    outcome: Literal["passed", "failure", "error"]
    kind: str
    """Names of the findings."""
    message: str
    output: str
    """Figures, shown by most CI systems beside the case."""


def write_junit(report: Report, path: Path) -> None:
    """Write ``report`` as one ``testsuite``; a variant that could not run is an ``error``.

    Raises ``ConfigError`` when ``path`` cannot be written.
    """
    cases = [_variant(entry) for entry in report.variants]
    cases += [
        _Case(
            name=f"check.{check.name}",
            outcome="passed" if check.passed else "failure",
            kind=check.name,
            message=check.detail,
            output=check.detail,
        )
        for check in report.checks
    ]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.outcome == "failure" for case in cases)),
        "errors": str(sum(case.outcome == "error" for case in cases)),
    }
    name = _xml(f"nearfar verify {report.bundle} {report.version}")
    suite = ET.Element("testsuite", {"name": name, **counts})
    where = _xml(report.bundle)
    for case in cases:
        element = ET.SubElement(suite, "testcase", classname=where, name=_xml(case.name))
        if case.outcome != "passed":
            fault = ET.SubElement(
                element, case.outcome, type=_xml(case.kind), message=_xml(case.message)
            )
            fault.text = _xml(case.message)
        if case.output:
            ET.SubElement(element, "system-out").text = _xml(case.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}: choose another file") from None


def _variant(entry: VariantReport) -> _Case:
    outcome: Literal["passed", "failure", "error"] = "passed"
    if not entry.passed:
        outcome = "error" if entry.backend_missing else "failure"
    return _Case(
        name=f"variant.{entry.id}",
        outcome=outcome,
        kind=", ".join(dict.fromkeys(finding.name for finding in entry.findings)),
        message="; ".join(f"{finding.name}: {finding.detail}" for finding in entry.findings),
        output=_figures(entry),
    )


def _figures(entry: VariantReport) -> str:
    shown = [f"size {format_bytes(entry.size_bytes)}"]
    if entry.sqnr_db is not None and entry.sqnr_db_min is not None:
        shown.append(f"SQNR {entry.sqnr_db:.1f} dB, worst {entry.sqnr_db_min:.1f} dB")
    if entry.agreement is not None:
        shown.append(f"agreement {entry.agreement:.2%} ({entry.disagreements} differ)")
    if entry.accuracy is not None:
        shown.append(f"accuracy {entry.accuracy:.2%}")
    shown += [f"{name} {value:.4g}" for name, value in sorted(entry.metrics.items())]
    if entry.milliseconds is not None:
        shown.append(f"{entry.milliseconds:.3g} ms here")
    return "\n".join(shown)


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
