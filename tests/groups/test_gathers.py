"""all-gather, of equal and unequal parts, and gather: meaning, dimensions, layouts, lists."""

import itertools

import pytest
import torch

from tcomm import reference
from tcomm.errors import CollectiveMismatchError, ConfigError
from tests.groups.verbs import (
    MOVING_WORLDS,
    dims_of,
    group_for,
    inputs_to_move,
    join,
    kinds_to_move,
    mistake,
    odd_outs,
    odd_views,
    random_bytes,
    sizes_for,
    unequal_bits,
)


def _meaning(member, algorithm):
    comm, world, found = group_for(member, algorithm), member.world_size, []
    how = {"algorithm": algorithm}
    few = slice(0, 1) if algorithm.startswith("triton") else slice(None)
    for seed, (dtype, row) in enumerate(kinds_to_move(algorithm)):
        inputs = inputs_to_move(seed, [(5, *row)] * world, dtype)
        found += [
            mistake(comm, "all_gather_single", inputs, **how),
            mistake(comm, "gather", inputs, seed % world, **how),
        ]
        for sizes in sizes_for(world)[few]:
            ragged = inputs_to_move(seed, [(rows, *row) for rows in sizes], dtype)
            found.append(mistake(comm, "all_gatherv", ragged, sizes, **how))
            found.append(mistake(comm, "all_gatherv", ragged, **how))
    comm.close()
    return join(found)


@pytest.mark.parametrize(("world_size", "algorithm"), MOVING_WORLDS)
def test_data_of_every_kind_comes_together_in_rank_order(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _meaning, algorithm) == [[]] * world_size


def _dims(member, algorithm):
    comm, world, found = group_for(member, algorithm), member.world_size, []
    shape = (2, 3, 1, 4)
    inputs = inputs_to_move(1, [shape] * world, torch.int64)
    for dim in dims_of(shape):
        how = {"dim": dim, "algorithm": algorithm}
        sizes = sizes_for(world)[0]
        shapes = [(*shape[: dim % 4], n, *shape[dim % 4 + 1 :]) for n in sizes]
        ragged = inputs_to_move(2, shapes, torch.bfloat16)
        found += [
            mistake(comm, "all_gather_single", inputs, **how),
            mistake(comm, "gather", inputs, dim % world, **how),
            mistake(comm, "all_gatherv", ragged, sizes, **how),
            mistake(comm, "all_gatherv", ragged, **how),
        ]
    empty = [torch.empty(2, 0, 3)] * world
    found += [mistake(comm, "all_gather_single", empty, dim=dim, algorithm=algorithm) for dim in (1, 2, -1)]
    comm.close()
    return join(found)


@pytest.mark.parametrize(
    ("world_size", "algorithm"),
    [(1, ""), (2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull"), (2, "torch")],
)
def test_tensors_may_be_put_together_along_any_dimension(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _dims, algorithm) == [[]] * world_size


def _layouts(member, algorithm):
    comm, rank, world, found = group_for(member, algorithm), member.rank, member.world_size, []
    few = slice(0, 1) if algorithm.startswith("triton") else slice(None)
    for dtype, dim in itertools.product((torch.complex64, torch.float32)[few], (1, 0)[few]):
        inputs = [torch.arange(12.0).view(3, 4).to(dtype) * (r + 1) for r in range(world)]
        if dtype.is_complex:
            inputs = [x + 2j * x for x in inputs]
        want = reference.all_gather(inputs, dim)[rank]
        for verb, args in (("all_gather_single", ()), ("all_gatherv", ([inputs[0].shape[dim]] * world,))):
            call = getattr(comm, verb)
            for name, x in odd_views(inputs[rank]).items():
                found.append((name, unequal_bits(call(x, *args, dim=dim, algorithm=algorithm), want)))
            for name, out, memory in odd_outs(want.shape, dtype):
                got = call(inputs[rank], *args, dim=dim, out=out, algorithm=algorithm)
                found.append((name, "" if got is out else "another tensor came back"))
                found.append((name, unequal_bits(out, want)))
                if name == "gaps":
                    found.append((name, "" if memory[..., 0].eq(0).all() else "written in the gaps"))
        same = torch.ones(1, 1, dtype=dtype).expand(3, 4)
        ones = torch.ones(3 * world, 4, dtype=dtype)
        found.append(("expanded", unequal_bits(comm.all_gather_single(same, algorithm=algorithm), ones)))
    comm.close()
    return [entry for entry in found if entry[1]]


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(1, ""), (2, "cpu:push"), (3, "cpu:pull"), (2, "triton:push"), (2, "torch")]
)
def test_inputs_and_results_may_lie_anyhow(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _layouts, algorithm) == [[]] * world_size


