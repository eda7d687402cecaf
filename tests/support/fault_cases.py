"""Cases of the fault run: drawn by hypothesis, run for real, judged against the promise.

The promise: every request ends in an answer or a typed error by its deadline plus 50 ms,
and nothing is left behind. What a plain timer of the same process oversleeps meanwhile is
the machine's, and is allowed on top.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from edge_runtime import Bundle, EdgeRuntime, InferenceSource, NearfarError, Policy, Result
from edge_runtime.policies import find_policy
from edge_runtime.policies.statics import Hedged, HedgingPolicy
from edge_runtime.policies.utility import ExpectedUtility
from tests.support.bundles import photo, tiny_bundle
from tests.support.fault_proxy import FAULTS_BY_PHASE, FaultProxy, ProxyHost
from tests.support.watch import open_sockets, our_threads

SLACK_MS = 50.0
CLOSE_S = 2.5
"""A session's closing handshake takes up to a second, and a reader a little more."""
REQUESTS = 3
TOGETHER = 6
"""Cases at once: they mostly wait."""
COMBINATIONS = [(fault, phase) for phase, faults in FAULTS_BY_PHASE.items() for fault in faults]
POLICIES: dict[str, Callable[[], Policy]] = {
    "ADAPTIVE": lambda: find_policy("ADAPTIVE"),
    "PREFER_IN_CLOUD": lambda: find_policy("PREFER_IN_CLOUD"),
    "ONLY_IN_CLOUD": lambda: find_policy("ONLY_IN_CLOUD"),
    "Hedged": Hedged,
    "Hedged:30ms": lambda: Hedged(HedgingPolicy(hedging_delay_ms=30.0)),
    "ExpectedUtility:accuracy": lambda: ExpectedUtility("accuracy"),
    "ExpectedUtility:balanced": lambda: ExpectedUtility("balanced"),
    "ExpectedUtility:saver": lambda: ExpectedUtility("saver"),
}
PHOTOS = [photo(number) for number in range(REQUESTS)]
SESSION_ONLY = ("upgrade", "hello")
_HANGING_HOST = "hangs.invalid"
_HANG_S = 0.6


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One runtime, one fault, a few requests."""

    fault: str
    phase: str
    policy: str
    session: bool
    tls: bool
    deadline_ms: int
    arrival: str
    """``burst``, ``staggered`` (one every 40 ms) or ``sequence``."""
    warmed: bool
    """The fault comes when everything was well before."""
    in_loop: bool
    """``arun`` in an event loop, not ``run`` in threads."""
    cancel_ms: int | None
    """``in_loop``: the first caller gives up after so long."""
    seed: int


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How one request ended."""

    kind: str
    """``on_device``, ``in_cloud``, an error's code, or ``cancelled``."""
    elapsed_ms: float
    overrun_ms: float
    """Beyond the deadline, the machine's own lateness taken off."""
    stall_ms: float
    """That lateness."""
    met: bool | None = None
    """The result's ``deadline_met``."""
    local_ms: float | None = None
    """That the local model took, its line included."""
    broken: str | None = None
    """A promise that does not hold for it."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one case went."""

    case: Case
    ends: tuple[End, ...]
    strikes: int
    close_ms: float
    broken: tuple[str, ...]


def draw_cases(number: int, count: int) -> list[Case]:
    """``count`` cases from one seed: all faults in all phases in turn, the rest drawn."""
    drawn: list[Case] = []

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    @given(
        policy=st.sampled_from(sorted(POLICIES)),
        session=st.booleans(),
        tls=st.sampled_from([False, False, False, True]),
        deadline_ms=st.integers(150, 400),
        arrival=st.sampled_from(["burst", "staggered", "sequence"]),
        warmed=st.booleans(),
        in_loop=st.booleans(),
        cancel_ms=st.one_of(st.none(), st.integers(0, 200)),
        own_seed=st.integers(0, 2**32 - 1),
    )
    def draw(*, session: bool, tls: bool, in_loop: bool, own_seed: int, **fields: Any) -> None:
        fault, phase = COMBINATIONS[len(drawn) % len(COMBINATIONS)]
        fields["cancel_ms"] = fields["cancel_ms"] if in_loop else None
        drawn.append(
            Case(
                fault=fault,
                phase=phase,
                session=session or phase in SESSION_ONLY,
                tls=(tls and phase != "dns") or phase == "tls",
                in_loop=in_loop,
                seed=own_seed,
                **fields,
            )
        )

    draw()
    return drawn[:count]


# One case -----------------------------------------------------------------------------


