"""The demo's stages, each a child process: what can run at once does."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from edge_runtime.contract.errors import ConfigError, NearfarError, RuntimeFault
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.limits import MAX_MANIFEST_BYTES
from edge_runtime.demo.children import Child, Children
from edge_runtime.demo.records import (
    MODES,
    DeviceEnd,
    DeviceReady,
    RequestRecord,
    decode_message,
)
from edge_runtime.demo.scoring import ModeScore, score
from edge_runtime.policies.base import InferenceMode

__all__ = ["Board", "Outcome", "Settings", "run_stages"]

_SMALL, _LARGE = "digits-small", "digits-large"
_FORMATS, _PRECISIONS = "torchscript,tflite,coreml", "fp32,fp16,int8"
_MARKER: Final = ".nearfar-demo"
_READY_S: Final = 300.0
_GATE_FAILED: Final = 1
"""Exit status of convert and verify when a variant is not good enough."""


class Board(Protocol):
    """Where people see the stages go by."""

    def start(self, stage: str) -> None:
        """A stage has started."""

    def say(self, stage: str, text: str) -> None:
        """What it does now."""

    def count(self, stage: str, done: int, total: int) -> None:
        """How far it is."""

    def end(self, stage: str, seconds: float, note: str) -> None:
        """It has ended well."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run depends on."""

    output: Path
    requests: int = 300
    """Photos in each mode."""
    seed: int = 1
    """Of the link schedule and the order of the photos."""
    schedule: str = "commuter"
    deadline_ms: float = 400.0
    """When the app needs the answer; accuracy is scored by it."""
    margin_ms: float = 20.0
    """What the app keeps of it for itself: the runtime is asked for an answer so much earlier."""
    give_up_ms: float = 30_000.0
    """ONLY_IN_CLOUD waits so long: its late answers are counted as late, not as missing."""
    interval_ms: float = 80.0
    """Between two photos."""
    kill_broker: bool = False

    @property
    def work(self) -> Path:
        """Where photos, bundle and logs go."""
        return self.output / "work"

    def photos(self, split: str) -> Path:
        """The photos of one split."""
        return self.work / f"photos-{split}"

    @property
    def bundle(self) -> Path:
        """The converted bundle."""
        return self.work / f"{_SMALL}.bundle"


class Outcome(msgspec.Struct, kw_only=True):
    """Everything that the report is made from."""

    settings: Settings
    scores: dict[str, ModeScore] = {}
    records: dict[str, list[RequestRecord]] = {}
    stages: dict[str, float] = {}
    zoo: list[dict[str, Any]] = []
    """Both models, with their accuracy on the test photos."""
    conversion_s: dict[str, float] = {}
    """Seconds of each conversion, by variant."""
    proof: dict[str, Any] = {}
    """What ``verify --json`` wrote."""
    gates_passed: bool = False
    killed_at: int | None = None
    """The number of the ADAPTIVE request after which the broker was killed."""


async def run_stages(settings: Settings, board: Board) -> Outcome:
    """Run everything; no child is left afterwards. Raises what a child failed with."""
    logs = _fresh_logs(settings.work)
    async with Children(logs) as children:
        demo = _Demo(settings, board, children)
        try:
            async with asyncio.TaskGroup() as group:
                small = group.create_task(demo.train(_SMALL))
                large = group.create_task(demo.train(_LARGE))
                photos = group.create_task(demo.render())
                serving = group.create_task(demo.serve(large))
                group.create_task(demo.convert_and_verify(small, photos))
        except ExceptionGroup as failed:
            raise _first_cause(failed) from None
        broker, url = serving.result()
        relay_url, control_port = await demo.relay(url)
        for mode in MODES:
            await demo.run_mode(mode, broker, relay_url, control_port)
        return demo.outcome


def _fresh_logs(work: Path) -> Path:
    """Empty the work folder of an earlier run; nothing else is ever removed."""
    marker = work / _MARKER
    if work.exists():
        if not marker.is_file():
            raise ConfigError(f"{work} is not of an earlier demo: choose another --output")
        shutil.rmtree(work)
    logs = work / "logs"
    try:
        logs.mkdir(parents=True)
        marker.touch()
    except OSError as error:
        raise ConfigError(f"cannot write to {work}: {error.strerror}") from None
    return logs


