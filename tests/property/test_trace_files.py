"""Trace files that hypothesis writes: what was recorded comes back, and nothing else does."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.simulation.trace_formats import read_recording
from edge_runtime.simulation.trace_series import bins_of_samples, check_bins, check_rtt

_RATES = st.lists(st.integers(0, 40_000).map(lambda n: n / 100), min_size=100, max_size=160).filter(
    any
)


@settings(max_examples=15)
@given(_RATES, st.sampled_from([" ", "\t", ",", ";"]), st.sampled_from(["\n", "\r\n"]))
def test_rates_of_tenths_of_a_second_come_back_as_written(
    rates: list[float], gap: str, newline: str
) -> None:
    text = newline.join(f"{i / 10:.1f}{gap}{rate:.4f}" for i, rate in enumerate(rates))
    (bins,) = read_recording(text.encode(), hint=None, rate_factor=None).uplink_runs
    assert np.allclose(bins, rates, atol=1e-5)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 30_000), min_size=2, max_size=400))
def test_a_mahimahi_list_keeps_every_packet(times: list[int]) -> None:
    ordered = sorted([*times, 0, 20_000])
    data = "\n".join(map(str, ordered)).encode()
    (bins,) = read_recording(data, hint="rate", rate_factor=None).uplink_runs
    assert round(bins.sum() * 0.1 / 0.012) == len(ordered)
    packets = np.round(bins * 0.1 / 0.012).astype(int)
    for number in (0, bins.size - 1, bins.size // 2):
        expected = sum(number * 100 <= t < (number + 1) * 100 for t in ordered)
        assert packets[number] == expected


@settings(max_examples=15)
@given(
    st.lists(st.floats(0.01, 3.0), min_size=20, max_size=60),
    st.lists(st.floats(0.0, 500.0), min_size=60, max_size=60),
)
def test_resampling_keeps_what_could_be_sent(steps: list[float], rates: list[float]) -> None:
    times = np.cumsum([0.0, *steps])
    values = np.asarray(rates[: times.size])
    runs = bins_of_samples(times, np.resize(values, times.size))
    if len(runs) > 1:
        return  # a gap parts the recording
    held = np.append(np.diff(times), np.median(np.diff(times)))
    sent = float((np.resize(values, times.size) * held).sum())
    # Less than one bin may be cut off at the end.
    assert sent - 0.1 * 500.0 - 0.01 <= runs[0].sum() * 0.1 <= sent + 0.01


_LINES = st.lists(
    st.one_of(
        st.text(max_size=24),
        st.integers(-(10**20), 10**20).map(str),
        st.floats().map(str),
        st.tuples(st.floats(), st.floats()).map(lambda p: f"{p[0]} {p[1]}"),
        st.tuples(st.integers(-5, 10**6), st.floats()).map(lambda p: f"{p[0]},{p[1]}"),
        st.sampled_from(
            ["time,uplink_mbps", "timestamp,UL_bitrate,direction", "Run 1", "####", "1,2,3,",
             "64 bytes from 192.0.2.1: icmp_seq=1 ttl=5 time=3.5 ms", "Request timed out.",
             "icmp_seq=999999999 time=1 ms", "[1e9] time=2 ms", "2021-13-45 99:99:99,5,uplink",
             "9 packets transmitted, 9 received, 0% packet loss, time 800ms", '"', "a,\"b"]
        ),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=40)
@given(_LINES, st.sampled_from([None, "rate", "rtt"]), st.sampled_from([None, 1e-3]))
def test_any_text_is_a_usable_recording_or_a_typed_error(
    lines: list[str], hint: str | None, factor: float | None
) -> None:
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    try:
        found = read_recording(data, hint=hint, rate_factor=factor)  # type: ignore[arg-type]
        for run in found.uplink_runs:
            bins = check_bins(run)
            assert bins.dtype == np.float64
            assert 100 <= bins.size <= 864_000
            assert (bins >= 0).all()
            assert (bins <= 10_000).all()
        if not found.uplink_runs:
            assert found.rtt_ms is not None
            rtt_ms = check_rtt(found.rtt_ms)
            assert (rtt_ms > 0).all()
    except ContractError as error:
        assert error.detail  # noqa: PT017  # either is right


@settings(max_examples=40)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read_recording(data, hint=None, rate_factor=None)
    except ContractError as error:
        assert error.detail  # noqa: PT017  # either is right