class Arena:
    """What all cases share: a bundle, a broker's proxies, certificates, a watched timer."""

    def __init__(self, host: ProxyHost, certificates: Certificates) -> None:
        self.host = host
        self.certificates = certificates
        self.bundle = Bundle.open(tiny_bundle())
        self.timer = Timer()

    def run(self, cases: list[Case]) -> list[Outcome]:
        """Several at once; what they leave behind is charged to all of them."""
        before = open_sockets()
        children = _children()
        with ThreadPoolExecutor(len(cases)) as pool:
            outcomes = list(pool.map(self.run_one, cases))
        left = _left_behind(before, children)
        if left:
            outcomes = [
                msgspec.structs.replace(one, broken=(*one.broken, *left)) for one in outcomes
            ]
        return outcomes

    def run_one(self, case: Case) -> Outcome:
        known = self.certificates
        proxy = self.host.open(case.seed, known.server if case.tls else None, known.wrong)
        try:
            return self._run(case, proxy)
        finally:
            proxy.close()

    def _run(self, case: Case, proxy: FaultProxy) -> Outcome:
        host = "127.0.0.1"
        if case.phase == "dns":
            host = _HANGING_HOST if case.fault == "hang" else "gone.invalid"
        elif not case.warmed:
            proxy.arm(case.fault, case.phase)
        runtime = EdgeRuntime(
            self.bundle,
            f"{'https' if case.tls else 'http'}://{host}:{proxy.port}",
            POLICIES[case.policy](),
            "tflite-int8-dyn",
            session=case.session,
            tls=self.certificates.client if case.tls else None,
        )
        broken: list[str] = []
        try:
            if case.warmed and case.phase != "dns":
                _warm(runtime, case)
                proxy.arm(case.fault, case.phase)
                if case.phase in ("connect", "tls", "health", "discovery", "upgrade", "hello"):
                    proxy.cut()
            ends = self._ask_in_loop(runtime, case) if case.in_loop else self._ask(runtime, case)
        finally:
            started = time.monotonic()
            runtime.close()
            close_ms = (time.monotonic() - started) * 1e3
        if close_ms / 1e3 - self.timer.worst_s(started, time.monotonic()) > CLOSE_S:
            broken.append(f"close took {close_ms:.0f} ms")
        broken += [end.broken for end in ends if end.broken is not None]
        return Outcome(
            case=case,
            ends=tuple(ends),
            strikes=proxy.strikes,
            close_ms=close_ms,
            broken=tuple(broken),
        )

    def _ask(self, runtime: EdgeRuntime, case: Case) -> list[End]:
        def ask(number: int) -> End:
            if case.arrival == "staggered":
                time.sleep(0.04 * number)
            started, outcome = time.monotonic(), _Failure()
            try:
                outcome.value = runtime.run(PHOTOS[number], deadline_ms=case.deadline_ms)
            except BaseException as error:
                outcome.value = error
            return self._judge(case, started, outcome.value)

        if case.arrival == "sequence":
            return [ask(number) for number in range(REQUESTS)]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(ask, range(REQUESTS)))

    def _ask_in_loop(self, runtime: EdgeRuntime, case: Case) -> list[End]:
        async def ask(number: int) -> End:
            if case.arrival == "staggered":
                await asyncio.sleep(0.04 * number)
            started, outcome = time.monotonic(), _Failure()
            cancelled = number == 0 and case.cancel_ms is not None
            try:
                asking = runtime.arun(PHOTOS[number], deadline_ms=case.deadline_ms)
                task = asyncio.create_task(asking)
                if cancelled:
                    assert case.cancel_ms is not None
                    asyncio.get_running_loop().call_later(case.cancel_ms / 1e3, task.cancel)
                outcome.value = await task
            except asyncio.CancelledError as error:
                if not cancelled:
                    outcome.value = error
                    return self._judge(case, started, error)
                return self._judge(case, started, None)
            except BaseException as error:
                outcome.value = error
            return self._judge(case, started, outcome.value)

        async def ask_all() -> list[End]:
            if case.arrival == "sequence":
                ends = [await ask(number) for number in range(REQUESTS)]
            else:
                ends = list(await asyncio.gather(*map(ask, range(REQUESTS))))
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                ends[0] = msgspec.structs.replace(ends[0], broken=f"tasks left: {tasks}")
            return ends

        return asyncio.run(ask_all())

    def _judge(self, case: Case, started: float, outcome: object) -> End:
        ended = time.monotonic()
        elapsed_ms = (ended - started) * 1e3
        stall_ms = self.timer.worst_s(started, ended) * 1e3
        overrun_ms = elapsed_ms - case.deadline_ms - stall_ms
        broken, met, local_ms = None, None, None
        if outcome is None:
            kind = "cancelled"
        elif isinstance(outcome, Result):
            kind, met = str(outcome.inference_source), outcome.deadline_met
            timings = outcome.timings
            if timings.local_ms is not None:
                local_ms = timings.local_ms + (timings.local_wait_ms or 0.0)
            if met is not (outcome.timings.total_ms <= case.deadline_ms):
                broken = f"deadline_met is {met} after {outcome.timings.total_ms:.1f} ms"
            if case.policy == "ONLY_IN_CLOUD" and kind == InferenceSource.ON_DEVICE:
                broken = "ONLY_IN_CLOUD answered on the device"
        elif isinstance(outcome, NearfarError):
            kind = outcome.code
            if not outcome.detail:
                broken = "an error without a word"
        else:
            kind, broken = type(outcome).__name__, f"untyped: {outcome!r}"
        if broken is None and overrun_ms > SLACK_MS:
            broken = f"{overrun_ms:.0f} ms late ({kind})"
        return End(
            kind=kind,
            elapsed_ms=elapsed_ms,
            overrun_ms=overrun_ms,
            stall_ms=stall_ms,
            met=met,
            local_ms=local_ms,
            broken=broken,
        )