def _roots_alone(member):
    """What a rank without a result gives as `out` is neither looked at nor written."""
    comm, rank, world = member.communicator(), member.rank, member.world_size
    x = torch.full((2, 3), float(rank))
    for root in range(world):
        want = torch.cat([torch.full((2, 3), float(r)) for r in range(world)])
        out = torch.zeros_like(want) if rank == root else torch.full((9,), -1.0)
        got = comm.gather(x, root, out=out)
        assert got is (out if rank == root else None)
        assert out.equal(want if rank == root else torch.full((9,), -1.0))
        assert comm.gather(x, root, out=out if rank == root else x).equal(want) if rank == root else True
        if rank != root:
            assert comm.gather(x, root, out=x, async_op=True).wait() is None
        assert x.eq(rank).all()
    comm.close()


def test_only_the_root_of_a_gather_needs_memory_for_it(on_ranks):
    on_ranks(3, _roots_alone)


def _in_place(member):
    comm, told = member.communicator(), []
    x = torch.arange(4.0)
    whole = torch.zeros(8)
    for call in (
        lambda: comm.all_gather_single(x, out=whole.view(torch.float64)),
        lambda: comm.all_gather_single(whole[:4], out=whole),
        lambda: comm.all_gatherv(x, [4, 4], out=x),
        lambda: comm.all_gatherv(whole[4:], [4, 4], out=whole),
        lambda: comm.all_gather_single(torch.zeros(4, 2), dim=1, out=torch.zeros(4).expand(4, 4)),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        told.append(str(caught.value).partition(" of ")[2])
    comm.barrier()
    comm.close()
    return told


def test_what_cannot_lie_in_one_place_is_refused(on_ranks):
    overlaps = "overlaps the input without being the input; give other memory"
    assert (
        on_ranks(2, _in_place)
        == [
            [
                "all_gather_single is float64 [4] on cpu; needed float32 [8] on cpu",
                f"all_gather_single {overlaps}",
                "all_gatherv is float32 [4] on cpu; needed float32 [8] on cpu",
                f"all_gatherv {overlaps}",
                "all_gather_single has several elements in one place; give memory of its own to each",
            ]
        ]
        * 2
    )


LISTED = (torch.uint8, torch.bool, torch.float8_e5m2, torch.bfloat16, torch.float32, torch.complex128)


def _listed(sizes, row, dim, rank):
    """A tensor of each dtype; rows of an odd number of bytes among them."""
    shape = (*row[:dim], sizes[rank], *row[dim:])
    return [random_bytes(100 * rank + i, shape, dtype) for i, dtype in enumerate(LISTED)]


def _lists(member, algorithm):
    comm, rank, world, found = group_for(member, algorithm), member.rank, member.world_size, []
    rows = [((3,), 1), ((), 0), ((3,), 0), ((0, 1), 1)]
    few = slice(0, 1) if algorithm.startswith("triton") else slice(None)
    for sizes, (row, dim) in itertools.product(sizes_for(world)[few], rows[few]):
        every = [_listed(sizes, row, dim, r) for r in range(world)]
        want = [torch.cat(xs, dim) for xs in zip(*every, strict=True)]
        outs = [torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 1] for x in want]
        options = {"dim": dim, "algorithm": algorithm}
        known = comm.all_gatherv(every[rank], sizes, **options)
        asked = comm.all_gatherv(tuple(every[rank]), **options)
        assert comm.all_gatherv(every[rank], sizes, out=outs, async_op=True, **options).wait() is not None
        for results in (known, asked, outs):
            found += [unequal_bits(got, w) for got, w in zip(results, want, strict=True)]
    assert comm.all_gatherv([torch.ones(3, 2), torch.ones(4, 3, 5)], dim=-2)[1].shape == (4, 3 * world, 5)
    comm.close()
    return join(found)


