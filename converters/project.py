"""Convert and verify every model of a ``nearfar.toml``, as the two commands would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from converters.config import ModelConfig, load_config, to_arguments, to_verify_arguments
from edge_runtime.contract.errors import ConfigError, NearfarError

__all__ = ["convert_project", "worst_status"]

# 0 passed, 1 a gate or check failed, 3 a backend is missing, 2 bad input.
_ORDER = (0, 1, 3, 2)


def worst_status(statuses: Iterable[int]) -> int:
    """One exit status for several: 2 before 3 before 1 before 0."""
    return max(statuses, key=lambda status: _ORDER.index(status) if status in _ORDER else 9)


def convert_project(
    path: Path, options: Sequence[str], *, reports: Path | None = None, quiet: bool = False
) -> int:
    """Convert each model, then verify each that names ``eval``; the worst exit status.

    A failed gate does not stop the others. All models are checked before the first is
    converted.

    Args:
        path: The ``nearfar.toml``.
        options: How to run, for every conversion: ``--jobs=2``, ``--force`` ...
        reports: A folder that gets ``<model>.json``, ``.xml`` (JUnit) and ``.html`` of each
            verification.
        quiet: Do not say which model's turn it is.

    Raises:
        ConfigError: the file, or an option in it, makes no sense.
        NearfarError: a model could not be converted; its name is in front.
    """
    from converters import cli

    models = load_config(path)
    _check_titles(models, path, needed=reports is not None)
    plans = []
    for model in models:
        convert = [*options, *to_arguments(model)]
        verify = _verify_arguments(model, options, reports)
        _parse(cli.convert, convert, model, path)
        plans.append((model, convert, verify))
    statuses = [0]
    for number, (model, convert, verify) in enumerate(plans, 1):
        if not quiet:
            click.echo(f"model {number} of {len(plans)}: {model.title}", err=True)
        statuses.append(_run(cli.convert, convert, model, path))
        if verify is not None:
            statuses.append(_run(cli.verify, verify, model, path))
    return worst_status(statuses)


def _check_titles(models: Sequence[ModelConfig], path: Path, *, needed: bool) -> None:
    """Reports are named after models."""
    titles = [model.title for model in models]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if needed and twice:
        raise ConfigError(f"{path}: two models are called {twice[0]!r}: give each a 'name'")


def _verify_arguments(
    model: ModelConfig, options: Sequence[str], reports: Path | None
) -> list[str] | None:
    arguments = to_verify_arguments(model)
    if arguments is None:
        return None
    shared = [one for one in options if one.startswith(("--jobs", "--quiet"))]
    if reports is not None:
        place = reports.absolute() / model.title
        shared += [
            f"--json={place}.json", f"--junit={place}.xml", f"--html={place}.html",
        ]  # fmt: skip
    return [*shared, *arguments]


def _parse(
    command: click.Command, arguments: Sequence[str], model: ModelConfig, path: Path
) -> click.Context:
    try:
        return command.make_context(command.name, list(arguments))
    except click.UsageError as error:
        raise ConfigError(f"{path}, {model.title}: {error.format_message()}") from None


def _run(command: click.Command, arguments: Sequence[str], model: ModelConfig, path: Path) -> int:
    with _parse(command, arguments, model, path) as context:
        try:
            command.invoke(context)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except NearfarError as error:
            raise type(error)(f"{model.title}: {error.detail}") from error
    return 0
