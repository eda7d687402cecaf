"""``nearfar run``: answer images or seeds with a bundle, on the device or by a broker."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_runtime.bundle import Bundle
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ContractError, NearfarError
from edge_runtime.contract.key_file import read_key_file
from edge_runtime.contract.tasks import ClassificationTask, GenerationTask
from edge_runtime.contract.wire import MAX_SEED
from edge_runtime.output import explain as explained
from edge_runtime.output import to_json, to_text
from edge_runtime.policies.base import InferenceMode
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.saving import Saver

__all__ = ["run"]


@click.command(
    epilog="""\b
Examples:
  nearfar run digits.bundle photo.jpg
  nearfar run digits.bundle *.jpg --broker http://127.0.0.1:8080 --deadline-ms 400
  nearfar run digits.bundle photo.jpg --broker https://broker.example \\
      --api-key-file key.txt --mode PREFER_IN_CLOUD --explain
  nearfar run digits.bundle photo.jpg --variant tflite-int8 --top-k 3 --json
  nearfar run detector.bundle street.jpg --save pictures/
  nearfar run generator.bundle --seed 7 --save pictures/

\b
Exit status: 0 every image or seed was answered; 1 some were not; 2 bad input: the
bundle, an option, or every image.
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="[IMAGE...]", type=click.Path())
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(0, MAX_SEED),
    multiple=True,
    help="For a bundle that generates: make this seed's image. Repeat it for more.",
)
@click.option(
    "--save",
    "save_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write pictures: boxes drawn, masks laid over the photo, images.",
)
@click.option("--broker", metavar="URL", help="Broker to offload to; without it all stays here.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in InferenceMode]),
    default=InferenceMode.ADAPTIVE.value,
    show_default=True,
    help="Where images may be answered.",
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(1, limits.MAX_DEADLINE_MS),
    default=limits.DEFAULT_DEADLINE_MS,
    show_default=True,
    help="Time for each answer, in milliseconds.",
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
    "--top-k", type=click.IntRange(1, limits.MAX_TOP_K), help="Show so many classes or boxes."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the broker's API key on its only line.",
)
@click.option(
    "--allow-plain-http", is_flag=True, help="Send the key over http:// to another machine."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line and answer.")
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Append each decision to this log (see: nearfar explain, nearfar replay).",
)
@click.option("--explain", is_flag=True, help="Print why each image was answered where it was.")
def run(
    bundle: Path,
    images: tuple[str, ...],
    seeds: tuple[int, ...],
    save_dir: Path | None,
    broker: str | None,
    mode: str,
    deadline_ms: float,
    variant: str,
    cloud_model: str | None,
    top_k: int | None,
    api_key_file: Path | None,
    allow_plain_http: bool,
    as_json: bool,
    log: Path | None,
    explain: bool,
) -> None:
    """Answer images, or seeds, with a BUNDLE, on this device or through a broker.

    Each IMAGE is a JPEG, PNG or WebP file. What is printed depends on the bundle's task:
    classes, a table of boxes, the share of each class of a mask, the size of an image.
    """
    api_key = None if api_key_file is None else read_key_file(api_key_file)
    opened = Bundle.open(bundle)
    names = _asked(opened, images, seeds)
    saver = None
    if save_dir is not None:
        if isinstance(opened.manifest.task, ClassificationTask):
            raise click.UsageError("--save: answers of this bundle are classes, not pictures")
        saver = Saver(save_dir)
    failures: list[NearfarError] = []
    with EdgeRuntime(
        opened,
        broker,
        mode,
        variant,
        cloud_model=cloud_model,
        api_key=api_key,
        deadline_ms=deadline_ms,
        allow_plain_http=allow_plain_http,
        log=log,
    ) as runtime:
        if broker is not None:
            runtime.prewarm(wait_ms=deadline_ms)
        if explain and not as_json:
            chosen = runtime.status().variant
            if chosen is not None:
                click.echo(f"variant {chosen.variant}: {chosen.reason}")
        for name in names:
            try:
                result = runtime.generate(int(name)) if seeds else runtime.run(name, top_k=top_k)
            except NearfarError as error:
                failures.append(error)
                _print_failure(name, error, as_json, "seed" if seeds else "image")
                continue
            saved = {} if saver is None else saver.save(name, result)
            show = to_json if as_json else to_text
            click.echo(show(name, result, opened.labels, saved))
            if explain and not as_json:
                click.echo(explained(result))
    if len(failures) == len(names) and all(isinstance(e, ContractError) for e in failures):
        raise click.exceptions.Exit(2)
    if failures:
        raise click.exceptions.Exit(1)


def _asked(bundle: Bundle, images: tuple[str, ...], seeds: tuple[int, ...]) -> list[str]:
    """The images' paths, or the seeds; a bundle takes one or the other."""
    generates = isinstance(bundle.manifest.task, GenerationTask)
    if generates and (images or not seeds):
        raise click.UsageError("this bundle generates images: pass --seed, and no IMAGE")
    if not generates and (seeds or not images):
        raise click.UsageError("this bundle takes images: pass at least one IMAGE, and no --seed")
    return [str(seed) for seed in seeds] if generates else list(images)


def _print_failure(name: str, error: NearfarError, as_json: bool, kind: str) -> None:
    if as_json:
        failure = {"code": error.code, "detail": error.detail, "retryable": error.retryable}
        shown = int(name) if kind == "seed" else name
        click.echo(json.dumps({kind: shown, "failure": failure}))
    click.echo(f"{name}: error [{error.code}]: {error.detail}", err=True)
