"""A .tflite keeps its record, its output order and its constants; a damaged one says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.formats.census import tflite_census
from converters.formats.metadata import read_metadata
from converters.formats.tflite_file import finish, read_model, write_model
from converters.formats.tflite_quantize import final_activations, kept_operators, statistics
from edge_runtime.contract.errors import ConversionError, ModelLoadError

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

CODES = schema.BuiltinOperator
FLOAT, INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT8


class Graph:
    """A flatbuffer built by hand: tensors by name, operators in order."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers = [self._buffer(None)]
        self.model.operatorCodes, self.model.metadata = [], []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.graph.inputs, self.graph.outputs = [], []
        self.model.subgraphs = [self.graph]

    @staticmethod
    def _buffer(data: np.ndarray | None) -> object:
        buffer = schema.BufferT()
        buffer.data = None if data is None else data.view(np.uint8).reshape(-1)
        buffer.offset = buffer.size = 0
        return buffer

    def tensor(
        self, name: str, shape: tuple[int, ...], data: np.ndarray | None = None, kind: int = FLOAT
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), list(shape), kind
        tensor.buffer = 0
        if data is not None:
            self.model.buffers.append(self._buffer(data))
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, code: int, inputs: list[int], outputs: list[int]) -> None:
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
        self.model.operatorCodes.append(entry)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = inputs, outputs
        self.graph.operators.append(operator)

    def done(self, inputs: list[int], outputs: list[int], names: list[str]) -> bytes:
        self.graph.inputs, self.graph.outputs = inputs, outputs
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
        signature.inputs = [self._entry("args_0", inputs[0])]
        signature.outputs = [self._entry(n, i) for n, i in zip(names, outputs, strict=True)]
        self.model.signatureDefs = [signature]
        return write_model(self.model)

    @staticmethod
    def _entry(name: str, index: int) -> object:
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name.encode(), index
        return entry


def two_outputs() -> bytes:
    graph = Graph()
    image = graph.tensor("in", (1, 4))
    add = graph.tensor("c", (4,), np.arange(4, dtype=np.float32))
    first, second = graph.tensor("net/a;", (1, 4)), graph.tensor("net/b;", (1, 4))
    graph.operator(CODES.RELU, [image], [first])
    graph.operator(CODES.MAXIMUM, [image, add], [second])
    return graph.done([image], [second, first], ["output_1", "output_0"])


def with_channels(channels: int, scale: float) -> object:
    quantization = schema.QuantizationParametersT()
    quantization.scale = np.full(channels, scale, np.float32)
    quantization.zeroPoint = np.zeros(channels, np.int64)
    return quantization


def test_equal_vectors_are_written_once_and_read_back_by_all() -> None:
    graph = Graph()
    image = graph.tensor("in", (1, 1000))
    places = [graph.tensor(f"w{number}", (1, 1000)) for number in range(4)]
    for number, place in enumerate(places):
        graph.graph.tensors[place].quantization = with_channels(1000, 0.5 + number)
    for place in places:
        graph.operator(CODES.RELU, [image], [place])
    data = graph.done([image], [places[-1]], ["output_0"])
    # Four vectors of scales, one of zero points: eight bytes a channel.
    assert 4 * 4000 + 8000 < len(data) < 4 * 4000 + 8000 + 4000
    for number, place in enumerate(places):
        found = read_model(data).subgraphs[0].tensors[place].quantization
        assert np.array_equal(found.scale, np.full(1000, 0.5 + number, np.float32))
        assert np.array_equal(found.zeroPoint, np.zeros(1000, np.int64))


def test_outputs_come_in_recorded_order_with_recorded_names() -> None:
    model = read_model(finish(two_outputs(), "image", ["latent", "score"], "{}"))
    (signature,) = model.signatureDefs
    assert [entry.name for entry in signature.outputs] == [b"latent", b"score"]
    assert list(model.subgraphs[0].outputs) == [2, 3]
    assert signature.inputs[0].name == b"image"


def test_unexpected_outputs_are_refused() -> None:
    with pytest.raises(ConversionError, match="output_0"):
        finish(two_outputs(), "image", ["only"], "{}")


def test_record_is_read_back_and_replaced_not_doubled(tmp_path: Path) -> None:
    once = finish(two_outputs(), "image", ["a", "b"], '{"n": 1}')
    twice = finish(once, "image", ["a", "b"], '{"n": 2, "ö": "ü"}')
    path = tmp_path / "m.tflite"
    path.write_bytes(twice)
    assert read_metadata(path) == '{"n": 2, "ö": "ü"}'
    assert len(read_model(twice).metadata) == 1


def test_same_input_gives_same_bytes() -> None:
    data = two_outputs()
    assert finish(data, "i", ["a", "b"], "{}") == finish(data, "i", ["a", "b"], "{}")


def test_constants_are_aligned_to_16_bytes() -> None:
    data = finish(two_outputs(), "image", ["a", "b"], '{"odd": 12345}')
    assert data.index(np.arange(4, dtype=np.float32).tobytes()) % 16 == 0


