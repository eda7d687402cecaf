"""``nearfar replay`` and ``nearfar explain``: read a decision log."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.gain.store import read_gain
from edge_runtime.log.reader import LogFile, read_log
from edge_runtime.log.replay import Replay, WhatIf, compare
from edge_runtime.log.replay import replay as replayed
from edge_runtime.log.report import explain_html, replay_html, what_if_rows
from edge_runtime.log.terminal import explain_text
from edge_runtime.page import clean, write_file
from edge_runtime.policies.adaptive import GainPrior
from edge_runtime.policies.registry import find_policy

__all__ = ["explain", "replay"]

_SHOWN = 10


@click.command(
    epilog="""\b
Examples:
  nearfar replay decisions.jsonl
  nearfar replay decisions.jsonl --policy PREFER_IN_CLOUD --html replay.html
  nearfar replay decisions.jsonl --policy ADAPTIVE --gain gain/VARIANT-CLOUD.json
\b
Exit status: 0 every decision comes out as logged (or another policy was asked for); 1 one
does not; 2 the log cannot be read.
"""
)
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--policy", metavar="P", help="Show what this policy would have done instead.")
@click.option("--gain", "gain_file", type=click.Path(path_type=Path), metavar="F",
              help="With --policy: judge by this measured gain, not by the prior.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="F",
              help="Write the outcome as JSON.")  # fmt: skip
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="F",
              help="Write it as a page.")  # fmt: skip
def replay(
    log: Path,
    policy: str | None,
    gain_file: Path | None,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Make the decisions of LOG again, by the same policy or by another one.

    The same policy must decide the same from the same inputs, bit for bit. Another one is
    compared by what it would have done, and by what it expected of it.
    """
    if gain_file is not None and policy is None:
        raise click.UsageError("--gain judges what --policy would have done")
    gain = GainPrior() if gain_file is None else read_gain(gain_file).curve
    read = read_log(log)
    for notice in read.notices:
        click.echo(f"notice: {notice}", err=True)
    if not read.entries:
        raise ConfigError("the log holds no request yet: nothing can be replayed")
    again = replayed(read) if policy is None else None
    other = None if policy is None else compare(read, find_policy(policy), gain)
    if json_file is not None:
        write_file(json_file, _document(read, again, other))
    if html_file is not None:
        write_file(html_file, replay_html(read, again, other).encode())
    if other is not None:
        _print_what_if(other)
    if again is not None:
        _print_replay(again)
        if again.mismatched:
            raise click.exceptions.Exit(1)


def _document(log: LogFile, again: Replay | None, other: WhatIf | None) -> bytes:
    value = {"notices": log.notices, "replay": again, "what_if": other}
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _print_replay(found: Replay) -> None:
    names = ", ".join(found.policies)
    if not found.mismatched:
        click.echo(
            clean(f"{found.decisions} decisions of {found.requests} requests come out as logged, "
                  f"bit for bit ({names})")
        )  # fmt: skip
        return
    click.echo(f"{found.mismatched} of {found.decisions} decisions come out otherwise:")
    for one in found.mismatches[:_SHOWN]:
        said = "; ".join(one.fields)
        click.echo(clean(f"  line {one.line}, step {one.step + 1}: {said}"))
    if found.mismatched > _SHOWN:
        click.echo(f"  and {found.mismatched - _SHOWN} more")


def _print_what_if(found: WhatIf) -> None:
    click.echo(
        f"{found.policy} would have ended otherwise for {found.changed} of {found.requests} "
        "requests"
    )
    click.echo(f"  {'':<30}{'as logged':>14}{found.policy[:24]:>26}")
    for name, logged, other in what_if_rows(found):
        click.echo(f"  {name:<30}{logged:>14}{other:>26}")
    click.echo("  actions, as logged -> then:")
    for before, after, count in found.changes:
        click.echo(f"    {before:<12} -> {after:<12}{count:>9}")
    if found.unanswerable:
        click.echo(
            f"  {found.unanswerable} requests lack the local answer it would have waited for"
        )


@click.command(
    epilog="""\b
Examples:
  nearfar explain decisions.jsonl
  nearfar explain decisions.jsonl --line 17 --html decision.html
"""
)
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--request", "request_id", metavar="ID", help="The request of this id.")
@click.option("--line", type=click.IntRange(min=1), metavar="N", help="The request on this line.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="F",
              help="Write a page with pictures.")  # fmt: skip
def explain(log: Path, request_id: str | None, line: int | None, html_file: Path | None) -> None:
    """Show one decision of LOG: what was known, expected, decided and measured.

    Without --request or --line, the last request.
    """
    if request_id is not None and line is not None:
        raise click.UsageError("pass --request or --line, not both")
    read = read_log(log)
    for notice in read.notices:
        click.echo(f"notice: {notice}", err=True)
    found = read.find(request=request_id, line=line)
    if html_file is not None:
        write_file(html_file, explain_html(found).encode())
    for text in explain_text(found):
        click.echo(text)