@pytest.mark.parametrize(
    ("world_size", "algorithm"),
    [(1, ""), (2, "cpu:pull"), (3, "cpu:push"), (4, "cpu:pull"), (2, "torch"), (2, "triton:pull")],
)
def test_tensors_of_mixed_dtypes_and_odd_lengths_travel_together(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _lists, algorithm) == [[]] * world_size


def _many(member):
    """So many tensors that no description holds them all."""
    comm, world = member.communicator(), member.world_size
    xs = [torch.full((member.rank + 1, 1 + i % 7), i) for i in range(150)]
    rows = world * (world + 1) // 2
    for _ in range(2):
        got = comm.all_gatherv(xs)
        assert [x.shape for x in got] == [(rows, 1 + i % 7) for i in range(150)]
        assert all(x.eq(i).all() for i, x in enumerate(got))
    xs[member.rank] = xs[member.rank].float()
    with pytest.raises(CollectiveMismatchError):
        comm.all_gatherv(xs)
    comm.barrier()
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_tensors_find_out_their_rows(on_ranks, world_size):
    on_ranks(world_size, _many)


def _different_lists(member):
    """Lists that fill as many bytes, of other tensors: a mismatch, and not one taken for the other."""
    comm, told = member.communicator(), []
    pairs = [
        ([(2, 2), (2, 6)], [(2, 6), (2, 2)], torch.float32),
        ([(2, 2), (2, 2)], [(2, 2), (2, 2)], torch.int32),
    ]
    for usual, unusual, dtype in pairs:
        shapes = unusual if member.rank == 1 else usual
        xs = [torch.ones(shape, dtype=dtype if member.rank == 1 else torch.float32) for shape in shapes]
        for call in (lambda xs=xs: comm.all_gatherv(xs, [2, 2]), lambda xs=xs: comm.all_gatherv(xs)):
            with pytest.raises(CollectiveMismatchError) as caught:
                call()
            told.append(str(caught.value).splitlines()[1 + member.rank])
        comm.barrier()
    comm.close()
    return told


def test_lists_that_differ_are_told_apart(on_ranks):
    told = on_ranks(2, _different_lists)
    assert [line.startswith("  rank 0: all_gatherv") for line in told[0]] == [True] * 4


def _wrong(comm):
    x = torch.ones(4, 2)
    return [
        (([], [2, 2]), {}, "all_gatherv takes one tensor or several, and at least one"),
        ((x,), {"out": x}, "all_gatherv cannot check out= without sizes=; give both, or neither"),
        ((None, [4, 4]), {}, "all_gatherv takes a torch.Tensor, not NoneType"),
        (([x, 3], [4, 4]), {}, "all_gatherv takes a torch.Tensor, not int"),
        ((torch.tensor(1.0),), {}, "all_gatherv of a 0-d tensor has no dimension to go along; reshape(1)"),
        ((x,), {"dim": 2}, "dim=2 of all_gatherv: a tensor of shape [4, 2] has dimensions -2 to 1"),
        ((x,), {"dim": "0"}, "dim='0' of all_gatherv is no integer"),
        ((x, [4]), {}, "sizes of all_gatherv has 1 entries; needed one for each of 2 ranks"),
        ((x, [4, -4]), {}, "sizes of all_gatherv=[4, -4] has a negative entry"),
        ((x, [3, 4]), {}, "all_gatherv on rank 0: tensors have [4] rows, needed 3 of each"),
        (([x, x[:3]],), {}, "all_gatherv on rank 0: tensors have [4, 3] rows, needed 4 of each"),
        (([x, x], [4, 4]), {"out": [x]}, "out= of all_gatherv has 1 tensors; needed one for each of 2"),
        (
            ([x], [4, 4]),
            {"out": [x]},
            "out= of all_gatherv is float32 [4, 2] on cpu; needed float32 [8, 2] on cpu",
        ),
    ]


def _refuses(member):
    comm = member.communicator()
    for args, options, told in _wrong(comm) if member.rank == 0 else ():
        with pytest.raises(ConfigError) as caught:
            comm.all_gatherv(*args, **options)
        assert str(caught.value) == told
    assert comm.all_gatherv(torch.ones(member.rank + 1)).tolist() == [1.0] * 3
    comm.close()


def test_wrong_lists_and_sizes_on_one_rank_send_nothing(on_ranks):
    on_ranks(2, _refuses)
