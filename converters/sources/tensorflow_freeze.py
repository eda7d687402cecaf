"""``python -m converters.sources.tensorflow_freeze FOLDER OUT HEIGHT WIDTH``: in its own process.

Loads a SavedModel, freezes one signature for a fixed input size and writes what a torch
process can read without TensorFlow: ``graph.json`` and ``constants.safetensors``. Errors of
the user's making go to ``error.txt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_CODE_OPERATORS = frozenset(
    {"EagerPyFunc", "LoadDataset", "LoadLibrary", "MatchingFiles", "PyFunc", "PyFuncStateless",
     "ReadFile", "SaveDatasetV2", "WriteFile", "XlaLaunch"}
)  # fmt: skip
# What holds, loads and saves variables, and calls functions; an assertion has no effect.
_STATEFUL_OPERATORS = frozenset(
    {"Assert", "AssignVariableOp", "DisableCopyOnRead", "MergeV2Checkpoints", "ReadVariableOp",
     "RestoreV2", "SaveV2", "StatefulPartitionedCall", "VarHandleOp", "VarIsInitializedOp"}
)  # fmt: skip
_MAX_GRAPH_BYTES = 2**31
_MAX_CONSTANT_BYTES = 2**30


class _Refused(Exception):
    """A sentence for the user."""


def _check_operators(folder: Path) -> None:
    """Refuse what reaches outside of the graph or keeps state, before TensorFlow runs it.

    Loading restores variables and runs nothing else then: tables and other resources, which
    bring functions of their own for that, are refused too.
    """
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.framework import op_def_registry

    model = saved_model_pb2.SavedModel()
    if (folder / "saved_model.pb").stat().st_size > _MAX_GRAPH_BYTES:
        raise _Refused("saved_model.pb is too large")
    try:
        model.ParseFromString((folder / "saved_model.pb").read_bytes())
    except Exception as error:  # protobuf raises its own types
        raise _Refused(f"saved_model.pb is broken ({error}): save the model again") from None
    for meta in model.meta_graphs:
        if not meta.object_graph_def.nodes:
            raise _Refused("it was saved by TensorFlow 1: load it with TensorFlow 2, save it again")
        nodes = list(meta.graph_def.node)
        for function in meta.graph_def.library.function:
            nodes.extend(function.node_def)
        functions = {function.signature.name for function in meta.graph_def.library.function}
        used = {node.op for node in nodes} - functions
        found = sorted(used & _CODE_OPERATORS)
        if found:
            raise _Refused(
                f"it runs code or touches files ({', '.join(found)}): leave that out and save "
                "it again"
            )
        known = {name: op_def_registry.get(name) for name in used}
        custom = sorted(name for name, definition in known.items() if definition is None)
        if custom:
            raise _Refused(
                f"it has custom operators ({', '.join(custom)}), which no phone has: build the "
                "model from TensorFlow's own"
            )
        stateful = sorted(
            name
            for name, definition in known.items()
            if definition.is_stateful and name not in _STATEFUL_OPERATORS
        )
        objects = {node.WhichOneof("kind") for node in meta.object_graph_def.nodes}
        stateful += sorted(objects & {"asset", "resource"})
        if stateful or any(node.saveable_objects for node in meta.object_graph_def.nodes):
            raise _Refused(
                f"it keeps state, draws random numbers or reads tables ({', '.join(stateful)}): "
                "save the part that only computes"
            )


def _signature(tf: Any, folder: Path) -> tuple[Any, str, Any]:
    """The loaded model (to keep its variables alive), the input's name, the function."""
    try:
        loaded = tf.saved_model.load(str(folder))
    except Exception as error:  # TensorFlow raises many types
        raise _Refused(f"TensorFlow cannot load it: {str(error).strip().splitlines()[0]}") from None
    signatures = dict(loaded.signatures)
    if not signatures:
        raise _Refused("it has no signature: save it with signatures")
    function = signatures.get("serving_default")
    if function is None:
        if len(signatures) != 1:
            raise _Refused(f"it has the signatures {sorted(signatures)}, none is serving_default")
        function = next(iter(signatures.values()))
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise _Refused(f"its signature takes {sorted(inputs)}: one image is fed")
    name = next(iter(inputs))
    if inputs[name].dtype != tf.float32:
        raise _Refused(f"its input is {inputs[name].dtype.name}: float32 is needed")
    if inputs[name].shape.rank is None:
        raise _Refused("its input has no known rank")
    return loaded, name, function


