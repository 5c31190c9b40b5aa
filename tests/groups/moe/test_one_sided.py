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
)
from tcomm.groups.moe.one_sided import MOST_PAYLOADS, OneSided, OneSidedLayout
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
PAYLOADS = ((torch.bfloat16, (HIDDEN,)), (torch.uint8, (3,)), (torch.int64, (2, 2)), (torch.float32, ()))
ROW_NBYTES = 2 * HIDDEN + 3 + 32 + 4


def make(member, engine="cpu", top_k=4, most=MOST, num_experts=EXPERTS, **kwargs):
    members = from_store(member.store, member.rank, member.world_size, "one_sided")
    return OneSided(
        members, most, top_k, num_experts, ROW_NBYTES + 4 * top_k, 4 * HIDDEN,
        engine=engine, timeout=kwargs.pop("timeout", 30.0), **kwargs,
    )  # fmt: skip


def _payloads(turn, rank, num_tokens):
    return [content(turn + i, rank, num_tokens, tail, dtype) for i, (dtype, tail) in enumerate(PAYLOADS)]


def _round(exchange, member, kind, turn, top_k, runtime_max, in_workspace):
    """One dispatch and combine, compared with what all ranks' routings say; the combined rows."""
    world, me = member.world_size, member.rank
    counts = [min(tokens_of(kind, turn, rank, MOST), runtime_max) for rank in range(world)]
    all_ids = [ids_of(kind, turn, rank, counts[rank], top_k).to(torch.int32) for rank in range(world)]
    ids = all_ids[me]
    payloads = [*_payloads(turn, me, counts[me]), ids]
    views = exchange.dispatch(ids, payloads, runtime_max, invalid_token_expert_id=EXPERTS)
    for source in range(world):
        to_me = [t for t, ranks in enumerate(destinations(all_ids[source], world)) if me in ranks]
        wanted = [*_payloads(turn, source, counts[source]), all_ids[source]]
        for view, rows in zip(views, wanted, strict=True):
            assert same_bytes(view[source, : len(to_me)], rows[to_me]), (kind, turn, source)
        assert views[-1][source, len(to_me) :].eq(EXPERTS).all()
    made = views[0].to(torch.float32) * factor_of(me)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    results = made.to(dtype)
    if in_workspace:
        results = exchange.combine_buffer(HIDDEN, dtype).copy_(results)
    combined = exchange.combine(results, runtime_max, payload_in_workspace=in_workspace)
    x = payloads[0].to(torch.float32)
    where = destinations(ids, world)
    rows = [
        in_order_sum([(x[t] * factor_of(r)).to(dtype) for r in where[t]], HIDDEN, dtype)
        for t in range(len(ids))
    ]
    assert same_bytes(combined, torch.stack(rows) if rows else combined.new_empty(0, HIDDEN)), (kind, turn)
    num_remote = sum(len([r for r in ranks if r != me]) for ranks in where)
    nbytes = sum(one[0:1].numel() * one.itemsize for one in payloads) if len(ids) else 0
    return combined, num_remote * (nbytes + HIDDEN * dtype.itemsize)


def rounds(member, engine, delays=False, kinds=KINDS):
    """Routings of every kind, in shapes that change from call to call; told: wire bytes and phases."""
    nbytes, turn = 0, 0
    for top_k in (4, 1, 8) if not delays else (3,):
        with_room = make(member, engine, top_k)
        before = with_room.workspace.traffic.wire_nbytes
        nbytes = 0
        for kind in kinds:
            turn += 1
            if delays and turn % member.world_size == member.rank:
                time.sleep(0.05)
            runtime_max = MOST if turn % 2 else MOST - 4
            combined, moved = _round(with_room, member, kind, turn, top_k, runtime_max, turn % 3 == 0)
            nbytes += moved
        assert with_room.workspace.traffic.wire_nbytes - before == nbytes
        assert with_room.workspace.traffic.num_phases == 2 * len(kinds)
        again, _ = _round(with_room, member, kinds[-1], turn, top_k, runtime_max, False)
        assert same_bytes(again, combined)
        with_room.close()
    return nbytes


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_each_token_is_once_at_each_of_its_ranks_and_comes_back_as_their_sum(on_ranks, world):
    moved = on_ranks(world, rounds, "cpu", world == 8)
    assert (sum(moved) > 0) == (world > 1)


def delayed(member, engine):
    return rounds(member, engine, delays=True)


def test_late_ranks_change_nothing(on_ranks):
    on_ranks(3, delayed, "cpu")


def _example(member):
    """Of `docs/moe/one_sided.md`."""
    members = from_store(member.store, member.rank, 2, "example")
    exchange = OneSided(members, 2, 2, 4, 8, 4, engine="cpu", timeout=20.0)
    x = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0]])][member.rank]
    ids = [torch.tensor([[3, 2], [0, 3]]), torch.tensor([[1, -1]])][member.rank].to(torch.int32)
    (view,) = exchange.dispatch(ids, [x], 2)
    seen = [view[0, :, 0].tolist(), view[1, :, 0].tolist()]
    combined = exchange.combine(view.clone(), 2).flatten().tolist()
    layout, nbytes = exchange.layout, exchange.workspace.traffic.wire_nbytes
    exchange.close()
    return seen, combined, (layout.dispatch_at, layout.combine_at, layout.nbytes), nbytes


