"""What does deciding cost, alone and beside one local int8 MobileNetV2 inference?

    python -m benchmarks.decision_cost --json build/bench/decision_cost.json

The situations are those of a simulated phone on a link that comes and goes: each is decided
again here, in order, interleaved with inferences of a real ``.tflite``. ``decision_us`` is
CPU time of one ``Policy.decide``; ``request_share`` is what all decisions of one request take
together, over the inference's median. ``passed`` holds them against their budgets: 200 us at
the 99th percentile, 2 % of the inference at the median.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import int8_latency
from benchmarks.machine import describe_machine
from edge_runtime.policies.base import Decision, Policy, Situation
from edge_runtime.runtimes.base import LoadedModel, find_runtime
from edge_runtime.simulation.constants import load_constants
from edge_runtime.simulation.device import DeviceRun
from edge_runtime.simulation.lineup import make_policy
from edge_runtime.simulation.traces import Trace
from edge_runtime.simulation.world import draw_world

POLICIES = ("ExpectedUtility:accuracy", "ExpectedUtility:balanced", "ExpectedUtility:saver")
BUDGET_P99_US = 200.0
BUDGET_SHARE = 0.02
_BINS = 3000
_DEADLINE_MS = 400.0


class _Recorder:
    """Passes questions on, and keeps them by request."""

    uses_local = True
    uses_cloud = True
    prewarms = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self.asked: list[Situation] = []

    def decide(self, situation: Situation) -> Decision:
        """What ``policy`` says."""
        self.asked.append(situation)
        return self.policy.decide(situation)


def commuter() -> Trace:
    """Five minutes of LTE between 0.3 and 12 Mbit/s, with two tunnels."""
    seconds = np.arange(_BINS) / 10.0
    rate = np.exp(np.log(2.0) + 1.8 * np.sin(seconds * 2 * math.pi / 47.0))
    rate[900:1000] = rate[2100:2250] = 0.01
    return Trace(name="commuter", group="LTE", radio="lte", uplink_mbps=rate, rtt_ms=None)


def situations(name: str) -> tuple[list[Situation], float]:
    """What one policy is asked on the way, and how often per request."""
    world = draw_world(
        commuter(), 0, device="mid", deadline_ms=_DEADLINE_MS, arrivals="poisson",
        constants=load_constants(),
    )  # fmt: skip
    recorder = _Recorder(make_policy(name))
    requests = DeviceRun(world, recorder).run()
    return recorder.asked, len(recorder.asked) / len(requests)


def measure(asked: list[Situation], policy: Policy, model: LoadedModel) -> dict[str, Any]:
    """Each situation once, an inference after every eighth. Microseconds."""
    spec = model.inputs[0]
    inputs = [np.random.default_rng(0).normal(size=spec.shape).astype(spec.dtype)]
    for _ in range(5):
        model.run(inputs)
    taken: list[float] = []
    inferences: list[float] = []
    for number, situation in enumerate(asked):
        start = time.thread_time_ns()
        policy.decide(situation)
        taken.append((time.thread_time_ns() - start) / 1e3)
        if number % 8 == 0:
            begun = time.perf_counter_ns()
            model.run(inputs)
            inferences.append((time.perf_counter_ns() - begun) / 1e3)
    cuts = statistics.quantiles(taken, n=100)
    return {
        "decisions": len(taken),
        "decision_us": {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)},
        "inference_us": round(statistics.median(inferences), 1),
        "mean_us": round(statistics.fmean(taken), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decision_cost")
    parser.add_argument("--json", type=Path, default=Path("build/bench/decision_cost.json"))
    parser.add_argument("--quick", action="store_true", help="one policy")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": describe_machine(), "policies": {}}
    with tempfile.TemporaryDirectory(prefix="nearfar-decision-") as scratch:
        print("converting MobileNetV2 ...", flush=True)
        request = int8_latency.nets()["mobilenet_v2"]
        variant = int8_latency.convert(request, "tflite", Path(scratch))["int8"]
        model = find_runtime("tflite").load(variant.path, variant, threads=1)
        for name in POLICIES[:1] if arguments.quick else POLICIES:
            asked, per_request = situations(name)
            found = measure(asked, make_policy(name), model)
            share = per_request * found["mean_us"] / found["inference_us"]
            found["decisions_per_request"] = round(per_request, 2)
            found["request_share"] = round(share, 4)
            found["passed"] = {
                "p99_us": found["decision_us"]["p99"] <= BUDGET_P99_US,
                "request_share": share <= BUDGET_SHARE,
            }
            document["policies"][name] = found
            print(
                f"{name}: p50 {found['decision_us']['p50']:.0f} us, "
                f"p99 {found['decision_us']['p99']:.0f} us, {per_request:.1f} a request; "
                f"{share:.1%} of an inference of {found['inference_us'] / 1e3:.2f} ms",
                flush=True,
            )
        model.close()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.json}")
    sys.exit(not all(all(one["passed"].values()) for one in document["policies"].values()))


if __name__ == "__main__":
    main()
