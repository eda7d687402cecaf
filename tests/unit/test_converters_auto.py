"""``--auto`` predicts before it converts, keeps the fewest layers and never boasts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from converters.auto import Prediction, Restored, finer_precisions, restore
from converters.verify.outcome import VariantReport

ORDER = [f"layer{number}" for number in range(32)]
CURVE = ((0, 20.0), (1, 21.0), (2, 22.0), (4, 24.0), (8, 26.0), (16, 29.0))


def report(sqnr_db: float, *, wanted_db: float = 25.0, size: int = 1000) -> VariantReport:
    return VariantReport(
        id="tflite-int8", format="tflite", precision="int8", passed=sqnr_db >= wanted_db,
        reasons=(), findings=(), images=8, sqnr_db=sqnr_db, wanted_db=wanted_db, size_bytes=size,
    )  # fmt: skip


@dataclass
class Converter:
    """Files that follow the curve, ``offset`` dB off."""

    offset: float = 0.0
    tried: list[int] = field(default_factory=list)

    def __call__(self, keep: tuple[str, ...]) -> VariantReport:
        assert keep == tuple(name for name in ORDER if name in keep), "in the order given"
        self.tried.append(len(keep))
        ratio = max(value for count, value in CURVE if count <= len(keep))
        return report(ratio + self.offset, size=1000 + 10 * len(keep))


def test_what_no_kept_layers_can_reach_is_not_tried() -> None:
    convert = Converter()
    done = restore(report(20.0, wanted_db=40.0), Prediction(order=ORDER, curve=CURVE), convert)
    assert convert.tried == []
    assert done == Restored(sqnr_db_before=20.0, size_before=1000)
    assert done.sentence("tflite-int8") == (
        "tflite-int8: no set of layers would help, by simulation; it does not ship"
    )


@pytest.mark.parametrize(
    ("measured", "wanted", "start"),
    [
        (20.0, 25.0, 8), (20.0, 24.0, 4), (18.0, 24.0, 8),  # the file is 2 dB below its simulation
        (20.0, 29.9, 2), (20.0, 30.1, None), (None, 25.0, 2),
    ],
)  # fmt: skip
def test_the_first_trial_is_where_the_simulation_passes(
    measured: float | None, wanted: float, start: int | None
) -> None:
    assert Prediction(order=ORDER, curve=CURVE).start(measured, wanted) == start


def test_without_a_simulation_the_search_starts_small() -> None:
    assert Prediction(order=ORDER).start(20.0, 25.0) == 2
    assert Prediction(order=ORDER[:3]).start(20.0, 25.0) == 1


def test_the_fewest_layers_that_pass_are_kept_and_their_price_is_told() -> None:
    convert = Converter()
    done = restore(report(20.0), Prediction(order=ORDER, curve=CURVE), convert)
    assert convert.tried[0] == 8
    assert len(convert.tried) <= 5
    assert done.kept == tuple(ORDER[:8])
    assert (done.sqnr_db_before, done.sqnr_db_after) == (20.0, 26.0)
    assert (done.size_before, done.size_after) == (1000, 1080)
    assert "8 layers stay in floating point" in done.sentence("x")
    assert "20.0 dB became 26.0 dB for +8% of size" in done.sentence("x")


def test_a_file_that_just_passes_here_may_not_pass_elsewhere() -> None:
    convert = Converter(offset=-0.8)  # 8 layers give 25.2 dB
    done = restore(report(19.2), Prediction(order=ORDER, curve=CURVE), convert)
    assert len(done.kept) > 8
    assert done.sqnr_db_after == 28.2


def test_what_helped_another_format_is_tried_first_and_is_enough() -> None:
    convert = Converter()
    guess = tuple(ORDER[:12])
    done = restore(report(20.0), Prediction(order=ORDER, curve=CURVE), convert, guess)
    assert convert.tried == [12]
    assert (done.kept, done.trials) == (guess, 1)


def test_after_a_guess_in_vain_more_layers_are_kept() -> None:
    convert = Converter(offset=-2.5)
    done = restore(report(17.5), Prediction(order=ORDER, curve=CURVE), convert, tuple(ORDER[:4]))
    assert convert.tried[0] == 4
    assert min(convert.tried[1:]) > 4
    assert len(convert.tried) <= 5
    assert done.kept == tuple(ORDER[:16])


def test_trials_in_vain_are_counted() -> None:
    done = restore(report(20.0), Prediction(order=ORDER, curve=CURVE), Converter(offset=-9.0))
    assert done.kept == ()
    assert 1 <= done.trials <= 5
    assert f"no set of layers helped in {done.trials} trials" in done.sentence("x")


def test_stand_ins_come_from_the_next_precision_on() -> None:
    assert finer_precisions("tflite", "int8") == ["int8-dyn", "int8w", "a16w8", "fp16", "fp32"]
    assert finer_precisions("coreml", "pal4") == ["int4w", "int8", "int8w", "fp16", "fp32"]
    assert finer_precisions("executorch", "int8") == ["fp32"]
    assert finer_precisions("tflite", "fp32") == []
    assert finer_precisions("coreml", "fp16+sparse") == []
