import functools
import logging
import os
import time

import pytest
import torch

from tcomm.errors import (
    CollectiveMismatchError,
    ConfigError,
    PeerLostError,
    PeerTimeoutError,
    UsageError,
)
from tcomm.memory.control import CONTROL_BYTES
from tests.groups.moe.low_latency_cases import (
    Case,
    as_experts_see,
    make,
    run_case,
    tokens_of,
    wanted_rows,
    wanted_sum,
)
from tests.memory.fake_symm_mem import give_workspaces_device_memory

STEPS, LOST = 6, 2
CASES = [Case(seed, 4, zero_copy=seed % 2 == 1) for seed in range(STEPS)]


def sum_of(exchange, case):
    # As numbers: a tensor would travel by a descriptor of a process that has ended.
    return run_case(exchange, case)[-1].float().tolist()


def wanted(case, layout, rank, masked=()):
    given = tokens_of(case, layout, rank)[0].float()
    return wanted_sum(case, layout, rank, given, masked=masked).float().tolist()


def _publish_to_one(survivors, then):
    """Only one rank is told of this rank's next call before `then`; the others afterwards."""
    publish, others = survivors.publish, survivors.active[1:]

    def broken(word):
        survivors.publish = publish
        survivors.masked.update(others)
        publish(word)
        then()
        survivors.masked.difference_update(others)
        publish(word)

    survivors.publish = broken


def _tell_one_by_kernel(exchange, then):
    """As `_publish_to_one`, where kernels publish: into pages of nobody, instead of those of the others."""
    engine, survivors, table = (
        exchange._engine,
        exchange.masks.survivors,
        exchange.workspace.arena.control.table,
    )
    send, pages, nobody = engine.send_dispatch, table.clone(), torch.zeros(CONTROL_BYTES, dtype=torch.uint8)

    def broken(job):
        table[survivors.active[1:]] = nobody.data_ptr()
        send(job)
        table.copy_(pages)
        then()
        survivors.publish(job.epoch << 32 | job.call.signature)

    engine.send_dispatch = broken


def _meet_the_end(exchange, case, how):
    """What the lost rank does in the step in which it is lost."""
    leave = functools.partial(os._exit, 0)
    sleep = functools.partial(time.sleep, 1.2)
    then = leave if "dies" in how else sleep
    x, topk_idx, weights = tokens_of(case, exchange.layout, exchange.workspace.rank)
    if "telling one" in how:
        if exchange.workspace.engine == "cpu":
            _publish_to_one(exchange.masks.survivors, then)
        else:
            _tell_one_by_kernel(exchange, then)
    if how.startswith("before"):
        then()
    _, _, handle, _ = exchange.dispatch(x, topk_idx, use_fp8=False)
    if how.startswith("between"):
        then()
    y = torch.zeros(exchange.layout.num_local_experts, exchange.layout.capacity, 128).bfloat16()
    y = exchange.next_combine_buffer(handle).zero_() if case.zero_copy else y
    exchange.combine(y, topk_idx, weights, handle, zero_copy=case.zero_copy)
    _meet_the_end(exchange, case, "after")


def _elastic(member, engine, how, lost_at):
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("tcomm").addHandler(handler)
    exchange = make(member, engine=engine)
    exchange.masks.on_timeout = "mask"
    exchange.dispatch(*tokens_of(CASES[0], exchange.layout, member.rank)[:2])
    with torch.no_grad():
        exchange._lending_space()
    sums, told = [], ""
    for number, case in enumerate(CASES if engine == "cpu" else CASES[:3]):
        if member.rank == LOST and number == lost_at:
            with pytest.raises(PeerTimeoutError) as caught:
                _meet_the_end(exchange, case, how)
            told = str(caught.value)
            break
        # Short where it has to pass: a rank without a core of its own may be late for no reason.
        exchange.workspace.timeout = 0.7 if number == lost_at else 20.0
        sums.append(sum_of(exchange, case))
    masks = exchange.masks.query().tolist(), bool(exchange.masks.query_fault()), exchange.masks.faults
    after = None
    if "sleeps" in how:
        exchange.masks.clean()
        after = exchange.masks.query().tolist(), exchange.masks.faults, sum_of(exchange, CASES[0])
    elif member.rank != LOST:
        with pytest.raises(
            PeerLostError, match=r"clean_mask #\d+ of group 'll' cannot complete: .*rank 2 died"
        ):
            exchange.masks.clean()
    verdicts = [
        name for name in os.listdir("/dev/shm") if exchange.masks.survivors._prefix in f"/dev/shm/{name}"
    ]
    exchange.close()
    return exchange.layout, sums, masks, logged, told, after, verdicts


