"""The worker: forked by a zygote, or ``python -m broker.executors.worker_process [MEMORY]``.

Speaks ``frames`` over its standard input and output; bodies lie in ``slots``, in the memory of
that descriptor. It ends when its input does, whatever
it is doing then: no worker outlives the process that started it, however that one died.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from broker.executors import frames
from broker.executors.base import LoadedModel, not_in_memory
from broker.executors.slots import WorkerSlots
from broker.models.servable import ModelKey, read_servable
from edge_runtime.contract.errors import ManifestError, NearfarError, WireError

if TYPE_CHECKING:
    from broker.executors.program import Begun, TorchProgram

__all__ = ["Models", "main"]

_LOG = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 0.25


class _Connection:
    """Frames from the front process, read on a thread of their own, and frames to it."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, slots: WorkerSlots | None) -> None:
        self._source = source
        self._sink = sink
        self._slots = slots
        self._inbox: queue.SimpleQueue[frames.ToWorker] = queue.SimpleQueue()
        self._next: frames.ToWorker | None = None
        """Taken out of the inbox, not yet received."""
        self._last_sent_s = time.monotonic()
        threading.Thread(target=self._read, name="frames", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                size = frames.frame_length(self._source.read(frames.HEADER_BYTES))
                payload = self._source.read(size)
                if len(payload) != size:
                    break
                message = frames.decode_to_worker(payload)
                if self._slots is not None and isinstance(message, frames.RunBatch):
                    message = self._slots.fetch(message)
                self._inbox.put(message)
        except WireError:  # the end of the input, in practice
            pass
        finally:
            # The main thread may be deep in a model: leave without asking it.
            os._exit(0)

    def receive(self) -> frames.ToWorker:
        if self._next is not None:
            found, self._next = self._next, None
            return found
        return self._inbox.get()

    def upcoming(self) -> frames.ToWorker | None:
        """What ``receive`` gives next, if it is there already."""
        if self._next is None and not self._inbox.empty():
            self._next = self._inbox.get()
        return self._next

    def send(self, message: frames.FromWorker) -> None:
        try:
            self._sink.write(frames.encode_frame(message))
            self._sink.flush()
        except BrokenPipeError:
            os._exit(0)
        self._last_sent_s = time.monotonic()

    def still_alive(self) -> None:
        """Tell the front process so, but not more often than four times a second."""
        if time.monotonic() - self._last_sent_s > _PROGRESS_EVERY_S:
            self.send(frames.Progress())


def _take_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for frames; a stray print() or C library must not write into them."""
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, sink


class Models:
    """The programs in this process's memory."""

    def __init__(self, load: frames.Load) -> None:
        from broker.executors.device import pick_device, use_threads
        from broker.executors.program import TorchProgram

        self._load_program = partial(
            TorchProgram.load,
            runtime=load.runtime,
            precision=load.precision,
            calibration=load.calibration,
            threads=load.threads,
        )
        self._caps, self._known = dict(load.caps), dict(load.known)
        self._by_key: dict[ModelKey, TorchProgram] = {}
        self._begun: tuple[frames.RunBatch, Begun] | None = None
        """The batch behind the one that runs, whose images decode."""
        self.device = pick_device(load.device)
        use_threads(load.threads)

    def load(self, ref: frames.ServableRef) -> tuple[ModelKey, LoadedModel]:
        """Raises ``ManifestError`` and what ``TorchProgram.load`` raises."""
        servable = read_servable(Path(ref.root))
        if servable.sha256 != ref.sha256:
            raise ManifestError(
                f"{ref.root} changed since the broker verified it: start the broker again"
            )
        program = self._load_program(servable, self.device, known=self._known.get(servable.key))
        program.cap = self._caps.get(servable.key)
        self._by_key[servable.key] = program
        return servable.key, program.loaded

    def unload(self, key: ModelKey) -> None:
        """Free one, if it is there."""
        program = self._by_key.pop(key, None)
        if program is not None:
            self._caps |= {} if program.cap is None else {key: program.cap}
            program.free()

    def begin(self, upcoming: frames.ToWorker | None) -> None:
        """Decode the images of the batch that comes next, while another one runs."""
        if not isinstance(upcoming, frames.RunBatch):
            return
        if self._begun is not None and self._begun[0] is upcoming:
            return
        program = self._by_key.get(upcoming.model)
        if program is not None and not all(item.tensor for item in upcoming.items):
            self._begun = upcoming, program.begin(upcoming.items)

    def run(self, request: frames.RunBatch, still_alive: Callable[[], None]) -> frames.BatchDone:
        """Answer a batch; ``still_alive`` is called now and then."""
        begun = None
        if self._begun is not None and self._begun[0] is request:
            begun = self._begun[1]
            self._begun = None
        program = self._by_key.get(request.model)
        if program is None:
            gone = frames.to_result(not_in_memory(request.model))
            return frames.BatchDone(results=(gone,) * len(request.items))
        outcomes = program.run(request.items, still_alive, begun)
        return frames.BatchDone(
            results=tuple(frames.to_result(outcome) for outcome in outcomes), cap=program.cap
        )


def _serve(connection: _Connection) -> None:
    load = connection.receive()
    if not isinstance(load, frames.Load):
        raise WireError("the first frame must be Load")
    models = Models(load)
    loaded = tuple(models.load(ref) for ref in load.servables)
    connection.send(frames.Ready(device=models.device, models=loaded))

    def progress() -> None:
        connection.still_alive()
        models.begin(connection.upcoming())

    while True:
        request = connection.receive()
        if isinstance(request, frames.RunBatch):
            connection.send(models.run(request, progress))
        elif isinstance(request, frames.LoadModel):
            try:
                one = models.load(request.servable)
            except NearfarError as error:
                connection.send(frames.failure_of(error))
            else:
                connection.send(frames.Ready(device=models.device, models=(one,)))
        elif isinstance(request, frames.UnloadModel):
            models.unload(request.model)
            connection.send(frames.Ready(device=models.device))
        else:
            raise WireError("Load comes once")


def main(memory: int | None = None) -> NoReturn:
    """Serve until the input ends; ``memory``: the descriptor of the slots' memory, if any.

    Exit 1 when loading failed, with the reason sent before.
    """
    # Whoever stops the broker may signal the whole group; the broker still drains then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    source, sink = _take_standard_streams()
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    slots = None
    if memory is not None:
        slots = WorkerSlots(memory)
        os.close(memory)
    connection = _Connection(source, sink, slots)
    try:
        _serve(connection)
    except NearfarError as error:
        connection.send(frames.failure_of(error))
    except Exception:
        _LOG.exception("the worker failed in a way nobody foresaw")
    # Not sys.exit: the reading thread holds a lock that interpreter shutdown would want.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
