"""The models a broker serves: found on disk, one version of each name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from broker.models.servable import ModelKey, OpenedServable, open_servable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, LimitExceeded, ModelNotFound
from edge_runtime.contract.manifest import SERVABLE_NAME

__all__ = ["Repository", "find_servables"]


class Repository:
    """Servables by name. Built once; while the broker runs, only who is in service changes.

    What was admitted before a model went out of service is answered.
    """

    def __init__(self, servables: Iterable[OpenedServable]) -> None:
        by_name: dict[str, OpenedServable] = {}
        for servable in servables:
            name = servable.manifest.name
            if name in by_name:
                raise ConfigError(
                    f"two servables are named {name!r}: {by_name[name].root} and "
                    f"{servable.root}; serve one of them, or export one under another name"
                )
            by_name[name] = servable
        if not by_name:
            raise ConfigError("no model to serve: pass --models with a servable folder")
        if len(by_name) > limits.MAX_MODELS:
            raise LimitExceeded(f"more than {limits.MAX_MODELS} models")
        self._by_name: Mapping[str, OpenedServable] = MappingProxyType(by_name)
        self._withdrawn: set[str] = set()

    @classmethod
    def open(cls, folders: Iterable[Path]) -> Repository:
        """Open every servable in ``folders``; see ``find_servables`` and ``open_servable``."""
        return cls(open_servable(root) for folder in folders for root in find_servables(folder))

    def __iter__(self) -> Iterator[OpenedServable]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str, version: str | None = None) -> OpenedServable:
        """The servable of a name, of ``version`` when one is asked for.

        Raises ``ModelNotFound``, whose text names the models there are.
        """
        found = self._known(name)
        if name in self._withdrawn:
            raise ModelNotFound(
                f"model {name!r} is out of service: ask its operator to load it again"
            )
        if version is not None and found.manifest.version != version:
            raise ModelNotFound(
                f"model {name!r} is served in version {found.manifest.version!r} only"
            )
        return found

    def _known(self, name: str) -> OpenedServable:
        found = self._by_name.get(name)
        if found is None:
            known = ", ".join(sorted(set(self._by_name) - self._withdrawn)[:16])
            raise ModelNotFound(f"no model of this name; this broker serves: {known}")
        return found

    def key_of(self, name: str) -> ModelKey:
        """Of a model, in service or not. ``ModelNotFound``."""
        return self._known(name).key

    def in_service(self, name: str) -> bool:
        """Whether ``get`` finds it."""
        return name in self._by_name and name not in self._withdrawn

    def withdraw(self, name: str) -> None:
        """Take a model out of service: new requests are told so. ``ModelNotFound``."""
        self._withdrawn.add(self._known(name).manifest.name)

    def restore(self, name: str) -> None:
        """Put it back; nothing changes where it is in service. ``ModelNotFound``."""
        self._withdrawn.discard(self._known(name).manifest.name)

    @property
    def keys(self) -> tuple[ModelKey, ...]:
        """Name and version of each model, sorted."""
        return tuple(sorted(servable.key for servable in self))


def find_servables(folder: Path) -> list[Path]:
    """The servables at ``folder``: itself, or the folders directly below that are one.

    Raises ``ConfigError`` when there is none, so that a wrong path is not an empty broker.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: pass a servable, made by nearfar export")
    if (folder / SERVABLE_NAME).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{SERVABLE_NAME}"))
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise ConfigError(
            f"{folder} holds no servable ({SERVABLE_NAME} is neither in it nor one level "
            "down): make one with nearfar export SOURCE -o DIR"
        )
    return found
