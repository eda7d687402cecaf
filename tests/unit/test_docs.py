"""Documentation that quotes the code is held to it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from docs import generate
from edge_runtime.contract import errors

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("mobile_samples/**/*.md")])


@pytest.mark.parametrize("name", sorted(generate.documents()))
def test_generated_pages_are_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.documents()[name], "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        wanted += requirements
    names = {re.split(r"[\[<>=~! ]", line)[0] for line in wanted} - {"nearfar"}
    first_cells = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    documented = {name.split()[0] for cell in first_cells for name in cell.split(", ")}
    assert names - documented == set()


def test_every_dependency_is_pinned_where_it_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        wanted += requirements
    names = {re.split(r"[\[<>=~! ]", line)[0] for line in wanted} - {"nearfar"}
    pins = (ROOT / "constraints.txt").read_text()
    assert {name for name in names if f"\n{name}==" not in pins} == set()
    assert "://" not in pins


def test_changelog_and_license_are_there() -> None:
    assert "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_error_details_of_the_docs_exist() -> None:
    """An error class that a page names is one we raise."""
    known = set(errors.__all__)
    for page in PAGES:
        for name in re.findall(
            r"`([A-Z]\w+(?:Error|Fault|Mismatch|Exceeded|Refused))`", page.read_text()
        ):
            assert name in known or name in ("TypeError", "RuntimeError", "ValueError"), (
                page.name,
                name,
            )
