"""Hostile trace folders: each is refused in bounded time and memory, with a reason."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from edge_runtime.contract.errors import ConfigError, LimitExceeded
from edge_runtime.simulation import trace_formats, traces
from edge_runtime.simulation.traces import read_traces

_GOOD = "".join(f"{i / 10:.1f} 5\n" for i in range(120))


def _reason(folder: Path, name: str, data: bytes) -> str:
    """Why a file is skipped, beside one that is used."""
    (folder / "good.up").write_text(_GOOD)
    (folder / name).write_bytes(data)
    found = read_traces(folder, assume_uplink=True)
    assert [trace.name for trace in found.traces] == ["good.up"]
    (skipped,) = found.skipped
    assert skipped.path == name
    return skipped.reason


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\xff\xfe\x00", "it is no text"),
        ("a.txt", b"0 1\n\xff\xff 2\n", "it is not UTF-8 text (byte 4)"),
        ("a.txt", b"\x1f\x8b\x08rest", "it is compressed: unpack it"),
        ("a.txt", b"\0" * 100, "it is no text"),
        ("a.up", b"0\n" + b"9" * 5000 + b"\n", "not a finite number"),
        ("a.up", b"0\n99999999999999999999\n", "not plausible"),
        ("a.up", b"0\n86400000000\n", "it lasts 86400000 s"),
        ("a.up", b"-5000\n0\n20000\n", "a time is negative"),
        ("a.txt", b"0 1\n1e15 1\n2e15 1\n", "one value every 1e+15 s"),
        ("a.txt", b"0 1\n1 1\n2 1e300\n", "not plausible"),
        ("a.txt", b"0 1\n1 inf\n2 1\n", "not a finite number"),
        ("a.txt", b"0 1\nnan 1\n2 1\n", "not a finite number"),
        ("a.csv", b"time_s,uplink_mbps\n" + b"0,1\n5,1\n" * 500, "its time jumps"),
        ("a.csv", b"time," + b"x," * 600 + b"uplink_mbps\n1\n", "more than 512 columns"),
        ("a.csv", b'time,uplink_mbps\n"' + b"x" * 200_000, "it is no table"),
        ("a.list", b"1,2\nRun 1\n3,4\n", "values before the first run"),
        ("a.list", b"Run 1\n" * 500, "no run has values"),
        ("a.list", b"Run 1\n1,2\n" * 300, "more than 256 runs"),
        ("ping.txt", b"icmp_seq=1 time=1 ms\nicmp_seq=999999999 time=1 ms\n", "echo requests"),
        ("ping.txt", b"64 bytes: icmp_seq=1 time=1 ms\n", "fewer than two replies"),
        ("rtt.txt", b"1e9\n" * 90, "a round trip of 1e+09 ms"),
    ],
)
def test_a_hostile_file_is_skipped_with_its_reason(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    assert reason in _reason(tmp_path, name, data)


def test_a_few_bytes_never_become_gigabytes(tmp_path: Path) -> None:
    """Each of these would be billions of bins, were they allocated before they are counted."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {
        "a.up": "0\n900000000000000\n",
        "b.up": "0 1\n0.001 1\n0.002 1\n4.9e9 1\n",
        "c.csv": "time_ns,uplink_mbps\n0,1\n1,1\n2,1\n" + "9" * 25 + ",1\n",
        "d.ping": "[1.0] icmp_seq=1 time=1 ms\n[99999999999.0] icmp_seq=2 time=1 ms\n",
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="no usable uplink trace"):
        read_traces(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_sizes_and_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_formats, "MAX_LINES", 150)
    assert "more than 150 lines" in _reason(tmp_path, "a.up", b"0\n" * 152)
    monkeypatch.setattr(trace_formats, "MAX_LINES", 4_000_000)
    monkeypatch.setattr(traces, "MAX_FILE_BYTES", 2_000)
    assert "more than 2000 bytes" in _reason(tmp_path, "a.up", b"7\n" * 1_001)
    monkeypatch.setattr(traces, "MAX_TOTAL_BINS", 100)
    with pytest.raises(LimitExceeded, match="pass fewer files"):
        read_traces(tmp_path)
    monkeypatch.setattr(traces, "MAX_FILES", 1)
    with pytest.raises(LimitExceeded, match="more than 1 files"):
        read_traces(tmp_path)


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.up").write_text(_GOOD)
    folder = tmp_path / "traces"
    folder.mkdir()
    (folder / "good.up").write_text(_GOOD)
    (folder / "file.up").symlink_to(outside / "secret.up")
    (folder / "dir").symlink_to(outside)
    (folder / "inside.up").symlink_to("good.up")
    (folder / "circle.up").symlink_to("circle.up")
    os.mkfifo(folder / "pipe.up")
    found = read_traces(folder)
    assert [trace.name for trace in found.traces] == ["good.up", "inside.up"]
    reasons = {skipped.path: skipped.reason for skipped in found.skipped}
    assert reasons.pop("pipe.up").endswith("is not a regular file")
    assert reasons == {
        "dir": "links to folders are not followed",
        "file.up": "it is a link that leaves the folder: copy the file",
        "circle.up": "circle.up: there is no such file",
    }


def test_an_index_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.up").write_text(_GOOD)
    folder = tmp_path / "traces"
    (folder / "u").mkdir(parents=True)
    (folder / "u" / "good.up").write_text(_GOOD)
    (folder / "u" / "link.up").symlink_to(tmp_path / "secret.up")
    paths = ["u/good.up", "../secret.up", "u/../../secret.up", str(tmp_path / "secret.up"),
             "u/link.up", "u\\..\\secret.up", "."]  # fmt: skip
    rows = [f"t{i},c,lte,{path}," for i, path in enumerate(paths)]
    (folder / "index.csv").write_text("\n".join(["name,class,radio,uplink,rtt", *rows]))
    found = read_traces(folder)
    assert [trace.name for trace in found.traces] == ["t0"]
    assert len([s for s in found.skipped if s.path.startswith("index.csv")]) == 6


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "good.up").write_text(_GOOD)
    (tmp_path / "\x1b[31mred.up").write_text(_GOOD)
    (tmp_path / os.fsdecode(b"bad\xff.up")).write_text("hello")
    found = read_traces(tmp_path)
    shown = [trace.name for trace in found.traces] + [s.path for s in found.skipped]
    shown += [source.file for source in found.sources]
    assert all(text.isprintable() for text in shown)
    assert len(found.traces) == 2