@pytest.mark.parametrize(
    ("engine", "how", "lost_at", "call"),
    [
        ("cpu", "before dispatch, dies", 1, 4),
        ("cpu", "between both, dies", 2, 7),
        ("cpu", "telling one, dies", 2, 7),
        ("cpu", "before dispatch, sleeps", 2, 6),
        ("cpu", "telling one, sleeps", 1, None),
        ("triton", "telling one, dies", 1, 5),
    ],
)
def test_survivors_go_on_as_if_the_owners_experts_gave_nothing(on_ranks, engine, how, lost_at, call):
    outcomes = on_ranks(4, _elastic, engine, how, lost_at, check=False)
    values = {o.rank: o.value for o in outcomes if not (o.rank == LOST and "dies" in how)}
    assert "".join(o.error for o in outcomes) == ""
    verdicts = {str(values[rank][2]) for rank in values if rank != LOST}
    assert len(verdicts) == 1, verdicts
    for rank, (layout, sums, masks, logged, told, after, left) in values.items():
        assert left == []
        if after is not None:
            assert after[:2] == ([0] * 4, [])
            assert after[2] == wanted(CASES[0], layout, rank)
        if rank == LOST:
            assert "have gone on without this rank, 2, since call #" in told
            continue
        assert masks[:2] == ([0, 0, 1, 0], True)
        ((lost_in, ranks),) = masks[2]
        assert ranks == (LOST,)
        assert call is None or lost_in == call
        assert len([line for line in logged if "goes on without ranks [2]: rank 2" in line]) == 1
        assert len(sums) == (STEPS if engine == "cpu" else 3)
        for number, (case, total) in enumerate(zip(CASES[: len(sums)], sums, strict=True)):
            # The first dispatch of all was not combined; each step is two calls.
            masked = {LOST} if 2 * number + 3 >= lost_in else set()
            assert total == wanted(case, layout, rank, masked), (number, lost_in)


class _Dies:
    """Ends this process at a point of the engine's way through one step."""

    def __init__(self, exchange, point):
        self._engine, self._survivors, self._point = exchange._engine, exchange.masks.survivors, point

    def in_part(self, part):
        """A part of a call begins: send_dispatch, receive_dispatch, send_combine or receive_combine."""
        wanted, _, how = self._point.partition(": ")
        if part != wanted:
            return
        if how == "begins":
            os._exit(0)
        if how == "has told one":
            _publish_to_one(self._survivors, functools.partial(os._exit, 0))
        if how == "writes":
            words, told = self._engine._words, []

            def written(rank, epoch):
                told.append(rank)
                return words(rank, epoch) if len(told) < 3 else os._exit(0)

            self._engine._words = written


def _watch(exchange, point):
    dies = _Dies(exchange, point)
    for part in ("send_dispatch", "receive_dispatch", "send_combine", "receive_combine"):
        run = getattr(exchange._engine, part)
        setattr(exchange._engine, part, lambda job, p=part, r=run: (dies.in_part(p), r(job)))


def _lose_some(member, engine, plan):
    exchange = make(member, engine=engine, num_experts=2 * member.world_size)
    exchange.masks.on_timeout = "mask"
    exchange._lending_space()
    sums, places = [], set()
    for number, case in enumerate(WAYS):
        if (number, member.rank) in plan:
            _watch(exchange, plan[number, member.rank])
        sums.append(sum_of(exchange, case))
        places.add(tuple(packed.rows.data_ptr() for packed in exchange._packed))
    masks = exchange.masks.query().tolist(), exchange.masks.faults
    exchange.close()
    return exchange.layout, sums, masks, len(places)


