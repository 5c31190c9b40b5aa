import time

import pytest
import torch

import tcomm
from tcomm.errors import CapabilityError, CollectiveMismatchError, ConfigError


def on_gloo(member, **kwargs):
    """A communicator with a process group behind it."""
    member.process_group()
    return tcomm.Communicator(timeout=20.0, **kwargs)


def _rows(rank, *shape, dtype=torch.float32):
    return (torch.arange(torch.Size(shape).numel()).view(shape) + 100 * rank).to(dtype)


def _broadcast(member):
    comm, world = on_gloo(member), member.world_size
    for root in range(world):
        x = _rows(comm.rank, 2, 3)
        assert comm.broadcast(x, root).equal(_rows(root, 2, 3))
        assert x.equal(_rows(comm.rank, 2, 3))
        assert comm.broadcast(x.t(), root).equal(_rows(root, 2, 3).t())
        out = torch.zeros(3, 2).t()
        assert comm.broadcast(x, root, out=out) is out
        assert out.equal(_rows(root, 2, 3))
        assert comm.broadcast(x, root, out=x, async_op=True).wait() is x
        assert x.equal(_rows(root, 2, 3))
        flags = torch.tensor(comm.rank == root)
        assert comm.broadcast(flags, root).item() is True
    comm.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast_gives_everyone_the_roots_tensor(on_ranks, world_size):
    on_ranks(world_size, _broadcast)


def _all_gather(member):
    comm, world = on_gloo(member), member.world_size
    for shape, dtype in [((2, 3), torch.float32), ((1,), torch.bfloat16), ((0, 4), torch.int64)]:
        x = _rows(comm.rank, *shape, dtype=dtype)
        expected = torch.cat([_rows(r, *shape, dtype=dtype) for r in range(world)])
        assert comm.all_gather_single(x).equal(expected)
        out = torch.empty_like(expected)
        assert comm.all_gather_single(x, out=out, async_op=True).wait() is out
        assert out.equal(expected)
    x = _rows(comm.rank, 3, 2).t()
    expected = torch.cat([_rows(r, 3, 2).t() for r in range(world)])
    wide = torch.zeros(2 * world, 6)
    assert comm.all_gather_single(x, out=wide[:, ::2]).equal(expected)
    assert wide[:, 1::2].eq(0).all()
    comm.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_gather_puts_the_ranks_one_after_another(on_ranks, world_size):
    on_ranks(world_size, _all_gather)


def _reduce_scatter(member):
    comm, world = on_gloo(member), member.world_size
    inputs = [_rows(r, 2 * world, 3) for r in range(world)]
    part = slice(2 * comm.rank, 2 * comm.rank + 2)
    total, largest = torch.stack(inputs).sum(0)[part], torch.stack(inputs).amax(0)[part]
    assert comm.reduce_scatter_single(inputs[comm.rank]).equal(total)
    assert comm.reduce_scatter_single(inputs[comm.rank], "avg").allclose(total / world)
    assert comm.reduce_scatter_single(inputs[comm.rank], torch.distributed.ReduceOp.MAX).equal(largest)
    out = torch.empty(3, 2).t()
    assert comm.reduce_scatter_single(inputs[comm.rank], out=out) is out
    assert out.equal(total)
    assert comm.reduce_scatter_single(torch.empty(0, 3)).shape == (0, 3)
    comm.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_reduce_scatter_gives_each_rank_its_part(on_ranks, world_size):
    on_ranks(world_size, _reduce_scatter)


def _average_of_integers(member):
    comm = on_gloo(member)
    with pytest.raises(ConfigError) as caught:
        comm.reduce_scatter_single(torch.ones(4, dtype=torch.int32), "avg")
    assert str(caught.value) == "the average of torch.int32 is not a torch.int32"
    comm.barrier()
    comm.close()


def test_reduce_scatter_refuses_an_average_of_integers_before_anything_is_sent(on_ranks):
    on_ranks(2, _average_of_integers)


def _all_to_all(member):
    comm, world, rank = on_gloo(member), member.world_size, member.rank
    x = _rows(rank, 2 * world, 3)
    expected = torch.cat([_rows(r, 2 * world, 3)[2 * rank : 2 * rank + 2] for r in range(world)])
    assert comm.all_to_all_single(x).equal(expected)
    sends = [[src + 2 * dst for dst in range(world)] for src in range(world)]
    inputs = [_rows(src, sum(sends[src]), 2) for src in range(world)]
    received = [inputs[src].split(sends[src])[rank] for src in range(world)]
    recvs = [sends[src][rank] for src in range(world)]
    result = comm.all_to_all_single(inputs[rank], sends[rank], recvs)
    assert result.equal(torch.cat(received))
    out = torch.empty(sum(recvs), 2)
    assert comm.all_to_all_single(inputs[rank], sends[rank], recvs, out=out, async_op=True).wait() is out
    assert out.equal(torch.cat(received))
    comm.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_to_all_sends_equal_and_ragged_rows(on_ranks, world_size):
    on_ranks(world_size, _all_to_all)


