"""A project's run: every mistake before any work, and one exit status for all."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from converters.project import convert_project, worst_status
from edge_runtime.contract.errors import ConfigError

GOOD = '[[model]]\nsource = "zoo:digits-small"\noutput = "build/good"\n'


def test_bad_input_outweighs_a_missing_backend_and_that_a_failed_gate() -> None:
    for order in permutations((0, 1, 2, 3)):
        assert worst_status(order) == 2
        assert worst_status([status for status in order if status != 2]) == 3
        assert worst_status([status for status in order if status < 2]) == 1
    assert worst_status([0, 0]) == 0
    assert worst_status([0, -9, 2]) == -9, "a command that died is worse than all"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("temperature = 500.0", "500.0 is not in the range"),
        ("min_android_api = 5", "5 is not in the range"),
        ("score_threshold = 2.0", "2.0 is not in the range"),
    ],
)
def test_a_bad_value_of_the_last_model_stops_before_the_first_is_converted(
    tmp_path: Path, line: str, says: str
) -> None:
    path = tmp_path / "nearfar.toml"
    path.write_text(GOOD + GOOD.replace("good", "bad") + line + "\n")
    with pytest.raises(ConfigError) as caught:
        convert_project(path, ["--jobs=1"])
    assert f"{path}, bad: " in caught.value.detail
    assert says in caught.value.detail
    assert not (tmp_path / "build").exists()


def test_reports_of_two_models_never_overwrite_each_other(tmp_path: Path) -> None:
    path = tmp_path / "nearfar.toml"
    path.write_text(GOOD + GOOD.replace("build/good", "other/good"))
    with pytest.raises(ConfigError, match="two models are called 'good': give each a 'name'"):
        convert_project(path, [], reports=tmp_path / "reports")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["nearfar.toml"]
