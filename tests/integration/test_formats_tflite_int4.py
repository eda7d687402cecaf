"""4-bit weights of a ``.tflite``: which they are, and how close they keep the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.formats.tflite import TFLiteBackend
from converters.jobs import Artifact, ConvertJob, SourceRequest
from converters.sources import load_source
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec

pytestmark = pytest.mark.slow

NET = '''
import torch
from torch import nn

def net():
    """Wide layers whose weights have outliers, a narrow first one, a depthwise one."""
    torch.manual_seed(0)
    built = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
    for layer in (built[4], built[6], built[10]):
        with torch.no_grad():
            layer.weight.mul_(torch.randn_like(layer.weight).abs() ** 2 + 0.1)
    return built.eval()
'''
SHAPE = (1, 3, 32, 32)


def _inputs(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (count, *SHAPE[1:])).astype(np.float32)


def _request(source: Path) -> SourceRequest:
    return SourceRequest(
        source=f"{source}:net", weights="random:0", preprocess="unit",
        input_height=SHAPE[2], input_width=SHAPE[3],
    )  # fmt: skip


def _convert(folder: Path, calibrated: bool) -> tuple[Path, Artifact]:
    folder.mkdir()
    source = folder / "wide_net.py"
    source.write_text(NET)
    calibration = folder / "calibration.npy"
    np.save(calibration, _inputs(16, 1))
    job = ConvertJob(
        source=_request(source),
        format="tflite",
        precision="int4w",
        out_dir=str(folder),
        inputs=(TensorSpec(name="image", dtype="float32", shape=SHAPE, layout="NCHW"),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 10), layout="NC"),),
        task=ClassificationTask(classes=10),
        preprocess=named("unit", SHAPE[2], SHAPE[3]),
        calibration=str(calibration) if calibrated else None,
        metadata='{"format":"nearfar.model","name":"wide","variant":"v","version":"1.0.0"}',
    )
    artifact = TFLiteBackend().convert(job)
    return folder / artifact.path, artifact


def _decibels(path: Path) -> float:
    import torch
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]
    given, answers = _inputs(8, 2), []
    for one in given:
        interpreter.set_tensor(source, one.transpose(1, 2, 0)[None].copy())
        interpreter.invoke()
        answers.append(interpreter.get_tensor(target)[0])
    with torch.no_grad():
        module = load_source(_request(path.parent / "wide_net.py")).module
        expected = module(torch.from_numpy(given)).numpy()
    wrong = np.stack(answers) - expected
    return float(10 * np.log10((expected**2).sum() / (wrong**2).sum()))


def _types(path: Path) -> list[tuple[str, str]]:
    """Operator and number type of each weight, in order."""
    from ai_edge_litert import schema_py_generated as schema

    from converters.formats.tflite_file import operator_names, read_model

    model = read_model(path.read_bytes())
    (graph,) = model.subgraphs
    names = {code: name for name, code in vars(schema.TensorType).items() if name[0] != "_"}
    found: list[tuple[str, str]] = []
    made: dict[int, Any] = {
        operator.outputs[0]: operator.inputs[0]
        for operator, kind in zip(graph.operators, operator_names(model, graph), strict=True)
        if kind == "DEQUANTIZE"
    }
    for operator, kind in zip(graph.operators, operator_names(model, graph), strict=True):
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            weight = made.get(operator.inputs[1], operator.inputs[1])
            found.append((kind, names[graph.tensors[weight].type]))
    return found


def test_chosen_weights_are_far_closer_than_rounded_ones(tmp_path: Path) -> None:
    rounded, plain = _convert(tmp_path / "rounded", calibrated=False)
    chosen, better = _convert(tmp_path / "chosen", calibrated=True)
    assert "compensate_weights" not in plain.rewrites
    assert "compensate_weights" in better.rewrites
    assert _decibels(chosen) > _decibels(rounded) + 4
    assert chosen.stat().st_size <= rounded.stat().st_size + 64


def test_what_is_narrow_or_depthwise_has_eight_bits(tmp_path: Path) -> None:
    path, _ = _convert(tmp_path / "chosen", calibrated=True)
    assert _types(path) == [
        ("CONV_2D", "INT8"),
        ("DEPTHWISE_CONV_2D", "INT8"),
        ("CONV_2D", "INT4"),
        ("CONV_2D", "INT4"),
        ("FULLY_CONNECTED", "INT4"),
    ]


def test_wider_layers_have_eight_bits_where_four_leave_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four, _ = _convert(tmp_path / "four", calibrated=True)
    monkeypatch.setattr("converters.formats.tflite_int4._ENOUGH_DB", 100.0)
    path, _ = _convert(tmp_path / "wider", calibrated=True)
    assert [kind for _, kind in _types(path)] == ["INT8", "INT8", "INT8", "INT4", "INT4"]
    assert path.stat().st_size > four.stat().st_size


def test_what_judges_was_not_fitted_to() -> None:
    import torch

    from converters.formats.tflite_int4 import _apart

    samples, others = torch.arange(10), torch.arange(10, 13)
    fitted, judges = _apart(samples, others)
    assert (fitted.tolist(), judges.tolist()) == (samples.tolist(), others.tolist())
    fitted, judges = _apart(samples, None)
    assert judges.tolist() == [3, 7]
    assert sorted([*fitted.tolist(), *judges.tolist()]) == samples.tolist()
    three = samples[:3]
    assert [one.tolist() for one in _apart(three, None)] == [[0, 1, 2], [0, 1, 2]]


def test_a_scale_that_cuts_off_is_what_an_exporter_finds() -> None:
    """From the largest magnitude, as exporters do; all other weights are whole steps of it."""
    import torch

    from converters.rewrites.rounding import SharedGrid

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((6, 20, 9), generator=generator, dtype=torch.float64)
    cuts = torch.full((6,), 0.6, dtype=torch.float64)
    grid = SharedGrid(weight, 7, cuts)
    rows = weight.flatten(1)
    columns = torch.arange(rows.shape[1])
    on_grid = torch.stack(
        [grid.nearest(column[None], rows[:, column][None])[0] for column in columns], dim=1
    )
    largest = on_grid.abs().amax(1)
    assert torch.allclose(largest, 0.6 * rows.abs().amax(1))
    steps = on_grid / (largest / 7)[:, None]
    assert torch.allclose(steps, steps.round(), atol=1e-9)
