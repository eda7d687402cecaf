"""Replaying, comparing and explaining logged decisions."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from edge_runtime.contract.errors import ConfigError
from edge_runtime.gain import GainCurve
from edge_runtime.log.cli import explain, replay
from edge_runtime.log.entries import LogEntry, PolicyRecord
from edge_runtime.log.lines import PolicyLine, encode
from edge_runtime.log.parameters import describe_policy, make_policy
from edge_runtime.log.reader import read_log
from edge_runtime.log.replay import compare
from edge_runtime.log.replay import replay as replayed
from edge_runtime.log.terminal import explain_text
from edge_runtime.log.timeline import cloud_quantiles
from edge_runtime.policies import find_policy, policy_names
from edge_runtime.policies.adaptive import Adaptive, GainPrior
from edge_runtime.policies.base import CloudOutlook, Decision, Situation
from edge_runtime.policies.forecast import forecast
from edge_runtime.results import InferenceSource, Timings
from tests.support.log_entries import entry, situation
from tests.support.reports import HOSTILE

CURVE = GainCurve(knots=((0.2, 0.5), (0.9, -0.1)), local_right=0.7)


def log_of(tmp_path: Path, *entries: LogEntry) -> Path:
    path = tmp_path / "log.jsonl"
    lines = [encode(PolicyLine.of(one.policy)) + encode(one) for one in entries]
    path.write_bytes(b"".join(lines))
    return path


def call(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])  # type: ignore[arg-type]


# The same policy ------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy_names())
def test_every_registered_policy_is_written_down_and_made_again(name: str) -> None:
    policy = find_policy(name)
    described = describe_policy(policy)
    if described.complete:
        made = make_policy(described)
        for asked in (situation(), situation(confidence=0.4), situation(cloud=None, link=None)):
            assert made.decide(asked) == policy.decide(asked)


@pytest.mark.parametrize("gain", [GainPrior(local_right=0.5), CURVE])
def test_a_policy_with_a_gain_of_its_own_comes_back(gain: GainPrior | GainCurve) -> None:
    policy = Adaptive(gain)  # type: ignore[arg-type]
    described = msgspec.json.decode(msgspec.json.encode(describe_policy(policy)), type=PolicyRecord)
    made = make_policy(described)
    assert isinstance(made, Adaptive)
    assert made.gain == gain
    asked = situation(confidence=0.45)
    assert made.decide(asked) == policy.decide(asked)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (PolicyRecord(name="NEVER"), "no policy 'NEVER'"),
        (PolicyRecord(name="ADAPTIVE", parameters={"surplus": 1}), "cannot be made again"),
        (PolicyRecord(name="ADAPTIVE", parameters={"gain": 3}), "cannot be made again"),
        (
            PolicyRecord(name="ADAPTIVE", parameters={"gain": {"type": "os.system"}}),
            "cannot be made again",
        ),
        (
            PolicyRecord(name="ADAPTIVE", parameters={"gain": {"type": "GainCurve", "knots": 1}}),
            "cannot be made again",
        ),
        (PolicyRecord(name="ADAPTIVE", complete=False), "could not be written down"),
    ],
)
def test_a_log_makes_no_policy_but_a_registered_one(record: PolicyRecord, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_policy(record)


class _Changed:
    """Decides like ADAPTIVE, but a hair dearer."""

    name, uses_local, uses_cloud, prewarms = "ADAPTIVE", True, True, True

    def decide(self, asked: Situation) -> Decision:
        decision = Adaptive().decide(asked)
        return msgspec.structs.replace(decision, price=decision.price * (1 + 2**-52))


def test_the_same_policy_decides_the_same_and_one_bit_is_seen(tmp_path: Path) -> None:
    sound = [entry("a", confidence=0.3), entry("b", confidence=0.99)]
    sound.append(entry("c", policy=Adaptive(CURVE)))  # type: ignore[arg-type]
    path = log_of(tmp_path, *sound)
    found = replayed(read_log(path))
    assert (found.requests, found.decisions, found.mismatched) == (3, 6, 0)
    done = call(replay, path)
    assert done.exit_code == 0
    assert "6 decisions of 3 requests come out as logged, bit for bit (ADAPTIVE)" in done.output

    other = msgspec.structs.replace(
        entry("d", policy=_Changed()), policy=describe_policy(Adaptive())
    )
    path = log_of(tmp_path, *sound, other)
    found = replayed(read_log(path))
    assert (found.mismatched, {one.request for one in found.mismatches}) == (2, {"d"})
    assert [one.fields[0].partition(":")[0] for one in found.mismatches] == ["price", "price"]
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    done = call(replay, path, "--html", page, "--json", figures)
    assert done.exit_code == 1
    assert "2 of 8 decisions come out otherwise" in done.output
    assert json.loads(figures.read_text())["replay"]["mismatched"] == 2
    assert "2 of 8 decisions" in page.read_text()


def test_what_cannot_be_read_or_replayed_is_one_clear_error(tmp_path: Path) -> None:
    empty = log_of(tmp_path)
    assert "no request yet" in str(call(replay, empty).exception)
    path = log_of(tmp_path, entry())
    assert "no policy 'NEVER'" in str(call(replay, path, "--policy", "NEVER").exception)
    assert call(replay, path, "--gain", path).exit_code == 2
    path.write_bytes(path.read_bytes() + b"{]\n")
    assert "line 3: it is not JSON" in str(call(replay, path).exception)


# Another policy -------------------------------------------------------------------------


def test_what_another_policy_would_have_done_is_counted_exactly(tmp_path: Path) -> None:
    entries = [entry("a", confidence=0.3), entry("b", confidence=0.99)]
    path = log_of(tmp_path, *entries)
    p = [one.steps[-1].decision.p_cloud_in_deadline for one in entries]
    found = compare(read_log(path), find_policy("ONLY_ON_DEVICE"), CURVE)
    assert (found.requests, found.changed) == (2, 1)
    assert found.changes == (("CASCADE", "LOCAL", 1), ("LOCAL", "LOCAL", 1))
    assert (found.logged.uploads, found.logged.upload_bytes) == (1, 100_000)
    assert found.logged.expected_gain == pytest.approx(CURVE.signed(0.3) * p[0])
    assert (found.other.uploads, found.other.price, found.other.local) == (0, 0.0, 2)
    cloud = compare(read_log(path), find_policy("ONLY_IN_CLOUD"), CURVE)
    first = find_policy("ONLY_IN_CLOUD").decide(situation()).p_cloud_in_deadline
    assert cloud.other.in_time == pytest.approx(2 * first)
    assert cloud.other.expected_gain == pytest.approx(
        (CURVE.signed(0.3) + CURVE.signed(0.99)) * first
    )


def test_a_policy_that_waits_is_asked_again_with_what_the_log_knows(tmp_path: Path) -> None:
    """The logged policy asked once; the log still holds confidence and time of the answer."""
    device = find_policy("ONLY_ON_DEVICE")
    known = entry("a", policy=device, confidence=0.3)
    unknown = entry("b", policy=device)
    unknown = msgspec.structs.replace(
        unknown, outcome=msgspec.structs.replace(unknown.outcome, confidence=None)
    )
    asked = situation(confidence=0.3, time_left_ms=390.0 - 21.5)
    expected = Adaptive().decide(asked)
    found = compare(read_log(log_of(tmp_path, known)), Adaptive(), GainPrior())
    assert found.changes == (("LOCAL", expected.action.value, 1),)
    assert found.other.price == expected.price
    assert found.unanswerable == 0
    assert compare(read_log(log_of(tmp_path, unknown)), Adaptive(), CURVE).unanswerable == 1
    done = call(replay, log_of(tmp_path, unknown), "--policy", "ADAPTIVE")
    assert done.exit_code == 0
    assert "1 requests lack the local answer" in done.output


# Explaining -----------------------------------------------------------------------------


def test_quantiles_are_the_inverse_of_the_forecast() -> None:
    asked = situation()
    assert asked.link is not None
    assert asked.cloud is not None
    early, median, late = cloud_quantiles(asked.link, asked.cloud, 100_000, 2000.0)
    assert early is not None
    assert median is not None
    assert late is not None
    assert 0 < early < median < late < 2000
    for share, time_ms in ((0.1, early), (0.5, median), (0.9, late)):
        p = forecast(asked.link, asked.cloud, 100_000, time_ms).p_in_time
        assert p == pytest.approx(share, abs=1e-6)
    assert cloud_quantiles(asked.link, CloudOutlook(queue_ms=9e9, inference_ms=1), 9, 100.0) == (
        None, None, None,
    )  # fmt: skip


def test_a_decision_is_drawn_in_80_columns_with_its_reason_in_words(tmp_path: Path) -> None:
    slow = entry(
        "slow",
        confidence=0.2,
        source=None,
        error="deadline_exceeded",
        deadline_met=None,
        timings=Timings(total_ms=1e7, cloud_ms=400.0),
        cloud="late",
        uploaded_bytes=123,
    )
    strange = entry(
        "strange",
        first=situation(time_left_ms=-5.0, deadline_ms=1.0, link=None, cloud=None),
        source=InferenceSource.ON_DEVICE,
        other_error="unauthorized",
    )
    path = log_of(tmp_path, entry("plain"), slow, strange)
    for numbered in read_log(path).entries:
        lines = explain_text(numbered)
        assert max(map(len, lines)) <= 80
        assert all(line.isprintable() for line in lines)
    done = call(explain, path, "--request", "plain")
    assert "1. CASCADE (ask_after_local): the local answer comes first" in done.output
    assert "asked 21.5 ms after the first question" in done.output
    assert "p_cloud_in_deadline" in done.output
    local, cloud, axis = (
        next(line for line in done.output.splitlines() if line.strip().startswith(word))
        for word in ("local  ", "cloud  ", "0 ms")
    )
    assert local.index("=") < local.index("-") < local.index("|")
    plot = cloud[len("   cloud") :]
    assert plot.index("-") < plot.index("o") < plot.index("|")
    assert "390 ms" in axis
    assert "no answer after 10000000.0 ms: deadline_exceeded" in call(
        explain, path, "--request", "slow"
    ).output.replace("\n", " ")
    assert call(explain, path, "--request", "a", "--line", "2").exit_code == 2


def test_the_page_of_a_decision_shows_hostile_names_and_nothing_from_outside(
    tmp_path: Path,
) -> None:
    hostile = msgspec.structs.replace(entry("x"), bundle=HOSTILE, variant=HOSTILE)
    path, page = log_of(tmp_path, hostile), tmp_path / "page.html"
    done = call(explain, path, "--html", page)
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert text.count("<svg") == 5, "two for each decision, and what was measured"
    compared = tmp_path / "compared.html"
    assert call(replay, path, "--policy", "ONLY_IN_CLOUD", "--html", compared).exit_code == 0
    assert "ONLY_IN_CLOUD would have ended otherwise for 1 of 1" in compared.read_text()


class _Strange:
    """A policy of somebody else, with arguments that have no form on paper."""

    name, uses_local, uses_cloud, prewarms = "STRANGE", True, False, False

    def __init__(self, model: object, *more: object) -> None:
        self.model = model

    def decide(self, asked: Situation) -> Decision:
        return find_policy("ONLY_ON_DEVICE").decide(asked)


def test_a_policy_that_cannot_be_written_down_says_so_and_is_not_made_again() -> None:
    described = describe_policy(_Strange(object()))
    assert described == PolicyRecord(name="STRANGE", parameters={}, complete=False)
    with pytest.raises(ConfigError, match="no policy 'STRANGE'"):
        make_policy(described)