def _first_cause(failed: ExceptionGroup[Exception]) -> Exception:
    cause = failed.exceptions[0]
    return _first_cause(cause) if isinstance(cause, ExceptionGroup) else cause


class _Stage:
    """One timed stage and the children that it starts."""

    def __init__(self, name: str, board: Board, children: Children) -> None:
        self._name = name
        self._board = board
        self._children = children
        self.notes: list[str] = []
        """Shown when it has ended."""

    async def start(self, child: str, arguments: Sequence[str], *, lines: bool = False) -> Child:
        """Start a child; what it prints shows as what the stage does now."""
        return await self._children.start(
            child, arguments, lines=lines, say=lambda text: self._board.say(self._name, text)
        )

    async def nearfar(self, child: str, *arguments: str, accept: Sequence[int] = (0,)) -> int:
        """Run a command of ours to its end; its exit status."""
        started = await self.start(child, ("-m", "edge_runtime", *arguments))
        return await started.finish(accept)

    async def nearfar_json(self, child: str, *arguments: str) -> Any:
        """Run a command of ours that answers in JSON on stdout."""
        started = await self.start(child, ("-m", "edge_runtime", *arguments), lines=True)
        text = b"".join([line async for line in started.lines()])
        await started.finish()
        return json.loads(text)


class _Demo:
    """One run: starts children, keeps what they answer."""

    def __init__(self, settings: Settings, board: Board, children: Children) -> None:
        self._settings = settings
        self._board = board
        self._children = children
        self.outcome = Outcome(settings=settings)

    @asynccontextmanager
    async def _stage(self, name: str) -> AsyncIterator[_Stage]:
        stage = _Stage(name, self._board, self._children)
        self._board.start(name)
        started_s = time.monotonic()
        yield stage
        seconds = time.monotonic() - started_s
        self.outcome.stages[name] = round(seconds, 2)
        self._board.end(name, seconds, ", ".join(stage.notes))

    async def train(self, name: str) -> None:
        """Train a zoo model, or find it in the cache."""
        async with self._stage(f"train {name}") as stage:
            answer = await stage.nearfar_json(f"train-{name}", "zoo", "train", name, "--json")
            self.outcome.zoo.append(answer["models"][0])
            stage.notes.append(f"{answer['models'][0]['test_accuracy']:.1%} on its test photos")

    async def render(self) -> None:
        """Write the calibration and the test photos."""
        async with self._stage("render photos") as stage:
            for split in ("calib", "test"):
                answer = await stage.nearfar_json(
                    f"render-{split}", "zoo", "render", "--split", split, "--json",
                    "-o", str(self._settings.photos(split)),
                )  # fmt: skip
                stage.notes.append(f"{answer['photos']} {split}")

    async def convert_and_verify(
        self, trained: asyncio.Task[None], rendered: asyncio.Task[None]
    ) -> None:
        """Make the bundle, then prove every variant on photos it has not seen."""
        settings = self._settings
        await asyncio.gather(trained, rendered)
        conversion, proof = settings.work / "conversion.json", settings.work / "proof.json"
        async with self._stage("convert") as stage:
            await stage.nearfar(
                "convert", "convert", f"zoo:{_SMALL}", "--to", _FORMATS,
                "--precision", _PRECISIONS, "--calib", str(settings.photos("calib")),
                "-o", str(settings.bundle), "--json", str(conversion),
                accept=(0, _GATE_FAILED),
            )  # fmt: skip
            self.outcome.conversion_s = _read_json(conversion)["seconds"]
            stage.notes.append(f"{settings.bundle}")
        async with self._stage("verify") as stage:
            test = settings.photos("test")
            code = await stage.nearfar(
                "verify", "verify", str(settings.bundle), "--eval", str(test),
                "--labels", str(test / "labels.csv"), "--json", str(proof),
                accept=(0, _GATE_FAILED),
            )  # fmt: skip
            self.outcome.proof = _read_json(proof)
            self.outcome.gates_passed = code == 0
            passed = sum(variant["passed"] for variant in self.outcome.proof["variants"])
            stage.notes.append(f"{passed} of {len(self.outcome.proof['variants'])} variants passed")

    async def serve(self, trained: asyncio.Task[None]) -> tuple[Child, str]:
        """Export the large model and start the broker on a free port."""
        await trained
        async with self._stage("serve") as stage:
            broker = await stage.start(
                "broker",
                ("-m", "edge_runtime", "serve", "--models", f"zoo:{_LARGE}",
                 "--port", "0", "--json-ready"),
                lines=True,
            )  # fmt: skip
            ready = json.loads(await broker.first_line(_READY_S))
            stage.notes.append(ready["url"])
            return broker, ready["url"]

    async def relay(self, broker_url: str) -> tuple[str, int]:
        """Start the emulated link in front of the broker."""
        async with self._stage("link") as stage:
            child = await stage.start(
                "relay",
                ("-m", "edge_runtime.simulation.relay",
                 "--target", broker_url.removeprefix("http://"),
                 "--schedule", self._settings.schedule, "--seed", str(self._settings.seed)),
                lines=True,
            )  # fmt: skip
            ready = json.loads(await child.first_line(_READY_S))
            stage.notes.append(f"{ready['schedule']}, {ready['period_s']:.0f} s, repeated")
            return ready["url"], ready["control_port"]

    async def run_mode(
        self, mode: InferenceMode, broker: Child, relay_url: str, control_port: int
    ) -> None:
        """Answer all photos in one mode, the link schedule from its start."""
        settings = self._settings
        only_cloud = mode is InferenceMode.ONLY_IN_CLOUD
        runtime_deadline_ms = (
            settings.give_up_ms if only_cloud else settings.deadline_ms - settings.margin_ms
        )
        # Without a link there are no bad stretches to meet: a faster pace saves time.
        interval_ms = settings.interval_ms / (4 if mode is InferenceMode.ONLY_ON_DEVICE else 1)
        records: list[RequestRecord] = []
        variant: str | None = None
        end: DeviceEnd | None = None
        async with self._stage(mode.value) as stage:
            child = await stage.start(
                f"device-{mode.value}",
                ("-m", "edge_runtime.demo.device",
                 "--bundle", str(settings.bundle), "--photos", str(settings.photos("test")),
                 "--broker", relay_url, "--control-port", str(control_port),
                 "--mode", mode.value, "--requests", str(settings.requests),
                 "--deadline-ms", str(runtime_deadline_ms),
                 "--interval-ms", str(interval_ms),
                 "--seed", str(settings.seed)),
                lines=True,
            )  # fmt: skip
            started_s = time.monotonic()
            async for line in child.lines():
                message = decode_message(line)
                if isinstance(message, DeviceReady):
                    variant, started_s = message.variant, time.monotonic()
                elif isinstance(message, DeviceEnd):
                    end = message
                else:
                    records.append(message)
                    self._board.count(mode.value, len(records), settings.requests)
                    if (
                        settings.kill_broker
                        and mode is InferenceMode.ADAPTIVE
                        and len(records) == settings.requests // 2
                    ):
                        broker.kill()
                        self.outcome.killed_at = len(records)
                        stage.notes.append(f"broker killed after request {len(records)}")
            await child.finish()
            if end is None or len(records) != settings.requests:
                raise RuntimeFault(
                    f"the device ended after {len(records)} of {settings.requests} photos; "
                    f"log: {child.log_path}"
                )
            seconds = round(time.monotonic() - started_s, 2)
            result = score(
                records,
                end,
                deadline_ms=settings.deadline_ms,
                variant=variant,
                seconds=seconds,
            )
            stage.notes.append(f"{result.accuracy_in_deadline:.1%} right in time")
        self.outcome.records[mode.value] = records
        self.outcome.scores[mode.value] = result


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(read_bounded(path, MAX_MANIFEST_BYTES))
    if not isinstance(value, dict):
        raise NearfarError(f"{path} holds no JSON object")
    return value