WAYS = [
    Case(0, 4, fp8=("use_fp8",), hook=True),
    Case(1, 3, hook=True),
    Case(2, 4, fp8=("use_fp8", "round_scale", "use_ue8m0"), zero_copy=True),
    Case(3, 2, "full", zero_copy=True, hook=True),
    Case(4, 4),
]


@pytest.mark.parametrize(
    ("engine", "world_size", "plan", "faults"),
    [
        # What was told in full before counts, though its hook was never called.
        ("cpu", 2, {(1, 0): "receive_combine: begins"}, [(5, (0,))]),
        ("cpu", 4, {(1, 0): "send_dispatch: writes", (1, 3): "receive_dispatch: begins"}, None),
        (
            "cpu",
            4,
            {(1, 2): "send_combine: has told one", (2, 1): "send_combine: writes"},
            [(5, (2,)), (6, (1,))],
        ),
        ("cpu", 3, {(2, 0): "send_dispatch: has told one", (3, 1): "receive_combine: begins"}, None),
        (
            "triton",
            4,
            {(1, 2): "send_combine: begins", (3, 1): "receive_combine: begins"},
            [(4, (2,)), (9, (1,))],
        ),
    ],
)
def test_ranks_die_at_every_point(on_ranks, engine, world_size, plan, faults):
    outcomes = on_ranks(world_size, _lose_some, engine, plan, check=False)
    lost = {rank for _, rank in plan}
    values = {o.rank: o.value for o in outcomes if o.rank not in lost}
    assert "".join(o.error for o in outcomes if o.rank not in lost) == ""
    assert len({str(value[2]) for value in values.values()}) == 1
    for rank, (layout, sums, (mask, found), num_places) in values.items():
        assert mask == [int(r in lost) for r in range(world_size)]
        assert faults is None or found == faults
        assert num_places == 1
        for number, (case, total) in enumerate(zip(WAYS, sums, strict=True)):
            masked = {r for call, ranks in found if call <= 2 * number + 2 for r in ranks}
            given = as_experts_see(case, tokens_of(case, layout, rank)[0])
            wanted_here = wanted_sum(case, layout, rank, given, masked=masked)
            assert total == wanted_here.float().tolist(), (number, found)


def _late_stores(member, engine):
    """Rank 2 writes its rows in fp8 when the others exchange others in the same half, in bfloat16."""
    exchange = make(member, engine=engine, num_experts=6)
    exchange.masks.on_timeout = "mask"
    case = STALE
    if member.rank == 2:
        begin = exchange.workspace.arena.channel.begin
        exchange.workspace.arena.channel.begin = lambda *args: (begin(*args), member.meet("write now"))[0]
        x, topk_idx, _ = tokens_of(case, exchange.layout, member.rank)
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2, since call #1"):
            exchange.dispatch(x, topk_idx)
        exchange.workspace.arena.channel.begin = begin
        member.meet("written")
        member.meet("rank 0 is alone")
        exchange.masks.clean()
        return exchange.layout, None, None, sum_of(exchange, case)
    exchange.workspace.timeout = 0.3 + 10 * member.rank
    sum_of(exchange, case)
    exchange.workspace.timeout = 20.0
    x, topk_idx, _ = tokens_of(LATER, exchange.layout, member.rank)
    rows, counts, _, hook = exchange.dispatch(x, topk_idx, use_fp8=False, return_recv_hook=True)
    member.meet("write now")
    member.meet("written")
    hook()
    found = [one[:n].tolist() for one, n in zip(rows, counts, strict=True)]
    # Then all of the others are late.
    if member.rank == 0:
        exchange.workspace.timeout = 0.3
        alone = sum_of(exchange, LATER)
    member.meet("rank 0 is alone")
    if member.rank == 1:
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 1, since call #4"):
            exchange.dispatch(x, topk_idx)
        alone = None
    exchange.workspace.timeout = 20.0
    exchange.masks.clean()
    return exchange.layout, found, alone, sum_of(exchange, case)