class _Failure:
    """Until it is known how a call ended."""

    value: object = None


def _warm(runtime: EdgeRuntime, case: Case) -> None:
    """Everything is well: the model is found, and the session open if there shall be one."""
    runtime.prewarm(wait_ms=1000)
    if case.session:
        uplink = runtime._engine.uplink
        assert uplink is not None
        give_up = time.monotonic() + 1.0
        while not uplink._transport.session_open and time.monotonic() < give_up:  # type: ignore[attr-defined]
            time.sleep(0.005)


# Instruments ----------------------------------------------------------------------------


class Timer:
    """Sleeps two milliseconds at a time and remembers by how much it overslept, and when."""

    _NAP_S = 0.002

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fault-timer")

    def __enter__(self) -> Timer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.is_set():
            time.sleep(self._NAP_S)
            now = time.monotonic()
            late_s = now - before - self._NAP_S
            if late_s > self._NAP_S:
                self._late.append((now, late_s))
            before = now

    def worst_s(self, since_s: float, until_s: float) -> float:
        """The longest oversleep that overlaps this span."""
        worst = 0.0
        for ended_s, late_s in reversed(self._late):
            if ended_s < since_s:
                break
            if ended_s - late_s <= until_s:
                worst = max(worst, late_s)
        return worst


class Certificates:
    """One that the clients trust, and one that they do not."""

    def __init__(self, folder: Path) -> None:
        from tests.support.certificates import certificate

        good, bad = folder / "good", folder / "bad"
        good.mkdir()
        bad.mkdir()
        trusted, self.server = certificate(good, "IP:127.0.0.1")
        _, self.wrong = certificate(bad, "IP:127.0.0.1")
        self.client = ssl.create_default_context(cafile=str(trusted))


