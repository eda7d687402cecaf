"""``nearfar calibrate``: measure what the cloud's answer is worth, for one pair of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from edge_runtime.bundle import Bundle
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.key_file import read_key_file
from edge_runtime.contract.manifest import Variant
from edge_runtime.contract.tasks import ClassificationTask, has_labels, task_name
from edge_runtime.gain.agreement import require_agreement
from edge_runtime.gain.build import build_record, today
from edge_runtime.gain.data import Photos, read_photos
from edge_runtime.gain.measure import LocalSide, Measurement, measure
from edge_runtime.gain.report import describe, to_document, to_html
from edge_runtime.gain.store import gain_folder, write_gain
from edge_runtime.page import write_file
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.variants import select_variant

__all__ = ["calibrate"]

_MOST_IMAGES = 20_000


@click.command(
    epilog="""\b
Examples:
  nearfar calibrate digits.bundle --broker http://127.0.0.1:8080 \\
      --data photos --labels photos/labels.csv --html gain.html
  nearfar calibrate digits.bundle --broker https://broker.example --api-key-file key.txt \\
      --data photos --against-cloud
\b
Every image is uploaded. Exit status: 0 the gain was written; 2 bad input, or the broker
does not answer; 3 a backend is missing.
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--broker", metavar="URL", required=True, help="Broker that serves the cloud model.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    required=True,
    help="Images like those the app will see; not those the models were trained on.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="file,class_index[,split], files inside FOLDER.",
)
@click.option("--split", metavar="S", help="Only the CSV's rows of this split.")
@click.option(
    "--against-cloud",
    is_flag=True,
    help="Without labels: measure how often the answers differ; who is right then is a prior.",
)
@click.option(
    "--variant",
    default="auto",
    show_default=True,
    help="auto, a variant's id, or FORMAT-PRECISION (see: nearfar inspect BUNDLE).",
)
@click.option(
    "--cloud-model", metavar="NAME", help="The broker's model; default: the one that fits."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the broker's API key on its only line.",
)
@click.option(
    "--allow-plain-http", is_flag=True, help="Send the key over http:// to another machine."
)
@click.option(
    "--limit",
    type=click.IntRange(1, _MOST_IMAGES),
    default=_MOST_IMAGES,
    show_default=True,
    help="At most so many images, drawn by a fixed seed.",
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(1, limits.MAX_DEADLINE_MS),
    default=30_000,
    show_default=True,
    help="Time for each answer of the broker, in milliseconds.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the gain goes.  [default: gain/ beside BUNDLE]",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="F",
              help="Write the figures as JSON.")  # fmt: skip
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="F",
              help="Write them as a page with pictures.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
def calibrate(
    bundle: Path,
    broker: str,
    data: Path,
    labels: Path | None,
    split: str | None,
    against_cloud: bool,
    variant: str,
    cloud_model: str | None,
    api_key_file: Path | None,
    allow_plain_http: bool,
    limit: int,
    deadline_ms: float,
    output: Path | None,
    json_file: Path | None,
    html_file: Path | None,
    quiet: bool,
) -> None:
    """Measure what the cloud's answer gains over a local variant of BUNDLE.

    Both sides answer every image. What the local confidence says of the gain is fitted, judged
    on the half of the images it was not fitted to, and stored under the digests of both
    models, where the runtime finds it.
    """
    if (labels is None) is not against_cloud:
        raise click.UsageError("pass either --labels CSV, or --against-cloud without labels")
    if split is not None and labels is None:
        raise click.UsageError("--split chooses rows of --labels")
    today()  # a broken clock setting is found before an hour of work
    opened = Bundle.open(bundle)
    task = opened.manifest.task
    require_agreement(task)
    if labels is not None and not isinstance(task, ClassificationTask):
        raise ConfigError(
            f"a class for each image cannot judge {task_name(task)}: pass --against-cloud, which "
            "takes the cloud's answer as the reference"
        )
    classes = task.classes if has_labels(task) else None
    photos = read_photos(data, labels, split=split, class_count=classes, most=limit)
    chosen = _choose(opened, variant)
    api_key = None if api_key_file is None else read_key_file(api_key_file)
    with EdgeRuntime(
        opened,
        broker,
        "ONLY_IN_CLOUD",
        cloud_model=cloud_model,
        api_key=api_key,
        deadline_ms=deadline_ms,
        allow_plain_http=allow_plain_http,
    ) as cloud:
        measured = _measure(opened, chosen, cloud, photos, deadline_ms, quiet=quiet)
    record = build_record(opened, chosen, measured, split=split)
    path = write_gain(gain_folder(opened) if output is None else output, record)
    if json_file is not None:
        document = to_document(record, str(path))
        write_file(json_file, json.dumps(document, indent=2).encode() + b"\n")
    if html_file is not None:
        write_file(html_file, to_html(record).encode())
    for line in describe(record):
        click.echo(line)
    click.echo(f"  written        {path}")


def _choose(bundle: Bundle, wanted: str) -> Variant:
    """The variant that the runtime would take."""
    selection = select_variant(bundle, wanted, fits_ms=limits.DEFAULT_DEADLINE_MS / 2, threads=1)
    selection.pipeline.close()
    return selection.pipeline.variant


def _measure(
    bundle: Bundle,
    variant: Variant,
    cloud: EdgeRuntime,
    photos: Photos,
    deadline_ms: float,
    *,
    quiet: bool,
) -> Measurement:
    local = LocalSide(bundle, variant)
    hidden = quiet or not sys.stderr.isatty()
    try:
        with click.progressbar(
            length=len(photos.files), label=variant.id, file=sys.stderr, hidden=hidden
        ) as bar:
            return measure(
                local,
                cloud,
                photos,
                deadline_ms=deadline_ms,
                progress=lambda done: bar.update(done - bar.pos),
            )
    finally:
        local.close()
