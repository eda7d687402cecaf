"""The ``nearfar`` command: gathers its subcommands from entry points.

A subcommand is a click command in the entry-point group ``nearfar.commands``. Only the
one that runs is imported, so ``nearfar --help`` stays fast and a missing extra breaks
nothing but the commands that need it.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import EntryPoint, entry_points, version

import click

from edge_runtime.contract.errors import BackendUnavailable, NearfarError

__all__ = ["main"]

_GROUP = "nearfar.commands"


_EXTRAS = {"broker": "broker", "converters": "convert", "edge_runtime": "edge"}


def _missing(name: str, extra: str, package: str | None) -> click.Command:
    """Stands for a command whose extra is not installed: listed, and says what to do."""

    def refuse() -> None:
        raise BackendUnavailable(
            f"'nearfar {name}' needs {package or 'a package'}, which is not installed: "
            f"pip install 'nearfar[{extra}]'"
        )

    return click.Command(
        name,
        callback=refuse,
        short_help=f"(not installed: pip install 'nearfar[{extra}]')",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


class _Commands(click.Group):
    """Subcommands that load when they are called."""

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self._points(), *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        point = self._points().get(name)
        if point is None:
            return super().get_command(ctx, name)
        try:
            command = point.load()
        except ImportError as error:
            return _missing(name, _EXTRAS.get(point.module.partition(".")[0], "all"), error.name)
        assert isinstance(command, click.Command)  # noqa: S101  # a wrong registration
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has its own --help with examples.",
)
@click.version_option(version("nearfar"), prog_name="nearfar")
def nearfar() -> None:
    """Image models near (on the device) and far (in the cloud).

    convert and verify make bundles of mobile variants and prove them right; run answers
    images with a bundle, locally or through a broker; export and serve run the broker;
    demo shows it all in one go.
    """


def main() -> None:
    """Entry point: a ``NearfarError`` becomes one line, never a traceback.

    Exit status 2, or 3 when a backend is not installed. SIGTERM ends a command as Ctrl-C
    does, with its temporary files removed and its children stopped; exit status 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        nearfar(prog_name="nearfar")
    except NearfarError as error:
        click.echo(f"error [{error.code}]: {error.detail}", err=True)
        sys.exit(3 if isinstance(error, BackendUnavailable) else 2)
    except ModuleNotFoundError as error:  # an extra that a command imports when it runs
        if (error.name or "").partition(".")[0] in _EXTRAS:
            raise
        click.echo(
            f"error [{BackendUnavailable.code}]: {error.name} is not installed: "
            "pip install 'nearfar[all]'",
            err=True,
        )
        sys.exit(3)
