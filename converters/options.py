"""Command-line options that name a trained model, shared by every command that takes one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click
import msgspec
from rich.console import Console

from converters.jobs import SourceRequest
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.tasks import TaskName
from edge_runtime.contract.tasks.classification import Activation

__all__ = [
    "JOBS",
    "JSON",
    "choose_console",
    "choose_many",
    "optional_source_options",
    "parse_size",
    "source_options",
    "source_request",
    "write_json",
]

F = TypeVar("F", bound=Callable[..., Any])


JSON = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="F",
    help="Write the result as JSON to F (- is stdout).",
)
JOBS = click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=min(4, os.cpu_count() or 1),
    show_default=True,
    help="Child processes at a time.",
)

_SOURCE = click.argument("source")
_OPTIONS = (
    click.option(
        "--weights",
        metavar="F",
        help="A .safetensors or .pth file (for keras: .weights.h5), DEFAULT for the "
        "library's own download, or random:SEED. A saved model has its own.",
    ),
    click.option(
        "--task",
        type=click.Choice(get_args(TaskName)),
        default="classification",
        show_default=True,
    ),
    click.option(
        "--labels",
        "labels_file",
        type=click.Path(path_type=Path),
        metavar="F",
        help="Text file, one class a line, in the order of the outputs.",
    ),
    click.option(
        "--preprocess",
        metavar="P",
        help="torchvision, tf, caffe, unit, raw, or a .toml file. Declared, never guessed; a "
        "download with its own, the zoo and Keras applications bring theirs.",
    ),
    click.option("--input-size", metavar="N|HxW", help="Pixels of the model's input."),
    click.option(
        "--resize-size",
        type=click.IntRange(1, 8192),
        metavar="M",
        help="Shorter side before the center crop  [default: the input size]",
    ),
    click.option(
        "--activation",
        type=click.Choice(["softmax", "sigmoid", "none"]),
        help="Classification: what turns outputs into scores  [default: softmax]",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0.01, 100.0),
        help="Classification: outputs are divided by this before the softmax  [default: 1]",
    ),
    click.option(
        "--latent",
        metavar="N|NxHxW",
        help="Generation: shape of one input, for example 100 or 100x1x1.",
    ),
    click.option(
        "--output-range",
        metavar="LOW:HIGH",
        help="Tasks that answer an image: the values of black and white  [default: 0:1; "
        "generation -1:1]",
    ),
    click.option(
        "--score-threshold",
        type=click.FloatRange(0.0, 1.0),
        help="Detection: boxes below are dropped  [default: 0.25]",
    ),
    click.option("--name", help="Name in the manifest  [default: from SOURCE]"),
    click.option("--version", "model_version", default="1.0.0", show_default=True),
    click.option("--force", is_flag=True, help="Replace the output if it exists."),
    click.option("--quiet", is_flag=True, help="No progress."),
)


def _output(*, required: bool) -> Callable[[F], F]:
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=required,
        help="Folder to write; it must not exist.",
    )


def source_options(function: F) -> F:
    """Add SOURCE, ``-o`` and their options to a command; ``source_request`` reads them."""
    for option in reversed((_SOURCE, _output(required=True), *_OPTIONS)):
        function = option(function)
    return function


def optional_source_options(function: F) -> F:
    """The same for a command that may take them from a file instead."""
    source = click.argument("source", required=False)
    for option in reversed((source, _output(required=False), *_OPTIONS)):
        function = option(function)
    return function


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """``N`` or ``HEIGHTxWIDTH`` in pixels. Raises ``ConfigError``."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isdigit() and 1 <= int(p) <= 8192 for p in parts):
        raise ConfigError(f"--input-size {text!r}: write N or HEIGHTxWIDTH in pixels")
    return int(parts[0]), int(parts[-1])


def _latent(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 3 or not all(p.isdigit() and 1 <= int(p) <= 2**20 for p in parts):
        raise ConfigError(f"--latent {text!r}: write N or NxHxW, for example 100 or 100x1x1")
    return tuple(int(part) for part in parts)


def _output_range(text: str | None) -> tuple[float | None, float | None]:
    """Scale and offset that take LOW to 0 and HIGH to 255."""
    if text is None:
        return None, None
    low_text, separator, high_text = text.partition(":")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        separator = ""
        low = high = 0.0
    if not separator or not -1e6 <= low < high <= 1e6:
        raise ConfigError(f"--output-range {text!r}: write LOW:HIGH, for example 0:1 or -1:1")
    scale = 255.0 / (high - low)
    return scale, -low * scale


def source_request(
    source: str,
    *,
    task: str = "classification",
    weights: str | None = None,
    labels_file: Path | None = None,
    preprocess: str | None = None,
    input_size: str | None = None,
    resize_size: int | None = None,
    activation: str | None = None,
    temperature: float | None = None,
    latent: str | None = None,
    output_range: str | None = None,
    score_threshold: float | None = None,
) -> SourceRequest:
    """What the options name, with absolute paths: child processes work elsewhere.

    Raises ``ConfigError``.
    """
    height, width = parse_size(input_size)
    head, _, tail = source.rpartition(":")
    if head.endswith(".py"):
        source = f"{Path(head).resolve()}:{tail}"
    elif Path(source).exists():
        source = str(Path(source).resolve())
    if weights is not None and _is_path(weights):
        weights = str(Path(weights).resolve())
    if preprocess is not None and preprocess.endswith(".toml"):
        preprocess = str(Path(preprocess).resolve())
    scale, offset = _output_range(output_range)
    return SourceRequest(
        source=source,
        task=cast("TaskName", task),
        weights=weights,
        preprocess=preprocess,
        input_height=height,
        input_width=width,
        resize_size=resize_size,
        labels=str(labels_file.resolve()) if labels_file is not None else None,
        activation=cast("Activation | None", activation),
        temperature=temperature,
        latent_shape=_latent(latent),
        output_scale=scale,
        output_offset=offset,
        score_threshold=score_threshold,
    )


def _is_path(weights: str) -> bool:
    """Neither ``DEFAULT`` or another enum member nor ``random:SEED``, or a file that is there."""
    named = re.fullmatch(r"[A-Z][A-Z0-9_]*|random:.*", weights)
    return named is None or Path(weights).is_file()


def choose_many(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """A comma-separated choice from ``known``, or ``all``. Raises ``ConfigError``."""
    if text.strip() == "all":
        return list(known)
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"--{what} {text!r}: choose, each once, from {','.join(known)}, or all")
    return chosen


def write_json(path: Path | None, value: object) -> None:
    """``--json F``: indented JSON to a file or, for ``-``, to stdout."""
    if path is None:
        return
    data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def choose_console(json_path: Path | None) -> Console:
    """Tables go to stderr when JSON goes to stdout; log files get room for all columns."""
    console = Console(stderr=str(json_path) == "-")
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console
