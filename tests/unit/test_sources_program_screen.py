"""A ``.pt2`` that could run code is refused before torch sees it; a sound one is not."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ModelLoadError, SourceError
from edge_runtime.contract.manifest import REFERENCE_RECORD_NAME
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.program_text import is_expression, is_guard, is_operator, is_tree

CODE = "__import__('os').abort()"
MODEL = "model/models/model.json"
SAMPLES = "model/data/sample_inputs/model.pt"
WEIGHTS = "model/data/weights/model_weights_config.json"
SAMPLE_PICKLE = (  # ((a tensor,), {}), as torch.save writes it
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01"
    b"ctorch\nFloatStorage\nq\x02X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04K\x03tq\x05Q"
    b"K\x00K\x01K\x03\x86q\x06K\x03K\x01\x86q\x07\x89ccollections\nOrderedDict\nq\x08)Rq\ttq\n"
    b"Rq\x0b\x85q\x0c}q\r\x86q\x0e."
)
Members = dict[str, bytes]


def value(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def members() -> Members:
    """What ``torch.export.save`` writes for ``relu(first.weight * images)``, byte by byte."""
    size = {"as_expr": {"expr_str": "Symbol('s34', positive=True, integer=True)", "hint": None}}
    meta = {"dtype": 7, "sizes": [size, {"as_int": 3}], "requires_grad": True,
            "device": {"type": "cpu", "index": None}, "strides": [{"as_int": 3}, {"as_int": 1}],
            "storage_offset": {"as_int": 0}, "layout": 7}  # fmt: skip
    leaf = {"type": None, "context": None, "children_spec": []}
    arguments = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]}
    keywords = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    node = {
        "target": "torch.ops.aten.mul.Tensor",
        "inputs": [{"name": "self", "arg": value("p_first_weight"), "kind": 1},
                   {"name": "other", "arg": value("images"), "kind": 1}],
        "outputs": [value("mul")],
        "metadata": {"stack_trace": "File \"net.py\", line 1, in forward\n    x * self.w"},
        "is_hop_single_tensor_return": None,
        "name": "mul",
    }  # fmt: skip
    program = {
        "graph_module": {
            "graph": {
                "inputs": [value("p_first_weight"), value("images")],
                "outputs": [value("mul")],
                "nodes": [node],
                "tensor_values": {"p_first_weight": meta, "images": meta, "mul": meta},
                "sym_int_values": {}, "custom_obj_values": {}, "is_single_tensor_return": False,
            },
            "signature": {
                "input_specs": [
                    {"parameter": {"arg": {"name": "p_first_weight"},
                                   "parameter_name": "first.weight"}},
                    {"user_input": {"arg": value("images")}},
                ],
                "output_specs": [{"user_output": {"arg": value("mul")}}],
            },
            "module_call_graph": [{"fqn": "", "signature": {
                "inputs": [], "outputs": [], "forward_arg_names": ["images"],
                "in_spec": json.dumps([1, {**arguments, "children_spec": [arguments, keywords]}]),
                "out_spec": json.dumps([1, leaf]),
            }}],
            "metadata": {}, "treespec_namedtuple_fields": {},
        },
        "opset_version": {"aten": 10}, "schema_version": {"major": 8, "minor": 20},
        "range_constraints": {"s34": {"min_val": 1, "max_val": 256}},
        "verifiers": ["TRAINING"], "torch_version": "2.12.1+cu130", "guards_code": [],
    }  # fmt: skip
    weight = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": meta}
    samples = io.BytesIO()
    with zipfile.ZipFile(samples, "w") as archive:
        archive.writestr("archive/data.pkl", SAMPLE_PICKLE)
        archive.writestr("archive/data/0", bytes(12))
    return {
        "model/data/weights/weight_0": bytes(12),
        WEIGHTS: json.dumps({"config": {"first.weight": weight}}).encode(),
        "model/data/constants/model_constants_config.json": b'{"config": {}}',
        MODEL: json.dumps(program).encode(),
        SAMPLES: samples.getvalue(),
        f"model/extra/{REFERENCE_RECORD_NAME}": b"{}",
        "model/archive_format": b"pt2",
        "model/archive_version": b"0",
        "model/.data/serialization_id": b"1",
    }


def write(path: Path, contents: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def screen(path: Path) -> bytes | None:
    return screen_program(path, REFERENCE_RECORD_NAME, SourceError)


class Payload:
    """Unpickled, it would end this process."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.abort, ()


def in_program(change: Callable[[dict[str, Any]], object]) -> Callable[[Members], None]:
    def harm(contents: Members) -> None:
        document = json.loads(contents[MODEL])
        change(document)
        contents[MODEL] = json.dumps(document).encode()

    return harm


