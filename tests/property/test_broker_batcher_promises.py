"""What every formed batch promises, whatever waits."""

from hypothesis import given
from hypothesis import strategies as st

from broker.executors.base import BatchItem
from broker.models.servable import ModelKey
from broker.scheduling.batcher import form_batch
from broker.scheduling.latency import LatencyModel
from broker.scheduling.queue import EdfQueue
from broker.scheduling.ticket import Ticket

NOW_S = 100.0
MODEL = ModelKey("m", "1")

requests = st.lists(
    st.tuples(
        st.floats(min_value=-1.0, max_value=2.0),  # seconds to the deadline
        st.integers(min_value=1, max_value=50),  # bytes
        st.booleans(),  # probe
    ),
    max_size=30,
)
latencies = st.builds(
    lambda fixed_ms, image_ms: (fixed_ms, image_ms),
    st.floats(min_value=0.0, max_value=300.0),
    st.floats(min_value=0.1, max_value=100.0),
)


def waiting_and_model(
    entries: list[tuple[float, int, bool]], line: tuple[float, float]
) -> tuple[EdfQueue[Ticket], LatencyModel]:
    waiting: EdfQueue[Ticket] = EdfQueue()
    for left_s, size_bytes, probe in entries:
        ticket = Ticket(
            model=MODEL,
            deadline_s=NOW_S + left_s,
            upload_bytes=size_bytes,
            probe=probe,
            item=BatchItem(b"x" * size_bytes),
        )
        ticket.place = waiting.push(ticket.deadline_s, ticket)
    latency = LatencyModel()
    for batch in range(1, 9):
        latency.observe(batch, line[0] + batch * line[1], now_s=0.0)
    return waiting, latency


@given(requests, latencies, st.integers(1, 8), st.integers(1, 120))
def test_every_batch_keeps_its_promises(
    entries: list[tuple[float, int, bool]],
    line: tuple[float, float],
    max_batch: int,
    max_bytes: int,
):
    waiting, latency = waiting_and_model(entries, line)
    before = list(waiting)
    formed = form_batch(waiting, latency, now_s=NOW_S, max_batch=max_batch, max_bytes=max_bytes)
    after = list(waiting)

    # Nobody is lost, nobody is doubled.
    assert sorted(map(id, [*formed.tickets, *formed.hopeless, *after])) == sorted(map(id, before))
    # Bounds hold; a single image may pass the byte bound, or it would wait forever.
    assert len(formed.tickets) <= max_batch
    if len(formed.tickets) > 1:
        assert sum(len(ticket.item.body) for ticket in formed.tickets) <= max_bytes
    # Earliest deadlines go first, and nothing expired runs.
    assert [t.deadline_s for t in formed.tickets] == sorted(t.deadline_s for t in formed.tickets)
    if formed.tickets and after:
        assert formed.tickets[-1].deadline_s <= after[0].deadline_s
    assert all(ticket.deadline_s > NOW_S for ticket in formed.tickets)
    # Only what would be late even alone is given up, and a probe never for a prediction.
    for ticket in formed.hopeless:
        late_alone = latency.mean_ms(1) > ticket.left_ms(NOW_S)
        assert ticket.deadline_s <= NOW_S or (late_alone and not ticket.probe)
    # An executor that is free gets work whenever there is some.
    assert bool(formed.tickets) or not after
    # The earliest deadline of a batch of several is kept.
    if len(formed.tickets) > 1:
        assert latency.mean_ms(len(formed.tickets)) <= formed.tickets[0].left_ms(NOW_S)


@given(requests, latencies)
def test_a_batch_is_as_large_as_its_deadline_allows(
    entries: list[tuple[float, int, bool]], line: tuple[float, float]
):
    waiting, latency = waiting_and_model(entries, line)
    formed = form_batch(waiting, latency, now_s=NOW_S, max_batch=8, max_bytes=10**9)
    if formed.tickets and waiting and len(formed.tickets) < 8:
        larger_ms = latency.mean_ms(len(formed.tickets) + 1)
        assert larger_ms > formed.tickets[0].left_ms(NOW_S)
