import os
import signal
import time

import pytest
import torch

from tcomm.errors import (
    CollectiveMismatchError,
    ConfigError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
    UsageError,
)
from tcomm.groups.moe.two_sided import TwoSided
from tcomm.groups.setup import from_store
from tests.groups.moe.routings import (
    EXPERTS,
    KINDS,
    content,
    destinations,
    factor_of,
    ids_of,
    in_order_sum,
    same_bytes,
    tokens_of,
)

MOST, HIDDEN = 9, 24
SMALL_RINGS = 12 * 1024
PAYLOADS = (
    (torch.uint8, (HIDDEN // 2,)),
    (torch.uint8, (3,)),
    (torch.float32, ()),
    (torch.bfloat16, (2, 40)),
)


def make(member, engine="cpu", num_nbytes=None, **kwargs):
    members = from_store(member.store, member.rank, member.world_size, "two_sided")
    kwargs.setdefault("timeout", 30.0)
    return TwoSided(members, num_nbytes=num_nbytes, engine=engine, **kwargs)


def weights_of(turn, rank, ids):
    return content(turn, rank, len(ids), ids.shape[1:], torch.float32)


def _round(exchange, member, kind, turn, top_k, most):
    """One prepare, a few exchanges and combine, compared with what all ranks' routings say."""
    world, me = member.world_size, member.rank
    counts = [min(tokens_of(kind, turn, rank, MOST), most) for rank in range(world)]
    all_ids = [ids_of(kind, turn, rank, counts[rank], top_k).to(torch.int32) for rank in range(world)]
    ids = all_ids[me]
    before = exchange.workspace.traffic.wire_nbytes
    info, got_ids, got_weights = exchange.prepare(ids, weights_of(turn, me, ids), most, EXPERTS)
    to_me = [
        (source, t)
        for source in range(world)
        for t, ranks in enumerate(destinations(all_ids[source], world))
        if me in ranks
    ]
    held = EXPERTS // world
    for row in range(most * world):
        wanted_ids, wanted_weights = [EXPERTS] * top_k, [0.0] * top_k
        if row < len(to_me):
            source, t = to_me[row]
            given = weights_of(turn, source, all_ids[source])[t].tolist()
            ours = [e // held == me and e >= 0 for e in all_ids[source][t].tolist()]
            wanted_ids = [
                e if mine else EXPERTS for e, mine in zip(all_ids[source][t].tolist(), ours, strict=True)
            ]
            wanted_weights = [w if mine else 0.0 for w, mine in zip(given, ours, strict=True)]
        assert got_ids[row].tolist() == wanted_ids, (kind, turn, row)
        assert got_weights[row].tolist() == wanted_weights
    num_remote = sum(len([r for r in ranks if r != me]) for ranks in destinations(ids, world))
    nbytes = num_remote * 8 * top_k
    for number, (dtype, tail) in enumerate(PAYLOADS):
        x = content(turn + number, me, counts[me], tail, dtype)
        rows = exchange.alltoallv(x, info)
        assert rows.shape == (most * world, *tail)
        wanted = [content(turn + number, source, counts[source], tail, dtype)[t] for source, t in to_me]
        if wanted:
            assert same_bytes(rows[: len(to_me)], torch.stack(wanted)), (kind, turn, number)
        nbytes += num_remote * torch.empty(1, *tail, dtype=dtype).nbytes
    combined, itemsize = _combined(exchange, member, info, ids, turn, top_k)
    nbytes += num_remote * 2 * HIDDEN + len([s for s, _ in to_me if s != me]) * HIDDEN * itemsize
    assert exchange.workspace.traffic.wire_nbytes - before == nbytes
    return combined


def _combined(exchange, member, info, ids, turn, top_k):
    """Rows multiplied on their way, and what a rank does not send is not a number."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    x = content(turn, member.rank, len(ids), (HIDDEN,), torch.bfloat16)
    rows = exchange.alltoallv(x, info)
    made = (rows.to(torch.float32) * factor_of(member.rank)).to(dtype)
    made[int(info.received.sum()) :] = float("nan")
    combined = exchange.combine(made, info, top_k)
    where = destinations(ids, member.world_size)
    terms = [[(x[t].to(torch.float32) * factor_of(r)).to(dtype) for r in where[t]] for t in range(len(ids))]
    sums = [in_order_sum(one, HIDDEN, dtype) for one in terms]
    assert same_bytes(combined, torch.stack(sums) if sums else combined.new_empty(0, HIDDEN)), turn
    return combined, dtype.itemsize


def rounds(member, engine, delays=False, kinds=KINDS, top_ks=(4, 1, 8)):
    """Routings of every kind through small rings, in shapes that change; told: combined rows."""
    exchange = make(member, engine, SMALL_RINGS)
    turn, told = 0, []
    for top_k in top_ks:
        for kind in kinds:
            turn += 1
            if delays and turn % member.world_size == member.rank:
                time.sleep(0.05)
            combined = _round(exchange, member, kind, turn, top_k, MOST if turn % 2 else MOST - 4)
            told.append(combined)
    again = _round(exchange, member, kinds[-1], turn, top_ks[-1], MOST if turn % 2 else MOST - 4)
    assert same_bytes(again, told[-1])
    phases = exchange.workspace.traffic.num_phases
    exchange.close()
    return phases == (len(told) + 1) * (2 + len(PAYLOADS) + 2)


@pytest.mark.parametrize(("world", "delays"), [(1, False), (2, False), (3, True), (4, False)])
def test_rows_arrive_as_one_prefix_in_order_and_come_back_as_sums(on_ranks, world, delays):
    assert on_ranks(world, rounds, "cpu", delays) == [True] * world


def eight(member, engine):
    return rounds(member, engine, kinds=("random", "some_ranks_empty", "full"), top_ks=(3,))


def test_eight_ranks(on_ranks):
    assert on_ranks(8, eight, "cpu") == [True] * 8


def streams(member, engine, most=400):
    """Far more than the rings hold: both ways, one way only, long rows, and rows of no bytes."""
    exchange = make(member, engine, 3 * 1024)
    world, me = member.world_size, member.rank
    slots = exchange.layout.slot_nbytes
    size = exchange.workspace.half_nbytes
    for turn, (target, tail, dtype) in enumerate(
        [(None, (33,), torch.float32), (0, (16,), torch.uint8), (world - 1, (257,), torch.int64),
         (None, (0,), torch.uint8)]
    ):  # fmt: skip
        most_here = most if turn < 2 else most // 8
        num_tokens = most_here if target is None or me != target else 0
        expert = (me + 1) % world if target is None else target
        ids = torch.full((num_tokens, 1), expert * (EXPERTS // world), dtype=torch.int32)
        info, got, _ = exchange.prepare(ids, torch.ones(num_tokens, 1), most_here, EXPERTS)
        rows = exchange.alltoallv(content(turn, me, num_tokens, tail, dtype), info)
        if target is None:
            sources = [(me - 1) % world]
        else:
            sources = [source for source in range(world) if source != target] if me == target else []
        wanted = [content(turn, source, most_here, tail, dtype) for source in sources]
        count = most_here * len(sources)
        assert info.received.tolist() == [most_here if s in sources else 0 for s in range(world)]
        if wanted:
            assert same_bytes(rows[:count], torch.cat(wanted)), turn
        assert (got < EXPERTS).sum() == count
    assert exchange.workspace.half_nbytes == size
    exchange.close()
    return slots


def test_any_amount_goes_through_rings_that_stay_small(on_ranks):
    assert max(on_ranks(2, streams, "cpu")) <= 384
    assert max(on_ranks(3, streams, "cpu")) <= 256


def _example(member):
    """Of `docs/moe/two_sided.md`."""
    members = from_store(member.store, member.rank, 2, "example")
    exchange = TwoSided(members, engine="cpu", timeout=20.0)
    x = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0]])][member.rank]
    ids = [torch.tensor([[3, 2], [0, 3]]), torch.tensor([[1, -1]])][member.rank].to(torch.int32)
    info, got, _ = exchange.prepare(ids, torch.ones(ids.shape), 2, 4)
    rows = exchange.alltoallv(x, info)
    combined = exchange.combine(rows, info, 2).flatten().tolist()
    nbytes = exchange.layout.nbytes
    exchange.close()
    return rows[:2, 0].tolist(), got.tolist(), combined, nbytes


def test_the_worked_example(on_ranks):
    first, second = on_ranks(2, _example)
    assert first[0] == [11.0, 20.0]
    assert second[0] == [10.0, 11.0]
    assert first[1] == [[0, 4], [1, 4], [4, 4], [4, 4]]
    assert second[1] == [[3, 2], [4, 3], [4, 4], [4, 4]]
    assert [first[2], second[2]] == [[10.0, 22.0], [20.0]]
    assert first[3] == 128 + 512 + 2 * 4 * 65536


def _misuse(member, engine):
    exchange, other = make(member, engine), make(member, engine)
    told = []

    def refused(kind, call):
        with pytest.raises(kind) as caught:
            call()
        told.append(str(caught.value))

    ids, weights, x = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4), torch.ones(2, HIDDEN)
    wrong = ids.clone()
    wrong[1, 2] = EXPERTS
    refused(ConfigError, lambda: exchange.prepare(ids.long(), weights, MOST, EXPERTS))
    refused(ConfigError, lambda: exchange.prepare(ids, weights[:1], MOST, EXPERTS))
    refused(ConfigError, lambda: exchange.prepare(ids, weights, 0, EXPERTS))
    refused(UsageError, lambda: exchange.prepare(ids, weights, 1, EXPERTS))
    refused(ConfigError, lambda: exchange.prepare(ids, weights, MOST, EXPERTS + 1))
    refused(ConfigError, lambda: exchange.prepare(wrong, weights, MOST, EXPERTS))
    info, _, _ = exchange.prepare(ids, weights, 2, EXPERTS)
    refused(UsageError, lambda: other.alltoallv(x, info))
    refused(ConfigError, lambda: exchange.alltoallv(x[:1], info))
    refused(ConfigError, lambda: exchange.combine(x, info, 4))
    rows = torch.ones(2 * member.world_size, HIDDEN)
    refused(ConfigError, lambda: exchange.combine(rows, info, 3))
    refused(ConfigError, lambda: exchange.combine(rows.long(), info, 4))
    with pytest.raises(CollectiveMismatchError):
        exchange.combine(rows.to((torch.float32, torch.float16)[member.rank % 2]), info, 4)
    combined = exchange.combine(rows, info, 4)
    exchange.close()
    other.close()
    with pytest.raises(GroupClosedError):
        exchange.alltoallv(x, info)
    return told, combined.tolist() == [[1.0] * HIDDEN] * 2


def test_what_does_not_fit_is_told_before_anything_moves(on_ranks):
    first, second = on_ranks(2, _misuse, "cpu")
    assert first == second
    told, agreed = first
    assert agreed
    for said, part in zip(
        told,
        (
            "topk_ids are torch.int64", "topk_weights are torch.float32 [1, 4]", "max_num_tokens=0",
            "2 tokens are more than max_num_tokens=1", "num_experts=25 do not divide among 2 ranks",
            "token 1 has expert 24 at entry 2", "alltoallv: the routing is of another exchange",
            "alltoallv of [1, 24]; needed contiguous [2, ...]",
            "combine of [2, 24]; needed contiguous [4, ...]",
            "top_k=3 of combine; the tokens have 4 experts", "not torch.int64 [4, 24]",
        ),
        strict=True,
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("nbytes", "told"), [(-1, "num_nbytes=-1"), (1000, "too little for rings from 2 ranks")]
)
def test_rings_of_no_size_are_refused(nbytes, told):
    class Two:
        exchange = type("Exchange", (), {"world_size": 2})

    with pytest.raises(ConfigError, match=told):
        TwoSided(Two(), num_nbytes=nbytes)


def _to_the_next(exchange, member, num_tokens):
    target = (member.rank + 1) % member.world_size * (EXPERTS // member.world_size)
    ids = torch.full((num_tokens, 1), target, dtype=torch.int32)
    return exchange.prepare(ids, torch.ones(num_tokens, 1), num_tokens, EXPERTS)[0]


def dies(member, engine):
    """Rank 1 dies in the middle: after it said that it takes part, before it has taken what it is sent."""
    exchange = make(member, engine, 3 * 1024, timeout=20.0)
    info = _to_the_next(exchange, member, 200)
    if member.rank == 1:
        if engine == "cpu":
            from tcomm.cpu import moe_two_sided as twin

            twin._run_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        exchange.alltoallv(torch.ones(200, HIDDEN), info)
    return caught.value.peers


def silent(member, engine):
    exchange = make(member, engine)
    info = _to_the_next(exchange, member, 3)
    peers = (1,)
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError, match="rank 1 is silent") as caught:
            exchange.alltoallv(torch.ones(3, HIDDEN), info, timeout=0.3)
        peers = caught.value.peers
    member.meet("late")
    exchange.close()
    return peers


def test_a_dead_peer_and_a_silent_one_are_named(on_ranks):
    outcomes = on_ranks(2, dies, "cpu", check=False)
    assert outcomes[0].value == (1,), outcomes[0].error
    assert on_ranks(2, silent, "cpu") == [(1,)] * 2