def renamed(old: str, new: str) -> Callable[[Members], None]:
    def harm(contents: Members) -> None:
        text = contents[MODEL].decode()
        assert json.dumps(old) in text
        contents[MODEL] = text.replace(json.dumps(old), json.dumps(new)).encode()

    return harm


def added(name: str, data: bytes = b"x") -> Callable[[Members], None]:
    return lambda contents: contents.update({name: data})


def tree(kind: str, context: object) -> Callable[[Members], None]:
    node = {"type": kind, "context": context, "children_spec": []}
    return in_program(
        lambda d: d["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec=json.dumps([1, node])
        )
    )


def pickled_samples(protocol: int) -> Callable[[Members], None]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(((Payload(),), {}), protocol))
    return added(SAMPLES, buffer.getvalue())


def pickled_weight(contents: Members) -> None:
    document = json.loads(contents[WEIGHTS])
    next(iter(document["config"].values()))["use_pickle"] = True
    contents[WEIGHTS] = json.dumps(document).encode()


def called(target: str) -> Callable[[Members], None]:
    return in_program(lambda d: d["graph_module"]["graph"]["nodes"][0].update(target=target))


def passed_along(contents: Members) -> None:
    """An operator that calls its argument, and an argument that is no operator."""
    argument = {"name": "", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    in_program(
        lambda d: d["graph_module"]["graph"]["nodes"][0].update(
            target="torch.ops.higher_order.wrap_with_set_grad_enabled", inputs=[argument]
        )
    )(contents)


FACTORY = {"default_factory_module": "antigravity", "default_factory_name": "webbrowser",
           "dict_context": []}  # fmt: skip
HOSTILE: list[tuple[str, Callable[[Members], object], str]] = [
    ("code as an input's name", renamed("images", f"images={CODE}"), "the name"),
    ("code in a tensor's path", renamed("first.weight", f'a"), {CODE}, ("'), "the text"),
    ("code as a guard", in_program(lambda d: d.update(guards_code=[CODE])), "its guard"),
    ("code as a size", in_program(lambda d: d.update(range_constraints={CODE: {}})),
     "shape expression"),
    ("a container that imports", tree("collections.defaultdict", FACTORY), "its out_spec"),
    ("an enum that imports", tree("builtins.dict", '[{"__enum__": 1, "fqn": "antigravity:x"}]'),
     "its out_spec"),
    ("a call of Python", called("torch.os.system"), "it calls 'torch.os.system'"),
    ("a call of the builtins", called("_operator.call"), "it calls"),
    ("an operator that reads files", called("torch.ops.aten.from_file.default"), "it calls"),
    ("a custom operator", called("torch.ops.mine.run.default"), "it calls"),
    ("Python passed to an operator", passed_along, "it calls 'torch.os.system'"),
    ("pickled example inputs", pickled_samples(2), "example inputs are more than tensors"),
    ("pickled in a newer way", pickled_samples(4), "example inputs are more than tensors"),
    ("pickled weights", pickled_weight, "its tensors are pickled"),
    ("weights of the old kind", added("model/data/weights/model.pt"), "data/weights/model.pt"),
    ("compiled code", added("model/data/aotinductor/model/x.so"), "data/aotinductor"),
    ("a second program", added("model/models/other.json", b"{}"), "models/other.json"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "says"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_program_that_could_run_code_is_refused(
    tmp_path: Path, harm: Callable[[Members], object], says: str
):
    contents = members()
    harm(contents)
    with pytest.raises(SourceError, match="could run code when it is loaded") as caught:
        screen(write(tmp_path / "hostile.pt2", contents))
    assert says in caught.value.detail
    assert caught.value.detail.endswith("torch.export.save from tensors and ATen operators only")


def junk(path: Path) -> None:
    path.write_bytes(b"junk" * 100)


def prefixed(path: Path) -> None:
    """Python would find the contents behind it; torch would look into it."""
    path.write_bytes(b"PK\x03\x04" + b"\0" * 60 + path.read_bytes())


def commented(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"behind"


def two_of_one_name(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MODEL, b"{}")


def two_but_for_case(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MODEL.replace("models", "MODELS"), b"{}")


def cut_name(path: Path) -> None:
    """For Python it ends at the NUL."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"archive_format", b"archive\0format"))


def other_directory(path: Path) -> None:
    """A table of contents of 64 bits that lies elsewhere for those who follow its offset."""
    data = path.read_bytes()
    end = data[-22:]
    count, length, offset = struct.unpack("<HLL", end[10:20])
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    path.write_bytes(data[:-22] + wide + locator + end)


def outside(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/../../outside", b"x")


def other_root(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("second/models/model.json", b"{}")


def no_json(path: Path) -> None:
    write(path, members() | {MODEL: b"{"})


def nested_json(path: Path) -> None:
    write(path, members() | {MODEL: b"[" * 100_000})


def no_weights(path: Path) -> None:
    contents = members()
    del contents[WEIGHTS]
    write(path, contents)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (junk, r"is not a torch.export program \(File is not a zip file\)"),
        (prefixed, "bytes before or behind its contents"),
        (commented, "bytes before or behind its contents"),
        (other_directory, "bytes before or behind its contents"),
        (two_of_one_name, "two members named"),
        (two_but_for_case, "two members named"),
        (cut_name, "no plain name|not a torch.export program"),
        (outside, "a member outside of it"),
        (other_root, "save it again"),
        (no_json, "no readable torch.export program"),
        (nested_json, "no readable torch.export program"),
        (no_weights, "no readable torch.export program"),
    ],
)
def test_an_archive_that_is_broken_or_reads_in_two_ways_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], says: str
):
    path = write(tmp_path / "model.pt2", members())
    harm(path)
    with pytest.raises(SourceError, match=says):
        screen(path)


def test_an_archive_that_grows_beyond_the_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MAX_BUNDLE_FILE_BYTES", 1_000)
    with pytest.raises(SourceError, match=r"unpacks to .* more than"):
        screen(write(tmp_path / "model.pt2", members()))


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path):
    with pytest.raises(ModelLoadError, match="does not exist"):
        screen_program(tmp_path / "nothing.pt2", REFERENCE_RECORD_NAME, ModelLoadError)


def test_a_sound_program_passes_and_gives_its_record(tmp_path: Path):
    contents = members()
    path = write(tmp_path / "model.pt2", contents)
    assert screen(path) == contents[f"model/extra/{REFERENCE_RECORD_NAME}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s34", True),
        ("Mul(Integer(2), Symbol('s39', positive=True, integer=True))", True),
        ("2*s39 + (s0//4)**2", True),
        ("Max(1, s0) <= 4", True),
        ("os", False),
        ("open", False),
        ("Symbol('s0').func", False),
        ("Symbol(__import__('os'))", False),
        ("s0()", False),
        ("(lambda: 1)()", False),
        ("[s0 for s0 in (1,)]", False),
        ("Symbol('__import__')", False),
        ("f'{s0}'", False),
        ("s0 if s1 else s2", False),
        ("Integer(1, **s0)", False),
        ("s0[0]", False),
        ("(" * 5000, False),
        ("s0 + " * 5000 + "s0", False),
    ],
)
def test_a_shape_expression_is_arithmetic_on_symbols_and_nothing_else(text: str, expected: bool):
    assert is_expression(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L['x'].size()[0] >= 2", True),
        ("Mod(L['x'].size()[2], 4) == 0", True),
        ("L['x'].stride()[0] == L['y']['k'].size()[1]", True),
        ("L['x'].__class__", False),
        ("L['x'].size(0)", False),
        ("L['x'].tofile()", False),
        ("""L['"+print()+"'] == 1""", False),
        ("torch", False),
    ],
)
def test_a_guard_compares_sizes_and_nothing_else(text: str, expected: bool):
    assert is_guard(text) is expected


def test_only_operators_of_aten_and_torchvision_and_scalar_arithmetic_are_called():
    sound = ["torch.ops.aten.conv2d.default", "torch.ops.torchvision.nms.default",
             "_operator.floordiv", "torch.sym_max", "math.ceil"]  # fmt: skip
    assert all(map(is_operator, sound))
    refused = ["torch.load", "torch.ops.aten.set_.source_Storage", "torch.ops.aten.conv2d",
               "torch.ops.aten.__class__.mro", "builtins.eval"]  # fmt: skip
    assert not any(map(is_operator, refused))


def test_containers_are_tuples_lists_and_dicts():
    leaf = {"type": None, "context": None, "children_spec": []}
    pair = {"type": "builtins.dict", "context": '["out", "aux"]', "children_spec": [leaf, leaf]}
    assert is_tree(json.dumps([1, pair]))
    assert not is_tree(json.dumps([2, pair]))
    assert not is_tree(json.dumps([1, {**pair, "context": '["a\\"b"]'}]))
    assert not is_tree(json.dumps([1, {**pair, "type": "my.Tuple"}]))
    assert not is_tree("[1")


def test_the_screen_needs_no_torch(tmp_path: Path):
    code = (
        "import sys, edge_runtime.contract.program_screen as s, pathlib;"
        "s.screen_program(pathlib.Path(sys.argv[1]), 'nearfar.json', ValueError);"
        "sys.exit('torch' in sys.modules)"
    )
    path = write(tmp_path / "model.pt2", members())
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
