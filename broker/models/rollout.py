"""Rollouts at work: who gets which version, and what becomes of a canary.

One ``Rollouts`` belongs to one broker and one event loop. It never waits and reads no clock but
the one it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

from broker.executors.base import EventSink
from broker.models.changes import Change, Promote, Rollback, changed
from broker.models.regression import Comparison, Regression, latency_ratio
from broker.models.repository import STABLE, Repository
from broker.models.routing import Canary, Rules, Shadow, check_rules, draw
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import (
    BackendUnavailable,
    BrokerFault,
    DeadlineExceeded,
    InferenceError,
    ModelLoadError,
    RequestRejected,
    WorkerLost,
)

__all__ = ["ArmStatus", "CanaryStatus", "Choice", "Rollouts", "RoutingEvent", "RoutingStatus"]

_KEPT_EVENTS: Final = 16
_FAILURES: Final = frozenset(
    error.code
    for error in (
        BackendUnavailable, BrokerFault, DeadlineExceeded, InferenceError, ModelLoadError,
        RequestRejected, WorkerLost,
    )
)  # fmt: skip
"""What a version can be blamed for. Who is turned away by the load on all models, who sends no
image and who leaves counts on neither side."""
_NO_RULES: Final = Rules()


class Choice(NamedTuple):
    """The version for one request."""

    servable: OpenedServable
    split: bool
    """It was drawn: the request counts in the trial."""


class ArmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a trial so far."""

    version: str
    requests: int
    failures: int
    batches: int


class CanaryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that goes on."""

    canary: Canary
    measured: ArmStatus
    stable: ArmStatus
    latency_ratio: float
    """Median batch times over those of the stable version, sizes being equal; 1 before any."""


class RoutingEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened to the routing of a model."""

    time: datetime
    event: str
    version: str | None
    detail: str = ""


class RoutingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The routing of one model as it is now."""

    name: str
    default: str | None
    """What a request without a version gets, the canary's share aside; None: nothing serves."""
    previous: str | None
    """What ``rollback`` returns to without a canary."""
    versions: tuple[str, ...]
    """The highest first, in service or not."""
    aliases: Mapping[str, str]
    canary: CanaryStatus | None
    shadow: Shadow | None
    events: tuple[RoutingEvent, ...]
    """The latest ones, oldest first."""


