"""From a SOURCE to a servable: the full-size model as the broker loads it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from converters.bundle_writer import default_name, labels_record, provenance
from converters.jobs import Prepared, PrepareJob, SourceRequest
from converters.supervisor import Listener, Supervisor
from edge_runtime.contract.files import atomic_directory, file_entries
from edge_runtime.contract.manifest import (
    SERVABLE_NAME,
    Reference,
    Servable,
    canonical_json,
)

__all__ = ["Export", "export_servable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What the command line asks for."""

    source: SourceRequest
    output: Path
    name: str | None = None
    version: str = "1.0.0"
    force: bool = False
    listener: Listener | None = None


def export_servable(request: Export) -> Servable:
    """Write ``servable.json``, ``model.pt2`` and ``labels.txt``, or raise and write nothing."""
    with (
        atomic_directory(request.output, replace=request.force) as root,
        tempfile.TemporaryDirectory(prefix="nearfar-export-") as scratch,
    ):
        supervisor = Supervisor(Path(scratch), listener=request.listener)
        job = PrepareJob(source=request.source, out_dir=str(root))
        answer = supervisor.run("export", job).answer
        assert isinstance(answer, Prepared)  # noqa: S101  # what a PrepareJob answers
        labels = labels_record(root, answer.labels) if answer.labels else None
        servable = Servable(
            name=request.name or default_name(request.source.source),
            version=request.version,
            task=answer.task,
            preprocess=answer.preprocess,
            labels=labels,
            model=Reference(path="model.pt2", inputs=answer.inputs, outputs=answer.outputs),
            provenance=provenance(request.source, answer, answer.tools),
            files=file_entries(root),
        )
        servable.check()
        (root / SERVABLE_NAME).write_bytes(canonical_json(servable))
        return servable
