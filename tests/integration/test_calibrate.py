"""``nearfar calibrate`` with the zoo's digits and a real broker, and what a runtime makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import Action, Bundle, EdgeRuntime
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.contract.wire import ModelRef
from edge_runtime.gain import GainCurve, load_gain
from edge_runtime.gain.fit import isotonic, isotonic_blocks
from edge_runtime.gain.store import GainRecord, read_gain
from edge_runtime.log import read_log
from edge_runtime.policies.adaptive import Adaptive, GainPrior
from tests.support.broker import BrokerProcess, broker_process
from tests.support.digits import checked, nearfar, render
from tests.support.tasks import task_bundle, task_servable

pytestmark = pytest.mark.slow


# The regression itself ------------------------------------------------------------------


@pytest.mark.parametrize("increasing", [True, False])
def test_isotonic_regression_is_scikit_learns(increasing: bool) -> None:
    pytest.importorskip("sklearn")
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(4)
    for count in (1, 2, 7, 300):
        x = rng.integers(0, max(count // 2, 1), count).astype(float)
        y, w = rng.normal(0, 1, count), rng.uniform(0.1, 4.0, count)
        theirs = IsotonicRegression(increasing=increasing).fit(x, y, sample_weight=w)
        order = np.argsort(np.unique(x))
        blocks = isotonic_blocks(x, y, w, increasing=increasing)
        steps = np.unique(x)[order]
        values = np.unique(theirs.predict(steps).round(9))
        assert sorted({round(block.value, 9) for block in blocks}) == pytest.approx(
            sorted(set(values))
        )
        distinct = np.arange(count, dtype=float)
        plain = IsotonicRegression(increasing=increasing).fit(distinct, y, sample_weight=w)
        assert isotonic(y, w, increasing=increasing) == pytest.approx(plain.predict(distinct))


# The whole way --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, and a bundle of the small net: one variant, made in the least time."""
    folder = tmp_path_factory.mktemp("calibrate")
    render(folder / "calib", "calib", 100)
    render(folder / "photos", "test", 200)
    checked(
        "convert", "zoo:digits-small", "--to", "tflite", "--precision", "fp32",
        "--calib", folder / "calib", "--calib-labels", folder / "calib" / "labels.csv",
        "-o", folder / "digits.bundle", "--quiet",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with broker_process(
        tmp_path_factory.mktemp("broker"), "--models", "zoo:digits-large"
    ) as running:
        yield running


def calibrate(work: Path, broker: BrokerProcess, *arguments: str | Path) -> str:
    return checked(
        "calibrate", work / "digits.bundle", "--broker", broker.url, "--data", work / "photos",
        *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def record(work: Path, broker: BrokerProcess) -> GainRecord:
    """With labels, beside the bundle."""
    told = calibrate(
        work, broker, "--labels", work / "photos" / "labels.csv", "--variant", "tflite-fp32",
        "--json", work / "gain.json", "--html", work / "gain.html",
    )  # fmt: skip
    (path,) = (work / "gain").iterdir()
    assert str(path) in told
    return read_gain(path)


def test_the_file_says_what_was_measured_for_which_pair(work: Path, record: GainRecord) -> None:
    bundle = Bundle.open(work / "digits.bundle")
    variant = bundle.manifest.variant("tflite-fp32")
    assert (record.variant, record.variant_sha256) == (variant.id, variant.sha256)
    assert record.cloud.name == "digits-large"
    assert (record.evidence, record.task) == ("labels", "classification")
    assert (record.provenance.images, record.provenance.skipped) == (200, 0)
    assert record.cloud_right is not None
    assert 0.8 < record.local_right < record.cloud_right
    gains = [gain for _, gain in record.knots]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.2
    assert gains[-1] < 0.05
    assert record.calibration is not None
    assert record.calibration.method == "temperature"
    assert record.held_out is not None
    assert record.held_out_prior is not None
    assert record.held_out.error < 0.1
    document = json.loads((work / "gain.json").read_text())
    assert document["knots"] == [list(knot) for knot in record.knots]
    page = (work / "gain.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert not re.search(r"https?://", page)
    stored = next((work / "gain").iterdir()).read_text()
    assert str(work) not in stored
    assert "digit-" not in stored


def test_the_runtime_finds_it_for_this_cloud_model_and_no_other(
    work: Path, broker: BrokerProcess, record: GainRecord
) -> None:
    """Found by both digests, used by the policy, seen in the log, replayed from there."""
    bundle = Bundle.open(work / "digits.bundle")
    with EdgeRuntime(bundle, broker.url, "ONLY_IN_CLOUD") as edge:
        model = edge.run(next((work / "photos").glob("*.jpg")), deadline_ms=5000).model
    assert isinstance(model, ModelRef)
    gain, reason = load_gain(bundle, record.variant_sha256, model.sha256)
    assert (gain, reason) == (record.curve, "gain_measured")
    assert isinstance(gain, GainCurve)
    assert load_gain(bundle, record.variant_sha256, "0" * 64) == (
        GainPrior(),
        "gain_prior_other_cloud",
    )
    assert load_gain(bundle, "0" * 64, model.sha256) == (GainPrior(), "gain_prior_uncalibrated")

    log = work / "log.jsonl"
    policy = Adaptive(gain)  # type: ignore[arg-type]
    with EdgeRuntime(bundle, broker.url, policy, "tflite-fp32", log=log) as edge:
        edge.prewarm(wait_ms=5000)
        for path in sorted((work / "photos").glob("*.jpg"))[:40]:
            result = edge.run(path, deadline_ms=3000)
            known = result.situation.confidence
            if known is not None and result.decision.action is not Action.LOCAL:
                p = result.decision.p_cloud_in_deadline
                assert result.decision.expected_gain == pytest.approx(gain.gain(known) * p)
    assert {one.entry.action for one in read_log(log).entries} == {"CASCADE", "LOCAL"}
    assert "come out as logged, bit for bit" in checked("replay", log)
    judged = checked("replay", log, "--policy", "ONLY_ON_DEVICE", "--gain",
                     next((work / "gain").iterdir()))  # fmt: skip
    assert "ONLY_ON_DEVICE would have ended otherwise" in judged
    assert "numbers:" in checked("explain", log, "--html", work / "explain.html")


def test_the_same_images_in_another_order_give_the_same_file(
    work: Path, broker: BrokerProcess, record: GainRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    rows = (work / "photos" / "labels.csv").read_text().splitlines()
    shuffled = work / "shuffled.csv"
    shuffled.write_text("\n".join([rows[0], *reversed(rows[1:])]))
    calibrate(work, broker, "--labels", shuffled, "--variant", "tflite-fp32", "-o", work / "again")
    (path,) = (work / "again").iterdir()
    again = read_gain(path)
    assert again.provenance.date == "1970-01-01"
    assert again.provenance.data_sha256 == record.provenance.data_sha256
    assert again.knots == record.knots
    assert path.read_bytes() == canonical_json(again)


def test_without_labels_the_disagreement_is_measured_and_the_file_says_so(
    work: Path, broker: BrokerProcess, record: GainRecord
) -> None:
    told = calibrate(work, broker, "--against-cloud", "--variant", "tflite-fp32", "-o",
                     work / "blind")  # fmt: skip
    assert "who is right is a prior" in told
    (path,) = (work / "blind").iterdir()
    blind = read_gain(path)
    assert (blind.evidence, blind.cloud_right, blind.held_out) == ("agreement", None, None)
    assert blind.agreement == record.agreement
    assert blind.curve.signed(0.4) > 0.05 > blind.curve.signed(0.99)
    bundle = Bundle.open(work / "digits.bundle")
    found = load_gain(bundle, blind.variant_sha256, blind.cloud.sha256, folder=work / "blind")
    assert found == (blind.curve, "gain_from_agreement")


def test_what_cannot_be_calibrated_ends_with_one_line(
    work: Path, broker: BrokerProcess, tmp_path: Path
) -> None:
    def refused(*arguments: str | Path) -> str:
        done = nearfar("calibrate", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    bundle, photos = work / "digits.bundle", work / "photos"
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:5]:
        shutil.copy(path, few)
    (few / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    base = (bundle, "--broker", broker.url, "--data", few, "--against-cloud")
    assert "at least 40 are needed (1 could not be read)" in refused(*base)
    assert "error [network_unreachable]" in refused(
        bundle, "--broker", "http://127.0.0.1:9", "--data", photos, "--against-cloud",
        "--deadline-ms", "300",
    )  # fmt: skip
    assert "the broker has no model 'none'" in refused(*base, "--cloud-model", "none")
    images = task_bundle("image_to_image")
    assert "not right or wrong" in refused(images, *base[1:])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_boxes_and_masks_are_held_to_the_clouds(work: Path, tmp_path: Path, task: str) -> None:
    """Both sides run the same net here, so both agree, and nothing is to be gained."""
    bundle = task_bundle(task)  # type: ignore[arg-type]
    with broker_process(
        tmp_path,
        "--models",
        str(task_servable(task)),  # type: ignore[arg-type]
    ) as running:
        base = ("calibrate", bundle, "--broker", running.url, "--data", work / "photos",
                "-o", tmp_path / "gain", "--limit", "60")  # fmt: skip
        checked(*base, "--against-cloud")
        refused = nearfar(*base, "--labels", work / "photos" / "labels.csv")
        assert refused.returncode == 2
        assert f"a class for each image cannot judge {task}" in refused.stderr
    (path,) = (tmp_path / "gain").iterdir()
    record = read_gain(path)
    assert record.agreement > 0.98
    assert record.evidence == "agreement"
    assert record.curve.gain(0.99) == 0.0
    assert record.local_right > 0.95
