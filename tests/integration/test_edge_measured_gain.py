"""A runtime decides by the gain that was measured for its two models, once it knows both."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_runtime import Bundle, EdgeRuntime, Result
from edge_runtime.gain import GainCurve, gain_folder
from edge_runtime.gain.store import CloudModel, write_gain
from edge_runtime.log import read_log
from edge_runtime.log.replay import replay
from edge_runtime.policies.adaptive import Adaptive
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_broker import FaultBroker
from tests.support.gains import record

WORTHLESS = ((0.1, -0.5), (0.9, -0.5))
"""A gain below zero at every confidence: nothing is ever worth an upload."""


def _ask(edge: EdgeRuntime) -> tuple[Result, str]:
    edge.prewarm(wait_ms=5000)  # finds the cloud model
    uplink = edge._engine.uplink
    assert uplink is not None
    digest = uplink.model_sha256
    assert digest is not None
    return edge.run(photo(0), deadline_ms=2000), digest


def test_the_measured_gain_of_this_pair_is_used_and_replays(tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle(), tmp_path / "tiny.bundle")
    bundle, log = Bundle.open(tmp_path / "tiny.bundle"), tmp_path / "log.jsonl"
    local = next(one for one in bundle.manifest.variants if one.id == "tflite-fp32")
    with FaultBroker() as far:
        with EdgeRuntime(bundle, far.url, variant=local.id, log=log) as edge:
            before, digest = _ask(edge)
        assert before.situation.gain_reason == "gain_prior_uncalibrated"
        cloud = CloudModel(name="cloud", version="1", sha256=digest)
        measured = record(variant_sha256=local.sha256, cloud=cloud, knots=WORTHLESS)
        write_gain(gain_folder(bundle), measured)
        with EdgeRuntime(bundle, far.url, variant=local.id, log=log) as edge:
            after, _ = _ask(edge)
        own = Adaptive(GainCurve(knots=((0.5, 0.9),), local_right=0.5))
        with EdgeRuntime(bundle, far.url, own, variant=local.id, log=log) as edge:
            chosen, _ = _ask(edge)
    assert after.situation.gain_reason == "gain_measured"
    assert (after.inference_source, after.decision.expected_gain) == ("ON_DEVICE", 0.0)
    assert chosen.situation.gain_reason is None, "a gain of the caller's own stands"
    assert chosen.inference_source == "IN_CLOUD"
    found = replay(read_log(log))
    assert found.mismatched == 0
    assert found.decisions >= 3
