"""Commands of the broker: ``nearfar serve`` and ``nearfar keys``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from broker.accounts.keys import KeyFile

__all__ = ["keys", "serve"]


@click.command(
    epilog="""\b
Examples:
  nearfar serve --models build/digits-large
  nearfar serve --models zoo:digits-large --port 0 --json-ready
  nearfar serve --models servables/ --host 0.0.0.0 --keys keys.json
\b
Then:
  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' \\
       http://127.0.0.1:8080/v1/models/digits-large:predict
"""
)
@click.option(
    "--models",
    "models",
    multiple=True,
    required=True,
    metavar="DIR|SPEC",
    help="A servable (made by nearfar export), a folder of servables, or a spec such as "
    "zoo:digits-large, which is exported first. Repeat it for more.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option("--port", default=8080, show_default=True, help="Port to bind; 0: a free one.")
@click.option(
    "--keys",
    "keys_file",
    metavar="FILE",
    help="Ask for an API key of this file (nearfar keys add). Needed off loopback.",
)
@click.option(
    "--state",
    metavar="DIR",
    help="Keep in DIR what was learned of the models' speed, so that a restart admits at once "
    "as before; and how requests are routed to versions.",
)
@click.option(
    "--routing",
    metavar="FILE",
    help="Rules for which version of a model answers: aliases, canary, shadow (TOML).",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the models run; auto: CUDA where there is a device.",
)
@click.option("--max-batch", type=int, help="Most images of one batch.  [default: 8]")
@click.option(
    "--executor",
    default="worker",
    show_default=True,
    help="worker: a process of its own; inline: a thread of this one; oip: another server "
    "(--backend URL); ray: actors of a Ray cluster (--backend ADDRESS, or a local one).",
)
@click.option("--backend", metavar="URL|ADDRESS", help="Where the executor oip or ray runs models.")
@click.option("--slots", type=int, help="Actors of the executor ray.  [default: 1]")
@click.option(
    "--backend-key",
    "backend_key_file",
    metavar="FILE",
    help="File whose first line is the API key for the backend of oip.",
)
@click.option("--threads", type=int, help="CPU threads of a forward pass.  [default: cores - 1]")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "eager", "openvino", "compile"]),
    help="What computes: PyTorch as it is, OpenVINO (CPU), or PyTorch compiled.  [default: auto]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
    help="Of the arithmetic; auto: bf16 where the device is made for it and the model bears it.",
)
@click.option(
    "--calibration",
    metavar="DIR",
    help="Photos that int8 is learned on, 32 or more: half of them, the others prove it.",
)
@click.option(
    "--memory-budget",
    type=float,
    metavar="MB",
    help="Room for models, by the size of their program files: what does not fit is loaded when it "
    "is asked for, and the least recently used goes.  [default: no bound]",
)
@click.option("--max-connections", type=int, help="Open connections.  [default: 1024]")
@click.option("--drain-timeout", type=float, help="Seconds a shutdown may take.  [default: 10]")
@click.option("--hang-timeout", type=float, help="Seconds until a worker is hung.  [default: 30]")
@click.option(
    "--jobs",
    "jobs_folder",
    metavar="DIR",
    help="Keep jobs here, so that they survive a restart.  [default: in memory]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin (https://app.example, or *) call. Repeat it for more.",
)
@click.option("--json-ready", is_flag=True, help="When ready, print one JSON line with the URL.")
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    keys_file: str | None,
    state: str | None,
    routing: str | None,
    device: str,
    max_batch: int | None,
    executor: str,
    backend: str | None,
    slots: int | None,
    backend_key_file: str | None,
    threads: int | None,
    runtime: str | None,
    precision: str | None,
    calibration: str | None,
    memory_budget: float | None,
    max_connections: int | None,
    drain_timeout: float | None,
    hang_timeout: float | None,
    jobs_folder: str | None,
    cors_origins: tuple[str, ...],
    json_ready: bool,
) -> None:
    """Run the broker: answer images that devices send.

    POST an image to /v1/models/NAME:predict. Logs are JSON lines on standard error, metrics
    at /metrics. SIGTERM or Ctrl-C answers what is in flight and exits 0; a second one exits
    at once.
    """
    # aiohttp and the rest load only when a broker is to run: --help stays fast.
    from broker.log import configure_logging
    from broker.server import RunningBroker, run_broker
    from broker.settings import build_settings

    given: dict[str, Any] = {
        "models": models,
        "host": host,
        "port": port,
        "keys": keys_file,
        "jobs": jobs_folder,
        "state": state,
        "routing": routing,
        "device": device,
        "max_batch": max_batch,
        "executor": executor,
        "backend": backend,
        "slots": slots,
        "backend_key_file": backend_key_file,
        "threads": threads,
        "runtime": runtime,
        "precision": precision,
        "calibration": calibration,
        "memory_budget_mb": memory_budget,
        "max_connections": max_connections,
        "drain_timeout_s": drain_timeout,
        "hang_timeout_s": hang_timeout,
        "cors_origins": cors_origins,
    }
    settings = build_settings(**{name: value for name, value in given.items() if value is not None})

    def announce(broker: RunningBroker) -> None:
        if json_ready:
            click.echo(msgspec.json.encode({"url": broker.url, "models": broker.models}))
        else:
            click.echo(f"serving {', '.join(broker.models)} at {broker.url} (Ctrl-C stops it)")

    configure_logging()
    sys.exit(asyncio.run(run_broker(settings, announce)))


_file_option = click.option(
    "--file", "path", required=True, type=click.Path(path_type=Path), help="The key file."
)


@click.group(
    epilog="""\b