STALE, LATER = Case(5, 4, "full", fp8=("use_fp8",)), Case(6, 4, "full")


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_late_stores_of_a_masked_rank_hit_nobody(on_ranks, engine):
    outcomes = on_ranks(3, _late_stores, engine)
    for rank, (layout, _, _, total) in enumerate(outcomes):
        given = as_experts_see(STALE, tokens_of(STALE, layout, rank)[0])
        assert total == wanted_sum(STALE, layout, rank, given).float().tolist()
    assert outcomes[0][2] == wanted(LATER, outcomes[0][0], 0, {1, 2})
    for rank, (layout, rows, _, _) in enumerate(outcomes[:2]):
        sent = [tokens_of(LATER, layout, source)[0] for source in range(3)]
        wanted_here = wanted_rows(LATER, layout, rank)
        assert rows == [[sent[s][t].tolist() for s, t in one if s != 2] for one in wanted_here]


def _by_hand(member, engine):
    exchange = make(member, engine=engine, num_experts=6, timeout=10.0)
    x, topk_idx, _ = tokens_of(CASES[0], exchange.layout, member.rank)
    masks, told = exchange.masks, []
    for chosen in ("mask", "raise"):
        masks.on_timeout = chosen
        assert masks.on_timeout == chosen
    if member.rank == 1:
        masks.on_timeout = "mask"
    with pytest.raises(CollectiveMismatchError, match=r"rank 1: low_latency_dispatch.*on_timeout=mask"):
        exchange.dispatch(x, topk_idx)
    masks.on_timeout = "raise"
    member.meet("all know what the others called")
    with pytest.raises(ConfigError, match="give another rank, 0 to 2"):
        masks.update(member.rank, True)
    with pytest.raises(ConfigError, match="give another rank"):
        masks.update(3, True)
    with pytest.raises(ConfigError, match=r"give int32 \[3\]"):
        masks.query(torch.zeros(2, dtype=torch.int32))
    if member.rank < 2:
        hook = exchange.dispatch(x, topk_idx, return_recv_hook=True)[-1]
        masks.update(2, True)
        hook()
        out = torch.full((3,), 7, dtype=torch.int32)
        assert masks.query(out) is out
        told = [out.tolist(), bool(masks.query_fault()), sum_of(exchange, CASES[2])]
    member.meet("masked")
    if member.rank < 2:
        with pytest.raises(ConfigError, match=r"rank 2 has completed call #1 and this rank #4.*clean_mask"):
            masks.update(2, False)
    masks.clean()
    told += [masks.query().tolist(), sum_of(exchange, CASES[3])]
    hook = exchange.dispatch(x, topk_idx, return_recv_hook=True)[-1]
    masks.update((member.rank + 1) % 3, True)
    member.meet("all have completed their calls")
    with pytest.raises(UsageError, match=r"a call is open, in which rank . has no part; call its hook"):
        masks.update((member.rank + 1) % 3, False)
    hook()
    member.meet("all have completed that call")
    masks.update((member.rank + 1) % 3, False)
    told.append(sum_of(exchange, CASES[4]))
    exchange.close()
    return exchange.layout, told


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_ranks_are_masked_by_hand_and_come_back(on_ranks, engine):
    for rank, (layout, told) in enumerate(on_ranks(3, _by_hand, engine)):
        if rank < 2:
            assert told[:2] == [[0, 0, 1], False]
            assert told[2] == wanted(CASES[2], layout, rank, {2})
        assert told[-3] == [0, 0, 0]
        assert told[-2] == wanted(CASES[3], layout, rank)
        assert told[-1] == wanted(CASES[4], layout, rank)


def _masked_and_dead(member):
    exchange = make(member, num_experts=6, timeout=10.0)
    if member.rank == 0:
        exchange.masks.update(1, True)
    if member.rank == 1:
        exchange.masks.update(0, True)
    member.meet("masked")
    if member.rank == 2:
        os._exit(0)
    x, topk_idx, _ = tokens_of(CASES[0], exchange.layout, member.rank)
    with pytest.raises(PeerLostError) as caught:
        exchange.dispatch(x, topk_idx)
    with pytest.raises(PeerLostError, match="was given up at call #1"):
        exchange.masks.clean()
    return caught.value.peers


