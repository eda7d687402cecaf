"""Every network fault in every phase of a request: an end in time, typed, nothing left.

``NEARFAR_FAULT_CASES`` and ``NEARFAR_FAULT_SEED`` choose how many cases and which;
``python -m benchmarks.fault_run --seed S --only N`` runs one of them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.broker import broker_process
from tests.support.bundles import servable
from tests.support.fault_cases import (
    COMBINATIONS,
    Arena,
    Certificates,
    draw_cases,
    hanging_names,
    run_cases,
    run_misses,
)
from tests.support.fault_proxy import ProxyHost

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("NEARFAR_FAULT_CASES", "180"))
"""Of three requests each."""
SEED = int(os.environ.get("NEARFAR_FAULT_SEED", "7"))


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("faults")
    with broker_process(folder, "--models", str(servable(folder / "model"))) as broker:
        port = int(broker.url.rpartition(":")[2])
        with ProxyHost("127.0.0.1", port) as host, hanging_names():
            made = Arena(host, Certificates(folder))
            with made.timer:
                yield made


def test_every_request_ends_in_time_and_typed_and_leaves_nothing(arena: Arena) -> None:
    cases = draw_cases(SEED, CASES)
    report, _ = run_cases(arena, cases, SEED)
    assert report.broken == (), f"seed {SEED}"
    assert report.requests == 3 * CASES
    # the faults did happen: otherwise all of this says nothing
    assert report.struck > CASES / 2
    if len(COMBINATIONS) <= CASES:
        assert {(case.fault, case.phase) for case in cases} == set(COMBINATIONS)
        assert {"IN_CLOUD", "ON_DEVICE", "network_unreachable"} <= set(report.by_kind)


def test_a_broker_that_is_no_help_makes_no_answer_late(arena: Arena) -> None:
    misses = run_misses(arena, 10)
    # what the machine delays is not ours; a share of 0.1 % is no answer in so few
    assert misses.misses_punctual == 0, misses
    assert misses.requests > 0


def test_the_same_seed_draws_the_same_cases() -> None:
    assert draw_cases(SEED, 20) == draw_cases(SEED, 20)
    assert draw_cases(SEED, 20) != draw_cases(SEED + 1, 20)