def _sized(shape: list[int | None], height: int, width: int) -> list[int | None]:
    """The input's shape with height and width filled in (0: as the model says)."""
    if len(shape) != 4:
        return [None, *shape[1:]]
    sides = [shape[1] or height or None, shape[2] or width or None]
    for side, wanted in zip(sides, (height, width), strict=True):
        if side is None:
            raise _Refused("it takes any size: pass --input-size")
        if wanted and side != wanted:
            raise _Refused(f"it takes {sides[0]}x{sides[1]} pixels, not {height}x{width}")
    return [None, *sides, shape[3]]


def freeze(folder: Path, out: Path, height: int, width: int) -> None:
    """Write ``graph.json`` and ``constants.safetensors`` into ``out``."""
    import numpy as np
    import tensorflow as tf
    from safetensors.numpy import save_file
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    _check_operators(folder)
    loaded, name, function = _signature(tf, folder)
    shape = function.structured_input_signature[1][name].shape.as_list()
    spec = tf.TensorSpec(_sized(shape, height, width), tf.float32, name=name)
    names = sorted(function.structured_outputs)
    traced = tf.function(lambda image: [function(**{name: image})[key] for key in names])
    try:
        frozen = convert_variables_to_constants_v2(traced.get_concrete_function(spec))
    except Exception as error:  # TensorFlow raises many types
        raise _Refused(
            f"it cannot be frozen for this size: {str(error).strip().splitlines()[0]}"
        ) from None
    values = _constants(tf, frozen.graph)
    constants: dict[str, Any] = {}
    nodes = []
    for operation in frozen.graph.get_operations():
        record = {
            "name": operation.name,
            "op": operation.type,
            "inputs": [tensor.name for tensor in operation.inputs],
            "shapes": [_shape(tensor) for tensor in operation.outputs],
            "attributes": _attributes(operation),
        }
        value = values.get(operation.name)
        if value is not None:
            if value.nbytes > _MAX_CONSTANT_BYTES:
                raise _Refused(f"its constant {operation.name} has {value.nbytes} bytes")
            constants[operation.name] = np.ascontiguousarray(value)
            record |= {"op": "Const", "inputs": [], "attributes": {}}
        nodes.append(record)
    save_file(constants, str(out / "constants.safetensors"))
    document = {
        "input": frozen.inputs[0].name,
        "input_shape": _shape(frozen.inputs[0]),
        "outputs": [tensor.name for tensor in frozen.outputs],
        "output_names": names,
        "nodes": nodes,
    }
    (out / "graph.json").write_text(json.dumps(document))
    del loaded


def _constants(tf: Any, graph: Any) -> dict[str, Any]:
    """Operations that depend on no input: name to value, numbers only."""
    definition = graph.as_graph_def()
    for node in definition.node:  # what only orders side effects would ask for the input
        data = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(data)
    pure = tf.Graph()
    with pure.as_default():
        tf.import_graph_def(definition, name="")
    fixed: dict[str, Any] = {}
    for operation in pure.get_operations():
        plain = len(operation.outputs) == 1 and operation.outputs[0].dtype.is_numpy_compatible
        depends = any(tensor.op.name not in fixed for tensor in operation.inputs)
        if plain and not depends and operation.type != "Placeholder" and _pure(operation):
            fixed[operation.name] = operation.outputs[0]
    with tf.compat.v1.Session(graph=pure) as session:
        found = session.run(fixed)
    return {
        name: value
        for name, value in found.items()
        if hasattr(value, "dtype") and value.dtype.kind in "biuf"
    }


def _pure(operation: Any) -> bool:
    """No state, and no function inside that could have one."""
    calls = any(
        value.HasField("func") or value.list.func for value in operation.node_def.attr.values()
    )
    return not calls and not operation.op_def.is_stateful


def _shape(tensor: Any) -> list[int | None] | None:
    return tensor.shape.as_list() if tensor.shape.rank is not None else None


def _attributes(operation: Any) -> dict[str, Any]:
    """Those that JSON can say: numbers, strings, lists of them."""
    result: dict[str, Any] = {}
    for key in operation.node_def.attr:
        if key.startswith("_") or key == "value":
            continue
        value = operation.get_attr(key)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, list):
            value = [item.decode() if isinstance(item, bytes) else item for item in value]
            if not all(isinstance(item, bool | int | float | str) for item in value):
                continue
        elif not isinstance(value, bool | int | float | str):
            value = getattr(value, "name", None)  # a dtype
        if value is not None:
            result[key] = value
    return result


def main() -> None:
    """Freeze, or leave a sentence in ``error.txt``."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        freeze(folder, out, int(sys.argv[3]), int(sys.argv[4]))
    except _Refused as error:
        (out / "error.txt").write_text(str(error))


if __name__ == "__main__":
    main()
