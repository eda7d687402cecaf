"""The decision log: every number comes back, crashes tear one line, the disk stays bounded."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from edge_runtime.contract.errors import ConfigError, ContractError, LimitExceeded, MissingFile
from edge_runtime.log import DecisionLog, LogEntry, read_log
from edge_runtime.log.entries import MAX_LINE_BYTES
from edge_runtime.log.lines import Lost, PolicyLine, Resumed, encode
from edge_runtime.log.writer import MIN_MAX_BYTES
from edge_runtime.policies.base import Decision
from tests.support.log_entries import entry, situation

ENTRY = entry()
POLICY = encode(PolicyLine.of(ENTRY.policy))


def log_of(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def changed(**changes: object) -> bytes:
    return json.dumps({**json.loads(encode(ENTRY)), **changes}).encode() + b"\n"


def test_an_entry_comes_back_with_every_bit(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(
        ENTRY.steps[0].decision,
        price=0.1 + 0.2,
        expected_gain=-0.0,
        predicted_cloud_ms=math.inf,
        predicted_upload_ms=math.nan,
        local_start_ms=5e-324,
    )
    steps = (msgspec.structs.replace(ENTRY.steps[0], decision=odd), *ENTRY.steps[1:])
    given = msgspec.structs.replace(ENTRY, steps=steps)
    (found,) = read_log(log_of(tmp_path, POLICY, encode(given), encode(ENTRY))).entries[:1]
    assert repr(found.entry) == repr(given)
    assert found.line == 2


def test_a_line_holds_no_name_of_a_policy_twice() -> None:
    assert b'"policy":"' + PolicyLine.of(ENTRY.policy).id.encode() in encode(ENTRY)
    assert encode(ENTRY).count(b"\n") == 1


# Reading what came from outside ---------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_a_torn_last_line_is_skipped_with_a_notice(tmp_path: Path, cut: int) -> None:
    whole = encode(ENTRY)
    log = read_log(log_of(tmp_path, POLICY, whole, whole[:-cut]))
    if cut == 1:  # only the newline is missing
        assert (len(log.entries), log.notices) == (2, ())
    else:
        assert len(log.entries) == 1
        assert log.notices == ("line 3, the last one, is torn and is skipped",)


def test_a_line_torn_before_the_writer_resumed_is_skipped_with_a_notice(tmp_path: Path) -> None:
    lines = (POLICY, encode(ENTRY)[:100] + b"\n", encode(Resumed()), POLICY, encode(ENTRY))
    log = read_log(log_of(tmp_path, *lines, encode(Lost(count=3))))
    assert [one.line for one in log.entries] == [5]
    assert log.notices == (
        "line 2 was torn by a crash and is skipped",
        "line 6: 3 entries could not be written before it",
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{}\n", "line 2: it is no entry of a nearfar decision log"),
        (b"[1]\n", "line 2: it is no entry"),
        (b"\n", "line 2: it is not JSON"),
        (b"\xff\n", "line 2: it is not JSON"),
        (b"[" * 200_000 + b"\n", "line 2: it is not JSON"),
        (changed(schema_version=2), "schema version is 2, this nearfar reads 1"),
        (changed(schema_version=None), "schema version is None"),
        (changed(kind="dream"), "nothing is known of its kind, 'dream'"),
        (changed(policy="0" * 16), "names a policy that no line before it describes"),
        (changed(policy=None), "names no policy"),
        (changed(task="chess"), "breaks its schema"),
        (changed(request="../x"), "breaks its schema"),
        (changed(surplus=1), "field 'surplus': read it with the nearfar that wrote it"),
        (changed(steps=[json.loads(encode(ENTRY))["steps"][0]] * 65), "breaks its schema"),
    ],
)
def test_a_line_that_makes_no_sense_is_an_error_with_its_number(
    tmp_path: Path, line: bytes, text: str
) -> None:
    with pytest.raises(ContractError, match=text):
        read_log(log_of(tmp_path, POLICY, line, encode(ENTRY)))
    with pytest.raises(ContractError, match=text):
        read_log(log_of(tmp_path, POLICY, line))


def test_a_field_of_a_newer_situation_is_not_dropped_in_silence(tmp_path: Path) -> None:
    raw = json.loads(encode(ENTRY))
    raw["steps"][0]["situation"]["link"]["satellites"] = 7
    with pytest.raises(ContractError, match=r"field 'steps\.0\.situation\.link\.satellites'"):
        read_log(log_of(tmp_path, POLICY, json.dumps(raw).encode() + b"\n"))


def test_what_is_no_log_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="it is no decision log"):
        read_log(log_of(tmp_path, b"x" * (MAX_LINE_BYTES + 100)))
    with pytest.raises(MissingFile):
        read_log(tmp_path / "none")
    with pytest.raises(MissingFile):
        read_log(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFile, match="not a regular file"):
        read_log(tmp_path / "pipe")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(LimitExceeded, match="split it"):
        read_log(huge)


def test_a_request_is_found_by_id_line_or_as_the_last(tmp_path: Path) -> None:
    log = read_log(log_of(tmp_path, POLICY, encode(entry("a")), encode(entry("b"))))
    assert log.find().entry.request == "b"
    assert log.find(request="a").line == log.find(line=2).line == 2
    for missing in ({"request": "c"}, {"line": 1}):
        with pytest.raises(ConfigError, match=r"holds no request|is no request"):
            log.find(**missing)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds no request yet"):
        read_log(log_of(tmp_path, POLICY)).find()


# Writing --------------------------------------------------------------------------------


def test_what_is_taken_is_written_in_order_and_only_for_its_user(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)
    for number in range(120):
        log(entry(f"r{number}"))
    log.close()
    log.close()
    assert [one.entry.request for one in read_log(path).entries] == [f"r{n}" for n in range(120)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().count(b'"kind":"policy"') == 1
    assert log.lost == 0
    log(ENTRY)
    assert log.lost == 1
    assert not any(t.name == "nearfar-log" for t in threading.enumerate())


def test_a_writer_that_finds_a_torn_line_marks_it_and_goes_on(tmp_path: Path) -> None:
    path = log_of(tmp_path, POLICY, encode(entry("a")), encode(ENTRY)[:50])
    log = DecisionLog(path)
    log(entry("b"))
    log.close()
    read = read_log(path)
    assert [one.entry.request for one in read.entries] == ["a", "b"]
    assert read.notices == ("line 3 was torn by a crash and is skipped",)


def test_the_files_stay_within_their_bounds_and_each_can_be_read_alone(tmp_path: Path) -> None:
    """Three files' worth is written, one older file stays: the oldest goes."""
    bulky = msgspec.structs.replace(ENTRY, bundle="x" * 4000, variant="y" * 4000)
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, max_bytes=MIN_MAX_BYTES, keep=1)
    for _ in range(3 * MIN_MAX_BYTES // len(encode(bulky))):
        log(bulky)
    log.close()
    assert log.lost == 0
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["log.jsonl", "log.jsonl.1"]
    for name in files:
        assert (tmp_path / name).stat().st_size <= MIN_MAX_BYTES
        assert len(read_log(tmp_path / name).entries) > 0


def test_two_writers_of_one_file_and_senseless_bounds_are_refused(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    with pytest.raises(ConfigError, match="give each its own file"):
        DecisionLog(tmp_path / "log.jsonl")
    log.close()
    DecisionLog(tmp_path / "log.jsonl").close()
    with pytest.raises(ConfigError, match="max_bytes"):
        DecisionLog(tmp_path / "other", max_bytes=1000)
    with pytest.raises(ConfigError, match="keep"):
        DecisionLog(tmp_path / "other", keep=-1)
    with pytest.raises(ConfigError, match="cannot write the decision log"):
        DecisionLog(tmp_path / "none" / "log.jsonl")
    with pytest.raises(ConfigError, match=r"Is a directory|not a regular file"):
        DecisionLog(tmp_path)


def test_an_entry_that_cannot_be_written_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)
    bad = msgspec.structs.replace(ENTRY, bundle="x" * MAX_LINE_BYTES)
    strange = msgspec.structs.replace(ENTRY, variant=object())
    for one in (bad, strange, entry("fine")):
        log(one)
    log.close()
    assert log.lost == 2
    read = read_log(path)
    assert [one.entry.request for one in read.entries] == ["fine"]
    assert read.notices == ("line 1: 2 entries could not be written before it",)


def test_the_last_decision_is_the_one_carried_out() -> None:
    assert ENTRY.action == "CASCADE"
    done = Decision(action="LOCAL", reason="private")  # type: ignore[arg-type]
    step = msgspec.structs.replace(ENTRY.steps[-1], done=msgspec.convert(
        msgspec.to_builtins(done), Decision))  # fmt: skip
    assert msgspec.structs.replace(ENTRY, steps=(step,)).action == "LOCAL"
    nothing: LogEntry = msgspec.structs.replace(ENTRY, steps=())
    assert (nothing.action, nothing.last) == ("NONE", None)
    assert situation().confidence is None
