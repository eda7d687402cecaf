"""Which version answers whom: the rules of one model, and the file that sets them.

    [models.digits]
    aliases = { stable = "1.0.0", previous = "0.9.0" }
    canary = { version = "2.0.0", percent = 5 }
    shadow = { version = "2.1.0", percent = 10 }

A request that names a version or an alias gets that one. One that names none gets the canary, if
its draw (``draw``) falls below ``percent``, and else what ``stable`` stands for.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from broker.models.repository import STABLE, Repository
from broker.models.servable import OpenedServable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, ModelNotFound, NearfarError
from edge_runtime.contract.manifest import Name, Version

__all__ = ["Canary", "Rules", "Shadow", "Unit", "check_rules", "draw", "read_routing", "same_task"]

Alias = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}$(?!\n)")]
Unit = Literal["caller", "request"]
"""What sticks to its version, see ``draw``."""

_POINTS: Final = 2**64


class Canary(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A version that answers a part of the requests, and what ends its trial."""

    version: Version
    percent: Annotated[float, msgspec.Meta(gt=0, le=90)]
    """At most 90: without requests for the stable version there is nothing to compare with."""
    by: Unit = "caller"
    min_requests: Annotated[int, msgspec.Meta(ge=10, le=1_000_000)] = 50
    """Answers of the canary before it is judged."""
    false_alarm: Annotated[float, msgspec.Meta(ge=1e-6, le=0.2)] = 0.01
    """Chance that a canary as good as the stable version is ever rolled back."""
    max_latency_ratio: Annotated[float, msgspec.Meta(ge=1.01, le=100)] = 1.5
    """How much slower it may be, in the median of batches of the same size."""
    max_error_increase: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    """How much larger its share of failures may be."""


class Shadow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version that computes a part of the requests again, for comparison alone."""

    version: Version
    percent: Annotated[float, msgspec.Meta(gt=0, le=100)]


class Rules(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The routing of one model."""

    aliases: Annotated[dict[Alias, Version], msgspec.Meta(max_length=limits.MAX_ALIASES)] = {}
    canary: Canary | None = None
    shadow: Shadow | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    models: Annotated[dict[Name, Rules], msgspec.Meta(max_length=limits.MAX_MODELS)] = {}


def read_routing(path: Path, repository: Repository) -> tuple[Mapping[str, Rules], str]:
    """Rules by model, and the file's SHA-256 in hex.

    Raises ``ConfigError`` for a file that cannot be read, makes no sense, or names models or
    versions that are not there.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limits.MAX_ROUTING_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the routing file {path}: {error.strerror}") from None
    if len(data) > limits.MAX_ROUTING_BYTES:
        raise ConfigError(f"{path} has more than {limits.MAX_ROUTING_BYTES} bytes")
    try:
        models = msgspec.convert(tomllib.loads(data.decode()), _File).models
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is no routing file: {error}") from None
    checked: dict[str, Rules] = {}
    for name, rules in models.items():
        try:
            checked[name] = check_rules(repository, name, rules)
        except NearfarError as error:
            raise ConfigError(f"{path}, models.{name}: {error.detail}") from None
    return checked, hashlib.sha256(data).hexdigest()


def check_rules(repository: Repository, name: str, rules: Rules) -> Rules:
    """``rules`` with the alias ``stable`` set where a canary or shadow needs it.

    Without that, the new version would be the highest one, and so the default itself. Raises
    ``ModelNotFound`` for what is not there, and ``ConfigError`` where parts contradict each other.
    """
    versions = {one.key.version: one for one in repository.versions(name)}
    for version in rules.aliases.values():
        _require(versions, name, version)
    trials = [one for one in (rules.canary, rules.shadow) if one is not None]
    aliases = dict(rules.aliases)
    if trials and STABLE not in aliases:
        tried = {one.version for one in trials}
        settled = [version for version in versions if version not in tried]
        if not settled:
            raise ConfigError("there is no other version that could be the stable one")
        aliases[STABLE] = settled[0]
    for one in trials:
        new, stable = _require(versions, name, one.version), versions[aliases[STABLE]]
        kind = "canary" if isinstance(one, Canary) else "shadow"
        if new is stable:
            raise ConfigError(
                f"the {kind} is version {one.version!r}, which is the stable one: name another"
            )
        if not same_task(new, stable):
            raise ConfigError(
                f"the {kind}, version {one.version!r}, has another task or other labels than the "
                f"stable version {stable.key.version!r}: devices could not use its answers"
            )
    return msgspec.structs.replace(rules, aliases=aliases)


def _require(versions: Mapping[str, OpenedServable], name: str, version: str) -> OpenedServable:
    if version not in versions:
        known = ", ".join(list(versions)[:16])
        raise ModelNotFound(f"model {name!r} has no version {version!r}; it has: {known}")
    return versions[version]


def same_task(one: OpenedServable, other: OpenedServable) -> bool:
    """Whether the answers of two versions mean the same to a device."""
    return one.task_name == other.task_name and one.ref.labels_sha256 == other.ref.labels_sha256


def draw(name: str, version: str, unit: str) -> float:
    """Where a unit falls among 100 percent: in [0, 100), the same each time.

    SHA-256 of model, version and unit: even over units, whatever they look like, and another
    draw for each version, so that not the same callers meet every canary. A canary whose percent
    grows keeps the callers it has. The unit is, for ``by = "caller"``, the caller: tenant, API
    key and address, so that one device sees one version; for ``by = "request"``, the idempotency
    key, so that a retry meets the version of its first try, and a new draw without one. Behind a
    proxy that shows one address for all, "caller" would be one unit: use "request" there.
    """
    digest = hashlib.sha256(f"{name}\0{version}\0{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / _POINTS * 100.0