def test_by_default_a_dead_rank_is_named_with_masks_too(on_ranks):
    outcomes = on_ranks(3, _masked_and_dead, check=False)
    assert [o.value for o in outcomes] == [(2,), (2,), None]


def _by_hand_on_device(member, exchange):
    """In a call, and before one."""
    layout, masks, told = exchange.layout, exchange.masks, []
    if member.rank != 2:
        hook = exchange.dispatch(*tokens_of(CASES[0], layout, member.rank)[:2], return_recv_hook=True)[-1]
        masks.update(2, True)
        hook()
        told.append(sum_of(exchange, CASES[1]))
    member.meet("masked")
    if member.rank == 2:
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2, since call #3"):
            sum_of(exchange, CASES[1])
    else:
        with pytest.raises(ConfigError, match=r"rank 2 has completed call #2 and this rank #5.*clean_mask"):
            masks.update(2, False)
    masks.clean()
    return [*told, sum_of(exchange, CASES[2])]


def _leaves_a_verdict(member):
    exchange = make(member)
    verdicts = exchange.masks.survivors._verdicts
    assert verdicts.propose("1", 0) == "1"
    member.meet("proposed")
    assert verdicts.exists(0)
    member.meet("seen")
    exchange.close()
    member.meet("closed")
    return verdicts.exists(0)


def test_the_last_one_to_close_leaves_no_verdict_behind(on_ranks):
    assert on_ranks(2, _leaves_a_verdict) == [False, False]


def _elastic_on_device(member):
    give_workspaces_device_memory(member)
    exchange = make(member, engine="triton", num_experts=6)
    layout, masks = exchange.layout, exchange.masks
    exchange._lending_space()
    told = [sum_of(exchange, CASES[0]), *_by_hand_on_device(member, exchange)]
    # Late, and then dead.
    masks.on_timeout = "mask"
    flags, completed = {"use_fp8": member.rank == 1}, masks.survivors.epoch_of(member.rank)
    with pytest.raises(CollectiveMismatchError, match="rank 1: low_latency_dispatch"):
        exchange.dispatch(*tokens_of(CASES[0], layout, member.rank)[:2], **flags)
    assert masks.survivors.epoch_of(member.rank) == completed + 1
    told.append(sum_of(exchange, CASES[3]))
    if member.rank == 1:
        time.sleep(1.2)
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 1, since call #"):
            sum_of(exchange, CASES[4])
    else:
        exchange.workspace.timeout = 0.7
        told.append(sum_of(exchange, CASES[4]))
        exchange.workspace.timeout = 20.0
        told.append(masks.query().tolist())
    masks.clean()
    told.append(sum_of(exchange, CASES[5]))
    if member.rank == 2:
        os._exit(0)
    # Longer than the watch takes to find out that a rank is gone.
    time.sleep(0.8)
    told += [sum_of(exchange, case) for case in CASES[:2]]
    masks.on_timeout = "raise"
    time.sleep(0.8)
    told += [sum_of(exchange, CASES[2]), masks.query().tolist()]
    exchange.close()
    return layout, told


def test_hosts_agree_for_kernels_on_a_device(on_ranks):
    outcomes = on_ranks(3, _elastic_on_device, check=False)
    assert "".join(o.error for o in outcomes[:2]) == ""
    for rank in (0, 1):
        layout, told = outcomes[rank].value
        sums = [(0, ()), (1, {2}), (2, ()), (3, ())] + [(4, {1})] * (rank == 0) + [(5, ())]
        sums += [(0, {2}), (1, {2}), (2, {2})]
        masks = [each for each in told if each and type(each[0]) is int]
        assert masks == [[0, 1, 0]] * (rank == 0) + [[0, 0, 1]]
        got = [each for each in told if each not in masks]
        assert got == [wanted(CASES[number], layout, rank, masked) for number, masked in sums]
