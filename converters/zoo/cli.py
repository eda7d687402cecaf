"""``nearfar zoo``: list the zoo, train it, render its photos."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from converters.zoo import ZOO, ZooModel
from converters.zoo.digits import SPLITS, Split, indices, write_split
from converters.zoo.weights import WeightsRecord, read_record, weights_file

__all__ = ["zoo"]

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress.")


@contextmanager
def _shown_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each message on a terminal; one line for each elsewhere."""
    console = Console(stderr=True)
    lock = threading.Lock()
    tasks: dict[str, TaskID] = {}
    bars = Progress(
        TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn(), console=console
    )

    def update(message: str, done: int, total: int) -> None:
        with lock:
            if message not in tasks:
                tasks[message] = bars.add_task(message, total=None)
                if not console.is_terminal and not quiet:
                    print(message, file=sys.stderr, flush=True)  # noqa: T201
            bars.update(tasks[message], completed=done, total=total or None)

    if console.is_terminal and not quiet:
        with bars:
            yield update
            for task in tasks.values():
                bars.update(task, total=1, completed=1)
    else:
        yield update


def _describe(model: ZooModel, record: WeightsRecord | None) -> dict[str, Any]:
    return {
        "name": model.name,
        "input_size": model.input_size,
        "parameters": model.parameters,
        "classes": len(model.labels),
        "weights": str(weights_file(model.name)) if record else None,
        "test_accuracy": record.test_accuracy if record else None,
        "test_photos": record.test_photos if record else None,
        "temperature": record.temperature if record else None,
    }


def _print_models(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"models": rows}, indent=2))
        return
    for row in rows:
        text = (
            f"{row['name']}: input {row['input_size']}x{row['input_size']} RGB, "
            f"{row['parameters']:,} parameters, "
        )
        if row["weights"] is None:
            text += f"not trained yet (nearfar zoo train {row['name']})"
        else:
            text += (
                f"{row['test_accuracy']:.1%} right on {row['test_photos']} test photos, "
                f"temperature {row['temperature']:.2f}"
            )
        click.echo(text)


@click.group(
    epilog="\b\nExamples:\n"
    "  nearfar zoo train\n"
    "  nearfar zoo render --split test -o photos/test\n"
    "  nearfar convert zoo:digits-small --calib photos/calib -o digits.bundle\n"
)
def zoo() -> None:
    """Two digit classifiers that need no download, and photos for them.

    They are trained on scikit-learn's 1797 real scans, rendered as phone photos. Weights
    are kept in $NEARFAR_CACHE (default: ~/.cache/nearfar).
    """


@zoo.command(name="list", epilog="\b\nExamples:\n  nearfar zoo list --json\n")
@_JSON
def list_models(as_json: bool) -> None:
    """Show the models, and the measured accuracy of those that are trained."""
    rows = [_describe(model, read_record(weights_file(name))) for name, model in ZOO.items()]
    _print_models(rows, as_json=as_json)


@zoo.command(epilog="\b\nExamples:\n  nearfar zoo train\n  nearfar zoo train digits-small --json\n")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(sorted(ZOO)))
@_JSON
@_QUIET
def train(names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Train the named models (default: all) where the cache has no sound weights.

    Deterministic; about half a minute for digits-small, a bit more than one for
    digits-large, at once on two cores. Prints the accuracy on the held-out test photos.
    """
    chosen = list(dict.fromkeys(names)) or list(ZOO)
    with _shown_progress(quiet=quiet) as update, ThreadPoolExecutor(len(chosen)) as pool:
        futures = [pool.submit(ZOO[name].record, update) for name in chosen]
        records = [future.result() for future in futures]
    rows = [_describe(ZOO[name], record) for name, record in zip(chosen, records, strict=True)]
    _print_models(rows, as_json=as_json)


@zoo.command(
    epilog="\b\nExamples:\n"
    "  nearfar zoo render --split test -o photos/test\n"
    "  nearfar zoo render --split calib --count 50 -o photos/calib --json\n"
)
@click.option(
    "--split", "split_name", type=click.Choice(SPLITS), required=True,
    help="Which scans: no scan is in two splits.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="Folder to write; it must not exist.",
)  # fmt: skip
@click.option("--count", type=int, metavar="N", help="Only the first N scans  [default: all]")
@click.option("--force", is_flag=True, help="Replace a folder that this command wrote.")
@_JSON
@_QUIET
def render(
    split_name: str, output: Path, count: int | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Write one photo (JPEG) of each scan of a split, and labels.csv.

    The same command gives the same bytes. labels.csv has the columns
    file,class_index,split.
    """
    with _shown_progress(quiet=quiet) as update:
        photos = write_split(
            output,
            cast("Split", split_name),
            count,
            replace=force,
            progress=update,
        )
    sizes = [photo.stat().st_size for photo in photos]
    if as_json:
        answer = {
            "folder": str(output),
            "split": split_name,
            "photos": len(photos),
            "available": len(indices(cast("Split", split_name))),
            "size_bytes": sum(sizes),
        }
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(
        f"wrote {len(photos)} {split_name} photos and labels.csv to {output} "
        f"({min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} kB each)"
    )
