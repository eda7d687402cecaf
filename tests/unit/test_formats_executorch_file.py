"""A ``.pte`` is read without ExecuTorch, and a damaged one is refused in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.formats.executorch_census import census
from converters.formats.executorch_file import read_metadata, read_pte
from edge_runtime.contract.errors import ModelLoadError

Field = Callable[[flatbuffers.Builder], tuple[str, Any]]


def number(value: int, kind: str = "Int32") -> Field:
    return lambda _: (kind, value)


def text(value: str) -> Field:
    return lambda builder: ("UOffsetTRelative", builder.CreateString(value))


def table(fields: dict[int, Field]) -> Field:
    """A table; the keys are field numbers, a union takes two."""

    def build(builder: flatbuffers.Builder) -> tuple[str, Any]:
        parts = {slot: field(builder) for slot, field in fields.items()}
        builder.StartObject(max(fields, default=-1) + 1)
        for slot, (kind, value) in parts.items():
            if kind == "UOffsetTRelative":
                builder.PrependUOffsetTRelativeSlot(slot, value, 0)
            else:
                getattr(builder, f"Prepend{kind}Slot")(slot, value, 0)
        return "UOffsetTRelative", builder.EndObject()

    return build


def tables(*items: Field) -> Field:
    def build(builder: flatbuffers.Builder) -> tuple[str, Any]:
        offsets = [item(builder)[1] for item in items]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return "UOffsetTRelative", builder.EndVector()

    return build


def numbers(*values: int) -> Field:
    def build(builder: flatbuffers.Builder) -> tuple[str, Any]:
        builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            builder.PrependInt32(value)
        return "UOffsetTRelative", builder.EndVector()

    return build


def call(operator: int) -> Field:
    kernel_call = table({0: number(operator)})
    return table({0: number(1, "Uint8"), 1: kernel_call})


def constant(scalar_type: int, *sizes: int) -> Field:
    tensor = table({0: number(scalar_type, "Int8"), 2: numbers(*sizes), 5: number(7, "Uint32")})
    return table({0: number(5, "Uint8"), 1: tensor})


def program(metadata: str | None) -> bytes:
    """Three calls of two kernels, two constants; perhaps metadata."""
    operators = tables(
        table({0: text("aten::topk"), 1: text("values")}), table({0: text("aten::exp")})
    )
    chain = table({2: tables(call(0), call(1), call(0))})
    values = tables(constant(6, 3, 5), constant(1, 40))
    plans = [table({0: text("forward"), 2: values, 5: tables(chain), 6: operators})]
    if metadata is not None:
        string = table({0: number(6, "Uint8"), 1: table({0: text(metadata)})})
        plans.append(table({0: text("nearfar_metadata"), 2: tables(string), 4: numbers(0)}))
    builder = flatbuffers.Builder(1024)
    builder.Finish(table({1: tables(*plans)})(builder)[1], file_identifier=b"ET12")
    return bytes(builder.Output())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pte"


@pytest.mark.parametrize("json", ['{"task":"classification"}', '{"labels":["Ärger","犬"]}', ""])
def test_metadata_come_back_as_they_were_stored(path: Path, json: str) -> None:
    path.write_bytes(program(json))
    assert read_metadata(path) == json


def test_file_of_someone_else_has_no_metadata(path: Path) -> None:
    path.write_bytes(program(None))
    assert read_metadata(path) == ""


def test_kernels_and_constants_are_counted(path: Path) -> None:
    path.write_bytes(program("{}"))
    file = read_pte(path)
    assert file.kernels == {"aten::topk.values": 2, "aten::exp": 1}
    assert file.constants == {"float32": 60, "int8": 40}
    assert file.delegated_share == 0.0
    counted = census(path)
    assert counted.ops == {"aten::exp": 1, "aten::topk.values": 2}
    assert counted.quantized_share == pytest.approx(40 / 55)


@pytest.mark.parametrize(
    "data",
    [b"", b"ET12", b"PK\3\4" + bytes(100), program("{}").replace(b"ET12", b"ET99")],
    ids=["empty", "short", "zip", "version"],
)
@pytest.mark.parametrize("read", [read_metadata, read_pte])
def test_what_is_no_pte_is_refused_with_what_to_do(
    path: Path, data: bytes, read: Callable[[Path], object]
) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"no readable .pte .*convert it again"):
        read(path)


def test_missing_file_and_missing_method_are_told_apart(path: Path) -> None:
    with pytest.raises(ModelLoadError, match="No such file"):
        read_pte(path)
    path.write_bytes(program("{}"))
    with pytest.raises(ModelLoadError, match="no method 'backward'"):
        read_pte(path, "backward")


_WHOLE = program('{"task":"segmentation"}')


@given(
    st.integers(0, len(_WHOLE) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(_WHOLE))
)
def test_damage_is_read_or_refused_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, damage: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.pte"
    broken = (_WHOLE[:at] + damage + _WHOLE[at + len(damage) :])[: max(length, at)]
    path.write_bytes(broken)
    for read in (read_metadata, read_pte):
        with contextlib.suppress(ModelLoadError):
            read(path)