def _unequal_splits(member):
    comm = on_gloo(member)
    sends, recvs = ([1, 2], [1, 2]) if member.rank == 0 else ([2, 2], [1, 2])
    with pytest.raises(CollectiveMismatchError) as caught:
        comm.all_to_all_single(_rows(member.rank, sum(sends), 2), sends, recvs)
    told = [str(caught.value), comm.all_to_all_single(_rows(0, 2, 1)).shape]
    comm.close()
    return told


def test_rows_that_are_not_expected_are_named_on_every_rank_and_none_is_sent(on_ranks):
    expected = (
        "all_to_all_single of group 'default_pg': rank 0 sends 2 rows to rank 1, which expects 1; "
        "rank 1 sends 2 rows to rank 0, which expects 2"
    )
    told = on_ranks(2, _unequal_splits)
    assert told[0] == told[1]
    assert told[0][0] == expected.replace("; rank 1 sends 2 rows to rank 0, which expects 2", "")


def _barrier(member, with_process_group):
    comm = on_gloo(member) if with_process_group else member.communicator()
    times = []
    for late in range(member.world_size):
        comm.barrier()
        if member.rank == late:
            time.sleep(0.1)
        arrived = time.monotonic()
        comm.barrier()
        times.append((arrived, time.monotonic()))
    comm.close()
    return times


@pytest.mark.parametrize(("world_size", "with_process_group"), [(1, False), (2, False), (3, True)])
def test_nobody_leaves_a_barrier_before_all_have_come(on_ranks, world_size, with_process_group):
    for round_ in zip(*on_ranks(world_size, _barrier, with_process_group), strict=True):
        assert min(left for _, left in round_) >= max(arrived for arrived, _ in round_)


def _bad_calls(comm):
    x = torch.ones(4, 2)
    ranks = "is not a rank of this group; ranks are 0 to 1"
    needed = "needed float32 [8, 2] on cpu"
    return [
        (lambda: comm.broadcast(x, 2), f"root=2 of broadcast {ranks}"),
        (lambda: comm.broadcast([1], 0), "broadcast takes a torch.Tensor, not list"),
        (
            lambda: comm.all_gather_single(torch.tensor(1.0)),
            "all_gather_single of a 0-d tensor has no dimension to go along; reshape(1)",
        ),
        (
            lambda: comm.all_gather_single(x, out=torch.ones(4, 2)),
            f"out= of all_gather_single is float32 [4, 2] on cpu; {needed}",
        ),
        (
            lambda: comm.reduce_scatter_single(torch.ones(3, 2)),
            "reduce_scatter_single of [3, 2]: 3 along dim 0 does not divide by 2 ranks; nothing is padded, "
            "so pad it or give sizes to the variable form",
        ),
        (
            lambda: comm.all_to_all_single(torch.tensor(1.0)),
            "all_to_all_single of a 0-d tensor has no rows; reshape(1)",
        ),
        (
            lambda: comm.all_to_all_single(x, [2, 2], out=x.clone()),
            "all_to_all_single cannot check out= without recv_splits=; give both, or neither",
        ),
        (
            lambda: comm.all_to_all_single(x, [3, 2], [2, 2]),
            "send_splits=[3, 2] adds up to 5; the tensor has 4 rows",
        ),
        (lambda: comm.barrier(timeout="never"), "timeout 'never' is neither seconds nor one of "),
    ]


def _refuses_and_goes_on(member):
    comm = on_gloo(member)
    if member.rank == 0:
        for call, message in _bad_calls(comm):
            with pytest.raises(ConfigError) as caught:
                call()
            assert str(caught.value).startswith(message), str(caught.value)
    assert comm.broadcast(_rows(comm.rank, 2), 1).equal(_rows(1, 2))
    assert comm.all_gather_single(torch.ones(1)).tolist() == [1.0, 1.0]
    comm.close()


def test_a_bad_argument_on_one_rank_sends_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)


def _only_torch_could(member):
    comm, told = member.communicator(name="tp"), []
    x = torch.ones(2, 2)
    verbs = {
        "broadcast": (x, 0),
        "all_gather_single": (x,),
        "reduce_scatter_single": (x,),
        "all_to_all_single": (x,),
    }
    for verb, args in verbs.items():
        with pytest.raises(CapabilityError) as caught:
            getattr(comm, verb)(*args, algorithm="torch")
        told.append(str(caught.value))
        assert getattr(comm, verb)(*args).eq(2 if verb.startswith("reduce") else 1).all()
    comm.close()
    return told


def test_without_a_process_group_the_verbs_are_there_and_torchs_are_refused_with_the_reason(on_ranks):
    needs = "there is no torch.distributed process group for cpu tensors behind this group"
    for told in on_ranks(2, _only_torch_could):
        assert len(told) == 4
        assert all(needs in line for line in told), told


def _mixed_with_all_reduce(member):
    comm, seen = on_gloo(member), []
    for turn in range(8):
        work = comm.all_reduce(torch.full((3,), float(turn)), async_op=True)
        gathered = comm.all_gather_single(torch.tensor([float(turn + comm.rank)]))
        seen.append((work.wait()[0].item(), gathered.tolist()))
    comm.close()
    return seen


def test_verbs_of_both_kinds_keep_one_order(on_ranks):
    assert on_ranks(2, _mixed_with_all_reduce) == [[(2.0 * t, [t, t + 1.0]) for t in range(8)]] * 2