@contextmanager
def hanging_names() -> Iterator[None]:
    """Looking ``hangs.invalid`` up takes longer than any deadline, and then fails."""
    look_up = socket.getaddrinfo

    def hang(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == _HANGING_HOST:
            time.sleep(_HANG_S)
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution")
        return look_up(host, *arguments, **options)

    socket.getaddrinfo = hang  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.getaddrinfo = look_up


def _children() -> set[str]:
    """Process ids of this process's children."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update((task / "children").read_text().split())
        except OSError:
            continue
    return found


def _left_behind(sockets: set[str], children: set[str]) -> tuple[str, ...]:
    give_up = time.monotonic() + _HANG_S + 1.0
    while True:
        gc.collect()
        left: list[str] = []
        threads = our_threads()
        if threads:
            left.append(f"threads left: {threads}")
        more = open_sockets() - sockets
        if more:
            left.append(f"{len(more)} sockets left")
        born = _children() - children
        if born:
            left.append(f"children left: {sorted(born)}")
        names = {"nearfar-dns"}  # a lookup that hangs ends by itself; nothing can end it sooner
        if (
            not left
            or time.monotonic() > give_up
            or (not set(threads) <= names and time.monotonic() > give_up - _HANG_S)
        ):
            return tuple(left)
        time.sleep(0.02)


# All of them ------------------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one fault run."""

    seed: int
    cases: int
    requests: int
    struck: int
    """Cases whose fault struck at least once."""
    broken: tuple[str, ...]
    worst_overrun_ms: float
    worst_close_ms: float
    leaks: int
    answers: int
    misses: int
    """Answers after the deadline, of policies that hold a local one."""
    missed: tuple[str, ...]
    """Each of them."""
    by_kind: dict[str, int]
    by_place: dict[str, dict[str, int]]
    """``fault/phase/transport/policy``: how its requests ended."""
    seconds: float


def run_cases(
    arena: Arena, cases: list[Case], number: int, together: int = TOGETHER
) -> tuple[Report, list[Outcome]]:
    """Run them, a few at once, and sum up."""
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for at in range(0, len(cases), together):
        outcomes += arena.run(cases[at : at + together])
    return summarize(outcomes, number, time.monotonic() - started), outcomes


def summarize(outcomes: list[Outcome], number: int, seconds: float) -> Report:
    """The figures of many cases."""
    ends = [(one.case, end) for one in outcomes for end in one.ends]
    places: dict[str, Counter[str]] = {}
    for case, end in ends:
        transport = ("session" if case.session else "POST") + ("+TLS" if case.tls else "")
        place = f"{case.fault}/{case.phase}/{transport}/{case.policy}"
        places.setdefault(place, Counter())[end.kind] += 1
    misses = [
        (case, end) for case, end in ends if end.met is False and case.policy != "ONLY_IN_CLOUD"
    ]
    return Report(
        seed=number,
        cases=len(outcomes),
        requests=len(ends),
        struck=sum(one.strikes > 0 or one.case.phase == "dns" for one in outcomes),
        broken=tuple(f"{why}: {one.case}" for one in outcomes for why in one.broken),
        worst_overrun_ms=max(end.overrun_ms for _, end in ends),
        worst_close_ms=max(one.close_ms for one in outcomes),
        leaks=sum(" left" in why for one in outcomes for why in one.broken),
        answers=sum(end.met is not None for _, end in ends),
        misses=len(misses),
        missed=tuple(f"{end}: {case}" for case, end in misses),
        by_kind=dict(Counter(end.kind for _, end in ends).most_common()),
        by_place={place: dict(counts) for place, counts in sorted(places.items())},
        seconds=seconds,
    )


# Misses ----------------------------------------------------------------------------------


BROKEN_BROKERS = (
    ("refuse", "connect"),
    ("black_hole", "connect"),
    ("black_hole", "upload_head"),
    ("slow", "waiting"),
)
HOLDING = tuple(name for name in POLICIES if name != "ONLY_IN_CLOUD")
_MISS_DEADLINE_MS = 150


class Misses(msgspec.Struct, frozen=True, kw_only=True):
    """Late answers with a local model that is fast enough, and a broker that is no help."""

    requests: int
    misses: int
    misses_punctual: int
    """Those while the machine's timer was at most 5 ms late."""
    late_local: int
    """Requests of runtimes whose 99th local percentile was above the deadline: not counted."""
    by_policy: dict[str, int]
    missed: tuple[str, ...]
    worst_ms: float
    """Beyond the deadline."""


def run_misses(arena: Arena, each: int, together: int = 4) -> Misses:
    """``each`` requests in a row per policy and broker that is dead, black-holed or slow."""

    def ask(what: tuple[str, str, str]) -> tuple[str, list[End], float]:
        fault, phase, policy = what
        case = Case(
            fault=fault,
            phase=phase,
            policy=policy,
            session=True,
            tls=False,
            deadline_ms=_MISS_DEADLINE_MS,
            arrival="sequence",
            warmed=True,
            in_loop=False,
            cancel_ms=None,
            seed=0,
        )
        proxy = arena.host.open()
        try:
            with EdgeRuntime(
                arena.bundle,
                f"http://127.0.0.1:{proxy.port}",
                POLICIES[policy](),
                "tflite-int8-dyn",
            ) as runtime:
                _warm(runtime, case)
                proxy.arm(fault, phase)
                if phase == "connect":
                    proxy.cut()
                ends = []
                for number in range(each):
                    started = time.monotonic()
                    result = runtime.run(PHOTOS[number % REQUESTS], deadline_ms=_MISS_DEADLINE_MS)
                    ends.append(arena._judge(case, started, result))
        finally:
            proxy.close()
        ran = sorted(end.local_ms for end in ends if end.local_ms is not None)
        return f"{fault}/{phase}/{policy}", ends, ran[int(0.99 * len(ran))] if ran else 0.0

    todo = [(*broker, policy) for broker in BROKEN_BROKERS for policy in HOLDING]
    with ThreadPoolExecutor(together) as pool:
        asked = list(pool.map(ask, todo))
    counted = [one for one in asked if one[2] <= _MISS_DEADLINE_MS]
    ends = [(place, end) for place, many, _ in counted for end in many]
    late = [(place, end) for place, end in ends if not end.met]
    return Misses(
        requests=len(ends),
        misses=len(late),
        misses_punctual=sum(end.stall_ms <= 5.0 for _, end in late),
        late_local=sum(len(many) for _, many, _ in asked) - len(ends),
        by_policy=dict(Counter(place.rpartition("/")[2] for place, _ in late)),
        missed=tuple(f"{place}: {end}" for place, end in late),
        worst_ms=max((end.elapsed_ms - _MISS_DEADLINE_MS for _, end in ends), default=0.0),
    )
