"""What an operator may do to the routing of a model while the broker runs."""

from __future__ import annotations

import msgspec

from broker.models.routing import Alias, Canary, Rules, Shadow
from edge_runtime.contract.errors import ConfigError, WireError
from edge_runtime.contract.manifest import Version

__all__ = [
    "Change",
    "ClearAlias",
    "EndShadow",
    "Promote",
    "Rollback",
    "SetAlias",
    "SetCanary",
    "SetShadow",
    "changed",
    "decode_change",
]


class _Change(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="action"
):
    """One of them."""


class SetCanary(_Change, frozen=True, kw_only=True, tag="set_canary"):
    """Begin a trial, or begin it anew with another share."""

    canary: Canary


class SetShadow(_Change, frozen=True, kw_only=True, tag="set_shadow"):
    """Compute a part of the requests by another version too."""

    shadow: Shadow


class EndShadow(_Change, frozen=True, kw_only=True, tag="end_shadow"):
    """Compute no more by it."""


class SetAlias(_Change, frozen=True, kw_only=True, tag="set_alias"):
    """Let a name stand for a version."""

    alias: Alias
    version: Version


class ClearAlias(_Change, frozen=True, kw_only=True, tag="clear_alias"):
    """Forget a name."""

    alias: Alias


class Promote(_Change, frozen=True, kw_only=True, tag="promote"):
    """Make a version the stable one; its trial has ended."""

    version: Version | None = None
    """None: the canary."""


class Rollback(_Change, frozen=True, kw_only=True, tag="rollback"):
    """End the canary; without one, make the version stable that was it before."""


Change = SetCanary | SetShadow | EndShadow | SetAlias | ClearAlias | Promote | Rollback

_decoder = msgspec.json.Decoder(Change)


def decode_change(body: bytes) -> Change:
    """From JSON, with its ``action``. Raises ``WireError``."""
    try:
        change: Change = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the change makes no sense: {error}") from None
    return change


def changed(rules: Rules, change: Change, *, stable: str, previous: str | None) -> Rules:
    """``rules`` after a change; versions are not looked up.

    ``stable``: what requests without a version get now; ``previous``: what they got before the
    last promotion. Raises ``ConfigError`` where there is nothing to change.
    """
    replace = msgspec.structs.replace
    match change:
        case SetCanary(canary=canary):
            return replace(rules, canary=canary)
        case SetShadow(shadow=shadow):
            return replace(rules, shadow=shadow)
        case EndShadow():
            if rules.shadow is None:
                raise ConfigError("this model has no shadow")
            return replace(rules, shadow=None)
        case SetAlias(alias=alias, version=version):
            return replace(rules, aliases=rules.aliases | {alias: version})
        case ClearAlias(alias=alias):
            if alias not in rules.aliases:
                raise ConfigError(f"this model has no alias {alias!r}")
            return replace(
                rules, aliases={one: of for one, of in rules.aliases.items() if one != alias}
            )
        case Promote(version=version):
            return _promoted(rules, version)
        case Rollback():
            if rules.canary is not None:
                return replace(rules, canary=None)
            if previous is None or previous == stable:
                raise ConfigError("there is no canary, and no version that was stable before")
            return _promoted(rules, previous)


def _promoted(rules: Rules, version: str | None) -> Rules:
    if version is None:
        if rules.canary is None:
            raise ConfigError("this model has no canary: say which version to promote")
        version = rules.canary.version
    shadow = rules.shadow
    return msgspec.structs.replace(
        rules,
        aliases=rules.aliases | {"stable": version},
        canary=None,
        shadow=None if shadow is not None and shadow.version == version else shadow,
    )
