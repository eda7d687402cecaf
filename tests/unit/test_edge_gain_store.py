"""A gain on disk belongs to one pair of models, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edge_runtime import Bundle
from edge_runtime.contract.errors import ConfigError, ContractError, LimitExceeded, NearfarError
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.gain import GainCurve, GainLookup, gain_folder, load_gain
from edge_runtime.gain.build import today
from edge_runtime.gain.report import describe, to_html
from edge_runtime.gain.store import (
    GAIN_REASONS,
    gain_path,
    read_gain,
    write_gain,
)
from edge_runtime.policies.adaptive import Adaptive, GainPrior
from edge_runtime.policies.base import Action
from tests.support.bundles import tiny_bundle
from tests.support.gains import CLOUD, OTHER, VARIANT, record
from tests.support.log_entries import situation
from tests.support.reports import HOSTILE


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(tiny_bundle())


def test_what_is_written_is_read_and_used(tmp_path: Path, bundle: Bundle) -> None:
    path = write_gain(tmp_path / "gain", record())
    assert path.name == f"{VARIANT}-{CLOUD}.json"
    assert read_gain(path) == record()
    assert path.read_bytes() == canonical_json(record())
    gain, reason = load_gain(bundle, VARIANT, CLOUD, folder=tmp_path / "gain")
    assert reason == "gain_measured"
    assert isinstance(gain, GainCurve)
    assert [gain.signed(c) for c in (0.0, 0.4, 0.75, 1.0)] == pytest.approx(
        [0.5, 0.375, 0.075, -0.1]
    )
    assert gain.gain(1.0) == 0.0
    assert [gain.local(c) for c in (0.0, 0.55, 1.0)] == pytest.approx([0.3, 0.625, 0.95])
    assert [gain.cloud(c) for c in (0.2, 1.0)] == pytest.approx([0.8, 0.85])
    assert gain.nodes == (0.4, 0.9)
    assert list((tmp_path / "gain").iterdir()) == [path]


def test_the_default_place_is_beside_the_bundle_and_the_bundle_still_opens(bundle: Bundle) -> None:
    assert gain_folder(bundle) == bundle.root.parent / "gain"


def test_any_other_pair_gets_the_prior_and_hears_why(tmp_path: Path, bundle: Bundle) -> None:
    write_gain(tmp_path, record())
    write_gain(tmp_path, record(variant_sha256=OTHER, evidence="agreement", cloud_right=None))
    prior = GainPrior(local_right=0.5)
    found = {
        pair: load_gain(bundle, *pair, folder=tmp_path, prior=prior)
        for pair in ((VARIANT, OTHER), ("d" * 64, CLOUD), (VARIANT, None), (OTHER, CLOUD))
    }
    assert found[VARIANT, OTHER] == (prior, "gain_prior_other_cloud")
    assert found["d" * 64, CLOUD] == (prior, "gain_prior_uncalibrated")
    assert found[VARIANT, None] == (prior, "gain_prior_no_cloud")
    assert found[OTHER, CLOUD][1] == "gain_from_agreement"
    assert {reason for _, reason in found.values()} <= set(GAIN_REASONS)


def test_a_runtime_reads_each_file_once_and_keeps_the_gains_of_models_apart(
    tmp_path: Path, bundle: Bundle
) -> None:
    path = write_gain(tmp_path, record())
    lookup = GainLookup(bundle, VARIANT, folder=tmp_path)
    assert lookup.of(None)[1] == "gain_prior_no_cloud"
    measured = lookup.of(CLOUD)
    assert measured == (record().curve, "gain_measured")
    path.unlink()
    assert lookup.of(CLOUD) is measured
    for number in range(200):
        assert lookup.of(f"{number:064x}")[1] == "gain_prior_uncalibrated"
    assert lookup.of(CLOUD)[1] == "gain_prior_uncalibrated", "forgotten, and gone"


@pytest.mark.parametrize("digest", ["../" + "b" * 61, "B" * 64, "b" * 63, "b" * 64 + "\n", ""])
def test_a_digest_that_is_none_never_becomes_a_path(
    tmp_path: Path, bundle: Bundle, digest: str
) -> None:
    with pytest.raises(ConfigError, match="hex SHA-256"):
        gain_path(tmp_path, VARIANT, digest)
    assert load_gain(bundle, VARIANT, digest, folder=tmp_path)[1] == "gain_prior_no_cloud"


def _changed(**changes: object) -> bytes:
    return json.dumps({**msgspec.to_builtins(record()), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is no gain"),
        (b"[" * 100_000, "is no gain"),
        (b"\xff\xfe", "is no gain"),
        (_changed(schema_version=2), "is no gain"),
        (_changed(format="nearfar.bundle"), "is no gain"),
        (_changed(surplus=1), "surplus"),
        (_changed(knots=[]), "is no gain"),
        (_changed(knots=[[0.5, 0.1]] * 129), "is no gain"),
        (_changed(knots=[[0.5, 1.5]]), "is no gain"),
        (_changed(knots=[[0.5, 0.1], [0.5, 0.0]]), "rise in confidence"),
        (_changed(knots=[[0.5, 0.1], [0.6, 0.2]]), "fall in gain"),
        (_changed(own=[[0.5, 0.9], [0.6, 0.8]]), "in its being right"),
        (_changed(nodes=[0.5] * 9), "is no gain"),
        (_changed(local_right=-0.1), "is no gain"),
        (_changed(variant_sha256=OTHER), "of another pair"),
    ],
)
def test_a_damaged_file_is_refused_and_costs_only_the_measurement(
    tmp_path: Path, bundle: Bundle, data: bytes, text: str
) -> None:
    path = gain_path(tmp_path, VARIANT, CLOUD)
    path.write_bytes(data)
    with pytest.raises(ContractError, match=text):
        read_gain(path)
    gain, reason = load_gain(bundle, VARIANT, CLOUD, folder=tmp_path)
    assert (gain, reason) == (GainPrior(), "gain_prior_unreadable")


def test_a_file_without_end_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    path = gain_path(tmp_path, VARIANT, CLOUD)
    path.write_bytes(b" " * (2**18 + 1))
    with pytest.raises(LimitExceeded):
        read_gain(path)
    assert load_gain(bundle, VARIANT, CLOUD, folder=tmp_path)[1] == "gain_prior_unreadable"


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "gain").write_text("a file")
    with pytest.raises(NearfarError, match="choose another folder"):
        write_gain(tmp_path / "gain", record())


def test_an_adaptive_policy_goes_by_the_curve() -> None:
    """One situation; a gain of nothing keeps it on the device, one of 0.5 does not."""
    known = situation(confidence=0.6, time_left_ms=370.0)
    worthless = GainCurve(knots=((0.5, 0.0),), local_right=0.9)
    worthwhile = GainCurve(knots=((0.5, 0.5),), local_right=0.4)
    assert Adaptive(worthless).decide(known).action is Action.LOCAL  # type: ignore[arg-type]
    decision = Adaptive(worthwhile).decide(known)  # type: ignore[arg-type]
    assert decision.action is Action.CASCADE
    assert decision.expected_gain == pytest.approx(0.5 * decision.p_cloud_in_deadline)


def test_the_page_shows_hostile_names_and_nothing_from_outside() -> None:
    page = to_html(record(bundle=HOSTILE, variant=HOSTILE))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page
    assert "https://" not in page
    assert all("\x1b" not in line and "\u202e" not in line for line in page.splitlines())
    assert describe(record())[1].endswith("device 70.0%, cloud 90.0%, same answer 75.0%")


def test_the_date_is_that_of_the_source_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert today() == "1970-01-02"
    for nonsense in ("soon", "1e9", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", nonsense)
        with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH"):
            today()
