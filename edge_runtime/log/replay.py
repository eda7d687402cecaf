"""Put logged situations before a policy again: the same one, or another.

Policies are pure, so the same policy must decide the same, bit for bit. Another one is
asked the questions it would have been asked: the first situation as logged; and, where it
wants to hear the local answer first, the next with the confidence and the time that were
logged. What the network would then have done is not in the log: prices and chances are what
the policies themselves expected, and one gain, the prior or a measured one, judges both.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.gain.curve import GainCurve
from edge_runtime.log.entries import LogEntry, PolicyRecord
from edge_runtime.log.parameters import make_policy
from edge_runtime.log.reader import LogFile
from edge_runtime.policies.adaptive import GainPrior
from edge_runtime.policies.base import Action, Decision, Policy, Situation

__all__ = ["Mismatch", "Replay", "Totals", "WhatIf", "compare", "replay"]

_SHOWN_MISMATCHES: Final = 100
_MAX_QUESTIONS: Final = 8
"""A policy that keeps asking to be asked again is stopped after so many."""


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that does not come out as logged."""

    line: int
    request: str
    step: int
    fields: tuple[str, ...]
    """Those that differ, ``name: logged -> replayed``."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The same policy again."""

    policies: tuple[str, ...]
    requests: int
    decisions: int
    mismatched: int
    mismatches: tuple[Mismatch, ...]
    """The first hundred."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over all requests, of the last decision for each."""

    local: int
    uploads: int
    upload_bytes: int
    expected_gain: float
    """Of the uploads, in right answers: the signed gain at the logged confidence, times the
    predicted chance that the answer comes in time."""
    price: float
    in_time: float
    """Sum over uploads of the predicted chance that the answer comes in time."""


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """What another policy would have done."""

    policy: str
    requests: int
    changed: int
    changes: tuple[tuple[str, str, int], ...]
    """(logged action, its action, requests), most frequent first."""
    logged: Totals
    other: Totals
    unanswerable: int
    """Requests whose next question depends on a local answer that was never made; their
    last decision counts as it is."""


def replay(log: LogFile) -> Replay:
    """Each logged decision again, by the policy that made it. Raises ``ConfigError``."""
    made: dict[bytes, Policy] = {}
    mismatches: list[Mismatch] = []
    decisions = mismatched = 0
    for numbered in log.entries:
        entry = numbered.entry
        key = msgspec.json.encode(entry.policy, order="deterministic")
        if key not in made:
            made[key] = make_policy(entry.policy)
        for number, step in enumerate(entry.steps):
            decisions += 1
            again = _as_logged(_decide(made[key], step.situation, numbered.line))
            differing = _differences(step.decision, again)
            if differing:
                mismatched += 1
                if len(mismatches) < _SHOWN_MISMATCHES:
                    mismatches.append(
                        Mismatch(
                            line=numbered.line,
                            request=entry.request,
                            step=number,
                            fields=differing,
                        )
                    )
    return Replay(
        policies=tuple(sorted({_described(numbered.entry.policy) for numbered in log.entries})),
        requests=len(log.entries),
        decisions=decisions,
        mismatched=mismatched,
        mismatches=tuple(mismatches),
    )


def _decide(policy: Policy, situation: Situation, line: int) -> Decision:
    """The policy's decision. ``ContractError``: its arithmetic fails on these numbers."""
    try:
        return policy.decide(situation)
    except (ArithmeticError, ValueError) as error:
        raise ContractError(
            f"line {line} of the log holds numbers that {policy.name} cannot decide on "
            f"({type(error).__name__}: {error})"
        ) from None


def _described(policy: PolicyRecord) -> str:
    return policy.name


def _as_logged(decision: Decision) -> Decision:
    """Through the log's own encoding, which turns whole floats like 0 into 0.0."""
    if not isinstance(decision, Decision):
        raise ConfigError("the policy gave no Decision")
    return msgspec.convert(msgspec.to_builtins(decision), Decision)


def _differences(logged: Decision, again: Decision) -> tuple[str, ...]:
    """Compared by the bits of their fields, so that NaN equals NaN and 0.0 is not -0.0."""
    if repr(logged) == repr(again):
        return ()
    pairs = ((name, getattr(logged, name), getattr(again, name))
             for name in logged.__struct_fields__)  # fmt: skip
    return tuple(f"{name}: {a!r} -> {b!r}" for name, a, b in pairs if repr(a) != repr(b))


# Another policy -------------------------------------------------------------------------


def compare(log: LogFile, policy: Policy, gain: GainCurve | GainPrior) -> WhatIf:
    """What ``policy`` would have done for each logged request, judged by ``gain``."""
    changes: Counter[tuple[str, str]] = Counter()
    logged: list[tuple[LogEntry, Decision]] = []
    other: list[tuple[LogEntry, Decision]] = []
    unanswerable = 0
    for numbered in log.entries:
        entry = numbered.entry
        last = entry.last
        if last is None:
            continue
        decision, answerable = _ask(policy, entry, numbered.line)
        unanswerable += not answerable
        changes[last.action.value, decision.action.value] += 1
        logged.append((entry, last))
        other.append((entry, decision))
    return WhatIf(
        policy=policy.name,
        requests=len(logged),
        changed=sum(count for (before, after), count in changes.items() if before != after),
        changes=tuple((before, after, count) for (before, after), count in changes.most_common()),
        logged=_totals(logged, gain),
        other=_totals(other, gain),
        unanswerable=unanswerable,
    )


def _ask(policy: Policy, entry: LogEntry, line: int) -> tuple[Decision, bool]:
    """The policy's last decision, and whether every question it wanted could be put."""
    situation = entry.steps[0].situation
    decision = _decide(policy, situation, line)
    for _ in range(_MAX_QUESTIONS):
        if decision.action is not Action.CASCADE or situation.confidence is not None:
            return decision, True
        following = _after_local(situation, entry)
        if following is None:
            return decision, False
        situation = following
        decision = _decide(policy, situation, line)
    return decision, True


def _after_local(first: Situation, entry: LogEntry) -> Situation | None:
    """The situation once the local answer is there; None: the log does not know it.

    The logged one where that question was put, else the first with what is known since.
    """
    for step in entry.steps[1:]:
        if step.situation.confidence is not None:
            return step.situation
    confidence, local_ms = entry.outcome.confidence, entry.outcome.timings.local_ms
    if confidence is None or local_ms is None:
        return None
    spent_ms = local_ms + (entry.outcome.timings.local_wait_ms or 0.0)
    return msgspec.structs.replace(
        first, confidence=confidence, time_left_ms=first.time_left_ms - spent_ms
    )


def _totals(decided: list[tuple[LogEntry, Decision]], gain: GainCurve | GainPrior) -> Totals:
    uploads = [(e, d) for e, d in decided if d.action is not Action.LOCAL]
    expected = 0.0
    for entry, decision in uploads:
        confidence = _confidence(entry)
        known = gain.local_right if confidence is None else confidence
        expected += gain.signed(known) * decision.p_cloud_in_deadline
    return Totals(
        local=len(decided) - len(uploads),
        uploads=len(uploads),
        upload_bytes=sum(entry.steps[0].situation.upload_bytes for entry, _ in uploads),
        expected_gain=expected,
        price=sum(decision.price for _, decision in uploads),
        in_time=sum(decision.p_cloud_in_deadline for _, decision in uploads),
    )


def _confidence(entry: LogEntry) -> float | None:
    """Of the local answer; None: none was made, or it has none."""
    asked = [step.situation.confidence for step in entry.steps]
    known = [confidence for confidence in asked if confidence is not None]
    return known[-1] if known else entry.outcome.confidence
