"""What surrounds the program in an ``.mlpackage``: metadata, and bytes without chance."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from edge_runtime.contract.manifest import REFERENCE_RECORD_NAME
from edge_runtime.runtimes.mil.program import model_file, read_spec

__all__ = ["make_reproducible", "set_metadata"]


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
    """Add the metadata, and take clock and chance out: same model, same bytes.

    Map order in the protobuf, the random identifiers of ``Manifest.json`` and the
    conversion date differ from run to run otherwise.
    """
    spec = read_spec(package)
    user = spec.description.metadata.userDefined
    for key in list(user):
        if "date" in key:
            del user[key]
    set_metadata(spec, record)
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
