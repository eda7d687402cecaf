"""Commands of the converters: convert, verify, export, inspect, formats."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, cast, get_args

import click
from rich import box
from rich.console import Console
from rich.table import Table

from converters.convert import Conversion
from converters.convert import convert as convert_source
from converters.dataset import Dataset, image_digests, read_dataset
from converters.export import Export, export_servable
from converters.jobs import InGraph, SourceRequest
from converters.options import (
    JOBS,
    JSON,
    choose_console,
    choose_many,
    optional_source_options,
    source_options,
    source_request,
    write_json,
)
from converters.plan import FileOptions, plan
from converters.progress import JobProgress
from converters.project import convert_project
from converters.ranges import parse_ranges
from converters.recipes import FORMATS, OFFERED, RECIPES, REFUSED
from converters.report.html import write_html
from converters.report.junit import write_junit
from converters.report.layers_table import print_layers
from converters.report.records import Sample
from converters.report.table import describe_preprocess, print_manifest, print_report
from converters.resume import JobCache
from converters.verify.gates import read_gates
from converters.verify.outcome import Options
from converters.verify.verify import verify_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError, EvaluationError
from edge_runtime.contract.manifest import Format, InputMode, MinOs, Precision
from edge_runtime.contract.tasks import task_name

__all__ = ["convert", "export", "formats", "inspect", "verify"]


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar convert zoo:digits-small --calib photos/ -o digits.bundle\n"
    "  nearfar convert torchvision:mobilenet_v2 --weights mnv2.safetensors \\\n"
    "      --preprocess torchvision --input-size 224 --resize-size 256 \\\n"
    "      --labels imagenet.txt --calib photos/ -o mnv2.bundle\n"
    "  nearfar convert nets.py:my_net --weights my.pth --preprocess tf \\\n"
    "      --input-size 224 --to tflite --precision fp16 -o my.bundle\n"
)
@optional_source_options
@click.option(
    "--to", "to_formats", default="torchscript,tflite,coreml", show_default=True,
    metavar="F,F", help=f"Formats: {', '.join(FORMATS)}, or all.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", default="fp32,fp16,int8", show_default=True, metavar="P,P",
    help=f"Each format gets those it has: {', '.join(OFFERED)}, or all.",
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
@click.option(
    "--ranges", default="minmax", show_default=True, metavar="R",
    help="Range of an int8 activation: minmax, mse (least squared error), or percentile:P.",
)  # fmt: skip
@click.option(
    "--allow-synthetic-calibration", "noise", is_flag=True,
    help="Without --calib, set int8 ranges from noise: stamped in the manifest; accuracy "
    "suffers badly.",
)  # fmt: skip
@click.option(
    "--input", "input_mode", type=click.Choice(get_args(InputMode)), default="float",
    show_default=True,
    help="uint8: the file takes 8-bit pixels, with normalization and channel order inside; "
    "image: the same behind the platform's image type (Core ML).",
)  # fmt: skip
@click.option("--nms", is_flag=True, help="Detection: decode and exact NMS inside the file.")
@click.option("--argmax", is_flag=True, help="Segmentation: classes, not scores, come out.")
@click.option(
    "--gates", type=click.Path(path_type=Path), metavar="TOML",
    help="Other bounds than the default, a table for each precision.",
)  # fmt: skip
@click.option(
    "--auto", is_flag=True,
    help="Where a gate fails, find the fewest layers to keep in floating point, or fall back "
    "to the next precision; says which, and what it cost.",
)  # fmt: skip
@click.option(
    "--keep", metavar="M,M",
    help="Modules of the model that stay in floating point where activations are quantized "
    "(int8, a16w8), by their names in it; --auto keeps more if need be.",
)  # fmt: skip
@click.option(
    "--keep-going", is_flag=True,
    help="Leave out variants that cannot be written, name them, and exit with 1.",
)  # fmt: skip
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="TOML",
    help="Convert and verify every model of this file instead of SOURCE: see docs/ci.md.",
)  # fmt: skip
@click.option(
    "--reports", type=click.Path(path_type=Path), metavar="DIR",
    help="With --config: JSON, JUnit and HTML of each verification.",
)  # fmt: skip
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR",
    help="Keep finished steps in DIR, by content, and take them up again.",
)  # fmt: skip
@click.option("--min-ios", metavar="N", help="Oldest iOS the app runs on, for example 16.")
@click.option(
    "--min-android-api", type=click.IntRange(21, 100), metavar="N",
    help="Oldest Android API level the app runs on.",
)  # fmt: skip
@JOBS
@JSON
def convert(
    source: str | None,
    task: str,
    to_formats: str,
    precisions: str,
    calib: Path | None,
    calib_labels: Path | None,
    calib_split: str | None,
    ranges: str,
    noise: bool,
    input_mode: str,
    nms: bool,
    argmax: bool,
    gates: Path | None,
    auto: bool,
    keep: str | None,
    keep_going: bool,
    config: Path | None,
    reports: Path | None,
    resume: Path | None,
    min_ios: str | None,
    min_android_api: int | None,
    name: str | None,
    model_version: str,
    output: Path | None,
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
    if config is not None:
        shared = [f"--jobs={jobs}"]
        shared += ["--force"] if force else []
        shared += ["--quiet"] if quiet else []
        shared += [f"--resume={resume.absolute()}"] if resume is not None else []
        sys.exit(convert_project(config, shared, reports=reports, quiet=quiet))
    if source is None or output is None:
        raise ConfigError("name a SOURCE and a folder to write (-o), or pass --config TOML")
    if reports is not None:
        raise ConfigError("--reports goes with --config; for one bundle use nearfar verify --html")
    request = source_request(source, task=task, **source_options)
    options = _file_options(input_mode, nms, argmax, min_ios, min_android_api, keep)
    targets, refused = plan(
        cast("list[Format]", choose_many(to_formats, FORMATS, "to")),
        cast("list[Precision]", choose_many(precisions, OFFERED, "precision")),
        options,
    )
    if options.keep and not any(target.recipe.calibrated for target in targets):
        raise ConfigError("--keep goes with int8 or a16w8: no other precision is asked for")
    data = None
    if calib is not None:
        data = read_dataset(calib, labels=calib_labels, split=calib_split, purpose="calibration")
        if len(set(image_digests(data.files))) != len(data.files):
            click.echo("note: the calibration folder holds some images twice", err=True)
    elif calib_labels is not None or calib_split is not None:
        raise ConfigError("--calib-labels and --calib-split need --calib DIR")
    console = choose_console(json_path)
    for sentence in refused:
        console.print(f"left out: {sentence}", highlight=False)
    with JobProgress(quiet=quiet) as progress:
        outcome = convert_source(
            Conversion(
                source=request,
                targets=targets,
                output=output,
                calibration=data,
                noise=noise,
                ranges=parse_ranges(ranges),
                options=options,
                gates=read_gates(gates, request.task),
                name=name,
                version=model_version,
                force=force,
                auto=auto,
                keep_going=keep_going,
                cache=JobCache(resume) if resume is not None else None,
                jobs=jobs,
                listener=progress.update,
            )
        )
    print_report(outcome.report, console, outcome.seconds)
    for variant_id, done in outcome.restored.items():
        console.print(done.sentence(variant_id), highlight=False)
    for name_left, found in outcome.left_out.items():
        console.print(f"[red]{name_left}[/red] was not written: {found.detail}", highlight=False)
    if not outcome.labels_given and outcome.manifest.labels is not None:
        console.print("no --labels given: classes are named by their number")
    if outcome.manifest.preprocess is not None:
        console.print(f"pre-processing: {describe_preprocess(outcome.manifest.preprocess)}")
    peak = max(outcome.peak_rss_bytes.values()) / 2**30
    console.print(f"wrote {output} (largest child process: {peak:.1f} GB)", highlight=False)
    write_json(json_path, outcome)
    sys.exit(outcome.report.exit_code or (1 if outcome.left_out else 0))


def _file_options(
    input_mode: str,
    nms: bool,
    argmax: bool,
    min_ios: str | None,
    min_android_api: int | None,
    keep: str | None,
) -> FileOptions:
    in_graph: list[InGraph] = []
    if nms:
        in_graph.append("nms")
    if argmax:
        in_graph.append("argmax")
    least = None
    if min_ios is not None or min_android_api is not None:
        if min_ios is not None and not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,2})?", min_ios):
            raise ConfigError(f"--min-ios {min_ios!r}: write a version, for example 16 or 17.2")
        least = MinOs(ios=min_ios, android_api=min_android_api)
    return FileOptions(
        input_mode=cast("InputMode", input_mode),
        in_graph=tuple(in_graph),
        min_os=least,
        keep=tuple(dict.fromkeys(filter(None, map(str.strip, (keep or "").split(","))))),
    )


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar verify digits.bundle --eval photos/\n"
    "  nearfar verify mnv2.bundle --eval photos/ --labels labels.csv --split eval \\\n"
    "      --json proof.json --junit proof.xml\n"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--eval", "eval_dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Real images that were not used for calibration; a generator needs none.",
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
    "--bisect", is_flag=True,
    help="Compare every file layer by layer and print where it loses most; a failed one "
    "always is, and the first layer that diverges is named.",
)  # fmt: skip
@click.option(
    "--junit", "junit_path", type=click.Path(path_type=Path), metavar="F",
    help="Write JUnit XML for CI.",
)  # fmt: skip
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path), metavar="F",
    help="Write one self-contained page: charts, layers, sample images with both answers.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
@JOBS
@JSON
def verify(
    bundle: Path,
    eval_dir: Path | None,
    labels: Path | None,
    split: str | None,
    reference: str | None,
    weights: str | None,
    gates: Path | None,
    bisect: bool,
    junit_path: Path | None,
    html_path: Path | None,
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
    data = _evaluation_data(opened, eval_dir, labels, split)
    bounds = read_gates(gates, task_name(opened.manifest.task))
    samples: list[Sample] = []
    with JobProgress(quiet=quiet) as progress:
        report = verify_bundle(
            opened,
            data,
            Options(
                gates=bounds,
                reference=source,
                jobs=jobs,
                layers=bisect or html_path is not None,
                samples=samples if html_path is not None else None,
                listener=progress.update,
            ),
        )
    console = choose_console(json_path)
    print_report(report, console)
    if bisect:
        print_layers(report, console)
    write_json(json_path, report)
    if junit_path is not None:
        write_junit(report, junit_path)
    if html_path is not None:
        write_html(report, html_path, bundle=opened, samples=samples, gates=bounds)
        console.print(f"wrote {html_path}", highlight=False)
    sys.exit(report.exit_code)


def _evaluation_data(
    bundle: Bundle, folder: Path | None, labels: Path | None, split: str | None
) -> Dataset:
    if folder is None:
        if bundle.manifest.preprocess is not None:
            raise ConfigError("pass --eval DIR: real images that were not used for calibration")
        return Dataset(files=())
    data = read_dataset(folder, labels=labels, split=split, purpose="evaluation")
    record = bundle.manifest.labels
    if data.classes is not None and record is not None and max(data.classes) >= record.count:
        raise EvaluationError(
            f"a label is {max(data.classes)}, the bundle has classes 0 to {record.count - 1}"
        )
    return data


def _reference_source(bundle: Bundle, reference: str, weights: str | None) -> SourceRequest:
    """The source at the bundle's input size; how it is fed comes from the bundle."""
    manifest = bundle.manifest
    size, latent = None, None
    if manifest.preprocess is not None:
        size = "x".join(str(side) for side in manifest.preprocess.size)
    elif manifest.reference is not None:
        latent = "x".join(str(side) for side in manifest.reference.inputs[0].shape[1:])
    return source_request(
        reference,
        task=task_name(manifest.task),
        weights=weights,
        preprocess="raw" if size is not None else None,
        input_size=size,
        latent=latent,
    )


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar export zoo:digits-large -o servables/digits-large\n"
    "  nearfar export torchvision:resnet50 --weights r50.safetensors \\\n"
    "      --preprocess torchvision --input-size 224 -o servables/resnet50\n"
    "  nearfar serve --models servables\n"
)
@source_options
@JSON
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
    with JobProgress(quiet=quiet) as progress:
        servable = export_servable(
            Export(
                source=source_request(source, task=task, **source_options),
                output=output,
                name=name,
                version=model_version,
                force=force,
                listener=progress.update,
            )
        )
    choose_console(json_path).print(
        f"wrote {output}: {servable.name} {servable.version}, {task_name(servable.task)}, "
        + (describe_preprocess(servable.preprocess) if servable.preprocess else "from a seed"),
        highlight=False,
    )
    write_json(json_path, servable)


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar inspect digits.bundle\n"
    "  nearfar inspect digits.bundle --json -\n"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@JSON
def inspect(bundle: Path, json_path: Path | None) -> None:
    """Check BUNDLE's files against its manifest and print what is in it."""
    manifest = Bundle.open(bundle).manifest
    print_manifest(manifest, choose_console(json_path))
    write_json(json_path, manifest)


@click.command(epilog="\b\nExample:\n  nearfar formats\n")
def formats() -> None:
    """Print which precision each format has, and why not where it has not."""
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("precision")
    for format_name in FORMATS:
        table.add_column(format_name, justify="center")
    for precision in OFFERED:
        table.add_row(precision, *(_offer(format_name, precision) for format_name in FORMATS))
    console.print(table)
    console.print("images: needs calibration images; better: needs none, is closer with them\n")
    for (format_name, precision), reason in REFUSED.items():
        console.print(f"{format_name} {precision}: {reason}", highlight=False)


def _offer(format_name: Format, precision: Precision) -> str:
    recipe = RECIPES.get((format_name, precision))
    if recipe is None:
        return "[dim]no[/dim]"
    if recipe.calibrated:
        return "images"
    return "better" if recipe.gains else "yes"
