"""What ``nearfar run`` prints of a result: for people, as JSON, and why it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from edge_runtime.contract.tasks import Box
from edge_runtime.contract.wire import ModelRef
from edge_runtime.policies.reasons import sentence
from edge_runtime.results import Result

__all__ = ["explain", "to_json", "to_text"]

_ARRAYS = ("class_map", "image")
_ONLY_OF = {"predictions": "classification", "boxes": "detection"}
_SHOWN_CLASSES = 5


def to_text(name: str, result: Result, labels: tuple[str, ...], saved: Mapping[str, str]) -> str:
    """One line for an answer, and one more for each box or saved file."""
    late = "" if result.deadline_met else "  LATE"
    where = (
        f"[{result.inference_source.value} {_model_name(result)}, "
        f"{result.timings.total_ms:.0f} ms]{late}"
    )
    asked = f"seed {name}" if result.task == "generation" else name
    lines = [f"{asked}: {_summary(result, labels)}  {where}"]
    if result.boxes:
        lines += _table(result.boxes)
    lines += [f"    saved {path}" for path in saved.values()]
    return "\n".join(lines)


def to_json(name: str, result: Result, labels: tuple[str, ...], saved: Mapping[str, str]) -> str:
    """One object: everything but pixels, which are files named under ``saved``."""
    document: dict[str, Any] = {}
    for field in result.__struct_fields__:
        value = getattr(result, field)
        if field not in _ARRAYS and _ONLY_OF.get(field, result.task) == result.task:
            document[field] = msgspec.to_builtins(value)
    if result.class_map is not None:
        document["classes"] = [
            {"index": index, "label": labels[index], "share": share}
            for index, share in _shares(result)
        ]
    for array in (result.class_map, result.image):
        if array is not None:
            document["height"], document["width"] = array.shape[:2]
    if saved:
        document["saved"] = dict(saved)
    key = "seed" if result.task == "generation" else "image"
    return json.dumps({key: int(name) if key == "seed" else name, **document})


def _model_name(result: Result) -> str:
    model = result.model
    return f"{model.name}@{model.version}" if isinstance(model, ModelRef) else model


def _summary(result: Result, labels: tuple[str, ...]) -> str:
    if result.predictions:
        return ", ".join(f"{one.label} {one.score:.3f}" for one in result.predictions)
    if result.class_map is not None:
        shares = _shares(result)
        shown = [f"{labels[index]} {share:.0%}" for index, share in shares[:_SHOWN_CLASSES]]
        more = len(shares) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")
    if result.image is not None:
        height, width = result.image.shape[:2]
        return f"{width} x {height} pixels"
    count = len(result.boxes)
    return f"{count or 'no'} object{'' if count == 1 else 's'}"


def _shares(result: Result) -> list[tuple[int, float]]:
    """Classes of the map and the share of its pixels, largest first."""
    assert result.class_map is not None  # noqa: S101  # callers looked
    counts = np.bincount(result.class_map.reshape(-1))
    order = np.argsort(-counts, kind="stable")
    return [(int(i), float(counts[i]) / result.class_map.size) for i in order if counts[i]]


def _table(boxes: tuple[Box, ...]) -> list[str]:
    wide = max(len("label"), *(len(box.label) for box in boxes))
    lines = [f"    {'label':<{wide}}  score  {'x_min':>7} {'y_min':>7} {'x_max':>7} {'y_max':>7}"]
    for box in boxes:
        corners = " ".join(f"{edge:7.1f}" for edge in (box.x_min, box.y_min, box.x_max, box.y_max))
        lines.append(f"    {box.label:<{wide}}  {box.score:.3f}  {corners}")
    return lines


def explain(result: Result) -> str:
    """The decision in a few indented lines."""
    decision, situation, timings = result.decision, result.situation, result.timings
    if not situation.scored:
        confidence = "not given by this task"
    elif situation.confidence is None:
        confidence = "not yet known"
    else:
        confidence = f"{situation.confidence:.3f}"
    inputs = (
        f"local confidence {confidence}, {situation.time_left_ms:.0f} ms left, "
        f"{situation.upload_bytes} bytes to upload"
    )
    lines = [
        f"    {decision.action.value} ({decision.reason}): {sentence(decision.reason)}",
        f"    given: {inputs}",
    ]
    if decision.predicted_cloud_ms is not None:
        lines.append(
            f"    cloud: {decision.predicted_cloud_ms:.0f} ms predicted "
            f"(upload {decision.predicted_upload_ms or 0:.0f} ms), in time with probability "
            f"{decision.p_cloud_in_deadline:.2f}; gain {decision.expected_gain:.4f} "
            f"against a price of {decision.price:.4f}"
        )
    measured = [
        f"{name} {value:.0f} ms"
        for name, value in (
            ("local", timings.local_ms),
            ("cloud", timings.cloud_ms),
            ("upload", timings.upload_ms),
            ("broker's queue", timings.server_queue_ms),
            ("broker's model", timings.server_inference_ms),
        )
        if value is not None
    ]
    failed = "" if result.error is None else f"; the other side failed: {result.error}"
    lines.append(f"    measured: {', '.join(measured)}{failed}")
    return "\n".join(lines)
