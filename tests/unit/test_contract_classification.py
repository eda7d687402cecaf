"""Ranking: exact order, ties by index, honest scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.contract.errors import TensorError
from edge_runtime.contract.tasks.classification import (
    ClassificationTask,
    postprocess,
    probabilities,
)

LABELS = ("a", "b", "c", "d")
TASK = ClassificationTask(classes=4, top_k=4)


def test_ties_keep_the_order_of_their_index() -> None:
    answer = postprocess(TASK, np.array([1.0, 2.0, 2.0, 1.0], np.float32), LABELS)
    assert [p.index for p in answer] == [1, 2, 0, 3]
    assert answer[0].score == answer[1].score


def test_ranking_survives_scores_that_round_to_one() -> None:
    answer = postprocess(TASK, np.array([900.0, 950.0, 940.0, 0.0], np.float32), LABELS)
    assert [p.index for p in answer] == [1, 2, 0, 3]


@pytest.mark.parametrize("bad", [[np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [0.0, 1.0, 2.0]])
def test_output_that_is_no_answer_is_refused(bad: list[float]) -> None:
    with pytest.raises(TensorError):
        postprocess(TASK, np.array(bad, np.float32), LABELS)


@given(hnp.arrays(np.float32, 4, elements=st.floats(-1e4, 1e4, width=32)))
def test_softmax_is_a_distribution_and_keeps_the_order(logits: np.ndarray) -> None:
    scores = probabilities(TASK, logits)
    assert scores.dtype == np.float64
    assert scores.sum() == pytest.approx(1.0)
    assert (np.diff(scores[np.argsort(logits, kind="stable")]) >= 0).all()


@given(hnp.arrays(np.float32, 4, elements=st.floats(-50, 50, width=32)))
def test_temperature_flattens_without_reordering(logits: np.ndarray) -> None:
    hot = ClassificationTask(classes=4, temperature=4.0, top_k=4)
    assert probabilities(hot, logits).max() <= probabilities(TASK, logits).max() + 1e-12
    order = [p.index for p in postprocess(TASK, logits, LABELS)]
    assert [p.index for p in postprocess(hot, logits, LABELS)] == order


def test_top_k_is_the_tasks_unless_asked_and_capped() -> None:
    task = ClassificationTask(classes=4, top_k=2)
    logits = np.arange(4, dtype=np.float32)
    assert len(postprocess(task, logits, LABELS)) == 2
    assert len(postprocess(task, logits, LABELS, top_k=3)) == 3
    assert len(postprocess(task, logits, LABELS, top_k=99)) == 4
