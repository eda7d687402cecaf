"""Commands of the converters: convert, verify, export, inspect, formats."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import msgspec
from rich.console import Console
from rich.table import Table

from converters.convert import Conversion, plan
from converters.convert import convert as convert_source
from converters.dataset import image_digests, read_dataset
from converters.export import Export, export_servable
from converters.jobs import SourceRequest
from converters.progress import JobProgress
from converters.recipes import FORMATS, OFFERED, RECIPES, REFUSED
from converters.report.junit import write_junit
from converters.report.table import describe_preprocess, print_manifest, print_report
from converters.verify.gates import read_gates
from converters.verify.verify import Options, verify_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError, EvaluationError
from edge_runtime.contract.manifest import Format, Precision
from edge_runtime.contract.tasks.classification import Activation

__all__ = ["convert", "export", "formats", "inspect", "verify"]

F = TypeVar("F", bound=Callable[..., Any])

_SOURCE_HELP = """
SOURCE is torchvision:NAME, keras:NAME, zoo:NAME (digits-small, digits-large) or
FILE.py:CALLABLE, a function or class that gives a torch.nn.Module.
"""


def _source_options(function: F) -> F:
    for option in reversed(
        [
            click.argument("source"),
            click.option(
                "--weights",
                metavar="F",
                help="A .safetensors or .pth file (for keras: .weights.h5), DEFAULT for the "
                "library's own download, or random:SEED.",
            ),
            click.option(
                "--task",
                type=click.Choice(["classification"]),
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
                help="torchvision, tf, caffe, unit, raw, or a .toml file. Declared, never "
                "guessed; a download with its own, the zoo and Keras applications bring theirs.",
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
                help="What turns outputs into scores  [default: softmax]",
            ),
            click.option(
                "--temperature",
                type=click.FloatRange(0.01, 100.0),
                help="Outputs are divided by this before the softmax  [default: 1]",
            ),
            click.option("--name", help="Name in the manifest  [default: from SOURCE]"),
            click.option("--version", "model_version", default="1.0.0", show_default=True),
            click.option(
                "-o",
                "--output",
                type=click.Path(path_type=Path),
                required=True,
                help="Folder to write; it must not exist.",
            ),
            click.option("--force", is_flag=True, help="Replace the output if it exists."),
            click.option("--quiet", is_flag=True, help="No progress."),
        ]
    ):
        function = option(function)
    return function


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isdigit() and 1 <= int(p) <= 8192 for p in parts):
        raise ConfigError(f"--input-size {text!r}: write N or HEIGHTxWIDTH in pixels")
    return int(parts[0]), int(parts[-1])


def _source_request(
    source: str,
    *,
    weights: str | None,
    labels_file: Path | None,
    preprocess: str | None,
    input_size: str | None,
    resize_size: int | None,
    activation: str | None,
    temperature: float | None,
) -> SourceRequest:
    """Absolute paths, so that child processes find the files from anywhere."""
    height, width = _size(input_size)
    head, _, tail = source.rpartition(":")
    if head.endswith(".py"):
        source = f"{Path(head).resolve()}:{tail}"
    if weights is not None and _is_path(weights):
        weights = str(Path(weights).resolve())
    if preprocess is not None and preprocess.endswith(".toml"):
        preprocess = str(Path(preprocess).resolve())
    return SourceRequest(
        source=source,
        weights=weights,
        preprocess=preprocess,
        input_height=height,
        input_width=width,
        resize_size=resize_size,
        labels=str(labels_file.resolve()) if labels_file is not None else None,
        activation=cast("Activation | None", activation),
        temperature=temperature,
    )


def _is_path(weights: str) -> bool:
    """Neither ``DEFAULT`` or another enum member nor ``random:SEED``, or a file that is there."""
    named = re.fullmatch(r"[A-Z][A-Z0-9_]*|random:.*", weights)
    return named is None or Path(weights).is_file()


def _choices(text: str, known: tuple[str, ...], what: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"--{what} {text!r}: choose, each once, from {','.join(known)}")
    return chosen


def _write_json(path: Path | None, value: object) -> None:
    if path is None:
        return
    data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _console(json_path: Path | None) -> Console:
    """Tables go to stderr when JSON goes to stdout; log files get room for all columns."""
    console = Console(stderr=str(json_path) == "-")
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


_JSON = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="F",
    help="Write the result as JSON to F (- is stdout).",
)
_JOBS = click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=min(4, os.cpu_count() or 1),
    show_default=True,
    help="Child processes at a time.",
)


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar convert zoo:digits-small --calib photos/ -o digits.bundle\n"
    "  nearfar convert torchvision:mobilenet_v2 --weights mnv2.safetensors \\\n"
    "      --preprocess torchvision --input-size 224 --resize-size 256 \\\n"
    "      --labels imagenet.txt --calib photos/ -o mnv2.bundle\n"
    "  nearfar convert nets.py:my_net --weights my.pth --preprocess tf \\\n"
    "      --input-size 224 --to tflite --precision fp16 -o my.bundle\n"
)
@_source_options
@click.option(
    "--to", "to_formats", default=",".join(FORMATS), show_default=True, metavar="F,F",
    help="Formats.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", default=",".join(OFFERED), show_default=True, metavar="P,P",
    help="Precisions; each format gets those it has.",
)  # fmt: skip
@click.option(
    "--calib", type=click.Path(path_type=Path), metavar="DIR",
    help="Real images for the int8 ranges, about 100.",
)  # fmt: skip
@click.option(
    "--calib-labels", type=click.Path(path_type=Path), metavar="CSV",
    help="file,class_index[,split]: which images to take, and a check that they fit the model.",
)  # fmt: skip
@click.option("--calib-split", metavar="S", help="Take only this split of the CSV.")
@_JOBS
@_JSON
def convert(
    source: str,
    task: str,
    to_formats: str,
    precisions: str,
    calib: Path | None,
    calib_labels: Path | None,
    calib_split: str | None,
    name: str | None,
    model_version: str,
    output: Path,
    force: bool,
    quiet: bool,
    jobs: int,
    json_path: Path | None,
    **source_options: Any,
) -> None:
    """Convert a trained model into a bundle of mobile variants, each proven.

    Every conversion runs in its own process; every saved file is loaded again by the
    interpreter that will serve it and compared with the fp32 model. Exit status: 0 all
    variants passed their gates, 1 one did not (it is marked not to ship), 2 bad input,
    3 a backend is missing.
    """
    del task
    request = _source_request(source, **source_options)
    targets, refused = plan(
        cast("list[Format]", _choices(to_formats, FORMATS, "to")),
        cast("list[Precision]", _choices(precisions, OFFERED, "precision")),
    )
    data = None
    if calib is not None:
        data = read_dataset(calib, labels=calib_labels, split=calib_split, purpose="calibration")
        if len(set(image_digests(data.files))) != len(data.files):
            click.echo("note: the calibration folder holds some images twice", err=True)
    elif calib_labels is not None or calib_split is not None:
        raise ConfigError("--calib-labels and --calib-split need --calib DIR")
    console = _console(json_path)
    for sentence in refused:
        console.print(f"left out: {sentence}", highlight=False)
    with JobProgress(quiet=quiet) as progress:
        outcome = convert_source(
            Conversion(
                source=request,
                targets=targets,
                output=output,
                calibration=data,
                name=name,
                version=model_version,
                force=force,
                jobs=jobs,
                listener=progress.update,
            )
        )
    print_report(outcome.report, console, outcome.seconds)
    if not outcome.labels_given:
        console.print("no --labels given: classes are named by their number")
    console.print(f"pre-processing: {describe_preprocess(outcome.manifest.preprocess)}")
    peak = max(outcome.peak_rss_bytes.values()) / 2**30
    console.print(f"wrote {output} (largest child process: {peak:.1f} GB)", highlight=False)
    _write_json(json_path, outcome)
    sys.exit(outcome.report.exit_code)


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar verify digits.bundle --eval photos/\n"
    "  nearfar verify mnv2.bundle --eval photos/ --labels labels.csv --split eval \\\n"
    "      --json proof.json --junit proof.xml\n"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--eval", "eval_dir", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="Real images that were not used for calibration.",
)  # fmt: skip
@click.option(
    "--labels", type=click.Path(path_type=Path), metavar="CSV",
    help="file,class_index[,split]: accuracy, and proof of the declared pre-processing.",
)  # fmt: skip
@click.option("--split", metavar="S", help="Take only this split of the CSV.")
@click.option("--reference", metavar="SOURCE", help="Compare with this source instead.")
@click.option("--weights", metavar="F", help="Weights of --reference.")
@click.option(
    "--gates", type=click.Path(path_type=Path), metavar="TOML",
    help="Other bounds than the default, a table for each precision.",
)  # fmt: skip
@click.option(
    "--junit", "junit_path", type=click.Path(path_type=Path), metavar="F",
    help="Write JUnit XML for CI.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
@_JOBS
@_JSON
def verify(
    bundle: Path,
    eval_dir: Path,
    labels: Path | None,
    split: str | None,
    reference: str | None,
    weights: str | None,
    gates: Path | None,
    junit_path: Path | None,
    quiet: bool,
    jobs: int,
    json_path: Path | None,
) -> None:
    """Prove every saved file of BUNDLE against its fp32 reference, on real images.

    With --labels the reference is also run under every named pre-processing: one that
    explains the labels better than the declared one is an error. Exit status: 0 all passed,
    1 a gate or check failed, 2 bad input, 3 a backend is missing.
    """
    opened = Bundle.open(bundle)
    if weights is not None and reference is None:
        raise ConfigError("--weights belongs to --reference SOURCE")
    source = None
    if reference is not None:
        source = _reference_source(opened, reference, weights)
    data = read_dataset(eval_dir, labels=labels, split=split, purpose="evaluation")
    if data.classes is not None and opened.manifest.labels is not None:
        worst = max(data.classes)
        if worst >= opened.manifest.labels.count:
            raise EvaluationError(
                f"a label is {worst}, the bundle has classes 0 to "
                f"{opened.manifest.labels.count - 1}"
            )
    with JobProgress(quiet=quiet) as progress:
        report = verify_bundle(
            opened,
            data,
            Options(gates=read_gates(gates), reference=source, jobs=jobs, listener=progress.update),
        )
    print_report(report, _console(json_path))
    _write_json(json_path, report)
    if junit_path is not None:
        write_junit(report, junit_path)
    sys.exit(report.exit_code)


def _reference_source(bundle: Bundle, reference: str, weights: str | None) -> SourceRequest:
    """The source at the bundle's input size; how it is fed comes from the bundle."""
    height, width = bundle.manifest.preprocess.size
    return _source_request(
        reference,
        weights=weights,
        labels_file=None,
        preprocess="raw",
        input_size=f"{height}x{width}",
        resize_size=None,
        activation=None,
        temperature=None,
    )


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar export zoo:digits-large -o servables/digits-large\n"
    "  nearfar export torchvision:resnet50 --weights r50.safetensors \\\n"
    "      --preprocess torchvision --input-size 224 -o servables/resnet50\n"
    "  nearfar serve --models servables\n"
)
@_source_options
@_JSON
def export(
    source: str,
    task: str,
    name: str | None,
    model_version: str,
    output: Path,
    force: bool,
    quiet: bool,
    json_path: Path | None,
    **source_options: Any,
) -> None:
    """Export a full-size model as a servable that the broker loads."""
    del task
    with JobProgress(quiet=quiet) as progress:
        servable = export_servable(
            Export(
                source=_source_request(source, **source_options),
                output=output,
                name=name,
                version=model_version,
                force=force,
                listener=progress.update,
            )
        )
    _console(json_path).print(
        f"wrote {output}: {servable.name} {servable.version}, "
        f"{describe_preprocess(servable.preprocess)}",
        highlight=False,
    )
    _write_json(json_path, servable)


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar inspect digits.bundle\n"
    "  nearfar inspect digits.bundle --json -\n"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@_JSON
def inspect(bundle: Path, json_path: Path | None) -> None:
    """Check BUNDLE's files against its manifest and print what is in it."""
    manifest = Bundle.open(bundle).manifest
    print_manifest(manifest, _console(json_path))
    _write_json(json_path, manifest)


@click.command(epilog="\b\nExample:\n  nearfar formats\n")
def formats() -> None:
    """Print which precision each format has, and why not where it has not."""
    console = Console()
    table = Table()
    table.add_column("format")
    for precision in OFFERED:
        table.add_column(precision)
    for format_name in FORMATS:
        row: list[str] = [format_name]
        for precision in OFFERED:
            recipe = RECIPES.get((format_name, precision))
            if recipe is None:
                row.append("[red]refused[/red]")
            else:
                row.append("calibrated" if recipe.calibrated else "yes")
        table.add_row(*row)
    console.print(table)
    for (format_name, precision), reason in REFUSED.items():
        console.print(f"{format_name} {precision}: {reason}", highlight=False)
