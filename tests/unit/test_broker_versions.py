"""Versions of one model: which is the default, what aliases stand for, what leaves service."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.models.repository import Repository
from broker.models.servable import open_servable
from broker.models.versions import precedence
from edge_runtime.contract import errors as e
from tests.support.servables import renamed_servable, shared_servable

ORDER = [
    "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
    "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2", "1.10.0", "2", "10.0.0", "2024a",
]  # fmt: skip


def test_versions_are_ordered_as_semantic_versioning_says():
    jumbled = [*ORDER[1::2], *ORDER[::2]]
    assert sorted(jumbled, key=precedence) == ORDER
    assert precedence("1.0.0") < precedence("1.0.0+build.2")
    assert precedence("1") != precedence("1.0.0")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    roots = [
        renamed_servable(shared_servable(), tmp_path / version, "tiny", version)
        for version in ("1.9.0", "1.10.0", "1.11.0-rc.1")
    ]
    return Repository(open_servable(root) for root in roots)


def test_without_a_version_the_highest_in_service_is_meant(repository: Repository):
    assert repository.get("tiny").key.version == "1.11.0-rc.1"
    assert repository.get("tiny", "stable").key.version == "1.11.0-rc.1"
    repository.withdraw("tiny", "1.11.0-rc.1")
    assert repository.get("tiny").key.version == "1.10.0"
    assert repository.get("tiny", "1.9.0").key.version == "1.9.0"
    assert repository.serving == (("tiny", "1.10.0"), ("tiny", "1.9.0"))
    assert repository.keys[0] == ("tiny", "1.11.0-rc.1")


def test_the_alias_stable_goes_before_the_highest_version(repository: Repository):
    repository.set_aliases("tiny", {"stable": "1.9.0", "next": "1.11.0-rc.1"})
    assert repository.get("tiny").key.version == "1.9.0"
    assert repository.get("tiny", "next").key.version == "1.11.0-rc.1"
    assert repository.is_default(repository.get("tiny", "stable").key)
    repository.withdraw("tiny", "stable")
    with pytest.raises(e.ModelNotFound, match=r"out of service in version '1\.9\.0'"):
        repository.get("tiny")
    assert not repository.in_service("tiny")
    assert repository.in_service("tiny", "next")


def test_what_leaves_service_without_a_version_leaves_in_all_versions(repository: Repository):
    repository.withdraw("tiny")
    with pytest.raises(e.ModelNotFound, match="out of service"):
        repository.get("tiny")
    with pytest.raises(e.ModelNotFound, match="out of service"):
        repository.get("tiny", "1.9.0")
    repository.restore("tiny", "1.9.0")
    assert repository.get("tiny").key.version == "1.9.0"
    repository.restore("tiny")
    assert repository.get("tiny").key.version == "1.11.0-rc.1"


def test_an_unknown_version_names_versions_and_aliases(repository: Repository):
    repository.set_aliases("tiny", {"stable": "1.9.0"})
    with pytest.raises(e.ModelNotFound, match=r"'1\.10\.0'.*alias 'stable'"):
        repository.get("tiny", "canary")
    assert not repository.in_service("tiny", "canary")


def test_an_alias_of_nothing_or_with_the_name_of_a_version_is_refused(repository: Repository):
    with pytest.raises(e.ModelNotFound, match="does not have"):
        repository.set_aliases("tiny", {"stable": "3.0.0"})
    with pytest.raises(e.ConfigError, match="is a version"):
        repository.set_aliases("tiny", {"1.9.0": "1.10.0"})
    assert repository.aliases("tiny") == {}