def test_the_worked_example(on_ranks):
    first, second = on_ranks(2, _example)
    assert first[0][0][:1] == [11.0]
    assert first[0][1][:1] == [20.0]
    assert second[0][0] == [10.0, 11.0]
    assert [first[1], second[1]] == [[10.0, 22.0], [20.0]]
    assert [first[3], second[3]] == [16, 8]
    assert first[2] == (128, 1280, 1408)


def _misuse(member, engine):
    exchange = make(member, engine)
    told = []

    def refused(kind, call):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        told.append(str(caught.value))

    ids = torch.zeros(2, 4, dtype=torch.int32)
    x = torch.ones(2, HIDDEN)
    rows = torch.ones(member.world_size, MOST, HIDDEN)
    refused(AssertionError, lambda: exchange.combine(rows, MOST))
    refused(AssertionError, lambda: exchange.combine_buffer(HIDDEN, torch.float32))
    refused(AssertionError, lambda: exchange.dispatch(ids, [x], MOST + 1))
    refused(AssertionError, lambda: exchange.dispatch(ids, [x], 1))
    refused(ConfigError, lambda: exchange.dispatch(ids, [x[:1]], MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids, [x.t()], MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids[:, :2], [x], MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids.float(), [x], MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids, [x] * 9, MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids, [x, x, x], MOST))
    refused(ConfigError, lambda: exchange.dispatch(ids, [x], MOST, invalid_token_expert_id=EXPERTS))
    wrong = ids.clone()
    wrong[1, 2] = EXPERTS
    refused(ConfigError, lambda: exchange.dispatch(wrong, [x], MOST))
    # One token more or less than the least that fits.
    exchange.dispatch(ids, [x], 2)
    refused(AssertionError, lambda: exchange.dispatch(ids, [x], 2))
    rows = torch.ones(member.world_size, 2, HIDDEN)
    refused(AssertionError, lambda: exchange.combine(rows, 3))
    refused(AssertionError, lambda: exchange.combine(rows, 2, payload_in_workspace=True))
    refused(ConfigError, lambda: exchange.combine(rows[:, :1], 2))
    refused(ConfigError, lambda: exchange.combine(rows.long(), 2))
    refused(ConfigError, lambda: exchange.combine(rows.repeat(1, 1, 2), 2))
    refused(ConfigError, lambda: exchange.combine_buffer(HIDDEN + 1, torch.float32))
    with pytest.raises(CollectiveMismatchError):
        exchange.combine(rows.to((torch.float32, torch.float16)[member.rank % 2]), 2)
    states = exchange.is_dispatched, exchange.combine(rows, 2), exchange.is_dispatched
    exchange.close()
    with pytest.raises(GroupClosedError):
        exchange.dispatch(ids, [x], 2)
    return told, [states[0], states[1].tolist(), states[2]] == [True, [[1.0] * HIDDEN] * 2, False]


def test_what_is_out_of_place_or_does_not_fit_is_told_before_anything_is_sent(on_ranks):
    first, second = on_ranks(2, _misuse, "cpu")
    assert first == second
    told, agreed = first
    assert agreed
    for said, part in zip(
        told,
        (
            "combine was called before dispatch", "combine_buffer was called before",
            "room for 1 to 9 tokens",
            "2 tokens are more than runtime_max=1", "payload 0 is [1, 24]", "contiguous [2, ...]",
            "needed [tokens, 4]", "needed int32 or int64", f"at most {MOST_PAYLOADS}",
            "payloads of 288 bytes a token; the workspace has room for 103", "is not among the payloads",
            "token 1 has expert 24 at entry 2; experts are 0 to 23", "dispatch was called twice",
            "combine of runtime_max=3 after dispatch of 2", "is not what combine_buffer() gave",
            "payload of combine is [2, 1, 24]", "not torch.int64", "rows of 192 bytes to combine",
            "room for 96",
        ),
        strict=True,
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((0, 1, 4, 8, 8), "max_num_tokens=0"), ((1, 1, 5, 8, 8), "num_experts=5 do not divide among 2 ranks")],
)
def test_sizes_that_make_no_sense_are_refused(sizes, told):
    class Two:
        exchange = type("Exchange", (), {"world_size": 2})

    with pytest.raises(ConfigError, match=told):
        OneSided(Two(), *sizes)


def test_regions_do_not_meet():
    layout = OneSidedLayout(3, 5, 100, 60)
    assert layout.dispatch_at == 128
    assert layout.combine_at == 128 + 1536 + 1024
    assert layout.nbytes == layout.combine_at + 1024
    assert layout.offsets([3, 90, 7], 5) == [128, 256, 1664]


def dies(member, engine):
    exchange = make(member, engine, timeout=20.0)
    ids = torch.full((1, 4), 0)
    exchange.dispatch(ids, [torch.ones(1, HIDDEN)], 2)
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        exchange.combine(torch.ones(2, 2, HIDDEN), 2)
    return caught.value.peers


def silent(member, engine):
    exchange = make(member, engine)
    peers = (1,)
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError, match=r"one_sided_dispatch .* rank 1 is silent") as caught:
            exchange.dispatch(torch.full((1, 4), 0), [], 2, timeout=0.3)
        peers = caught.value.peers
    member.meet("late")
    exchange.close()
    return peers


def test_a_dead_peer_and_a_silent_one_are_named(on_ranks):
    outcomes = on_ranks(2, dies, "cpu", check=False)
    assert outcomes[0].value == (1,), outcomes[0].error
    assert on_ranks(2, silent, "cpu") == [(1,)] * 2
