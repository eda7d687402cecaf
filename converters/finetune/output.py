"""What a run leaves behind: weights, labels, pre-processing, splits, and the next command."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from converters.finetune.checkpoint import CHECKPOINT, write_atomic
from converters.finetune.data import Sample, Split
from converters.finetune.model import Trainable
from converters.finetune.settings import FinetuneReport, HeadRecord
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.preprocess import Preprocess, ResizeExact

__all__ = [
    "FILES",
    "choose_calibration",
    "next_commands",
    "open_folder",
    "preprocess_toml",
    "write_report",
    "write_splits",
    "write_weights",
]

FILES = (
    "model.safetensors",
    "labels.txt",
    "preprocess.toml",
    "split.csv",
    "calib.csv",
    "model.py",
    "report.json",
    CHECKPOINT,
)
"""Everything that a run may write into its folder."""

_CALIBRATION = 128


def open_folder(folder: Path, *, force: bool, resume: bool) -> None:
    """Make ``folder`` ready. Raises ``ConfigError`` for one with something else in it.

    ``force`` removes what an earlier run wrote, nothing else.
    """
    if resume:
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another output folder")
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if present and not force:
        hint = "pass --resume to go on, or --force" if CHECKPOINT in present else "pass --force"
        raise ConfigError(f"{folder} exists: choose another output, or {hint} to start again")
    for name in present:
        if name in FILES:
            (folder / name).unlink()
    folder.mkdir(parents=True, exist_ok=True)


def choose_calibration(train: Sequence[Sample], *, count: int = _CALIBRATION) -> list[Sample]:
    """At most ``count`` training images, spread evenly over the classes."""
    queues: dict[int | None, list[Sample]] = {}
    for sample in sorted(train, key=lambda sample: sample.sha256):
        queues.setdefault(sample.label, []).append(sample)
    order = sorted(queues, key=lambda label: -1 if label is None else label)
    chosen: list[Sample] = []
    depth = 0
    while len(chosen) < min(count, len(train)):
        for label in order:
            if depth < len(queues[label]) and len(chosen) < count:
                chosen.append(queues[label][depth])
        depth += 1
    return sorted(chosen, key=lambda sample: sample.path)


def _rows(samples: Iterable[Sample], folder: Path, split: str) -> list[tuple[str, str, str]]:
    return [(os.path.relpath(sample.path, folder), str(sample.label), split) for sample in samples]


def _csv(rows: Iterable[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class_index", "split"))
    writer.writerows(rows)
    return text.getvalue().encode()


def write_splits(output: Path, folder: Path, split: Split, calibration: Sequence[Sample]) -> None:
    """``split.csv`` and ``calib.csv``, as ``convert`` and ``verify`` read them.

    Without labels there are no classes to write down, and no files.
    """
    if split.train[0].label is None:
        return
    rows = [*_rows(split.train, folder, "train"), *_rows(split.heldout, folder, "val")]
    write_atomic(output / "split.csv", _csv(sorted(rows)))
    write_atomic(output / "calib.csv", _csv(_rows(calibration, folder, "calib")))


def preprocess_toml(record: Preprocess) -> str:
    """The record as ``--preprocess FILE.toml`` reads it; floats keep every digit."""
    table = record.normalization
    lines = [
        f'color = "{record.color}"',
        f"flip_horizontal = {str(record.flip_horizontal).lower()}",
    ]
    lines += ["", "[resize]"]
    if isinstance(record.resize, ResizeExact):
        lines += ['type = "exact"', f"height = {record.resize.height}"]
        lines += [f"width = {record.resize.width}"]
    else:
        lines += ['type = "shorter_side"', f"size = {record.resize.size}"]
    lines += [f'algorithm = "{record.resize.algorithm}"']
    if record.crop is not None:
        lines += ["", "[crop]", f"height = {record.crop.height}", f"width = {record.crop.width}"]
    lines += ["", "[normalization]", f"scale = {float(table.scale)!r}"]
    lines += [f"mean = {[float(value) for value in table.mean]!r}"]
    lines += [f"std = {[float(value) for value in table.std]!r}", ""]
    return "\n".join(lines)


_MODEL = '''"""The net of {origin} with its layer {head} for {classes} classes.

Written by ``nearfar finetune``; the weights are in model.safetensors.
"""

from pathlib import Path

from converters.finetune import with_new_head


def model():
    """The net, without its weights."""
    return with_new_head({source}, {factory!r}, head={head!r}, classes={classes})
'''


def write_weights(
    output: Path,
    trainable: Trainable,
    source: str,
    head: HeadRecord,
    labels: Sequence[str] | None,
) -> str:
    """Write weights, labels and pre-processing; returns the SOURCE that they belong to.

    A torchvision net takes its class count from the labels; any other net with a new head
    gets a ``model.py`` that builds it.
    """
    from safetensors.torch import save

    state = {
        name: value.detach().contiguous().clone()
        for name, value in trainable.module.state_dict().items()
    }
    write_atomic(output / "model.safetensors", save(state))
    if labels is not None:
        write_atomic(output / "labels.txt", "".join(f"{name}\n" for name in labels).encode())
    assert trainable.source.preprocess is not None  # noqa: S101  # load_trainable saw to it
    write_atomic(output / "preprocess.toml", preprocess_toml(trainable.source.preprocess).encode())
    if trainable.kind == "torchvision" or not head.replaced:
        return source
    name, _, factory = source.rpartition(":")
    where = '"zoo"'
    if trainable.kind == "python":
        where = f"Path(__file__).parent / {os.path.relpath(name, output)!r}"
    text = _MODEL.format(
        origin=f"{Path(name).name}:{factory}",
        source=where,
        factory=factory,
        head=head.name,
        classes=head.classes,
    )
    if trainable.kind == "zoo":
        text = text.replace("from pathlib import Path\n\n", "")
    write_atomic(output / "model.py", text.encode())
    return f"{output / 'model.py'}:model"


def next_commands(
    output: Path,
    source: str,
    report: FinetuneReport,
    *,
    labels: bool,
    more: Sequence[str] = (),
) -> tuple[str, str]:
    """The ``nearfar convert`` and ``nearfar verify`` lines that follow."""
    bundle = output.with_name(f"{output.name}.bundle")
    convert = ["nearfar", "convert", source, "--weights", str(output / "model.safetensors")]
    if labels:
        convert += ["--labels", str(output / "labels.txt")]
    convert += ["--preprocess", str(output / "preprocess.toml")]
    if report.temperature is not None:
        convert += ["--temperature", f"{report.temperature:.4g}"]
    convert += ["--calib", report.data.folder]
    verify = ["nearfar", "verify", str(bundle), "--eval", report.data.folder]
    if (output / "split.csv").is_file():
        convert += ["--calib-labels", str(output / "calib.csv")]
        verify += ["--labels", str(output / "split.csv"), "--split", "val"]
    convert += [*more, "-o", str(bundle)]
    return shlex.join(convert), shlex.join(verify)


def write_report(output: Path, report: FinetuneReport) -> None:
    """``report.json``, indented."""
    data = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomic(output / "report.json", data + b"\n")
