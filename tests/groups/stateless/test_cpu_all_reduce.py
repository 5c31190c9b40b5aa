import datetime
import functools

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError, PeerTimeoutError
from tcomm.groups.stateless.cpu_all_reduce import cpu_all_reduce_


def _x(rank, dtype=torch.float32):
    x = torch.randn(257, generator=torch.Generator().manual_seed(rank)) * 10**rank
    return x.to(dtype)


def _in_order(world_size):
    """The sum in the order that is promised."""
    block = world_size & -world_size
    sums = []
    for first in range(0, world_size, block):
        parts = [_x(rank) for rank in range(first, first + block)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        sums.append(parts[0])
    return functools.reduce(torch.add, sums)


def _reduce(member, sizes):
    member.process_group()
    results = {}
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if member.rank >= size:
            continue
        x = _x(member.rank)
        assert cpu_all_reduce_(x, group, timeout=20) is x
        whole = torch.full((3,), member.rank, dtype=torch.int32)
        cpu_all_reduce_(whole, group, datetime.timedelta(seconds=20))
        strided = torch.ones(4, 4).t()[::2]
        cpu_all_reduce_(strided, group)
        assert torch.equal(strided, torch.full((2, 4), float(size)))
        results[size] = (x.numpy().tobytes(), whole.tolist())
    return results


def test_the_bits_are_the_same_on_every_rank_and_those_of_the_promised_order(on_ranks):
    sizes = [1, 2, 3, 4, 6]
    told = on_ranks(6, _reduce, sizes)
    for size in sizes:
        results = {told[rank][size][0] for rank in range(size)}
        assert results == {_in_order(size).numpy().tobytes()}
        assert told[0][size][1] == [sum(range(size))] * 3


def _one_is_missing(member):
    member.process_group()
    group = dist.group.WORLD
    if member.rank == 2:
        member.meet("failed")
        return ""
    with pytest.raises(PeerTimeoutError) as caught:
        cpu_all_reduce_(torch.ones(3), group, timeout=0.5)
    assert isinstance(caught.value, RuntimeError)
    member.meet("failed")
    return str(caught.value)


def test_a_missing_rank_is_named_when_the_time_is_up(on_ranks):
    for told in on_ranks(3, _one_is_missing)[:2]:
        assert "cpu_all_reduce_: Timed out after 0.5 s of waiting for rank 2" in told


def test_wrong_arguments_are_refused_before_anything_is_sent():
    with pytest.raises(ConfigError, match=r"cpu_all_reduce_ takes a torch\.Tensor, not list"):
        cpu_all_reduce_([1.0], None)
    with pytest.raises(ConfigError, match="timeout -1"):
        cpu_all_reduce_(torch.ones(1), None, timeout=-1)
