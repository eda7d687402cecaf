"""What each format has is said before any work, in a table that fits a terminal."""

from __future__ import annotations

from click.testing import CliRunner

from converters.recipes import FORMATS, OFFERED, RECIPES, REFUSED
from edge_runtime.cli import nearfar


def test_every_combination_is_offered_or_refused_with_a_reason() -> None:
    everything = {(name, precision) for name in FORMATS for precision in OFFERED}
    assert set(RECIPES) | set(REFUSED) == everything
    assert not set(RECIPES) & set(REFUSED)
    assert all(reason and not reason.endswith(".") for reason in REFUSED.values())


def test_shared_weights_come_with_inputs_to_choose_them_by() -> None:
    for recipe in RECIPES.values():
        assert not recipe.rounded or recipe.calibrated or recipe.gains
        assert not (recipe.calibrated and recipe.gains)


def test_formats_are_named_whole_in_80_columns() -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(nearfar, ["formats"])
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.output.splitlines()]
    assert ["precision", *FORMATS] in lines
    rows = {line[0]: line[1:] for line in lines if line and line[0] in OFFERED}
    assert list(rows) == list(OFFERED)
    assert rows["fp32"] == ["yes"] * 4
    assert rows["int8"] == ["images"] * 4
    assert rows["pal4"] == ["no", "no", "better", "no"]
