"""``nearfar job``: submit slow work, look at it, fetch its answer, cancel it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.key_file import read_key_file
from edge_runtime.contract.wire import MAX_SEED
from edge_runtime.jobs.job import Job
from edge_runtime.output import to_json, to_text
from edge_runtime.policies.base import InferenceMode
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.saving import Saver

__all__ = ["job"]

_POLL_S = 0.05


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every subcommand: which bundle, which broker, where jobs are kept."""
    options = (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.option(
            "--broker",
            "brokers",
            metavar="URL",
            multiple=True,
            help="Broker that runs jobs. Repeat it for more.",
        ),
        click.option(
            "--state",
            type=click.Path(path_type=Path),
            metavar="DIR",
            required=True,
            help="Where jobs are kept between commands.",
        ),
        click.option(
            "--mode",
            type=click.Choice([mode.value for mode in InferenceMode]),
            default=InferenceMode.ADAPTIVE.value,
            show_default=True,
            help="Where jobs may run.",
        ),
        click.option("--cloud-model", metavar="NAME", help="The broker's model."),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path),
            help="File with the broker's API key on its only line.",
        ),
        click.option(
            "--allow-plain-http",
            is_flag=True,
            help="Send the key over http:// to another machine.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@contextlib.contextmanager
def _runtime(
    bundle: Path,
    brokers: tuple[str, ...],
    state: Path,
    mode: str,
    cloud_model: str | None,
    api_key_file: Path | None,
    allow_plain_http: bool,
) -> Iterator[EdgeRuntime]:
    api_key = None if api_key_file is None else read_key_file(api_key_file)
    with EdgeRuntime(
        Bundle.open(bundle),
        brokers or None,
        mode,
        cloud_model=cloud_model,
        api_key=api_key,
        allow_plain_http=allow_plain_http,
        state=state,
    ) as runtime:
        yield runtime


def _find(runtime: EdgeRuntime, job_id: str) -> Job:
    for found in runtime.jobs():
        if found.id == job_id:
            return found
    raise ConfigError(f"no job {job_id!r} is kept here: nearfar job list shows those that are")


def _settle(one: Job, limit_s: float) -> None:
    """Wait until the job is known to be accepted, or has ended."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        status = one.status()
        if status.ended or status.state == "running" or status.place is not None:
            return
        time.sleep(_POLL_S)


def _show(one: Job) -> None:
    click.echo(msgspec.json.encode(one.status()).decode())


_wait_option = click.option(
    "--wait-s",
    type=click.FloatRange(0, 3600),
    default=5.0,
    show_default=True,
    help="Seconds to wait for news of the broker.",
)


@click.group(
    epilog="""\b
Examples:
  nearfar job submit painter.bundle --seed 7 --broker http://127.0.0.1:8080 --state jobs/
  nearfar job list painter.bundle --broker http://127.0.0.1:8080 --state jobs/
  nearfar job result painter.bundle ID --broker http://127.0.0.1:8080 --state jobs/ --save .
  nearfar job cancel painter.bundle ID --broker http://127.0.0.1:8080 --state jobs/
"""
)
def job() -> None:
    """Submit slow work to a broker, and come back for it.

    A job is kept in the --state folder, so that any later command finds it (docs/jobs.md).
    """


@job.command(epilog="Example: nearfar job submit digits.bundle a.jpg --broker URL --state jobs/")
@_common
@click.argument("images", nargs=-1, metavar="[IMAGE...]", type=click.Path())
@click.option("--seed", "seeds", type=click.IntRange(0, MAX_SEED), multiple=True,
              help="For a bundle that generates. Repeat it for more.")  # fmt: skip
@_wait_option
def submit(images: tuple[str, ...], seeds: tuple[int, ...], wait_s: float, **where: Any) -> None:
    """Begin jobs for images or seeds; print each as JSON.

    One that the broker could not be told of within --wait-s is kept, and sent by a later
    command.
    """
    if not images and not seeds:
        raise click.UsageError("pass at least one IMAGE, or --seed")
    with _runtime(**where) as runtime:
        made = [runtime.submit(image) for image in images]
        made += [runtime.submit(seed) for seed in seeds]
        for one in made:
            _settle(one, wait_s)
            _show(one)


@job.command(name="list", epilog="Example: nearfar job list digits.bundle --state jobs/")
@_common
@_wait_option
def list_jobs(wait_s: float, **where: Any) -> None:
    """Print every job that is kept, one JSON object a line."""
    with _runtime(**where) as runtime:
        for one in runtime.jobs():
            _settle(one, wait_s)
            _show(one)


@job.command(epilog="Example: nearfar job status digits.bundle ID --broker URL --state jobs/")
@_common
@click.argument("job_id", metavar="ID")
@_wait_option
def status(job_id: str, wait_s: float, **where: Any) -> None:
    """Print one job as JSON."""
    with _runtime(**where) as runtime:
        one = _find(runtime, job_id)
        _settle(one, wait_s)
        _show(one)


@job.command(epilog="Example: nearfar job result digits.bundle ID --broker URL --state jobs/")
@_common
@click.argument("job_id", metavar="ID")
@click.option("--timeout-s", type=click.FloatRange(0, 86_400), default=600.0, show_default=True,
              help="How long to wait for it.")  # fmt: skip
@click.option("--save", "save_dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Write an answer that is a picture.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def result(
    job_id: str, timeout_s: float, save_dir: Path | None, as_json: bool, **where: Any
) -> None:
    """Wait for the answer of a job and print it; it is kept until nearfar job cancel."""
    with _runtime(**where) as runtime:
        answer = _find(runtime, job_id).result(timeout_s)
        saved: dict[str, str] = {}
        if save_dir is not None and answer.image is not None:
            saved = Saver(save_dir).save(job_id, answer)
        labels = Bundle.open(where["bundle"]).labels
        if as_json:
            said = json.loads(to_json("0", answer, labels, saved))
            said.pop("seed" if answer.task == "generation" else "image")
            click.echo(json.dumps({"job": job_id, **said}))
        else:
            # the line of a seed begins with "seed", which an id is not
            click.echo(to_text(job_id, answer, labels, saved).removeprefix("seed "))


@job.command(epilog="Example: nearfar job cancel digits.bundle ID --broker URL --state jobs/")
@_common
@click.argument("job_id", metavar="ID")
@_wait_option
def cancel(job_id: str, wait_s: float, **where: Any) -> None:
    """Cancel a job, or forget one that has ended, here and at the broker."""
    with _runtime(**where) as runtime:
        one = _find(runtime, job_id)
        _settle(one, wait_s)
        one.forget()
