"""Rollouts: rules, the split, and what operators may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.models import changes as c
from broker.models.repository import Repository
from broker.models.rollout import Rollouts
from broker.models.routing import Canary, Rules, Shadow, read_routing
from broker.models.routing_state import begin_routing
from broker.models.servable import ModelKey, OpenedServable, open_servable
from edge_runtime.contract import errors as e
from edge_runtime.contract.manifest import Labels
from tests.support.broker import Events
from tests.support.servables import shared_servable

OLD, NEW = "1.0.0", "2.0.0"


def with_version(version: str, **changes: Any) -> OpenedServable:
    opened = open_servable(shared_servable())
    manifest = msgspec.structs.replace(opened.manifest, version=version, **changes)
    return msgspec.structs.replace(opened, manifest=manifest)


@pytest.fixture
def repository() -> Repository:
    return Repository([with_version(OLD), with_version(NEW)])


def rollouts_over(repository: Repository, **canary: Any) -> tuple[Rollouts, Events, list[str]]:
    events, rolled_back = Events(), list[str]()
    rollouts = Rollouts(repository, events, rolled_back=rolled_back.append)
    if canary:
        rollouts.change("tiny", c.SetCanary(canary=Canary(version=NEW, **canary)))
    return rollouts, events, rolled_back


def versions_of(rollouts: Rollouts, count: int, **asked: Any) -> list[str]:
    return [
        rollouts.choose("tiny", None, caller=(f"device {number}",), key="k").servable.key.version
        for number in range(count)
    ]


def test_a_canary_leaves_the_present_default_the_stable_one(repository: Repository):
    rollouts, _, _ = rollouts_over(repository, percent=10)
    assert repository.aliases("tiny") == {"stable": OLD}
    assert repository.get("tiny").key.version == OLD
    assert rollouts.percent_of(ModelKey("tiny", NEW)) == 10.0
    assert rollouts.percent_of(ModelKey("tiny", OLD)) == 90.0


def test_a_caller_stays_with_its_version_and_keeps_the_canary_when_the_share_grows(
    repository: Repository,
):
    rollouts, _, _ = rollouts_over(repository, percent=10)
    few = versions_of(rollouts, 300)
    assert versions_of(rollouts, 300) == few
    rollouts.change("tiny", c.SetCanary(canary=Canary(version=NEW, percent=40)))
    more = versions_of(rollouts, 300)
    assert 0 < few.count(NEW) < more.count(NEW)
    assert all(now == NEW for now, before in zip(more, few, strict=True) if before == NEW)


def test_a_request_sticks_by_its_key_where_the_rule_says_so(repository: Repository):
    rollouts, _, _ = rollouts_over(repository, percent=50, by="request")

    def version(key: str) -> str:
        return rollouts.choose("tiny", None, caller=("one",), key=key).servable.key.version

    drawn = {key: version(key) for key in map(str, range(40))}
    assert set(drawn.values()) == {OLD, NEW}
    assert all(version(key) == was for key, was in drawn.items())


def test_whoever_names_a_version_is_not_part_of_the_trial(repository: Repository):
    rollouts, _, _ = rollouts_over(repository, percent=90)
    choice = rollouts.choose("tiny", "stable", caller=("x",), key="k")
    assert (choice.servable.key.version, choice.split) == (OLD, False)
    for _ in range(100):
        rollouts.ended(ModelKey("tiny", NEW), split=False, status=502, code="inference")
    status = rollouts.status("tiny").canary
    assert status is not None
    assert (status.measured.requests, status.stable.requests) == (0, 0)


def test_a_canary_out_of_service_takes_no_requests(repository: Repository):
    rollouts, _, _ = rollouts_over(repository, percent=90)
    repository.withdraw("tiny", NEW)
    assert set(versions_of(rollouts, 20)) == {OLD}
    assert rollouts.percent_of(ModelKey("tiny", OLD)) == 100.0


def test_a_client_of_tensors_gets_no_canary_with_other_tensors():
    opened = open_servable(shared_servable())
    (taken,) = opened.manifest.model.inputs
    other = msgspec.structs.replace(
        opened.manifest.model, inputs=(msgspec.structs.replace(taken, name="pixels"),)
    )
    repository = Repository([with_version(OLD), with_version(NEW, model=other)])
    rollouts, _, _ = rollouts_over(repository, percent=90)
    for number in range(20):
        choice = rollouts.choose("tiny", None, caller=(str(number),), key="k", tensors=True)
        assert choice.servable.key.version == OLD


def fail(rollouts: Rollouts, version: str, count: int, code: str | None) -> None:
    for _ in range(count):
        status = 200 if code is None else 500
        rollouts.ended(ModelKey("tiny", version), split=True, status=status, code=code)


def test_a_canary_that_fails_is_rolled_back_at_its_first_look_and_stays_so(
    repository: Repository, tmp_path: Path
):
    rollouts, events, rolled_back = rollouts_over(repository)
    begin_routing(rollouts, repository, routing=None, state=tmp_path, events=events)
    rollouts.change("tiny", c.SetCanary(canary=Canary(version=NEW, percent=20, min_requests=20)))
    fail(rollouts, OLD, 80, None)
    fail(rollouts, NEW, 19, "inference")
    assert rolled_back == []
    fail(rollouts, NEW, 1, "inference")
    assert rolled_back == ["tiny"]
    status = rollouts.status("tiny")
    assert (status.canary, status.default) == (None, OLD)
    assert status.events[-1].event == "canary_rolled_back"
    assert "20 of 20 requests failed, 0 of 80" in status.events[-1].detail
    assert set(versions_of(rollouts, 50)) == {OLD}
    again, fresh = Rollouts(repository, events), Events()
    begin_routing(again, repository, routing=None, state=tmp_path, events=fresh)
    assert set(versions_of(again, 50)) == {OLD}
    assert fresh.seen == []


@pytest.mark.parametrize("code", ["overloaded", "rate_limited", "image_unreadable", "wire"])
def test_no_version_is_blamed_for_what_clients_and_load_do(repository: Repository, code: str):
    rollouts, _, rolled_back = rollouts_over(repository, percent=50, min_requests=20)
    fail(rollouts, OLD, 100, None)
    fail(rollouts, NEW, 100, code)
    assert rolled_back == []


def test_a_slow_canary_is_rolled_back_by_batches_of_equal_size(repository: Repository):
    rollouts, events, rolled_back = rollouts_over(repository, percent=5)
    old, new = ModelKey("tiny", OLD), ModelKey("tiny", NEW)
    for number in range(40):  # twice as slow, and faster a batch all the same: they are smaller
        rollouts.batch_ran(old, 8, 40 + number % 5)
        rollouts.batch_ran(old, 1, 10 + number % 5)
        rollouts.batch_ran(new, 1, 20 + number % 5)
    assert rolled_back == ["tiny"]
    assert events.named("canary_rolled_back")[0]["reason"] == "latency"


def test_how_long_an_interrupted_batch_took_is_held_against_no_version(repository: Repository):
    rollouts, _, rolled_back = rollouts_over(repository, percent=50)
    old, new = ModelKey("tiny", OLD), ModelKey("tiny", NEW)
    for number in range(60):
        rollouts.batch_ran(old, 1, 10 + number % 5)
        rollouts.batch_ran(new, 1, 10 + number % 5)
        rollouts.batch_interrupted(new, 1, 5_000.0, at_fault=False)
    status = rollouts.status("tiny").canary
    assert status is not None
    assert (status.measured.batches, status.latency_ratio) == (60, 1.0)
    assert (status.measured.requests, status.measured.failures) == (0, 0)
    assert rolled_back == []


def test_a_canary_that_ends_its_process_is_rolled_back_though_each_request_was_answered(
    repository: Repository,
):
    rollouts, events, rolled_back = rollouts_over(repository, percent=50, min_requests=40)
    old, new = ModelKey("tiny", OLD), ModelKey("tiny", NEW)
    for number in range(60):
        rollouts.ended(old, split=True, status=200, code=None)
        rollouts.ended(new, split=True, status=200, code=None)
        if rolled_back:
            break
        if number % 2:
            rollouts.batch_interrupted(new, 1, 900.0, at_fault=True)
    assert rolled_back == ["tiny"]
    assert events.named("canary_rolled_back")


def test_promotion_and_rollback_move_the_stable_version(repository: Repository):
    rollouts, _, _ = rollouts_over(repository, percent=10)
    rollouts.change("tiny", c.Promote())
    assert (repository.get("tiny").key.version, rollouts.status("tiny").canary) == (NEW, None)
    rollouts.change("tiny", c.Rollback())
    assert repository.get("tiny").key.version == OLD
    rollouts.change("tiny", c.Rollback())
    assert repository.get("tiny").key.version == NEW
    with pytest.raises(e.ConfigError, match="no canary"):
        rollouts.change("tiny", c.Promote())
    events = [event.event for event in rollouts.status("tiny").events]
    assert events == ["set_canary", "promote", "rollback", "rollback"]


def test_a_change_that_cannot_be_changes_nothing(repository: Repository):
    rollouts, events, _ = rollouts_over(repository)
    for change, kind in [
        (c.SetCanary(canary=Canary(version="3.0.0", percent=5)), e.ModelNotFound),
        (c.SetAlias(alias="stable", version="3.0.0"), e.ModelNotFound),
        (c.ClearAlias(alias="none"), e.ConfigError),
        (c.EndShadow(), e.ConfigError),
        (c.Rollback(), e.ConfigError),
    ]:
        with pytest.raises(kind):
            rollouts.change("tiny", change)
    rollouts.change("tiny", c.SetAlias(alias="stable", version=NEW))
    with pytest.raises(e.ConfigError, match="the stable one"):
        rollouts.change("tiny", c.SetShadow(shadow=Shadow(version=NEW, percent=5)))
    assert rollouts.status("tiny").shadow is None
    assert [name for name, _ in events.seen] == ["set_alias"]


def test_a_canary_with_other_labels_is_refused():
    labels = Labels(path="labels.txt", count=5, sha256="0" * 64)
    repository = Repository([with_version(OLD), with_version(NEW, labels=labels)])
    with pytest.raises(e.ConfigError, match="other labels"):
        rollouts_over(repository, percent=5)


FILE = """
[models.tiny]
aliases = { previous = "1.0.0" }
canary = { version = "2.0.0", percent = 5, by = "request" }
shadow = { version = "2.0.0", percent = 100 }
"""


def test_a_routing_file_sets_the_rules(repository: Repository, tmp_path: Path):
    path = tmp_path / "routing.toml"
    path.write_text(FILE)
    rules, digest = read_routing(path, repository)
    assert rules["tiny"].aliases == {"previous": OLD, "stable": OLD}
    assert rules["tiny"].canary == Canary(version=NEW, percent=5.0, by="request")
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "no routing file"),
        ("[models.tiny]\ncanary = { version = '2.0.0', percent = 91 }", "percent"),
        ("[models.tiny]\ncanary = { version = '2.0.0', percent = 0 }", "percent"),
        ("[models.tiny]\ncanary = { version = '2.0.0' }", "percent"),
        ("[models.tiny]\ncanary = { version = '3', percent = 1 }", "no version '3'"),
        ("[models.tiny]\nwhat = 1", "what"),
        ("[models.huge]\n", "no model of this name"),
        ("[models.tiny]\naliases = { Stable = '1.0.0' }", "aliases"),
        ("[models.tiny]\naliases = { stable = '9' }", "no version '9'"),
        ("#" * 300_000, "more than"),
    ],
)
def test_a_routing_file_that_makes_no_sense_is_refused(
    repository: Repository, tmp_path: Path, text: str, said: str
):
    path = tmp_path / "routing.toml"
    path.write_text(text)
    with pytest.raises(e.ConfigError, match=said):
        read_routing(path, repository)
    with pytest.raises(e.ConfigError, match="cannot read"):
        read_routing(tmp_path / "nothing.toml", repository)


def test_what_was_changed_at_run_time_outlives_a_restart_until_the_file_changes(
    repository: Repository, tmp_path: Path
):
    path, state, events = tmp_path / "routing.toml", tmp_path / "state", Events()
    path.write_text(FILE)

    def begin() -> Rollouts:
        rollouts = Rollouts(repository, events)
        begin_routing(rollouts, repository, routing=path, state=state, events=events)
        return rollouts

    first = begin()
    first.change("tiny", c.Promote())
    second = begin()
    assert second.rules()["tiny"] == (
        Rules(aliases={"previous": OLD, "stable": NEW}), OLD,
    )  # fmt: skip
    path.write_text(FILE + "\n# edited\n")
    assert begin().rules()["tiny"][0].canary is not None
    assert "another one" in str(events.named("routing_state_ignored")[0]["reason"])


@pytest.mark.parametrize("text", ["", "{", '{"models": {"tiny": {"rules": {"canary": 1}}}}'])
def test_a_broken_state_is_left_aside_with_a_word(
    repository: Repository, tmp_path: Path, text: str
):
    (tmp_path / "routing.json").write_text(text)
    events = Events()
    rollouts = Rollouts(repository, events)
    begin_routing(rollouts, repository, routing=None, state=tmp_path, events=events)
    assert rollouts.rules() == {}
    assert len(events.named("routing_state_ignored")) == 1


def test_a_state_of_versions_that_are_gone_is_left_aside(repository: Repository, tmp_path: Path):
    first = Rollouts(repository, Events())
    begin_routing(first, repository, routing=None, state=tmp_path, events=Events())
    first.change("tiny", c.SetCanary(canary=Canary(version=NEW, percent=5)))
    less = Repository([with_version(OLD)])
    events = Events()
    second = Rollouts(less, events)
    begin_routing(second, less, routing=None, state=tmp_path, events=events)
    assert second.rules() == {}
    assert "no version '2.0.0'" in str(events.named("routing_state_ignored")[0]["reason"])


def test_changes_are_read_strictly():
    assert c.decode_change(b'{"action": "promote"}') == c.Promote()
    canary = b'{"action": "set_canary", "canary": {"version": "1\\n", "percent": 5}}'
    for wrong in (
        b"",
        b"{}",
        b'{"action": "x"}',
        b'{"action": "promote", "x": 1}',
        b"\xff",
        canary,
    ):
        with pytest.raises(e.WireError):
            c.decode_change(wrong)