class Rollouts:
    """Rules by model, over a repository. ``changed_rules`` is called after every change."""

    def __init__(
        self,
        repository: Repository,
        events: EventSink,
        *,
        rolled_back: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._repository = repository
        self._events = events
        self._rolled_back = rolled_back
        self._clock = clock
        self._rules: dict[str, Rules] = {}
        self._previous: dict[str, str] = {}
        self._trials: dict[str, Comparison] = {}
        self._history: dict[str, deque[RoutingEvent]] = {}
        self.on_change: Callable[[], None] = lambda: None

    # Requests ----------------------------------------------------------------------------

    def choose(
        self,
        name: str,
        version: str | None,
        *,
        caller: tuple[str, ...],
        key: str,
        tensors: bool = False,
    ) -> Choice:
        """The version for a request; see ``draw`` for what sticks to it.

        ``version``: a version or alias that it names; ``caller``: who asks, its tenant first;
        ``key``: its idempotency key, or its own id where it has none; ``tensors``: it sends or
        takes tensors, and so cannot be given a version with others. Raises ``ModelNotFound``.
        """
        rules = self._rules.get(name)
        if version is None and rules is not None and rules.canary is not None:
            canary = rules.canary
            if self._repository.in_service(name, canary.version):
                stable = self._repository.get(name)
                tried = self._repository.get(name, canary.version)
                if not tensors or _same_tensors(stable, tried):
                    unit = "\0".join(caller if canary.by == "caller" else (caller[0], key))
                    drawn = draw(name, canary.version, unit) < canary.percent
                    return Choice(tried if drawn else stable, split=True)
        return Choice(self._repository.get(name, version), split=False)

    def ended(self, model: ModelKey, *, split: bool, status: int, code: str | None) -> None:
        """A request was answered with this HTTP status and error code."""
        trial = self._trials.get(model.name)
        failed = code in _FAILURES
        if trial is None or not split or (status >= 400 and not failed):
            return
        on_canary = self._on_canary(model)
        if on_canary is not None:
            self._judge(model.name, trial.request(canary=on_canary, failed=failed))

    def batch_ran(self, model: ModelKey, images: int, duration_ms: float) -> None:
        """A batch came back."""
        trial = self._trials.get(model.name)
        on_canary = None if trial is None else self._on_canary(model)
        if trial is not None and on_canary is not None:
            found = trial.batch(canary=on_canary, images=images, duration_ms=duration_ms)
            self._judge(model.name, found)

    def batch_interrupted(
        self, model: ModelKey, images: int, duration_ms: float, *, at_fault: bool
    ) -> None:
        """A batch came back that was run again: how long that took says nothing of a version.

        Where the version ended or hung its process itself, that counts as a request that failed,
        whatever became of the batch's requests afterwards.
        """
        trial = self._trials.get(model.name)
        on_canary = None if trial is None else self._on_canary(model)
        if at_fault and trial is not None and on_canary is not None:
            self._judge(model.name, trial.request(canary=on_canary, failed=True))

    def batch_lost(self, model: ModelKey, images: int) -> None:
        """Its requests count, each where it is answered."""

    def dropped(self, model: ModelKey) -> None:
        """It counts where it is answered."""

    def _on_canary(self, model: ModelKey) -> bool | None:
        """Which arm a version is; None: neither."""
        rules = self._rules[model.name]
        if rules.canary is not None and model.version == rules.canary.version:
            return True
        return False if model.version == rules.aliases.get(STABLE) else None

    def _judge(self, name: str, found: Regression | None) -> None:
        if found is None:
            return
        rules = self._rules[name]
        assert rules.canary is not None  # noqa: S101  # a trial has one
        version = rules.canary.version
        self._take(name, msgspec.structs.replace(rules, canary=None))
        self._rolled_back(name)
        detail = f"{found.detail} (p {found.p_value:.2g})"
        self._tell(name, "canary_rolled_back", version, detail, reason=found.kind)
        self.on_change()

    def shadow_of(self, model: ModelKey, unit: str) -> OpenedServable | None:
        """The version that shall compute this request too; None: none shall."""
        rules = self._rules.get(model.name)
        shadow = None if rules is None else rules.shadow
        if shadow is None or shadow.version == model.version:
            return None
        if not self._repository.in_service(model.name, shadow.version):
            return None
        if draw(model.name, shadow.version, unit) >= shadow.percent:
            return None
        return self._repository.get(model.name, shadow.version)

    def drop_shadow(self, name: str, detail: str) -> None:
        """End a shadow that does harm; nothing changes where there is none."""
        rules = self._rules.get(name, _NO_RULES)
        if rules.shadow is None:
            return
        version = rules.shadow.version
        self._take(name, msgspec.structs.replace(rules, shadow=None))
        self._tell(name, "shadow_dropped", version, detail)
        self.on_change()

    # Operators ---------------------------------------------------------------------------

    def change(self, name: str, change: Change) -> None:
        """Raises ``ModelNotFound`` and ``ConfigError``; nothing has changed then."""
        rules = self._rules.get(name, _NO_RULES)
        stable = self._repository.key_of(name).version
        new = changed(rules, change, stable=stable, previous=self._previous.get(name))
        ended = rules.canary if new.canary is None else None
        self._take(name, check_rules(self._repository, name, new))
        pinned = self._rules[name].aliases.get(STABLE)
        if isinstance(change, Promote | Rollback) and pinned is not None and pinned != stable:
            self._previous[name] = stable
        version = pinned if isinstance(change, Promote) else getattr(change, "version", None)
        if version is None and isinstance(change, Rollback):
            version = ended.version if ended is not None else pinned
        self._tell(name, str(type(change).__struct_config__.tag), version, _said(change))
        self.on_change()

    def set_rules(self, name: str, rules: Rules, previous: str | None = None) -> None:
        """Take over rules from a file or an earlier process. Raises as ``check_rules``."""
        self._take(name, check_rules(self._repository, name, rules))
        versions = {one.key.version for one in self._repository.versions(name)}
        if previous in versions:
            self._previous[name] = previous

    def rules(self) -> Mapping[str, tuple[Rules, str | None]]:
        """Rules of every model that has some, and its previous stable version."""
        return {name: (rules, self._previous.get(name)) for name, rules in self._rules.items()}

    def _take(self, name: str, rules: Rules) -> None:
        before = self._rules.get(name, _NO_RULES)
        self._repository.set_aliases(name, rules.aliases)
        self._rules[name] = rules
        same_trial = (before.canary, before.aliases.get(STABLE)) == (
            rules.canary, rules.aliases.get(STABLE),
        )  # fmt: skip
        if rules.canary is None:
            self._trials.pop(name, None)
        elif not same_trial or name not in self._trials:
            self._trials[name] = Comparison(
                min_requests=rules.canary.min_requests,
                false_alarm=rules.canary.false_alarm,
                max_latency_ratio=rules.canary.max_latency_ratio,
                max_error_increase=rules.canary.max_error_increase,
            )

    def _tell(
        self, name: str, event: str, version: str | None, detail: str, **fields: object
    ) -> None:
        now = datetime.fromtimestamp(self._clock(), UTC)
        history = self._history.setdefault(name, deque(maxlen=_KEPT_EVENTS))
        history.append(RoutingEvent(time=now, event=event, version=version, detail=detail))
        self._events(event, {"model": name, "version": version, "text": detail, **fields})

    # What is shown -----------------------------------------------------------------------

    def percent_of(self, model: ModelKey) -> float:
        """The share of requests without a version that this one gets."""
        rules = self._rules.get(model.name, _NO_RULES)
        canary = rules.canary
        if canary is not None and not self._repository.in_service(model.name, canary.version):
            canary = None
        if canary is not None and canary.version == model.version:
            return canary.percent
        if not self._repository.is_default(model):
            return 0.0
        return 100.0 if canary is None else 100.0 - canary.percent

    def shadow_percent_of(self, model: ModelKey) -> float:
        """The share of them that this one computes as well."""
        shadow = self._rules.get(model.name, _NO_RULES).shadow
        return shadow.percent if shadow is not None and shadow.version == model.version else 0.0

    def status(self, name: str) -> RoutingStatus:
        """``ModelNotFound``."""
        versions = self._repository.versions(name)
        rules = self._rules.get(name, _NO_RULES)
        serving = self._repository.in_service(name)
        return RoutingStatus(
            name=name,
            default=self._repository.key_of(name).version if serving else None,
            previous=self._previous.get(name),
            versions=tuple(one.key.version for one in versions),
            aliases=dict(self._repository.aliases(name)),
            canary=self._trial_status(name, rules),
            shadow=rules.shadow,
            events=tuple(self._history.get(name, ())),
        )

    def _trial_status(self, name: str, rules: Rules) -> CanaryStatus | None:
        trial = self._trials.get(name)
        if trial is None or rules.canary is None:
            return None
        canary, stable = (
            ArmStatus(
                version=version, requests=arm.requests, failures=arm.failures, batches=arm.ran
            )
            for version, arm in (
                (rules.canary.version, trial.canary), (rules.aliases[STABLE], trial.stable),
            )
        )  # fmt: skip
        ratio = latency_ratio(trial.canary.batches, trial.stable.batches)
        return CanaryStatus(
            canary=rules.canary, measured=canary, stable=stable, latency_ratio=round(ratio, 4)
        )


def _same_tensors(one: OpenedServable, other: OpenedServable) -> bool:
    mine, others = one.manifest.model, other.manifest.model
    return mine.inputs == others.inputs and mine.outputs == others.outputs


def _said(change: Change) -> str:
    """The change in words of its own, for the log."""
    fields = msgspec.to_builtins(change)
    fields.pop("action", None)
    return msgspec.json.encode(fields).decode() if fields else ""
