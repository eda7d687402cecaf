"""What the front process and a worker process say to each other.

A frame is four bytes, the length as little-endian unsigned integer, and that many bytes of
MessagePack: one of the tagged structs below. Both ends are ours; the bounds are there so
that a broken peer is an error at once and never an endless read.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from broker.executors.base import (
    BatchItem,
    Device,
    LoadedModel,
    Outcome,
    Precision,
    RuntimeName,
    TensorAnswer,
)
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import NearfarError, WireError, error_from_code
from edge_runtime.contract.wire import EncodedAnswer

__all__ = [
    "HEADER_BYTES",
    "MAX_FRAME_BYTES",
    "Answered",
    "BatchDone",
    "Failed",
    "Failure",
    "FromWorker",
    "Load",
    "LoadModel",
    "Progress",
    "Ready",
    "Result",
    "RunBatch",
    "ServableRef",
    "Tensors",
    "ToWorker",
    "UnloadModel",
    "decode_from_worker",
    "decode_to_worker",
    "encode_frame",
    "failure_of",
    "frame_length",
    "ref_of",
    "result_of",
    "to_result",
]

HEADER_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 2 * limits.MAX_BATCH_BYTES + 2 * 2**20
"""A full batch; or its answers, see ``OpenedServable.largest_batch``, and as many bytes of
tensors beside them, see ``form_batch``."""

_LENGTH = struct.Struct("<I")


class ServableRef(msgspec.Struct, frozen=True, array_like=True):
    """A folder that the front process verified, by the digest of its manifest."""

    root: str
    sha256: str


class Load(msgspec.Struct, frozen=True, tag="load"):
    """To the worker, first: what to load, and where."""

    servables: tuple[ServableRef, ...]
    device: Device
    threads: int
    runtime: RuntimeName = "auto"
    precision: Precision = "auto"
    calibration: str | None = None
    """Folder of the photos that int8 is learned on."""
    caps: tuple[tuple[ModelKey, int], ...] = ()
    """Batch sizes beyond which earlier workers ran out of memory."""
    known: tuple[tuple[ModelKey, LoadedModel], ...] = ()
    """How earlier workers ran these models, once they had compared it with fp32."""


class LoadModel(msgspec.Struct, frozen=True, tag="load_model"):
    """To the worker, between batches: load one more. It answers ``Ready`` or ``Failed``."""

    servable: ServableRef


class UnloadModel(msgspec.Struct, frozen=True, tag="unload_model"):
    """To the worker, between batches: free one. It answers ``Ready``."""

    model: ModelKey


class RunBatch(msgspec.Struct, frozen=True, tag="run"):
    """To the worker: run these requests."""

    model: ModelKey
    items: tuple[BatchItem, ...]
    slot: int | None = None
    """Where their bodies are, empty here; None: here. See ``slots``."""
    sizes: tuple[int, ...] = ()
    """Of the bodies in the slot, one behind the other."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From the worker: it has loaded, or freed, what it was asked to."""

    device: str
    models: tuple[tuple[ModelKey, LoadedModel], ...] = ()
    """What it loaded just now."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """From the worker, instead of ``Ready``: why not. After ``Load`` it exits."""

    code: str
    detail: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """From the worker, now and then during a long batch: still alive."""


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """One request's answer; masks and images are files already."""

    answer: EncodedAnswer


class Tensors(msgspec.Struct, frozen=True, tag="tensors"):
    """One request's outputs, and its answer where that was asked for."""

    tensors: tuple[bytes, ...]
    answer: EncodedAnswer | None


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """One request's error."""

    code: str
    detail: str


Result = Answered | Tensors | Failure


class BatchDone(msgspec.Struct, frozen=True, tag="done"):
    """From the worker: one result for each request, in order."""

    results: tuple[Result, ...]
    cap: int | None = None
    """The largest batch that its memory holds, where a larger one did not fit."""


ToWorker = Load | LoadModel | UnloadModel | RunBatch
FromWorker = Ready | Failed | Progress | BatchDone

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode_frame(message: ToWorker | FromWorker) -> bytearray:
    """Length and payload. Raises ``WireError`` over ``MAX_FRAME_BYTES``."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    size = len(frame) - HEADER_BYTES
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {size} bytes is over {MAX_FRAME_BYTES}")
    _LENGTH.pack_into(frame, 0, size)
    return frame


def frame_length(header: bytes) -> int:
    """Payload bytes that follow these four. Raises ``WireError``."""
    if len(header) != HEADER_BYTES:
        raise WireError(f"a frame header has {HEADER_BYTES} bytes, got {len(header)}")
    size: int = _LENGTH.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame announces {size} bytes, over {MAX_FRAME_BYTES}")
    return size


def decode_to_worker(payload: bytes) -> ToWorker:
    """What the front process said. Raises ``WireError``."""
    try:
        return _to_worker.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"a frame to the worker makes no sense: {error}") from None


def decode_from_worker(payload: bytes) -> FromWorker:
    """What the worker said. Raises ``WireError``."""
    try:
        return _from_worker.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"a frame from the worker makes no sense: {error}") from None


def ref_of(servable: OpenedServable) -> ServableRef:
    """What tells a worker which servable to load."""
    return ServableRef(root=str(servable.root), sha256=servable.sha256)


def failure_of(error: NearfarError) -> Failed:
    """The error that ends a worker before it is ready."""
    return Failed(code=error.code, detail=error.detail)


def to_result(outcome: Outcome) -> Result:
    """One request's outcome, ready to travel."""
    if isinstance(outcome, NearfarError):
        return Failure(code=outcome.code, detail=outcome.detail)
    if isinstance(outcome, TensorAnswer):
        return Tensors(tensors=outcome.tensors, answer=outcome.answer)
    return Answered(answer=outcome)


def result_of(result: Result) -> Outcome:
    """The inverse of ``to_result``."""
    if isinstance(result, Failure):
        return error_from_code(result.code, result.detail)
    if isinstance(result, Tensors):
        return TensorAnswer(tensors=result.tensors, answer=result.answer)
    return result.answer
