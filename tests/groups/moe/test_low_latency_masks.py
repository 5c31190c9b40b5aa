import functools
import logging
import os
import time

import pytest
import torch

from tcomm.errors import CapabilityError, ConfigError, PeerLostError, PeerTimeoutError
from tests.groups.moe.low_latency_cases import Case, make, run_case, tokens_of, wanted_sum

STEPS, LOST = 6, 2
CASES = [Case(seed, 4, zero_copy=seed % 2 == 1) for seed in range(STEPS)]


def sum_of(exchange, case):
    # As numbers: a tensor would travel by a descriptor of a process that has ended.
    return run_case(exchange, case)[-1].float().tolist()


def wanted(case, layout, rank, masked=()):
    given = tokens_of(case, layout, rank)[0].float()
    return wanted_sum(case, layout, rank, given, masked=masked).float().tolist()


def _publish_to_one(exchange, then):
    """From now on only rank 0 is told of this rank's next call, before `then`; the others afterwards."""
    survivors = exchange.masks.survivors
    publish = survivors.publish

    def broken(word):
        survivors.masked.update({1, 3})
        publish(word)
        then()
        survivors.masked.clear()
        publish(word)

    survivors.publish = broken


def _meet_the_end(exchange, case, how):
    """What the lost rank does in the step in which it is lost."""
    leave = functools.partial(os._exit, 0)
    sleep = functools.partial(time.sleep, 1.2)
    then = leave if "dies" in how else sleep
    x, topk_idx, weights = tokens_of(case, exchange.layout, exchange.workspace.rank)
    if "telling one" in how:
        _publish_to_one(exchange, then)
    if how.startswith("before"):
        then()
    _, _, handle, _ = exchange.dispatch(x, topk_idx, use_fp8=False)
    if how.startswith("between"):
        then()
    y = torch.zeros(exchange.layout.num_local_experts, exchange.layout.capacity, 128).bfloat16()
    exchange.combine(y, topk_idx, weights, handle)
    _meet_the_end(exchange, case, "after")


def _elastic(member, how, lost_at):
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("tcomm").addHandler(handler)
    exchange = make(member)
    exchange.masks.on_timeout = "mask"
    exchange.dispatch(*tokens_of(CASES[0], exchange.layout, member.rank)[:2])
    with torch.no_grad():
        exchange._lending_space()
    sums, told = [], ""
    for number, case in enumerate(CASES):
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
    verdicts = [
        name for name in os.listdir("/dev/shm") if exchange.masks.survivors._prefix in f"/dev/shm/{name}"
    ]
    exchange.close()
    return exchange.layout, sums, masks, logged, told, after, verdicts


@pytest.mark.parametrize(
    ("how", "lost_at", "call"),
    [
        ("before dispatch, dies", 1, 4),
        ("between both, dies", 2, 7),
        ("telling one, dies", 2, 7),
        ("before dispatch, sleeps", 2, 6),
        ("telling one, sleeps", 1, None),
    ],
)
def test_survivors_go_on_as_if_the_owners_experts_gave_nothing(on_ranks, how, lost_at, call):
    outcomes = on_ranks(4, _elastic, how, lost_at, check=False)
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
        for number, (case, total) in enumerate(zip(CASES, sums, strict=True)):
            # The first dispatch of all was not combined; each step is two calls.
            masked = {LOST} if 2 * number + 3 >= lost_in else set()
            assert total == wanted(case, layout, rank, masked), (number, lost_in)


def _by_hand(member):
    exchange = make(member, num_experts=6, timeout=10.0)
    masks, told = exchange.masks, []
    for chosen in ("mask", "raise"):
        masks.on_timeout = chosen
        assert masks.on_timeout == chosen
    with pytest.raises(ConfigError, match="give another rank, 0 to 2"):
        masks.update(member.rank, True)
    with pytest.raises(ConfigError, match="give another rank"):
        masks.update(3, True)
    with pytest.raises(ConfigError, match=r"give int32 \[3\]"):
        masks.query(torch.zeros(2, dtype=torch.int32))
    if member.rank < 2:
        masks.update(2, True)
        out = torch.full((3,), 7, dtype=torch.int32)
        assert masks.query(out) is out
        told = [out.tolist(), bool(masks.query_fault()), sum_of(exchange, CASES[2])]
    member.meet("masked")
    if member.rank < 2:
        with pytest.raises(ConfigError, match=r"rank 2 has completed call #0 and this rank #2.*clean_mask"):
            masks.update(2, False)
    masks.clean()
    told += [masks.query().tolist(), sum_of(exchange, CASES[3])]
    masks.update((member.rank + 1) % 3, True)
    member.meet("all have completed their calls")
    masks.update((member.rank + 1) % 3, False)
    told.append(sum_of(exchange, CASES[4]))
    exchange.close()
    return exchange.layout, told


def test_ranks_are_masked_by_hand_and_come_back(on_ranks):
    for rank, (layout, told) in enumerate(on_ranks(3, _by_hand)):
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
    return caught.value.peers


def test_by_default_a_dead_rank_is_named_with_masks_too(on_ranks):
    outcomes = on_ranks(3, _masked_and_dead, check=False)
    assert [o.value for o in outcomes] == [(2,), (2,), None]


def _kernels(member):
    exchange = make(member, engine="triton")
    with pytest.raises(CapabilityError, match="kernels mask nobody"):
        exchange.masks.on_timeout = "mask"
    with pytest.raises(ConfigError, match="on_timeout='ignore' is neither"):
        exchange.masks.on_timeout = "ignore"
    exchange.masks.on_timeout = "raise"
    assert exchange.masks.on_timeout == "raise"
    with pytest.raises(CapabilityError, match="engine='triton'"):
        exchange.masks.update(0, True)
    return exchange.masks.query().tolist(), exchange.masks.faults, bool(exchange.masks.query_fault())


def test_kernels_mask_nobody(on_ranks):
    assert on_ranks(1, _kernels) == [([0], [], False)]
