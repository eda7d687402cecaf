"""The emulated phone: ``python -m edge_runtime.demo.device``, a child of ``nearfar demo``.

It holds one ``EdgeRuntime`` in one mode and takes photos at a fixed pace, whether or not
earlier ones are answered: waiting would spare it the bad stretches of the link (the
"coordinated omission" of load tests). What happened to each photo goes to stdout as JSON
lines. Bytes are counted by the relay, which alone sees what crosses the link.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.demo.records import DeviceEnd, DeviceMessage, DeviceReady, RequestRecord
from edge_runtime.policies.base import Action, InferenceMode
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.simulation.relay import RelayStats

__all__ = ["choose_photos", "main"]

_SETTLE_STEP_S: Final = 0.25
_SETTLE_S: Final = 10.0


class _LinkControl:
    """The relay's control port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def stats(self) -> RelayStats:
        """Counters now."""
        return await self._ask(b"stats\n")

    async def restart(self) -> RelayStats:
        """Start the link schedule anew."""
        return await self._ask(b"restart\n")

    async def settled(self) -> RelayStats:
        """Counters once nothing has crossed the uplink for a moment."""
        before = await self.stats()
        for _ in range(int(_SETTLE_S / _SETTLE_STEP_S)):
            await asyncio.sleep(_SETTLE_STEP_S)
            now = await self.stats()
            if now.uplink_bytes == before.uplink_bytes:
                break
            before = now
        return before

    async def _ask(self, line: bytes) -> RelayStats:
        self._writer.write(line)
        return msgspec.json.decode(await self._reader.readline(), type=RelayStats)


@asynccontextmanager
async def _link_control(port: int) -> AsyncIterator[_LinkControl]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield _LinkControl(reader, writer)
    finally:
        writer.close()


def choose_photos(folder: Path, count: int, seed: int) -> list[tuple[Path, int]]:
    """``count`` labeled photos in an order drawn from ``seed``; all, before one comes twice.

    ``folder`` holds ``labels.csv`` with ``file`` and ``class_index`` columns.
    """
    text = read_bounded(folder / "labels.csv", limits.MAX_CSV_BYTES).decode()
    rows = [
        (folder / row["file"], int(row["class_index"])) for row in csv.DictReader(text.splitlines())
    ]
    if not rows:
        raise ConfigError(f"{folder} lists no photos")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[order[i % len(rows)]] for i in range(count)]


def _say(message: DeviceMessage) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


async def _ask(
    runtime: EdgeRuntime, record: RequestRecord, data: bytes, slot_bytes: asyncio.Future[int]
) -> None:
    """Answer one photo, and report it once its slot on the link is over."""
    loop = asyncio.get_running_loop()
    called_s = loop.time()
    try:
        result = await runtime.arun(data)
    except NearfarError as error:
        record = msgspec.structs.replace(
            record,
            latency_ms=(loop.time() - called_s) * 1e3,
            upload_started=True,  # without a local answer, only the cloud was asked
            error=error.code,
        )
    else:
        record = msgspec.structs.replace(
            record,
            latency_ms=(loop.time() - called_s) * 1e3,
            predicted=result.predictions[0].index,
            source=result.inference_source,
            action=result.decision.action.value,
            reason=result.decision.reason,
            upload_started=result.decision.action is not Action.LOCAL,
            error=result.error,
        )
    _say(msgspec.structs.replace(record, uploaded_bytes=await slot_bytes))


async def _ask_all(
    runtime: EdgeRuntime,
    control: _LinkControl,
    photos: list[tuple[Path, int]],
    interval_s: float,
) -> None:
    """Take each photo at its time; ends when all are answered."""
    loop = asyncio.get_running_loop()
    images = [path.read_bytes() for path, _ in photos]
    before = await control.restart()
    start_s = loop.time()
    async with asyncio.TaskGroup() as group:
        for number, (path, truth) in enumerate(photos):
            await asyncio.sleep(max(0.0, start_s + number * interval_s - loop.time()))
            slot_bytes: asyncio.Future[int] = loop.create_future()
            record = RequestRecord(
                file=path.name, truth=truth, link_s=loop.time() - start_s, latency_ms=0.0
            )
            group.create_task(_ask(runtime, record, images[number], slot_bytes))
            await asyncio.sleep(max(0.0, start_s + (number + 1) * interval_s - loop.time()))
            now = await control.stats()
            slot_bytes.set_result(now.uplink_bytes - before.uplink_bytes)
            before = now


async def _run(arguments: argparse.Namespace) -> None:
    photos = choose_photos(arguments.photos, arguments.requests, arguments.seed)
    async with _link_control(arguments.control_port) as control:
        before = await control.stats()
        async with await asyncio.to_thread(
            EdgeRuntime,
            arguments.bundle,
            broker=arguments.broker,
            policy=arguments.mode,
            deadline_ms=arguments.deadline_ms,
            variant="auto",
        ) as runtime:
            variant = runtime.status().variant
            _say(DeviceReady(variant=None if variant is None else variant.variant))
            await _ask_all(runtime, control, photos, arguments.interval_ms / 1e3)
        after = await control.settled()
        _say(
            DeviceEnd(
                uploaded_bytes=after.uplink_bytes - before.uplink_bytes,
                downloaded_bytes=after.downlink_bytes - before.downlink_bytes,
            )
        )


def main() -> None:
    """Parse the command line and answer all photos."""
    parser = argparse.ArgumentParser(prog="python -m edge_runtime.demo.device")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--broker", required=True, metavar="URL")
    parser.add_argument("--control-port", type=int, required=True)
    parser.add_argument("--mode", choices=[mode.value for mode in InferenceMode], required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--deadline-ms", type=float, required=True)
    parser.add_argument("--interval-ms", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    try:
        asyncio.run(_run(parser.parse_args()))
    except NearfarError as error:
        print(f"error [{error.code}]: {error.detail}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