Examples:
  nearfar keys add --file keys.json --tenant acme
  nearfar keys list --file keys.json
  nearfar keys revoke --file keys.json k3v9x0a2b7qz
"""
)
def keys() -> None:
    """Make, list and revoke API keys of a broker.

    The file holds hashes only and is readable by you alone. A running broker follows it:
    a revoked key is refused within a second.
    """


@keys.command("add", epilog="Example: nearfar keys add --file keys.json --tenant acme")
@_file_option
@click.option("--tenant", required=True, help="Whose key it is: a-z 0-9 . _ -, 64 at most.")
@click.option("--admin", is_flag=True, help="It may take models out of service and back.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Share of the device "
              "beside other tenants, when not all can be served.")  # fmt: skip
@click.option("--max-priority", type=int, default=2, show_default=True, help="Best class it may "
              "ask for: 1 (before all others), 2 or 3 (only when nobody else waits).")  # fmt: skip
@click.option("--rate", "rate_per_s", type=float, help="Requests a second.  [default: no limit]")
@click.option("--burst", type=int, help="So many of them at once.  [default: one second's]")
def add_key(
    path: Path,
    tenant: str,
    admin: bool,
    weight: float,
    max_priority: int,
    rate_per_s: float | None,
    burst: int | None,
) -> None:
    """Make a key and print it, once: it cannot be shown again."""
    key, text = KeyFile(path).add(
        tenant,
        admin=admin,
        weight=weight,
        max_priority=max_priority,
        rate_per_s=rate_per_s,
        burst=burst,
    )
    click.echo(text)
    click.echo(f"key {key.id} for {key.tenant} is in {path}; keep the line above", err=True)


@keys.command("list", epilog="Example: nearfar keys list --file keys.json")
@_file_option
def list_keys(path: Path) -> None:
    """Print id, tenant and date of each key, and what sets it apart."""
    for key in KeyFile(path).read():
        admin = "  admin" if key.admin else ""
        limits = "" if key.weight == 1.0 else f"  weight {key.weight:g}"
        limits += "" if key.max_priority == 2 else f"  priority {key.max_priority}"
        if key.rate_per_s is not None:
            limits += f"  {key.rate_per_s:g}/s, {key.burst} at once"
        click.echo(f"{key.id}  {key.tenant}  {key.created:%Y-%m-%dT%H:%M:%SZ}{admin}{limits}")


@keys.command("revoke", epilog="Example: nearfar keys revoke --file keys.json k3v9x0a2b7qz")
@_file_option
@click.argument("key_id", metavar="ID")
def revoke_key(path: Path, key_id: str) -> None:
    """Take a key out of the file."""
    key = KeyFile(path).revoke(key_id)
    click.echo(f"revoked {key.id} of {key.tenant}")
