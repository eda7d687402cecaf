"""What surrounds the program in an ``.mlpackage``: metadata, and no byte too many or by chance."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from edge_runtime.contract.manifest import REFERENCE_RECORD_NAME
from edge_runtime.runtimes.mil.program import model_file, read_spec

__all__ = ["make_reproducible", "set_metadata", "share_constants"]


def share_constants(block: Any) -> int:
    """Let operators share the constants that are equal; returns how many constants go.

    coremltools writes strides, padding, scales and zero points once an operator: half of the
    description of a small quantized net. ``block``: a protobuf MIL ``Block``, changed in
    place. What the block gives out keeps its name.
    """
    if any(operation.blocks for operation in block.operations):
        return 0  # names within would have to follow; no converter here writes any
    given = set(block.outputs)
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    left = []
    for operation in block.operations:
        if operation.type == "const":
            (output,) = operation.outputs
            value = output.type.SerializeToString(deterministic=True)
            value += operation.attributes["val"].SerializeToString(deterministic=True)
            if value in first and output.name not in given:
                renamed[output.name] = first[value]
                continue
            first.setdefault(value, output.name)
        for taken in operation.inputs.values():
            for argument in taken.arguments:
                if argument.name in renamed:
                    argument.name = renamed[argument.name]
        left.append(type(operation).FromString(operation.SerializeToString()))
    del block.operations[:]
    block.operations.extend(left)
    return len(renamed)


def set_metadata(spec: Any, record: str) -> None:
    """Put the JSON record into the user metadata, and what Xcode shows into its fields.

    ``spec``: the protobuf ``Model``, changed in place. Xcode shows description, author,
    version and license; those that the record does not name stay empty.
    """
    metadata = spec.description.metadata
    metadata.userDefined[REFERENCE_RECORD_NAME] = record
    fields = json.loads(record)
    if not isinstance(fields, dict):
        return
    name, variant = fields.get("name"), fields.get("variant")
    described = fields.get("description")
    if described is None and name is not None:
        task = fields.get("task")
        kind = str(task.get("type", "")) if isinstance(task, dict) else ""
        described = " ".join(str(part) for part in (name, variant, kind) if part)
    for field, value in (
        ("shortDescription", described),
        ("versionString", fields.get("version")),
        ("author", fields.get("author")),
        ("license", fields.get("license")),
    ):
        if isinstance(value, str) and value:
            setattr(metadata, field, value)


def make_reproducible(package: Path, record: str = "{}") -> None:
    """Add the metadata, share equal constants, take clock and chance out: same model, same bytes.

    Map order in the protobuf, the random identifiers of ``Manifest.json`` and the
    conversion date differ from run to run otherwise.
    """
    spec = read_spec(package)
    user = spec.description.metadata.userDefined
    for key in list(user):
        if "date" in key:
            del user[key]
    set_metadata(spec, record)
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            share_constants(block)
    model_file(package).write_bytes(spec.SerializeToString(deterministic=True))
    model_file(package).chmod(0o644)
    manifest_file = package / "Manifest.json"
    manifest = json.loads(manifest_file.read_text())
    renamed = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper()
        for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {
        renamed[old]: entry for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True))
