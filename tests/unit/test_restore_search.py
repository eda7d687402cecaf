"""The smallest set of layers to keep, in few conversions."""

from __future__ import annotations

import pytest

from converters.restore.search import find_keep

ORDER = tuple(f"layer{index}" for index in range(16))


class Converter:
    """Stands for conversions: the noise of each rounded layer adds up."""

    def __init__(self, noise: dict[str, float]) -> None:
        self.noise = noise
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, keep: tuple[str, ...]) -> float:
        self.calls.append(keep)
        return sum(value for name, value in self.noise.items() if name not in keep)


def halving() -> Converter:
    return Converter({name: 2.0**-index for index, name in enumerate(ORDER)})


def test_one_bad_layer_is_one_conversion() -> None:
    converter = Converter({name: 10.0 if name == "layer0" else 0.01 for name in ORDER})
    found = find_keep(ORDER, converter, lambda noise: noise < 1)
    assert found.best is not None
    assert found.best.keep == ("layer0",)
    assert converter.calls == [("layer0",)]


@pytest.mark.parametrize("needed", range(1, 17))
def test_the_smallest_prefix_is_found_when_the_budget_suffices(needed: int) -> None:
    def enough(keep: tuple[str, ...]) -> bool:
        return set(ORDER[:needed]) <= set(keep)

    calls: list[tuple[str, ...]] = []

    def measure(keep: tuple[str, ...]) -> bool:
        calls.append(keep)
        return enough(keep)

    found = find_keep(ORDER, measure, bool, budget=40)
    assert found.best is not None
    assert found.best.keep == ORDER[:needed]
    assert len(calls) == len(set(calls)), "no set is converted twice"


@pytest.mark.parametrize("budget", range(1, 8))
@pytest.mark.parametrize("limit", [0.9, 0.3, 0.05, 0.001])
def test_the_budget_is_never_passed(budget: int, limit: float) -> None:
    converter = halving()
    found = find_keep(ORDER, converter, lambda noise: noise < limit, budget=budget)
    assert len(converter.calls) == len(found.trials) <= budget
    if found.best is not None:
        assert found.best.figures < limit
        assert found.best.accepted


@pytest.mark.parametrize("budget", range(1, 8))
def test_an_answer_that_exists_is_not_missed_for_want_of_budget(budget: int) -> None:
    """Only keeping everything helps: the last trial goes there."""
    found = find_keep(ORDER, set, lambda kept: len(kept) == 16, budget=max(2, budget))
    assert found.best is not None
    assert found.best.keep == ORDER


def test_layers_that_others_make_up_for_are_taken_out_again() -> None:
    needed = {"layer2", "layer5"}
    found = find_keep(ORDER, set, lambda kept: needed <= kept, budget=20)
    assert found.best is not None
    assert set(found.best.keep) == needed
    assert found.best.keep == ("layer2", "layer5"), "in the order of sensitivity"


def test_nothing_helps_and_the_trials_say_so() -> None:
    converter = halving()
    found = find_keep(ORDER, converter, lambda _noise: False, budget=6)
    assert found.best is None
    assert len(found.trials) == len(converter.calls) <= 6
    assert converter.calls[-1] == ORDER


def test_no_more_than_the_most_is_kept() -> None:
    converter = halving()
    found = find_keep(ORDER, converter, lambda _noise: False, budget=9, most=3)
    assert found.best is None
    assert max(len(keep) for keep in converter.calls) == 3


def test_a_start_that_is_too_large_is_bisected_down() -> None:
    found = find_keep(ORDER, set, lambda kept: "layer1" in kept, budget=4, start=8)
    assert found.best is not None
    assert len(found.trials[0].keep) == 8
    assert found.best.keep == ORDER[:2]


def test_the_same_search_twice_makes_the_same_trials() -> None:
    first, second = halving(), halving()
    for converter in (first, second):
        find_keep(ORDER, converter, lambda noise: noise < 0.2)
    assert first.calls == second.calls


def test_no_layers_or_no_budget_is_no_search() -> None:
    converter = halving()
    assert find_keep((), converter, lambda _n: True).best is None
    assert find_keep(ORDER, converter, lambda _n: True, budget=0).best is None
    assert converter.calls == []
