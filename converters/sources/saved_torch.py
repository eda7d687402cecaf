"""Models that torch saved whole: ``torch.export`` programs and TorchScript archives."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import msgspec

from converters.jobs import SourceRequest
from converters.sources.checks import as_detector
from converters.sources.types import Built, Detector, Finished
from converters.weights import file_digest
from edge_runtime.contract import limits
from edge_runtime.contract.archives import check_zip
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.manifest import REFERENCE_RECORD_NAME, ReferenceRecord
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.tasks import ClassificationTask, DetectionTask

__all__ = ["build_saved_torch"]

_FILE_CALL = re.compile(rb"\b(?:torch|aten)\.(?:save|load|from_file)\b")
_MAX_CODE_BYTES = 64 * 2**20


def build_saved_torch(path: Path, request: SourceRequest) -> Built:
    """``.pt2``, or a TorchScript archive; their graphs become ``nn`` layers.

    A ``model.pt2`` that nearfar wrote brings its pre-processing, and a detector its
    anchors from the file beside it. Raises ``SourceError``, and ``ConfigError`` for weights
    beside it.
    """
    if request.weights is not None:
        raise ConfigError(f"{path.name} holds its own weights: leave --weights out")
    if not path.is_file():
        raise SourceError(f"there is no file {path}: check SOURCE")
    if path.stat().st_size > limits.MAX_BUNDLE_FILE_BYTES:
        raise SourceError(f"{path.name} is larger than {limits.MAX_BUNDLE_FILE_BYTES} bytes")
    digest = file_digest(path)
    built = _program(path, request) if path.suffix == ".pt2" else _torchscript(path, request)
    built.weights, built.weights_sha256, built.source_sha256 = path.name, digest, digest
    return built


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]


def _program(path: Path, request: SourceRequest) -> Built:
    import torch

    from converters.sources.graphs.batch import ProgramModule

    data = screen_program(path, REFERENCE_RECORD_NAME, SourceError)
    record = _record(path, data, request)
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # schema, zip and C++ errors of many types
        raise SourceError(
            f"{path.name} is no program that torch {torch.__version__} reads: {_first(error)}"
        ) from None
    built = Built(module=ProgramModule(program), finish=_finisher(request))
    shapes = [
        tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(shapes) == 1 and len(shapes[0]) == 4:
        height, width = shapes[0][2:]
        if isinstance(height, int) and isinstance(width, int):
            built.size = (height, width)
    if record is not None:
        _apply_record(built, record, path, request)
    return built


def _record(path: Path, data: bytes | None, request: SourceRequest) -> ReferenceRecord | None:
    if data is None:
        return None
    try:
        record = msgspec.json.decode(data, type=ReferenceRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path.name}: its {REFERENCE_RECORD_NAME} is broken: {error}") from None
    kind = record.task.__struct_config__.tag
    if kind != request.task:
        raise ConfigError(f"{path.name} is for {kind}: pass --task {kind}")
    return record


def _apply_record(
    built: Built, record: ReferenceRecord, path: Path, request: SourceRequest
) -> None:
    built.preprocess = record.preprocess
    if isinstance(record.task, ClassificationTask):
        built.activation, built.temperature = record.task.activation, record.task.temperature
        built.finish = _finisher(request, strip=False)  # the record says what is still to do
    if isinstance(record.task, DetectionTask):
        built.finish = _with_anchors(record.task, path, _finisher(request))


def _with_anchors(task: DetectionTask, path: Path, finish: Any) -> Any:
    import numpy as np

    beside = path.parent / Path(task.anchors.path).name
    if not beside.is_file() or beside.stat().st_size != 16 * task.anchors.count:
        raise SourceError(
            f"{path.name} needs its {task.anchors.count} anchors in {beside.name} beside it"
        )
    anchors = np.frombuffer(beside.read_bytes(), dtype="<f4").reshape(-1, 4)

    def finished(module: Any, shape: tuple[int, ...]) -> Finished:
        done: Finished = finish(module, shape)
        done.detection = as_detector(
            Detector(
                module=done.module,
                anchors=anchors,
                classes=task.classes,
                activation=task.activation,
                box_weights=task.box_weights,
            ),
            path.name,
        )
        return done

    return finished


def _torchscript(path: Path, request: SourceRequest) -> Built:
    import torch

    members = check_zip(path, "a TorchScript archive", SourceError)
    names = [member.filename for member in members]
    if any(name.endswith("/models/model.json") for name in names):
        raise SourceError(f"{path.name} is a torch.export program: name it .pt2")
    if not any(name.endswith("/constants.pkl") for name in names):
        raise SourceError(
            f"{path.name} holds no model, perhaps only weights: pass FILE.py:CALLABLE with "
            f"--weights {path.name}"
        )
    if any(name.endswith("/bytecode.pkl") for name in names):
        code = "a .ptl file is for phones alone: pass the TorchScript archive it was made from"
        if not any("/code/" in name for name in names):
            raise SourceError(f"{path.name}: {code}")
    with zipfile.ZipFile(path) as archive:
        code_members = [m for m in members if "/code/" in m.filename and m.filename.endswith(".py")]
        if sum(member.file_size for member in code_members) > _MAX_CODE_BYTES:
            raise SourceError(f"{path.name}: its code is too large")
        for member in code_members:
            found = _FILE_CALL.search(archive.read(member))
            if found is not None:
                raise SourceError(
                    f"{path.name} reads or writes files ({found.group().decode()}): models with "
                    "side effects are refused"
                )
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # C++ errors of many types
        raise SourceError(f"{path.name} is no readable TorchScript: {_first(error)}") from None
    if not isinstance(module, torch.jit.ScriptModule):
        raise SourceError(f"{path.name} holds no module")
    return Built(module=module.float(), finish=_finisher(request))


def _finisher(request: SourceRequest, strip: bool = True) -> Any:
    strip = strip and request.task == "classification" and request.activation is None

    def finish(module: Any, shape: tuple[int, ...]) -> Finished:
        import torch

        from converters.sources.checks import run_once
        from converters.sources.graphs.batch import saved_as_layers
        from converters.sources.graphs.build import without_final_activation

        generator = torch.Generator().manual_seed(0)
        example = torch.randn((2, *shape), generator=generator)
        run_once(module, example[:1])  # a wrong size gets its own sentence
        layers = saved_as_layers(module, example)
        activation = without_final_activation(layers) if strip else None
        return Finished(module=layers, activation=activation)

    return finish
