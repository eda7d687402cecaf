"""``FILE.py:CALLABLE``: the user's own code, run in this child process only."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.sources.checks import as_detector
from converters.sources.types import Built, Detector, Finished
from edge_runtime.contract.errors import SourceError

__all__ = ["build_python_file"]


def build_python_file(request: SourceRequest) -> Built:
    """Call CALLABLE; it gives an ``nn.Module``, or a ``Detector`` for detection.

    Something that only holds the net as ``.module`` (a data-parallel or training wrapper)
    is unpacked. Raises ``SourceError`` for every failure of the user's code.
    """
    file_name, _, attribute = request.source.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise SourceError(f"source file {path} does not exist")
    answer = _call(path, attribute)
    where = f"{path.name}:{attribute}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if isinstance(answer, Detector):
        if request.task != "detection":
            raise SourceError(f"{where} returned a Detector: pass --task detection")
        detector = as_detector(answer, where)
        return Built(
            module=_module(detector.module, where),
            source_sha256=digest,
            finish=lambda module, _: Finished(module=module, detection=detector),
        )
    built = Built(module=_module(answer, where), source_sha256=digest)
    if request.task == "detection":
        from converters.sources.torchvision_detection import is_torchvision_detector, with_heads

        if is_torchvision_detector(built.module):
            built.finish = with_heads
    return built


def _call(path: Path, attribute: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = loaded
    try:
        spec.loader.exec_module(loaded)
        factory = getattr(loaded, attribute, None)
        if not callable(factory):
            raise SourceError(
                f"{path.name} has no callable {attribute!r}: write FILE.py:CALLABLE with the "
                "name of a function in it"
            )
        return factory()
    except SourceError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise SourceError(
            f"{path.name}:{attribute} failed ({reason}): it is called without arguments and "
            "must return the model"
        ) from error


def _module(answer: Any, where: str) -> Any:
    import torch

    if isinstance(answer, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        answer = answer.module
    elif not isinstance(answer, torch.nn.Module):
        inner = getattr(answer, "module", None)
        if not isinstance(inner, torch.nn.Module):
            kind = "a class" if isinstance(answer, type) else f"a {type(answer).__name__}"
            raise SourceError(f"{where} returned {kind}, no nn.Module: return the built model")
        answer = inner
    return answer.float()
