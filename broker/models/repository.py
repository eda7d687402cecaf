"""The models a broker serves: found on disk, one or more versions of each name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from broker.models.servable import ModelKey, OpenedServable, open_servable
from broker.models.versions import precedence
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, LimitExceeded, ModelNotFound
from edge_runtime.contract.manifest import SERVABLE_NAME

__all__ = ["STABLE", "Repository", "find_servables"]

STABLE: Final = "stable"
"""The alias that a request without a version means, where it is set."""
_NAMED = 16


class Repository:
    """Servables by name and version. While the broker runs, only service and aliases change.

    A request names a version, an alias, or neither: then it gets the version that the alias
    ``stable`` stands for, and without that alias the highest one in service (see
    ``precedence``), which the name ``stable`` means then, too. What was admitted before a version
    went out of service is answered.
    """

    def __init__(self, servables: Iterable[OpenedServable]) -> None:
        by_name: dict[str, dict[str, OpenedServable]] = {}
        count = 0
        for servable in servables:
            name, version = servable.key
            versions = by_name.setdefault(name, {})
            if version in versions:
                raise ConfigError(
                    f"two servables are named {name!r} and are of version {version!r}: "
                    f"{versions[version].root} and {servable.root}; serve one of them, or export "
                    "one under another name or version"
                )
            versions[version] = servable
            count += 1
        if not count:
            raise ConfigError("no model to serve: pass --models with a servable folder")
        if count > limits.MAX_MODELS:
            raise LimitExceeded(f"more than {limits.MAX_MODELS} models")
        self._by_name: Mapping[str, Mapping[str, OpenedServable]] = MappingProxyType(
            {name: MappingProxyType(_highest_first(found)) for name, found in by_name.items()}
        )
        self._count = count
        self._withdrawn: set[ModelKey] = set()
        self._aliases: dict[str, Mapping[str, str]] = {}

    @classmethod
    def open(cls, folders: Iterable[Path]) -> Repository:
        """Open every servable in ``folders``; see ``find_servables`` and ``open_servable``.

        Raises ``ConfigError`` also where a folder NAME/VERSION holds another model.
        """
        return cls(_open(folder, root) for folder in folders for root in find_servables(folder))

    def __iter__(self) -> Iterator[OpenedServable]:
        return (one for versions in self._by_name.values() for one in versions.values())

    def __len__(self) -> int:
        return self._count

    def get(self, name: str, version: str | None = None) -> OpenedServable:
        """The servable of a name, of the version or alias ``version`` when one is asked for.

        Raises ``ModelNotFound``, whose text names the models or versions there are.
        """
        found = self._wanted(name, version)
        if found is None or found.key in self._withdrawn:
            which = "" if found is None else f" in version {found.key.version!r}"
            raise ModelNotFound(
                f"model {name!r} is out of service{which}: ask its operator to load it again"
            )
        return found

    def _wanted(self, name: str, version: str | None) -> OpenedServable | None:
        """What is meant, in service or not; None: a default where nothing is in service."""
        versions = self._known(name)
        aliases = self._aliases.get(name, {})
        if version is None or (version == STABLE and version not in {*versions, *aliases}):
            pinned = aliases.get(STABLE)
            if pinned is not None:
                return versions[pinned]
            serving = (one for one in versions.values() if one.key not in self._withdrawn)
            return next(serving, None)
        found = versions.get(version) or versions.get(aliases.get(version, ""))
        if found is None:
            raise ModelNotFound(
                f"model {name!r} has no version or alias of this name; it is served in "
                f"version {', '.join([repr(one) for one in versions][:_NAMED])}"
                + "".join(f", alias {alias!r}" for alias in sorted(aliases)[:_NAMED])
            )
        return found

    def _known(self, name: str) -> Mapping[str, OpenedServable]:
        found = self._by_name.get(name)
        if found is None:
            serving = {key.name for key in self.keys if key not in self._withdrawn}
            known = ", ".join(sorted(serving)[:_NAMED])
            raise ModelNotFound(f"no model of this name; this broker serves: {known}")
        return found

    def key_of(self, name: str, version: str | None = None) -> ModelKey:
        """Of a version or alias, in service or not; None: of the default, or the highest.

        Raises ``ModelNotFound``.
        """
        found = self._wanted(name, version)
        return next(iter(self._known(name).values())).key if found is None else found.key

    def versions(self, name: str) -> tuple[OpenedServable, ...]:
        """All versions of a name, in service or not, the highest first. ``ModelNotFound``."""
        return tuple(self._known(name).values())

    def in_service(self, name: str, version: str | None = None) -> bool:
        """Whether ``get`` finds it."""
        try:
            found = self._wanted(name, version)
        except ModelNotFound:
            return False
        return found is not None and found.key not in self._withdrawn

    def is_default(self, key: ModelKey) -> bool:
        """Whether a request that names no version gets this one, were there no split."""
        found = self._wanted(key.name, None)
        return found is not None and found.key == key and key not in self._withdrawn

    def withdraw(self, name: str, version: str | None = None) -> tuple[ModelKey, ...]:
        """Take a version, or all of them, out of service: new requests are told so.

        Those that were in service till now. ``ModelNotFound``.
        """
        keys = [key for key in self._named(name, version) if key not in self._withdrawn]
        self._withdrawn.update(keys)
        return tuple(keys)

    def restore(self, name: str, version: str | None = None) -> None:
        """Put it, or all versions, back; nothing changes where they serve. ``ModelNotFound``."""
        self._withdrawn.difference_update(self._named(name, version))

    def _named(self, name: str, version: str | None) -> tuple[ModelKey, ...]:
        if version is None:
            return tuple(one.key for one in self.versions(name))
        return (self.key_of(name, version),)

    def aliases(self, name: str) -> Mapping[str, str]:
        """Versions by alias."""
        return self._aliases.get(name, {})

    def set_aliases(self, name: str, aliases: Mapping[str, str]) -> None:
        """Replace the aliases of a name.

        Raises ``ModelNotFound`` for a version that is not there, and ``ConfigError`` for an
        alias that is the name of a version.
        """
        versions = self._known(name)
        for alias, version in aliases.items():
            if version not in versions:
                raise ModelNotFound(
                    f"alias {alias!r} stands for version {version!r}, which model {name!r} does "
                    f"not have: it has {', '.join([repr(one) for one in versions][:_NAMED])}"
                )
            if alias in versions:
                raise ConfigError(f"alias {alias!r} is a version of model {name!r} already")
        self._aliases[name] = MappingProxyType(dict(sorted(aliases.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, sorted."""
        return tuple(sorted(self._by_name))

    @property
    def keys(self) -> tuple[ModelKey, ...]:
        """Name and version of each servable: by name, the highest version of each first."""
        return tuple(one.key for name in self.names for one in self._by_name[name].values())

    @property
    def serving(self) -> tuple[ModelKey, ...]:
        """Those of ``keys`` that are in service."""
        return tuple(key for key in self.keys if key not in self._withdrawn)


