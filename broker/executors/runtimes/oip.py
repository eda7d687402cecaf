"""A model behind another server, by the Open Inference Protocol v2 with binary tensors."""

from __future__ import annotations

import http.client
import math
import ssl
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.executors.base import LoadedModel
from broker.executors.runtimes.base import Affine
from broker.models.servable import OpenedServable
from broker.oip.datatypes import Datatype, datatype_of, read_binary, read_json
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    ContractError,
    DeadlineExceeded,
    InferenceError,
    ModelLoadError,
    ModelNotFound,
    NearfarError,
    Overloaded,
    WorkerLost,
)
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["Backend", "OipRuntime"]

_HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_JSON_BYTES: Final = 2**20
"""What an answer may take beside its tensors."""


class _Output(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    datatype: Datatype
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw(b"")


class _Answer(msgspec.Struct, frozen=True):
    outputs: tuple[_Output, ...]


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]


class _Metadata(msgspec.Struct, frozen=True):
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


class _Error(msgspec.Struct, frozen=True):
    error: str = ""


_MAPPED: Final[Mapping[int, type[NearfarError]]] = {
    401: BackendUnavailable,
    403: BackendUnavailable,
    404: ModelNotFound,
    408: DeadlineExceeded,
    429: Overloaded,
    503: Overloaded,
    504: DeadlineExceeded,
}
"""Other statuses: the model failed there. 401 is not our client's fault but our key's."""


class Backend:
    """One connection to a server, kept open. One caller at a time."""

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigError(f"backend {url!r} must be like http://10.0.0.7:8000")
        self.timeout_s = timeout_s
        self._prefix = parts.path.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname,
                parts.port,
                timeout=timeout_s,
                context=ssl.create_default_context(),
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname, parts.port, timeout=timeout_s
            )

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = _JSON_BYTES,
    ) -> tuple[bytes, str | None]:
        """The body of a 200 answer, and the length of the JSON in it where it says so.

        Raises the error that its status stands for, ``DeadlineExceeded`` after
        ``timeout_s``, and ``WorkerLost`` without a connection.
        """
        fresh = self._connection.sock is None
        try:
            return self._exchange(method, path, body, headers or {}, max_bytes)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(
                f"the backend gave no answer for {self.timeout_s:g} s: ask again"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if fresh or not isinstance(error, ConnectionError):
                raise WorkerLost(
                    f"the backend cannot be reached ({type(error).__name__})"
                ) from None
        # A kept connection that the server closed meanwhile: running twice changes nothing.
        return self.request(method, path, body, headers, max_bytes)

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        max_bytes: int,
    ) -> tuple[bytes, str | None]:
        self._connection.request(method, self._prefix + path, body, {**self._headers, **headers})
        answer = self._connection.getresponse()
        data = answer.read(max_bytes + 1)
        if len(data) > max_bytes:
            self.close()
            raise InferenceError(f"the backend answers more than {max_bytes} bytes")
        if answer.status != 200:
            kind = _MAPPED.get(answer.status, InferenceError)
            raise kind(f"the backend answers {answer.status}: {_error_text(data)}")
        return data, answer.getheader(_HEADER_LENGTH)

    def is_ready(self) -> bool:
        """Whether it says that it can run models. Raises nothing."""
        try:
            self.request("GET", "/v2/health/ready")
        except NearfarError:
            return False
        return True

    def close(self) -> None:
        """Drop the connection; the next request makes another one."""
        self._connection.close()


def _error_text(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Error).error[:300] or "no reason given"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "no reason given"


class OipRuntime:
    """A servable's model on a backend, under the servable's name."""

    def __init__(self, servable: OpenedServable, backend: Backend) -> None:
        """Raises ``ModelLoadError`` where the backend's model has other tensors."""
        self.info = LoadedModel("oip", "unknown")
        self._backend = backend
        model = servable.manifest.model
        self._input, self._outputs = model.inputs[0], model.outputs
        self._path = f"/v2/models/{quote(servable.manifest.name, safe='')}"
        self._check()

    def _check(self) -> None:
        data, _ = self._backend.request("GET", self._path)
        try:
            found = msgspec.json.decode(data, type=_Metadata)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"the backend's model metadata make no sense: {error}") from None
        for spec, theirs in (
            (self._input, found.inputs),
            *((spec, found.outputs) for spec in self._outputs),
        ):
            named = [one for one in theirs if one.name == spec.name]
            if not named or not _fits(spec, named[0]):
                raise ModelLoadError(
                    f"the backend has no tensor {spec.name!r} of {spec.dtype} with rows of "
                    f"{list(spec.shape[1:])}: it serves another model under this name"
                )

    def forward(
        self, rows: NDArray[np.generic], affine: Affine | None
    ) -> list[NDArray[np.generic]]:
        """See ``ModelRuntime.forward``. Raises what ``Backend.request`` raises as well."""
        if affine is not None:
            rows = rows.astype(np.float32) * affine.scale + affine.shift
        data = np.ascontiguousarray(rows).tobytes()
        head = msgspec.json.encode(
            {
                "parameters": {"timeout": int(self._backend.timeout_s * 1e6)},
                "inputs": [
                    {
                        "name": self._input.name,
                        "shape": rows.shape,
                        "datatype": datatype_of(self._input.dtype),
                        "parameters": {"binary_data_size": len(data)},
                    }
                ],
                "outputs": [
                    {"name": spec.name, "parameters": {"binary_data": True}}
                    for spec in self._outputs
                ],
            }
        )
        largest = 8 * len(rows) * sum(spec.size_bytes for spec in self._outputs) + _JSON_BYTES
        answer, length = self._backend.request(
            "POST",
            f"{self._path}/infer",
            head + data,
            {_HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
            largest,
        )
        try:
            return self._tensors(answer, len(answer) if length is None else int(length), len(rows))
        except (ContractError, msgspec.DecodeError, ValueError, KeyError) as error:
            text = getattr(error, "detail", type(error).__name__)
            raise InferenceError(f"the backend's answer makes no sense: {text}") from None

    def _tensors(self, answer: bytes, head_bytes: int, rows: int) -> list[NDArray[np.generic]]:
        view = memoryview(answer)
        message = msgspec.json.decode(view[:head_bytes], type=_Answer)
        found: dict[str, NDArray[np.generic]] = {}
        at = head_bytes
        for output in message.outputs:
            size = output.parameters.get("binary_data_size")
            if size is None:
                values = read_json(output.name, output.datatype, output.shape, bytes(output.data))
            else:
                piece = view[at : at + size]
                values = read_binary(output.name, output.datatype, output.shape, piece)
                at += size
            found[output.name] = np.asarray(values)
        tensors = []
        for spec in self._outputs:
            tensor = found[spec.name].reshape(rows, *spec.shape[1:])
            tensors.append(tensor.astype(np.float32) if tensor.dtype.kind == "f" else tensor)
        return tensors

    def free(self) -> None:
        """The backend's models are its operator's business."""


def _fits(spec: TensorSpec, tensor: _Tensor) -> bool:
    """Whether a backend's tensor can be this one: -1 is any size; the batch axis may lack."""
    own, theirs = spec.shape, tensor.shape
    if len(theirs) == len(own) - 1:
        theirs = (-1, *theirs)
    same_rank = len(theirs) == len(own) and math.prod(own) > 0
    return (
        same_rank
        and tensor.datatype == datatype_of(spec.dtype)
        and all(given in (-1, wanted) for given, wanted in zip(theirs[1:], own[1:], strict=True))
    )
