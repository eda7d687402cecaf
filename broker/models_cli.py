"""``nearfar models``: see and change which version of a model answers, on a running broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import click
import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BackendUnavailable,
    BrokerFault,
    ConfigError,
    NetworkUnreachable,
    error_from_code,
)
from edge_runtime.contract.key_file import read_key_file
from edge_runtime.contract.wire import Problem

__all__ = ["models"]

_TIMEOUT_S: Final = 30.0
_MAX_ANSWER_BYTES: Final = 4 * 2**20


def _common(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--broker", "url", metavar="URL", required=True, help="The broker."),
        click.option(
            "--api-key-file",
            "key_file",
            type=click.Path(path_type=Path),
            help="File with an API key on its only line; changes need an admin key.",
        ),
        click.option(
            "--allow-plain-http",
            is_flag=True,
            help="Send the key over http:// to another machine.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the broker's answer as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(
    epilog="""\b
Examples:
  nearfar models list --broker http://127.0.0.1:8080
  nearfar models show digits --broker URL --json
  nearfar models canary digits 2.0.0 --percent 5 --broker URL --api-key-file admin.key
  nearfar models promote digits --broker URL --api-key-file admin.key
  nearfar models rollback digits --broker URL --api-key-file admin.key
"""
)
def models() -> None:
    """Show and change which version of a model a running broker answers with.

    Changes need an admin key (nearfar keys add --admin). A canary that fails more often or is
    slower than the stable version is rolled back by the broker itself (docs/operations.md).
    """


@models.command("list", epilog="Example: nearfar models list --broker http://127.0.0.1:8080")
@_common
def list_models(as_json: bool, **where: Any) -> None:
    """Print every version in service: its share of requests, aliases, what computes it."""
    answer = _ask("GET", "/v1/models", None, **where)
    if as_json:
        click.echo(msgspec.json.encode(answer))
        return
    for one in answer["models"]:
        runs = "not in memory" if one["runtime"] is None else f"{one['runtime']} {one['precision']}"
        line = f"{one['name']}  {one['version']}  {one['percent']:g} %  {runs}"
        if one["shadow_percent"]:
            line += f"  shadow of {one['shadow_percent']:g} %"
        click.echo(line + "".join(f"  {alias}" for alias in one["aliases"]))


@models.command(epilog="Example: nearfar models show digits --broker http://127.0.0.1:8080")
@_common
@click.argument("name")
def show(name: str, as_json: bool, **where: Any) -> None:
    """Print the routing of a model: default, aliases, canary, shadow, what happened."""
    _print(_ask("GET", _path(name), None, **where), as_json)


@models.command(
    epilog="Example: nearfar models canary digits 2.0.0 --percent 5 --broker URL "
    "--api-key-file admin.key"
)
@_common
@click.argument("name")
@click.argument("version")
@click.option("--percent", type=click.FloatRange(0, 90, min_open=True), required=True,
              help="Of the requests that name no version.")  # fmt: skip
@click.option("--by", type=click.Choice(["caller", "request"]), default="caller", show_default=True,
              help="What sticks to its version. Behind a proxy: request.")  # fmt: skip
@click.option("--min-requests", type=click.IntRange(10, 1_000_000), default=50, show_default=True,
              help="Answers before it is judged.")  # fmt: skip
@click.option("--max-latency-ratio", type=click.FloatRange(1.01, 100), default=1.5,
              show_default=True, help="How much slower it may be.")  # fmt: skip
@click.option("--false-alarm", type=click.FloatRange(1e-6, 0.2), default=0.01, show_default=True,
              help="Chance to roll back one that is as good.")  # fmt: skip
def canary(
    name: str,
    version: str,
    percent: float,
    by: str,
    min_requests: int,
    max_latency_ratio: float,
    false_alarm: float,
    **where: Any,
) -> None:
    """Let VERSION of NAME answer a part of the requests, on trial."""
    trial = {
        "version": version,
        "percent": percent,
        "by": by,
        "min_requests": min_requests,
        "max_latency_ratio": max_latency_ratio,
        "false_alarm": false_alarm,
    }
    _change(name, {"action": "set_canary", "canary": trial}, **where)


@models.command(
    epilog="Example: nearfar models shadow digits 2.0.0 --percent 10 --broker URL "
    "--api-key-file admin.key"
)
@_common
@click.argument("name")
@click.argument("version", required=False)
@click.option("--percent", type=click.FloatRange(0, 100, min_open=True),
              help="Of the requests; needed with VERSION.")  # fmt: skip
def shadow(name: str, version: str | None, percent: float | None, **where: Any) -> None:
    """Let VERSION compute a part of the requests beside, for comparison; without it: no more."""
    if version is None:
        _change(name, {"action": "end_shadow"}, **where)
        return
    if percent is None:
        raise ConfigError("say how many of the requests: --percent 10")
    _change(
        name, {"action": "set_shadow", "shadow": {"version": version, "percent": percent}}, **where
    )


@models.command(
    epilog="Example: nearfar models alias digits staging 2.0.0 --broker URL "
    "--api-key-file admin.key"
)
@_common
@click.argument("name")
@click.argument("alias")
@click.argument("version", required=False)
def alias(name: str, alias: str, version: str | None, **where: Any) -> None:
    """Let ALIAS stand for VERSION of NAME; without a version, forget it."""
    if version is None:
        _change(name, {"action": "clear_alias", "alias": alias}, **where)
    else:
        _change(name, {"action": "set_alias", "alias": alias, "version": version}, **where)


@models.command(
    epilog="Example: nearfar models promote digits --broker URL --api-key-file admin.key"
)
@_common
@click.argument("name")
@click.argument("version", required=False)
def promote(name: str, version: str | None, **where: Any) -> None:
    """Make VERSION of NAME, or its canary, the stable one."""
    change = {"action": "promote"} | ({} if version is None else {"version": version})
    _change(name, change, **where)


@models.command(
    epilog="Example: nearfar models rollback digits --broker URL --api-key-file admin.key"
)
@_common
@click.argument("name")
def rollback(name: str, **where: Any) -> None:
    """End the canary of NAME; without one, return to the version that was stable before."""
    _change(name, {"action": "rollback"}, **where)


def _path(name: str) -> str:
    return f"/v1/models/{quote(name, safe='')}/routing"


def _change(name: str, change: dict[str, Any], *, as_json: bool, **where: Any) -> None:
    _print(_ask("POST", _path(name), change, **where), as_json)


def _print(routing: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(routing))
        return
    click.echo(f"{routing['name']}  default {routing['default'] or 'none in service'}")
    click.echo(f"versions  {'  '.join(routing['versions'])}")
    for name, version in routing["aliases"].items():
        click.echo(f"alias  {name}  {version}")
    if (trial := routing["canary"]) is not None:
        click.echo(f"canary  {trial['canary']['version']}  {trial['canary']['percent']:g} %")
        for arm in (trial["measured"], trial["stable"]):
            click.echo(
                f"  {arm['version']}: {arm['failures']} of {arm['requests']} requests failed, "
                f"{arm['batches']} batches"
            )
        click.echo(f"  latency ratio {trial['latency_ratio']:g}")
    if (shadow := routing["shadow"]) is not None:
        click.echo(
            f"shadow  {shadow['version']}  {shadow['percent']:g} %  agreed {shadow['agreed']}, "
            f"differed {shadow['differed']}, failed {shadow['failed']}, "
            f"skipped {shadow['skipped']}"
        )
    for event in routing["events"]:
        detail = event.get("detail", "")
        click.echo(
            f"{event['time']}  {event['event']}  {event['version'] or ''}  {detail}".rstrip()
        )


def _ask(
    method: str,
    path: str,
    body: object,
    *,
    url: str,
    key_file: Path | None,
    allow_plain_http: bool,
) -> Any:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ConfigError(f"--broker {url!r} must be like https://broker.example:8080")
    headers = {}
    if key_file is not None:
        if parts.scheme == "http" and not allow_plain_http:
            from broker.settings import is_loopback

            if not is_loopback(parts.hostname):
                raise ConfigError(
                    "the key would be readable on its way: use https://, or --allow-plain-http"
                )
        headers["Authorization"] = f"Bearer {read_key_file(key_file)}"
    data = None if body is None else msgspec.json.encode(body)
    status, answer = asyncio.run(_send(method, url.rstrip("/") + path, headers, data))
    try:
        if status == 200:
            return msgspec.json.decode(answer)
        problem = msgspec.json.decode(answer, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BrokerFault(f"{url} answered {status}, and no broker's words") from None
    raise error_from_code(problem.code, problem.detail[: limits.MAX_TEXT_CHARS])


async def _send(
    method: str, url: str, headers: dict[str, str], data: bytes | None
) -> tuple[int, bytes]:
    """Status and body. Raises ``NetworkUnreachable``, ``BrokerFault``."""
    try:
        import aiohttp
    except ImportError as error:
        raise BackendUnavailable(f"{error}; pip install 'nearfar[broker]'") from None
    limit = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(
                method, url, headers=headers, data=data, allow_redirects=False
            ) as response,
        ):
            answer = await response.content.read(_MAX_ANSWER_BYTES + 1)
            while len(answer) <= _MAX_ANSWER_BYTES and not response.content.at_eof():
                answer += await response.content.read(_MAX_ANSWER_BYTES + 1 - len(answer))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise NetworkUnreachable(f"no answer from {url}: {reason}") from None
    if len(answer) > _MAX_ANSWER_BYTES:
        raise BrokerFault(f"{url} answered more than {_MAX_ANSWER_BYTES} bytes")
    return response.status, answer
