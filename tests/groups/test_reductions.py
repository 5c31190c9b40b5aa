"""reduce, reduce-scatter and what they share with all-reduce: meaning, bits, dimensions, layouts."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tcomm import reference
from tcomm.errors import ConfigError
from tests.groups.verbs import (
    PULL_AND_PUSH,
    dims_of,
    group_for,
    inputs_to_reduce,
    join,
    mistake,
    odd_outs,
    odd_views,
    sizes_for,
    wrong_result,
)

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
WORLDS = [(2, name) for name in PULL_AND_PUSH] + [
    (world, name) for world in (3, 4) for name in PULL_AND_PUSH[:2]
]


def _ops(dtype):
    return ("sum", "max", "min") if dtype is torch.int64 else ("sum", "avg", "max", "min")


def _meaning(member, algorithm):
    comm, world, found = group_for(member, algorithm), member.world_size, []
    how = {"algorithm": algorithm}
    few = slice(0, 2) if algorithm.startswith("triton") else slice(None)
    shapes = [(world,), (3 * world, 5), (0, 2)][few]
    for seed, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        op = _ops(dtype)[seed % len(_ops(dtype))]
        inputs = inputs_to_reduce(seed, world, shape, dtype)
        found += [
            mistake(comm, "reduce", inputs, seed % world, op, op=op, **how),
            mistake(comm, "reduce_scatter_single", inputs, op, op=op, **how),
        ]
        for sizes in sizes_for(world)[few]:
            ragged = inputs_to_reduce(seed, world, (sum(sizes), *shape[1:]), dtype)
            found.append(mistake(comm, "reduce_scatterv", ragged, sizes, op, op=op, **how))
    comm.close()
    return join(found)


@pytest.mark.parametrize(("world_size", "algorithm"), WORLDS)
def test_reductions_have_the_bits_of_the_reference(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _meaning, algorithm) == [[]] * world_size


def _one_set_of_bits(member):
    """All engines and algorithms, and the parts of an all-reduce, of values on which the order tells."""
    comm, rank, world = member.communicator(), member.rank, member.world_size
    inputs = inputs_to_reduce(7, world, (world * 40, 3), torch.float32)
    x = inputs[rank]
    whole = comm.all_reduce(x)
    part = slice(40 * rank, 40 * rank + 40)
    found = []
    for name in PULL_AND_PUSH:
        found.append(wrong_result(comm.reduce_scatter_single(x, algorithm=name), whole[part], "sum"))
        found.append(wrong_result(comm.reduce_scatterv(x, [40] * world, algorithm=name), whole[part], "sum"))
        for root in range(world):
            total = comm.reduce(x, root, algorithm=name)
            found.append(wrong_result(total, whole if root == rank else None, "sum"))
    comm.close()
    return join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_engine_and_algorithm_has_the_bits_of_all_reduce(on_ranks, world_size):
    assert on_ranks(world_size, _one_set_of_bits) == [[]] * world_size


def _dims(member, algorithm):
    comm, world, found = group_for(member, algorithm), member.world_size, []
    shape = (2 * world, world, 3 * world, world)
    inputs = inputs_to_reduce(1, world, shape, torch.float32)
    inputs = [x.nan_to_num(1.0, 2.0, 3.0) for x in inputs]
    for dim in dims_of(shape):
        sizes = [0] * world
        sizes[0] += shape[dim] - 1
        sizes[-1] += 1
        found += [
            mistake(comm, "reduce_scatter_single", inputs, dim=dim, algorithm=algorithm, op="sum"),
            mistake(comm, "reduce_scatterv", inputs, sizes, dim=dim, algorithm=algorithm, op="sum"),
        ]
    empty = [torch.empty(2, 0, world)] * world
    found += [mistake(comm, "reduce_scatter_single", empty, dim=d, algorithm=algorithm) for d in (1, 2, -2)]
    comm.close()
    return join(found)


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(1, ""), (2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull")]
)
def test_parts_may_be_taken_along_any_dimension(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _dims, algorithm) == [[]] * world_size


def _layouts(member, algorithm):
    comm, rank, world, found = group_for(member, algorithm), member.rank, member.world_size, []
    # Whole numbers, because torch adds in another order.
    inputs = [torch.randn(2 * world, 6, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    inputs = [(8 * x).round() for x in inputs]
    x = inputs[rank]
    expected = {
        "reduce_scatter_single": reference.reduce_scatter(inputs)[rank],
        "reduce": reference.all_reduce(inputs)[0],
    }
    for verb, want in expected.items():
        args = (0,) if verb == "reduce" else ()
        gets = verb != "reduce" or rank == 0
        for name, view in odd_views(x).items():
            got = getattr(comm, verb)(view, *args, algorithm=algorithm)
            found.append((name, wrong_result(got, want if gets else None, "sum")))
        for name, out, memory in odd_outs(want.shape, want.dtype):
            got = getattr(comm, verb)(x, *args, out=out, algorithm=algorithm)
            found.append((name, "" if got is (out if gets else None) else "another tensor came back"))
            found.append((name, wrong_result(out, want if gets else torch.zeros_like(want), "sum")))
            if name == "gaps":
                found.append((name, "" if memory[..., 0].eq(0).all() else "written in the gaps"))
    comm.close()
    return [entry for entry in found if entry[1]]


@pytest.mark.parametrize(
    ("world_size", "algorithm"),
    [(2, "cpu:pull"), (3, "cpu:push"), (2, "triton:push"), (2, "torch"), (3, "torch")],
)
def test_inputs_and_results_may_lie_anyhow(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _layouts, algorithm) == [[]] * world_size


def _in_place(member, algorithm):
    comm, rank, world = group_for(member, algorithm), member.rank, member.world_size
    told = []
    for numel in (6, 40_000):
        inputs = [(torch.arange(float(numel)) + 3 * r) for r in range(world)]
        total = reference.all_reduce(inputs)[0]
        for root in range(world):
            x = inputs[rank].clone()
            got = comm.reduce(x, root, out=x, algorithm=algorithm)
            assert (got is x) if root == rank else got is None
            assert x.equal(total if root == rank else inputs[rank])
            sizes = [numel if r == root else 0 for r in range(world)]
            x = inputs[rank].clone()
            out = x if root == rank else torch.empty(0)
            assert comm.reduce_scatterv(x, sizes, out=out, algorithm=algorithm) is out
            assert out.equal(total if root == rank else torch.empty(0))
    x = torch.ones(2 * world, 2)
    with pytest.raises(ConfigError) as caught:
        comm.reduce_scatter_single(x, out=x[:2], algorithm=algorithm)
    told.append(str(caught.value))
    comm.barrier()
    comm.close()
    return told


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull"), (2, "torch")]
)
def test_a_rank_that_gets_everything_may_get_it_in_place(on_ranks, world_size, algorithm):
    overlap = "out= of reduce_scatter_single overlaps the input without being the input; give other memory"
    assert on_ranks(world_size, _in_place, algorithm) == [[overlap]] * world_size


def _several(member, algorithm):
    comm, rank, world, found = group_for(member, algorithm), member.rank, member.world_size, []
    for sizes in sizes_for(world):
        total = sum(sizes)
        shapes = [(total,), (2, total, 3), (total, 1), (5, 0, total), (3, 4, 1, total)]
        for op, dtype in (("max", torch.int64), ("avg", torch.bfloat16)):
            for dim, some in ((0, shapes[::2]), (1, [(2, total, 3), (1, total)]), (-1, shapes[3:])):
                fitting = [shape for shape in some if shape[dim] == total]
                lists = [inputs_to_reduce(i, world, shape, dtype) for i, shape in enumerate(fitting)]
                want = [reference.reduce_scatter(xs, op, dim, sizes)[rank] for xs in lists]
                mine = [xs[rank] for xs in lists]
                got = comm.reduce_scatterv(mine, sizes, op, dim=dim, algorithm=algorithm)
                outs = [torch.zeros(*x.shape, 2, dtype=dtype)[..., 1] for x in want]
                work = comm.reduce_scatterv(
                    mine, sizes, op, dim=dim, out=outs, algorithm=algorithm, async_op=True
                )
                work.wait()
                for results in (got, outs):
                    found += [wrong_result(a, b, op) for a, b in zip(results, want, strict=True)]
    comm.close()
    return join(found)


@pytest.mark.parametrize(("world_size", "algorithm"), [(1, ""), (2, "cpu:pull"), (3, "cpu:push")])
def test_several_tensors_that_share_sizes_travel_together(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _several, algorithm) == [[]] * world_size


def _wrong_lists(comm):
    x, y = torch.ones(4, 2), torch.ones(2, 4)
    return [
        (([], [2, 2]), {}, "reduce_scatterv takes one tensor, or several of one dtype, and at least one"),
        (
            ([x, x.double()], [2, 2]),
            {},
            "reduce_scatterv takes one tensor, or several of one dtype, and at least one",
        ),
        (([x, None], [2, 2]), {}, "reduce_scatterv takes a torch.Tensor, not NoneType"),
        (
            ([x, y], [2, 2]),
            {},
            "reduce_scatterv: sizes=[2, 2] adds up to 4, a tensor of shape [2, 4] has 2 along dim 0",
        ),
        (
            (x, [1, 2]),
            {},
            "reduce_scatterv: sizes=[1, 2] adds up to 3, the tensor has 4 along dim 0",
        ),
        ((x, [4]), {}, "sizes of reduce_scatterv has 1 entries; needed one for each of 2 ranks"),
        ((x, [5, -1]), {}, "sizes of reduce_scatterv=[5, -1] has a negative entry"),
        ((x, [2.0, 2.0]), {}, "sizes of reduce_scatterv=[2.0, 2.0] has entries that are no integers"),
        ((x, None), {}, "sizes of reduce_scatterv=None has entries that are no integers"),
        (([x, x], [2, 2]), {"out": [x]}, "out= of reduce_scatterv has 1 tensors; needed one for each of 2"),
        (
            ([x], [2, 2]),
            {"out": [torch.ones(2, 3)]},
            "out= of reduce_scatterv is float32 [2, 3] on cpu; needed float32 [2, 2] on cpu",
        ),
        (([x], [2, 2], "avg"), {"dim": 2}, "dim=2 of reduce_scatterv: a tensor of shape [4, 2] has "),
        (([x.int()], [2, 2], "avg"), {}, "the average of torch.int32 is not a torch.int32"),
    ]


def _refuses_lists(member):
    comm = member.communicator()
    for args, options, told in _wrong_lists(comm) if member.rank == 0 else ():
        with pytest.raises(ConfigError) as caught:
            comm.reduce_scatterv(*args, **options)
        assert str(caught.value).startswith(told), str(caught.value)
    assert comm.reduce_scatterv([torch.ones(3)], [1, 2])[0].tolist() == [2.0] * (1 + member.rank)
    comm.close()


def test_wrong_lists_and_sizes_on_one_rank_send_nothing(on_ranks):
    on_ranks(2, _refuses_lists)


def _of_torch(member):
    """Operations and dtypes that only torch has, and its own result for those that tcomm has too."""
    comm, rank, world = group_for(member, "torch"), member.rank, member.world_size
    x = torch.arange(1, 4 * world + 1).view(-1, 2) + rank
    columns = [torch.arange(1, 4 * world + 1).view(-1, 2) + r for r in range(world)]
    product = torch.stack(columns).prod(0)
    assert comm.reduce_scatter_single(x, "product").equal(product.split(2)[rank])
    assert comm.reduce_scatter_single(x, dist.ReduceOp.PRODUCT, dim=1 - world % 2).numel() == 4
    total = comm.reduce(x, 1, dist.ReduceOp.BXOR)
    assert (total is None) == (rank != 1)
    for dtype in (torch.float32, torch.int32, torch.uint8, torch.complex64):
        y = x.to(dtype)
        sizes = [2 * world - 1, *[0] * (world - 2), 1]
        part = torch.stack([c.to(dtype) for c in columns]).sum(0).to(dtype).split(sizes)[rank]
        assert comm.reduce_scatterv(y, sizes, algorithm="torch").equal(part), dtype
    average = comm.reduce(x.float(), 0, "avg", algorithm="torch")
    if rank == 0:
        assert average.allclose(torch.stack(columns).float().mean(0))
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_only_torch_reduces_goes_there(on_ranks, world_size):
    on_ranks(world_size, _of_torch)