def _highest_first(versions: Mapping[str, OpenedServable]) -> dict[str, OpenedServable]:
    order = sorted(versions, key=precedence, reverse=True)
    return {version: versions[version] for version in order}


def _open(folder: Path, root: Path) -> OpenedServable:
    servable = open_servable(root)
    said = (root.parent.name, root.name)
    if root.parent.parent == folder and said != servable.key:
        raise ConfigError(
            f"{root} holds version {servable.key.version!r} of {servable.key.name!r}: below "
            "--models, folders are NAME/VERSION as the servable says it, or servables"
        )
    return servable


def find_servables(folder: Path) -> list[Path]:
    """The servables at ``folder``: itself, the folders directly below, or NAME/VERSION folders.

    Raises ``ConfigError`` when there is none, so that a wrong path is not an empty broker.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: pass a servable, made by nearfar export")
    if (folder / SERVABLE_NAME).is_file():
        return [folder]
    found = sorted(
        path.parent
        for pattern in (f"*/{SERVABLE_NAME}", f"*/*/{SERVABLE_NAME}")
        for path in folder.glob(pattern)
    )
    servables = set(found)
    found = [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.parent not in servables
    ]
    if not found:
        raise ConfigError(
            f"{folder} holds no servable ({SERVABLE_NAME} is neither in it nor one or two levels "
            "down): make one with nearfar export SOURCE -o DIR"
        )
    return found
