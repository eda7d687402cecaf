"""A folder of uplink traces: what is used, what is not, and what each value then is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.trace_names import (
    column_direction,
    find_partner,
    path_direction,
    path_kind,
    path_radio,
    rate_factor,
)
from edge_runtime.simulation.traces import TraceFolder, read_traces


def _pairs(rates: list[float], step_s: float = 0.1) -> str:
    return "".join(f"{i * step_s:.1f} {rate:.4f}\n" for i, rate in enumerate(rates))


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _reasons(found: TraceFolder) -> dict[str, str]:
    return {skipped.path: skipped.reason for skipped in found.skipped}


_RATES = [float(i % 7) for i in range(200)]
_RTTS = "".join(f"{30 + i % 5}.5\n" for i in range(60))


def test_a_mahimahi_line_is_one_packet_of_1500_bytes(tmp_path: Path) -> None:
    # 3 packets in the first 100 ms, then 1 each.
    times = [0, 50, 99, *range(100, 20_000, 100)]
    _write(tmp_path, {"drive-lte.up": "\n".join(map(str, times)) + "\n"})
    (trace,) = read_traces(tmp_path).traces
    assert trace.radio == "lte"
    assert trace.name == "drive-lte.up"
    assert trace.uplink_mbps.size == 200
    assert trace.uplink_mbps[0] == pytest.approx(3 * 0.12)
    assert set(trace.uplink_mbps[1:].round(9)) == {0.12}
    assert trace.rtt_ms is None


def test_seconds_and_rates_are_read_as_they_are(tmp_path: Path) -> None:
    _write(tmp_path, {"uplink-wifi.txt": _pairs(_RATES)})
    (trace,) = read_traces(tmp_path).traces
    assert trace.uplink_mbps.dtype == np.float64
    assert trace.uplink_mbps.tolist() == _RATES
    assert (trace.radio, trace.group, trace.name) == ("wifi", "WiFi", "uplink-wifi")


def test_a_rate_holds_until_the_next_sample(tmp_path: Path) -> None:
    _write(tmp_path, {"ul.txt": "".join(f"{t} {t % 3}\n" for t in range(20))})
    (trace,) = read_traces(tmp_path).traces
    assert trace.uplink_mbps.tolist() == [float(t % 3) for t in range(20) for _ in range(10)]


@pytest.mark.parametrize(
    "name", ["x.down", "downlink/x.txt", "x_DL.txt", "download-x.txt", "up/x.down"]
)
def test_a_downlink_is_never_an_uplink(tmp_path: Path, name: str) -> None:
    _write(tmp_path, {name: _pairs(_RATES), "good.up": _pairs(_RATES)})
    found = read_traces(tmp_path, assume_uplink=True)
    assert [trace.name for trace in found.traces] == ["good.up"]
    assert _reasons(found) == {name: "a downlink's rate is never an uplink's"}


def test_a_rate_of_unknown_direction_needs_the_users_word(tmp_path: Path) -> None:
    _write(tmp_path, {"walk.txt": _pairs(_RATES), "good.up": _pairs(_RATES)})
    found = read_traces(tmp_path)
    assert [trace.name for trace in found.traces] == ["good.up"]
    assert "--assume-uplink" in _reasons(found)["walk.txt"]
    assumed = read_traces(tmp_path, assume_uplink=True)
    assert [source.direction for source in assumed.sources] == ["its name", "--assume-uplink"]


def test_only_words_inside_the_folder_state_a_direction(tmp_path: Path) -> None:
    folder = tmp_path / "uplink"
    _write(folder, {"walk.txt": _pairs(_RATES)})
    with pytest.raises(ConfigError, match="assume-uplink"):
        read_traces(folder)


def test_a_table_is_read_by_its_headers_words(tmp_path: Path) -> None:
    rows = "".join(f"{1000 * t},{9 * t},{800 + t},{40 + t}\n" for t in range(20))
    _write(tmp_path, {"nsa.csv": "time_ms,DL_mbps,UL (kbit/s),rtt_ms\n" + rows})
    found = read_traces(tmp_path)
    (trace,), (source,) = found.traces, found.sources
    assert trace.radio == "5g"
    assert source.direction == "its columns"
    kilobits = [800 + t for t in range(20) for _ in range(10)]
    assert trace.uplink_mbps.tolist() == pytest.approx([rate / 1e3 for rate in kilobits])
    assert trace.rtt_ms is not None
    assert trace.rtt_ms.tolist() == [40.0 + t for t in range(20) for _ in range(5)]


def test_rows_of_a_loaded_downlink_say_nothing_about_the_uplink(tmp_path: Path) -> None:
    head = "timestamp,uplink_mbps,uplink_rolled_mbps_3,direction\n"
    up = "".join(f"2021-01-18 16:01:{s:02d},50,1,uplink\n" for s in range(30))
    down = "".join(f"2021-01-18 16:02:{s:02d},0.3,1,downlink\n" for s in range(30))
    _write(tmp_path, {"a.csv": head + up + down})
    found = read_traces(tmp_path)
    (trace,) = found.traces
    assert trace.uplink_mbps.tolist() == [50.0] * 300
    assert "30 rows of another direction left out" in found.sources[0].notes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("time,throughput\n1,2\n2,3\n", "names no unit"),
        ("time,dl_mbps\n1,2\n2,3\n", "is a downlink's"),
        ("time,dl_mbps,throughput_mbps\n1,2,3\n2,3,4\n", "is a downlink's"),
        ("x,uplink_mbps\n1,2\n", "no column of its header names a time"),
        ("time,power\n1,2\n", "names a rate or a round trip"),
        ("time,uplink_mbps,ul2_mbps,upload_mbps\n1,2,3,4\n", "several columns"),
        ("time,uplink_mbps\n1,2\n3\n", "line 3 has another number of cells"),
        ("time,uplink_mbps\n1,2\n2,NaN\n", "line 3: 'NaN' is not a finite number"),
        ("time,uplink_mbps\n1,2\n2,1e999\n", "line 3: '1e999' is not a finite number"),
        ("time,uplink_mbps\n1,\n2,-\n", "has no value"),
        ("time,uplink_mbps\n0,5\n100,5\n200,5\n", "one value every 100 s"),
        ("0 1\n1 -2\n", "negative"),
        ("0 1\n1 2\n2 3\n", "it lasts 3.0 s; at least 10 s are needed"),
        ("0 1\n1 2 3\n", "line 2 has 3 numbers"),
        ("0 1\n1 x\n", "line 2: 'x' is not a finite number"),
        ("0 1_0\n1 1\n", "no column"),
        ("0 0\n9 0\n18 0\n", "never above 0"),
        ("0 99999\n9 0\n18 0\n", "not plausible"),
        ("5 1\n5 1\n", "does not move on"),
        ("1 2 3\n4 5 6\n", "3 columns and no header"),
        ("", "it is empty"),
        ("# only a comment\n", "it is empty"),
        ("Run 1\n1,2,3\n", "may be rates or round trips"),
        ("0\n500\n400\n3000\n", "the time goes back"),
    ],
)
def test_what_is_not_used_says_why(tmp_path: Path, text: str, reason: str) -> None:
    name = "up-link/x.txt" if text.startswith("0\n") else "x.txt"
    _write(tmp_path, {name: text, "good.up": _pairs(_RATES)})
    found = read_traces(tmp_path, assume_uplink=True)
    assert [trace.name for trace in found.traces] == ["good.up"]
    assert reason in _reasons(found)[name]


def test_the_unit_of_a_bare_column_is_the_users_to_say(tmp_path: Path) -> None:
    _write(tmp_path, {"a.csv": "time,uplink\n" + "".join(f"{t},125000\n" for t in range(20))})
    (trace,) = read_traces(tmp_path, rate_unit="bytes").traces
    assert set(trace.uplink_mbps) == {1.0}
    with pytest.raises(ConfigError, match="no rate unit 'furlongs'"):
        read_traces(tmp_path, rate_unit="furlongs")


def test_short_runs_are_joined_and_long_ones_stay(tmp_path: Path) -> None:
    short = ["Run 1", ",".join(["1"] * 120), "####", "Run 2", ",".join(["2"] * 120)]
    long = ["Run 1", ",".join(["3"] * 700), "Run 2", ",".join(["4"] * 650)]
    lists = {"ul/throughput/a.list": short, "ul/throughput/b.list": long}
    _write(tmp_path, {name: "\n".join(lines) for name, lines in lists.items()})
    sizes = {t.name: (t.uplink_mbps.size, t.uplink_mbps[0]) for t in read_traces(tmp_path).traces}
    assert sizes == {
        "ul/throughput/a": (240, 1.0),
        "ul/throughput/b#1": (700, 3.0),
        "ul/throughput/b#2": (650, 4.0),
    }


def test_a_second_pair_of_lists_is_not_read(tmp_path: Path) -> None:
    times = ",".join(f"{i / 10:.1f}" for i in range(200))
    text = f"Run 1\n{times}\n{','.join(['5'] * 200)}\n{times}\n{','.join(['9'] * 200)}\n"
    _write(tmp_path, {"drive.up": text})
    found = read_traces(tmp_path)
    assert found.traces[0].uplink_mbps.tolist() == [5.0] * 200
    assert "lists after a run's first two were not read" in found.sources[0].notes


def test_a_gap_in_time_parts_runs(tmp_path: Path) -> None:
    rows = [(t, 5) for t in range(20)] + [(t, 6) for t in range(500, 530)]
    _write(tmp_path, {"a.up": "".join(f"{t} {r}\n" for t, r in rows)})
    assert [t.uplink_mbps.size for t in read_traces(tmp_path).traces] == [200, 300]


def test_ping_output_counts_lost_replies_as_two_seconds(tmp_path: Path) -> None:
    replies = [
        f"64 bytes from 192.0.2.1: icmp_seq={n} ttl=50 time={20 + n}.5 ms"
        for n in range(1, 21)
        if n != 3
    ]
    end = "20 packets transmitted, 19 received, 5% packet loss, time 19000ms"
    _write(tmp_path, {"lte.up": _pairs(_RATES), "lte.ping": "\n".join([*replies, "", end])})
    (trace,) = read_traces(tmp_path).traces
    assert trace.rtt_ms is not None
    assert trace.rtt_ms[:15].tolist() == [21.5] * 5 + [22.5] * 5 + [2000.0] * 5
    assert trace.rtt_ms.size == 100


def test_round_trips_find_their_rate(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "uplink/lte/a.txt": _pairs(_RATES),
            "uplink/5g/a.txt": _pairs(_RATES),
            "ping/lte/a.txt": _RTTS,
            "ping/5g/b.txt": _RTTS,
        },
    )
    found = read_traces(tmp_path)
    assert {s.file: s.rtt for s in found.sources} == {
        "uplink/5g/a.txt": "ping/5g/b.txt",
        "uplink/lte/a.txt": "ping/lte/a.txt",
    }


def test_partners_never_cross_radios() -> None:
    assert find_partner("up/lte/p1.txt", ["ping/5g/p1.txt"], "lte") is None
    assert find_partner("up/lte/mac_p1.txt", ["ping/lte/p1.txt", "ping/lte/p2.txt"], "lte") == (
        "ping/lte/p1.txt"
    )
    assert find_partner("a.up", ["x.rtt", "y.rtt"], None) is None


def test_an_index_names_all_there_is(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "index.csv": "name,class,radio,uplink,rtt\n"
            "one,Tram,LTE,u/1.txt,r/1.txt\n"
            "two,,4G,u/1.txt,\n"
            "one,Tram,lte,u/1.txt,\n"
            "bad,Tram,6g,u/1.txt,\n"
            "gone,Tram,lte,u/9.txt,\n"
            "down,Tram,lte,x.down,\n"
            "away,Tram,lte,../u/1.txt,\n"
            "root,Tram,lte,/etc/passwd,\n"
            "swap,Tram,lte,r/1.txt,u/1.txt\n",
            "u/1.txt": _pairs(_RATES),
            "r/1.txt": _RTTS,
            "x.down": _pairs(_RATES),
            "other.up": _pairs(_RATES),
        },
    )
    found = read_traces(tmp_path)
    assert [(t.name, t.group, t.radio) for t in found.traces] == [
        ("one", "Tram", "lte"),
        ("two", "LTE", "lte"),
    ]
    assert found.traces[0].rtt_ms is not None
    assert found.traces[0].rtt_ms.size == 60
    reasons = {path.partition(" (")[0]: reason for path, reason in _reasons(found).items()}
    assert reasons.pop("index.csv line 10").startswith("one number a line is either")
    assert reasons == {
        "index.csv line 4": "the name 'one' is there already",
        "index.csv line 5": "radio '6g' is none of 3g, lte, 5g, wifi",
        "index.csv line 6": "u/9.txt: there is no such file",
        "index.csv line 7": "a downlink's rate is never an uplink's",
        "index.csv line 8": "'../u/1.txt' leaves the folder",
        "index.csv line 9": "'/etc/passwd' leaves the folder",
        "1 other files": "index.csv does not name them",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,radio,uplink\n", "no column class, rtt"),
        ("name,class,radio,uplink,rtt\na,b\n", "line 2 has 2 cells"),
        ("name,class,radio,uplink,rtt\n,b,lte,x,\n", "needs a name and an uplink"),
        ("name,class,radio,uplink,rtt\n\x1b[2J,b,lte,x,\n", "short and printable"),
        ("", "no column name, class, radio, uplink, rtt"),
    ],
)
def test_a_broken_index_is_refused_as_a_whole(tmp_path: Path, text: str, reason: str) -> None:
    _write(tmp_path, {"index.csv": text, "good.up": _pairs(_RATES)})
    with pytest.raises(ConfigError, match=reason):
        read_traces(tmp_path)


def test_a_folder_without_a_usable_trace_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is empty"):
        read_traces(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        read_traces(tmp_path / "nowhere")
    _write(tmp_path, {"a.txt": "hello"})
    with pytest.raises(ConfigError, match=r"a\.txt: no column"):
        read_traces(tmp_path)
    _write(tmp_path, {f"walk{i}.txt": _pairs(_RATES) for i in range(5)})
    with pytest.raises(ConfigError, match=r": walk0\.txt and 4 more: it does not say.*; a\.txt: "):
        read_traces(tmp_path)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("uplink_mbps", 1.0), ("UL_MBPS", 1.0), ("rate (kbit/s)", 1e-3), ("bps", 1e-6),
        ("bits_per_second", 1e-6), ("tx MBps", 8.0), ("kB/s", 8e-3), ("bytes/s", 8e-6),
        ("uplinkMbps", 1.0), ("Gbps", 1e3), ("tx_bytes", None), ("throughput", None),
        ("rtt_ms", None), ("B", None), ("Mbit", 1.0),
    ],
)  # fmt: skip
def test_units_are_read_from_a_columns_name(name: str, factor: float | None) -> None:
    assert rate_factor(name) == pytest.approx(factor) if factor else rate_factor(name) is None


def test_words_of_a_path_say_what_a_file_is() -> None:
    assert path_direction("downlink/x.up") == "uplink"
    assert path_direction("x_up_down.txt") is None
    assert path_direction("downtown-upper.txt") is None
    assert path_kind("uplink/ping.txt") == "rtt"
    assert path_kind("throughput/static/p3.list") == "rate"
    assert path_radio("lte/mmwave_3.txt") == "5g"
    assert path_radio("campus/wi-fi.txt") == "wifi"
    assert path_radio("5g-lte.txt") is None
    assert column_direction("tx_rate") == "uplink"
    assert column_direction("up_down") is None