def test_constants_behind_the_flatbuffer_are_taken_in() -> None:
    """A plain repack would lose what ``Buffer.offset`` points to."""
    data = two_outputs()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    outside = np.arange(4, dtype=np.float32).tobytes()
    model.buffers[1].data, model.buffers[1].offset, model.buffers[1].size = None, 2, 2
    import flatbuffers

    builder = flatbuffers.Builder(64)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    length = len(builder.Output())
    model.buffers[1].offset, model.buffers[1].size = length, len(outside)
    builder = flatbuffers.Builder(64)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    packed = bytes(builder.Output())
    assert len(packed) == length
    taken = read_model(packed + outside)
    assert bytes(taken.buffers[1].data) == outside
    assert taken.buffers[1].offset == taken.buffers[1].size == 0


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x08\0\0\0TFL3" + b"\xff" * 40])
def test_damaged_file_is_named_not_a_traceback(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    for read in (read_metadata, tflite_census):
        with pytest.raises(ModelLoadError, match=r"m\.tflite"):
            read(path)


def _convolutions() -> Graph:
    graph = Graph()
    image = graph.tensor("in", (1, 4, 4, 3))
    one = graph.tensor("net/a.conv;1", (8, 1, 1, 3), np.ones(24, np.float32))
    two = graph.tensor("net/a.convs;", (8, 1, 1, 8), np.ones(64, np.int8), INT8)
    mid, out = graph.tensor("net/a.conv;", (1, 4, 4, 8)), graph.tensor("final", (1, 4, 4, 8))
    graph.operator(CODES.CONV_2D, [image, one, -1], [mid])
    graph.operator(CODES.CONV_2D, [mid, two, -1], [out])
    return graph


def test_keep_meets_the_module_and_not_one_whose_name_begins_alike() -> None:
    data = _convolutions().done([0], [4], ["output_0"])
    assert kept_operators(data, ("a.conv",), post_processed=False) == (
        ["net/a.conv;;"],
        ("a.conv",),
    )
    assert kept_operators(data, ("a.convs",), post_processed=False) == (["final;"], ("a.convs",))
    scopes, kept = kept_operators(data, ("a",), post_processed=False)
    assert (len(scopes), kept) == (2, ("a",))
    assert kept_operators(data, ("b",), post_processed=False) == ([], ())


def test_what_lies_around_the_net_stays_in_float() -> None:
    graph = Graph()
    image, middle = graph.tensor("in", (1, 4)), graph.tensor("around/;", (1, 4))
    inside, out = graph.tensor("net/a;", (1, 4)), graph.tensor("StatefulPartitionedCall", (1, 4))
    graph.operator(CODES.ABS, [image], [middle])
    graph.operator(CODES.RELU, [middle], [inside])
    graph.operator(CODES.NEG, [inside], [out])
    data = graph.done([image], [out], ["output_0"])
    assert kept_operators(data, (), post_processed=False)[0] == ["around/;;"]
    assert kept_operators(data, (), post_processed=True)[0] == [
        "around/;;", "StatefulPartitionedCall;",
    ]  # fmt: skip


def test_statistics_reach_from_the_layer_before_to_the_activation_after() -> None:
    graph = Graph()
    image = graph.tensor("in", (1, 2, 2, 3))
    weight = graph.tensor("w", (3, 1, 1, 3), np.ones(9, np.float32))
    names = ("conv", "mean", "centered", "root", "normed", "relu")
    conv, mean, centered, root, normed, relu = (graph.tensor(n, (1, 2, 2, 3)) for n in names)
    graph.operator(CODES.CONV_2D, [image, weight, -1], [conv])
    graph.operator(CODES.MEAN, [conv], [mean])
    graph.operator(CODES.SUB, [conv, mean], [centered])
    graph.operator(CODES.RSQRT, [mean], [root])
    graph.operator(CODES.MUL, [centered, root], [normed])
    graph.operator(CODES.RELU, [normed], [relu])
    data = graph.done([image], [relu], ["output_0"])
    assert set(statistics(data)) == {"mean;", "root;", "normed;"}


def test_division_by_a_constant_is_no_statistic() -> None:
    graph = Graph()
    image = graph.tensor("in", (1, 4))
    six = graph.tensor("six", (1,), np.array([6], np.float32))
    out = graph.tensor("out", (1, 4))
    graph.operator(CODES.DIV, [image, six], [out])
    assert statistics(graph.done([image], [out], ["output_0"])) == []


@pytest.mark.parametrize(("shape", "found"), [((1, 9), ["out;"]), ((1, 4, 4, 3), [])])
def test_final_softmax_stays_in_float_but_an_image_does_not(
    shape: tuple[int, ...], found: list[str]
) -> None:
    graph = Graph()
    image, out = graph.tensor("in", shape), graph.tensor("out", shape)
    graph.operator(CODES.LOGISTIC, [image], [out])
    assert final_activations(graph.done([image], [out], ["output_0"])) == found


def test_census_counts_bytes_by_type_and_shares_by_number(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(_convolutions().done([0], [4], ["output_0"]))
    counted = tflite_census(path)
    assert counted.weight_bytes == {"float32": 96, "int8": 64}
    assert counted.ops == {"CONV_2D": 2}
    assert counted.quantized_share == pytest.approx(64 / 88)
