"""The stream of rows by itself, and by kernels at the same places: whatever goes where."""

import time

import pytest
import torch

from tcomm.cpu import moe_two_sided as on_host
from tcomm.errors import PeerTimeoutError
from tcomm.kernels import moe_two_sided as by_kernels
from tcomm.memory.control import Word
from tcomm.memory.rings import HEAD, RECEIVED, SENT, TAIL, RingLayout
from tcomm.signature import CallDescription

CALL = CallDescription("turn", "rows")
LAYOUT = RingLayout(2, 1, 128)
ENGINES = {"cpu": on_host, "triton": by_kernels}


def tables(counts, first=0):
    """Rows for or from each rank, one after another."""
    table = torch.zeros(2, 64, dtype=torch.int64)
    for rank, count in enumerate(counts):
        table[rank, :count] = torch.arange(first, first + count).flip(0)
        first += count
    return table, torch.tensor(counts)


CASES = ([[2, 40], [31, 1]], [[0, 30], [0, 0]], [[0, 0], [0, 0]], [[3, 1], [2, 5]])
"""`[source][destination]`: how many rows go."""


def all_streams(member, engine, delay=0.0):
    return [_stream(member, ENGINES[engine], sent, delay, f"arena {n}") for n, sent in enumerate(CASES)]


def _stream(member, engine, sent, delay, name):
    """Rows in reverse both where they come from and where they go."""
    arena, rank = member.arena(64 << 10, name), member.rank
    given, taken = tables(sent[rank]), tables([sent[source][rank] for source in range(2)])
    x = torch.arange(sum(sent[rank]))[:, None] * 100 + 1000000 * rank + torch.arange(5)
    out = torch.full((int(taken[1].sum()), 5), -1)
    told = engine.announce(given[1], arena, CALL, 20.0).tolist() == taken[1].tolist()
    if rank:
        time.sleep(delay)
    engine.exchange_rows(x, out, given, taken, LAYOUT, arena, CALL, 20.0)
    words = arena.staging.buffer.local[arena.staging.layout.half(0) :][: LAYOUT.slots_at].view(torch.int64)
    counts = [int(words[LAYOUT.word(kind, 1 - rank, 0)]) for kind in (SENT, RECEIVED, HEAD, TAIL)]
    member.meet("done")
    return told, out.tolist(), counts, x.tolist()


def check(told, sent):
    for rank in range(2):
        announced, out, counts, x = told[rank]
        wanted = []
        for source in range(2):
            first = sum(sent[source][:rank])
            wanted += told[source][3][first : first + sent[source][rank]]
        assert announced
        assert out == wanted
        # 3 rows of 40 bytes in a slot; what a peer emptied last is told at any time.
        assert counts[:3] == [-(-sent[rank][1 - rank] // 3), *[-(-sent[1 - rank][rank] // 3)] * 2]
        assert counts[3] <= counts[0]
        assert len(x) == sum(sent[rank])


def check_all(told):
    for number, sent in enumerate(CASES):
        check([one[number] for one in told], sent)


def test_rows_go_where_the_tables_say(on_ranks):
    check_all(on_ranks(2, all_streams, "cpu", 0.05))


def stuck(member, engine):
    """Rank 1 says that it takes part, and then neither sends nor receives."""
    arena, rank = member.arena(64 << 10), member.rank
    if rank == 0:
        x = torch.zeros(40, 5, dtype=torch.int64)
        with pytest.raises(PeerTimeoutError, match=r"turn #1 of .* timed out after 0\.3 s on rank 0: rank 1"):
            ENGINES[engine].exchange_rows(
                x, x.clone(), tables([0, 40]), tables([0, 40]), LAYOUT, arena, CALL, 0.3
            )
    else:
        epoch = arena.channel.begin(CALL, 20.0)
        arena.channel.publish(0, epoch << 32 | CALL.signature)
    member.meet("done")
    return arena.channel.words[Word.WAITING_FOR]


def test_a_peer_that_takes_nothing_is_named(on_ranks):
    assert on_ranks(2, stuck, "cpu")[0] == 0


def gone_after_it_was_done(member):
    """Rank 1 looks whether rank 0 lives before it looks at what came, when rank 0 has sent all and left."""
    arena, rank = member.arena(64 << 10), member.rank
    given, taken = ([0, 12], [0, 0]) if rank == 0 else ([0, 0], [12, 0])
    x, out = torch.full((12, 5), 7), torch.zeros(12, 5, dtype=torch.int64)
    looks = []
    limit, step = on_host._Receiver.limit, on_host.Wait.step

    def step_after_it_left(wait):
        while not arena.channel.pages[0].words[Word.LEFT]:
            time.sleep(0.001)
        looks.append(step(wait))
        return looks[-1]

    if rank == 1:
        on_host._Receiver.limit = lambda end: limit(end) if looks else end.first
        on_host.Wait.step = step_after_it_left
    on_host.exchange_rows(x, out, tables(given), tables(taken), LAYOUT, arena, CALL, 20.0)
    if rank == 0:
        arena.close("done")
    return int(out.sum()), looks


def test_a_peer_that_is_done_and_left_is_not_lost(on_ranks):
    assert on_ranks(2, gone_after_it_was_done) == [(0, []), (12 * 5 * 7, [True])]


def unfit(member, engine):
    """Rank 1 takes rows that rank 0 does not give."""
    arena, rank = member.arena(64 << 10), member.rank
    x, told = torch.zeros(40, 5, dtype=torch.int64), ""
    taken = tables([40 * rank, 0])
    try:
        ENGINES[engine].exchange_rows(x, x.clone(), tables([0, 0]), taken, LAYOUT, arena, CALL, 20.0)
    except (AssertionError, PeerTimeoutError) as error:
        told = str(error)
    member.meet("done")
    return told


def test_tables_that_do_not_fit_end(on_ranks):
    assert on_ranks(2, unfit, "cpu") == ["", "ranks [0] are done, and rows to or from them are not"]


def left(member, engine):
    """A peer that has done its part may go: what it sent before counts."""
    arena, rank = member.arena(64 << 10), member.rank
    given, taken = ([0, 12], [0, 0]) if rank == 0 else ([0, 0], [12, 0])
    x, out = torch.full((12, 5), 7), torch.zeros(12, 5, dtype=torch.int64)
    ENGINES[engine].exchange_rows(x, out, tables(given), tables(taken), LAYOUT, arena, CALL, 20.0)
    if rank == 0:
        arena.close("done")
    return int(out.sum())


def test_a_peer_that_is_done_may_leave(on_ranks):
    assert on_ranks(2, left, "cpu") == [0, 12 * 5 * 7]
