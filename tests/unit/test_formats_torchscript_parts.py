"""Clamps in any form become capped ReLUs; a .ptl is read without running anything in it."""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.formats.census import ptl_census
from converters.formats.engine_check import compare_with_reference, ratio_db
from converters.formats.float_region import arithmetic_region
from converters.formats.metadata import read_metadata
from edge_runtime.contract.errors import ConversionError, ModelLoadError

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Net(torch.nn.Module):
    def __init__(self, clamp: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.clamp = clamp

    def forward(self, x: Any) -> Any:
        return self.clamp(self.conv(x) * 9)


CAPPED = {
    "ReLU6": torch.nn.ReLU6(),
    "Hardtanh": torch.nn.Hardtanh(0.0, 6.0),
    "F.relu6": lambda x: F.relu6(x),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "torch.clamp": lambda x: torch.clamp(x, 0, 6),
    "keywords": lambda x: torch.clamp(x, min=0, max=6),
    "method": lambda x: x.clamp(0, 6),
    "another cap": lambda x: torch.clip(x, 0, 255),
}
UNCAPPED = {
    "both signs": torch.nn.Hardtanh(),
    "upper only": lambda x: torch.clamp(x, max=6),
    "lower only": lambda x: x.clamp(min=0),
    "plain relu": torch.nn.ReLU(),
}


def _cap(clamp: Callable[[Any], Any]) -> tuple[Any, int, Any, Any]:
    from converters.rewrites.relu6 import cap_relus

    torch.manual_seed(0)
    net, x = Net(clamp).eval(), torch.randn(2, 3, 5, 5)
    traced = torch.fx.symbolic_trace(net)
    return traced, cap_relus(traced, x), x, net(x).detach()


@pytest.mark.parametrize("form", CAPPED)
def test_clamp_from_zero_becomes_a_relu_with_the_same_answer(form: str) -> None:
    from converters.rewrites.relu6 import apply_caps

    traced, count, x, expected = _cap(CAPPED[form])
    assert count == 1
    assert sum(type(m) is torch.nn.ReLU for m in traced.modules()) == 1
    with torch.no_grad(), apply_caps(traced):
        assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("form", UNCAPPED)
def test_other_clamps_are_left_alone(form: str) -> None:
    traced, count, x, expected = _cap(UNCAPPED[form])
    assert count == 0
    assert torch.equal(traced(x), expected)


def test_without_its_cap_the_relu_alone_answers_otherwise() -> None:
    """The equality above is the cap's doing."""
    traced, _, x, expected = _cap(CAPPED["ReLU6"])
    assert float((traced(x).detach() - expected).abs().max()) > 1.0


def test_uncapped_is_a_real_clamp_hidden_from_the_quantizer() -> None:
    from converters.rewrites.in_float import InFloat
    from converters.rewrites.relu6 import uncap

    traced, _, x, expected = _cap(CAPPED["F.relu6"])
    uncap(traced, "capped_relu6")
    assert torch.equal(traced(x), expected)
    assert any(isinstance(m, InFloat) for m in traced.modules())


def test_engine_far_from_its_own_arithmetic_is_refused() -> None:
    exact = np.linspace(-1, 1, 100)
    with pytest.raises(ConversionError, match="its own arithmetic"):
        compare_with_reference(
            "x", engine=lambda _: [exact[::-1]], reference=lambda _: [exact + 0.01],
            exact=lambda _: [exact], count=3,
        )  # fmt: skip


def test_coarse_quantization_alone_is_no_fault_of_the_engine() -> None:
    exact = np.sin(np.arange(400.0))
    noise = np.cos(np.arange(400.0) ** 2) * 0.3
    worst = compare_with_reference(
        "x", engine=lambda _: [exact + noise[::-1]], reference=lambda _: [exact + noise],
        exact=lambda _: [exact], count=2,
    )  # fmt: skip
    assert worst < 25


def test_nan_from_the_engine_is_refused() -> None:
    exact = np.ones(4)
    assert ratio_db([exact], [exact * math.nan]) == -math.inf
    with pytest.raises(ConversionError):
        compare_with_reference(
            "x", engine=lambda _: [exact * math.nan], reference=lambda _: [exact],
            exact=lambda _: [exact], count=1,
        )  # fmt: skip


def test_region_ends_at_layers_and_walks_each_way_on_its_own() -> None:
    chain = {
        "conv": [],
        "mean": ["conv"],
        "root": ["mean"],
        "mul": ["root", "conv"],
        "relu": ["mul"],
    }
    after = {n: [m for m, inputs in chain.items() if n in inputs] for n in chain}
    assert arithmetic_region(["root"], chain, after, {"mean", "root", "mul"}) == {
        "mean", "root", "mul",
    }  # fmt: skip


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"model/{name.replace('__', '/').replace('_pkl', '.pkl')}", data)
    return path


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_census_runs_nothing_that_a_pickle_names(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    bytecode = pickle.dumps((4, Hostile(f"touch {canary}")), protocol=2)
    counted = ptl_census(_archive(tmp_path / "m.ptl", bytecode_pkl=bytecode))
    assert not canary.exists()
    assert counted.ops == {}


def test_census_counts_calls_not_names(tmp_path: Path) -> None:
    method = (
        (
            "instructions",
            (("OP", 0, 0), ("STORE", 1, 0), ("OP", 0, 0), ("OPN", 1, 2), ("RET", 0, 0)),
        ),
        ("operators", (("quantized::conv2d", "new", 4), ("aten::cat", "", 2))),
    )
    path = _archive(tmp_path / "m.ptl", bytecode_pkl=pickle.dumps((4, ("f", method)), protocol=2))
    counted = ptl_census(path)
    assert counted.ops == {"aten::cat": 1, "quantized::conv2d": 2}
    assert counted.quantized_ops == 2


@pytest.mark.parametrize("data", [b"", b"PK\3\4 broken", b"x" * 500])
def test_damaged_ptl_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.ptl"
    path.write_bytes(data)
    for read in (read_metadata, ptl_census):
        with pytest.raises(ModelLoadError, match=r"m\.ptl"):
            read(path)


def test_ptl_record_is_read_without_torch(tmp_path: Path) -> None:
    path = _archive(tmp_path / "m.ptl", **{"extra__nearfar.json": b'{"a": 1}'})
    assert read_metadata(path) == '{"a": 1}'


def _field(number: int, content: bytes) -> bytes:
    tag, out = number * 8 + 2, b""
    for value in (tag, len(content)):
        while value > 127:
            out, value = out + struct.pack("B", value & 127 | 128), value >> 7
        out += struct.pack("B", value)
    return out + content


def test_mlpackage_record_is_read_and_a_cut_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m.mlpackage" / "Data" / "com.apple.CoreML"
    folder.mkdir(parents=True)
    entry = _field(1, b"nearfar.json") + _field(2, b'{"x": "' + b"y" * 300 + b'"}')
    other = _field(1, b"author") + _field(2, b"someone")
    user = _field(100, other) + _field(100, entry)
    model = b"\x08\x08" + _field(2, _field(100, user))
    (folder / "model.mlmodel").write_bytes(model)
    package = tmp_path / "m.mlpackage"
    assert read_metadata(package) == '{"x": "' + "y" * 300 + '"}'
    (folder / "model.mlmodel").write_bytes(model[:-7])
    with pytest.raises(ModelLoadError, match="cut off"):
        read_metadata(package)
