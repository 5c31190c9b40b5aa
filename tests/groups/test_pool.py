import gc

import pytest
import torch

from tcomm.groups.pool import _KEPT_KINDS, POOLED_BYTES, ResultPool

LARGE = torch.Size([POOLED_BYTES])


def _address(pool, shape=LARGE, dtype=torch.float32):
    return pool.take(shape, dtype).data_ptr()


def test_memory_is_used_again_once_nobody_holds_it():
    pool = ResultPool()
    assert len({_address(pool) for _ in range(10)}) == 1


def _slice_of(x):
    return x[5:6]


def _other_shape(x):
    return x.view(2, -1).t()


def _array(x):
    return x.numpy()


def _storage(x):
    return x.untyped_storage()


def _detached(x):
    return x.detach()


def _in_a_graph(x):
    weight = torch.ones_like(x, requires_grad=True)
    return (x * weight).sum()


@pytest.mark.parametrize(
    "hold", [_slice_of, _other_shape, _array, _storage, _detached, _in_a_graph, memoryview]
)
def test_whatever_still_refers_to_a_result_keeps_its_memory(hold):
    pool = ResultPool()
    x = pool.take(LARGE, torch.float32)
    address, held = x.data_ptr(), hold(x.numpy() if hold is memoryview else x)
    del x
    gc.collect()
    others = [pool.take(LARGE, torch.float32) for _ in range(4)]
    assert address not in {other.data_ptr() for other in others}
    del held


def test_results_that_are_held_are_never_overwritten():
    pool, held = ResultPool(), []
    for number in range(6):
        x = pool.take(LARGE, torch.float32)
        x.fill_(number)
        held.append(x)
        pool.take(LARGE, torch.float32).fill_(-1)
    assert [int(x[0]) for x in held] == [int(x[-1]) for x in held] == list(range(6))


def test_shapes_and_dtypes_do_not_share_memory_and_are_as_asked():
    pool = ResultPool()
    shapes = [LARGE, torch.Size([2, POOLED_BYTES]), torch.Size([POOLED_BYTES, 1])]
    taken = [pool.take(s, d) for s in shapes for d in (torch.float32, torch.bfloat16, torch.int64)]
    assert [(tuple(t.shape), t.dtype) for t in taken] == [
        (tuple(s), d) for s in shapes for d in (torch.float32, torch.bfloat16, torch.int64)
    ]
    assert len({t.data_ptr() for t in taken}) == len(taken)
    assert all(t.is_contiguous() and not t.requires_grad for t in taken)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (POOLED_BYTES // 4 - 1,)])
def test_small_results_are_ordinary_tensors(shape):
    pool = ResultPool()
    assert pool.take(torch.Size(shape), torch.float32).shape == shape
    assert not pool._buffers


def test_memory_of_kinds_not_used_for_long_is_given_back():
    pool = ResultPool()
    for extra in range(3 * _KEPT_KINDS):
        pool.take(torch.Size([POOLED_BYTES + extra]), torch.float32)
    assert len(pool._buffers) == _KEPT_KINDS
    assert all(len(buffers) <= 2 for buffers in pool._buffers.values())


def _held_results(member):
    comm, held = member.communicator(), []
    for turn in range(6):
        held.append(comm.all_reduce(torch.full((50_000,), float(turn))))
        comm.all_reduce(torch.full((50_000,), -1.0))
    values = [(x[0].item(), x[-1].item()) for x in held]
    address = comm.all_reduce(held[0]).data_ptr()
    reused = comm.all_reduce(held[0]).data_ptr() == address
    comm.close()
    return values, reused


def test_a_communicators_results_stay_as_they_are_while_they_are_held(on_ranks):
    assert on_ranks(2, _held_results) == [([(2.0 * t, 2.0 * t) for t in range(6)], True)] * 2
