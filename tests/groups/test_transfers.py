"""broadcast, scatter, all-to-all, equal and ragged: meaning, layouts, one's own memory, splits."""

import itertools

import pytest
import torch

from tcomm import reference
from tcomm.errors import CapabilityError, CollectiveMismatchError, ConfigError
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
    unequal_bits,
)


def splits_for(world):
    """Rows from each rank to each: all different, nothing, all of it to itself, all of it to one rank."""
    return [
        [[(s + 2 * d) % (world + 1) for d in range(world)] for s in range(world)],
        [[0] * world for _ in range(world)],
        [[6 if s == d else 0 for d in range(world)] for s in range(world)],
        [[5 if d == world - 1 else 0 for d in range(world)] for _ in range(world)],
        [[4 if s == 0 else 0 for _ in range(world)] for s in range(world)],
    ]


def _ragged(comm, seed, splits, row, dtype, algorithm):
    """Ragged all-to-alls whose receivers know what comes, and whose receivers do not."""
    inputs = inputs_to_move(seed, [(sum(line), *row) for line in splits], dtype)
    want = reference.all_to_all(inputs, splits)
    receives = [line[comm.rank] for line in splits]
    out = torch.zeros(sum(receives), *row, dtype=dtype)
    for recvs, where in ((None, None), (receives, None), (receives, out)):
        yield mistake(
            comm, "all_to_all_single", inputs, splits[comm.rank], recvs, out=where,
            expected=want, algorithm=algorithm,
        )  # fmt: skip


def _meaning(member, algorithm):
    comm, world, found = group_for(member, algorithm), member.world_size, []
    how = {"algorithm": algorithm}
    few = slice(0, 1) if algorithm.startswith("triton") else slice(None)
    for seed, (dtype, row) in enumerate(kinds_to_move(algorithm)):
        inputs = inputs_to_move(seed, [(2 * world, *row)] * world, dtype)
        found += [
            mistake(comm, "broadcast", inputs, seed % world, **how),
            mistake(comm, "scatter", inputs, (seed + 1) % world, **how),
            mistake(comm, "all_to_all_single", inputs, **how),
        ]
        for splits in splits_for(world)[few]:
            found += _ragged(comm, seed, splits, row, dtype, algorithm)
    scalars = inputs_to_move(9, [()] * world, torch.float64)
    found.append(mistake(comm, "broadcast", scalars, world - 1, **how))
    comm.close()
    return join(found)


@pytest.mark.parametrize(("world_size", "algorithm"), [(1, ""), *MOVING_WORLDS])
def test_data_of_every_kind_goes_where_it_belongs(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _meaning, algorithm) == [[]] * world_size


def _dims(member, algorithm):
    comm, world = group_for(member, algorithm), member.world_size
    shape = (world, 2 * world, 3 * world, world)
    inputs = inputs_to_move(1, [shape] * world, torch.int64)
    found = [
        mistake(comm, "scatter", inputs, dim % world, dim=dim, algorithm=algorithm) for dim in dims_of(shape)
    ]
    comm.close()
    return join(found)


@pytest.mark.parametrize(
    ("world_size", "algorithm"),
    [(1, ""), (2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull"), (2, "torch")],
)
def test_a_tensor_may_be_taken_apart_along_any_dimension(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _dims, algorithm) == [[]] * world_size


def _layouts(member, algorithm):
    comm, rank, world, found = group_for(member, algorithm), member.rank, member.world_size, []
    few = slice(0, 1) if algorithm.startswith("triton") else slice(None)
    for dtype in (torch.complex64, torch.float32, torch.bfloat16)[few]:
        inputs = [torch.arange(24.0).view(12, 2).to(dtype) * (r + 1) for r in range(world)]
        if dtype.is_complex:
            inputs = [x + 2j * x for x in inputs]
        even = [12 // world] * world
        for verb, args, want in (
            ("broadcast", (1,), inputs[1]),
            ("scatter", (1,), reference.scatter(inputs, 1)[rank]),
            ("all_to_all_single", (), reference.all_to_all(inputs)[rank]),
            ("all_to_all_single", (even, even), reference.all_to_all(inputs)[rank]),
        ):
            call = getattr(comm, verb)
            for name, x in odd_views(inputs[rank]).items():
                found.append((verb, name, unequal_bits(call(x, *args, algorithm=algorithm), want)))
            for name, out, memory in odd_outs(want.shape, dtype):
                got = call(inputs[rank], *args, out=out, algorithm=algorithm)
                found.append((verb, name, "" if got is out else "another tensor came back"))
                found.append((verb, name, unequal_bits(out, want)))
                if name == "gaps":
                    found.append((verb, name, "" if memory[..., 0].eq(0).all() else "written in the gaps"))
    comm.close()
    return [entry for entry in found if entry[2]]


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(2, "cpu:push"), (3, "cpu:pull"), (2, "triton:push"), (2, "torch")]
)
def test_inputs_and_results_may_lie_anyhow(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _layouts, algorithm) == [[]] * world_size


def _single_element(member, algorithm):
    """One element is contiguous whatever its stride."""
    comm, found = group_for(member, algorithm), []
    for dtype in (torch.float32, torch.complex128):
        inputs = inputs_to_move(3, [(1,)] * 2, dtype)
        (x,) = odd_views(inputs[member.rank]).values()
        assert x.is_contiguous()
        (out,) = odd_views(torch.zeros(1, dtype=dtype)).values()
        found.append(unequal_bits(comm.broadcast(x, 1, out=out, algorithm=algorithm), inputs[1]))
        found.append(unequal_bits(comm.all_gather_single(x, algorithm=algorithm), torch.cat(inputs)))
    comm.close()
    return join(found)


@pytest.mark.parametrize("algorithm", ["cpu:pull", "triton:push", "torch"])
def test_a_single_element_may_have_any_stride(on_ranks, algorithm):
    assert on_ranks(2, _single_element, algorithm) == [[]] * 2


def _in_place(member, algorithm):
    comm, rank, world = group_for(member, algorithm), member.rank, member.world_size
    for numel, root in itertools.product((world, 10_000 * world), range(world)):
        inputs = [torch.arange(numel) + 7 * r for r in range(world)]
        x = inputs[rank].clone()
        assert comm.broadcast(x, root, out=x, algorithm=algorithm) is x
        assert x.equal(inputs[root])
        x = inputs[rank].clone()
        assert comm.all_to_all_single(x, out=x, algorithm=algorithm) is x
        assert x.equal(reference.all_to_all(inputs)[rank])
    strided = torch.stack([inputs[rank], inputs[rank]], 1)[:, 0]
    comm.broadcast(strided, 0, out=strided, algorithm=algorithm)
    assert strided.equal(inputs[0])
    told, x = [], torch.arange(float(2 * world))
    for call in (
        lambda: comm.scatter(x, 0, out=x[:2], algorithm=algorithm),
        lambda: comm.all_to_all_single(x, [2] * world, [2] * world, out=x, algorithm=algorithm),
        lambda: comm.all_to_all_single(x, out=x.flip(0).view(-1)[:1].expand(2 * world), algorithm=algorithm),
        lambda: comm.broadcast(x[1:], 0, out=x[:-1], algorithm=algorithm),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        told.append(str(caught.value))
    comm.barrier()
    comm.close()
    return told


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull"), (3, "torch")]
)
def test_what_stays_in_its_place_may_be_its_own_result(on_ranks, world_size, algorithm):
    overlap = "overlaps the input without being the input; give other memory"
    parts = "is the input, and its parts do not stay where they are; give other memory"
    for told in on_ranks(world_size, _in_place, algorithm):
        assert told == [
            f"out= of scatter {overlap}",
            f"out= of all_to_all_single {parts}",
            "out= of all_to_all_single has several elements in one place; give memory of its own to each",
            f"out= of broadcast {overlap}",
        ]


def _scatter_without_input(member, algorithm):
    comm, rank, world = group_for(member, algorithm), member.rank, member.world_size
    for root, dim in itertools.product(range(world), (0, -1)):
        whole = random_bytes(5, (2 * world, 3 * world), torch.float64)
        want = whole.chunk(world, dim)[rank]
        out = torch.zeros(want.shape, dtype=torch.float64)
        x = whole if rank == root else None
        assert comm.scatter(x, root, dim=dim, out=out, algorithm=algorithm) is out
        assert unequal_bits(out, want) == ""
        if rank != root:
            with pytest.raises(ConfigError) as caught:
                comm.scatter(None, root)
            told = str(caught.value)
    with pytest.raises(ConfigError) as caught:
        comm.scatter(None, rank, out=torch.ones(2))
    assert str(caught.value) == told
    comm.barrier()
    comm.close()
    return told


@pytest.mark.parametrize("algorithm", ["cpu:pull", "triton:push", "torch"])
def test_only_the_root_of_a_scatter_needs_an_input(on_ranks, algorithm):
    told = "scatter without x: the root has to give x, and the others x or out="
    assert on_ranks(2, _scatter_without_input, algorithm) == [told] * 2


def _only_some_expect(member):
    """Who says nothing takes what comes; who says something wrong is named, with everybody who is."""
    comm, rank = member.communicator(), member.rank
    splits = [[1, 2, 3], [4, 0, 1], [2, 2, 2]]
    x = torch.full((sum(splits[rank]), 2), float(rank))
    receives = [line[rank] for line in splits]
    got = comm.all_to_all_single(x, splits[rank], receives if rank == 1 else None)
    assert got[:, 0].tolist() == [float(s) for s in range(3) for _ in range(receives[s])]
    wrong = [9, receives[1], 8] if rank == 2 else None
    with pytest.raises(CollectiveMismatchError) as caught:
        comm.all_to_all_single(x, splits[rank], wrong)
    error = caught.value
    assert comm.all_to_all_single(x, splits[rank]).shape == got.shape
    comm.close()
    return str(error), error.peers


def test_pairs_that_do_not_fit_are_named_where_only_some_ranks_expect_anything(on_ranks):
    told = (
        "all_to_all_single of group 'test': rank 0 sends 3 rows to rank 2, which expects 9; "
        "rank 2 sends 2 rows to rank 2, which expects 8"
    )
    assert on_ranks(3, _only_some_expect) == [(told, (0, 2))] * 3


def _refused_before_the_ranks_agree(member):
    """What only the choice refuses must not leave a peer behind in the middle of a call."""
    comm = member.communicator(timeout=5.0)
    x = torch.ones(3)
    calls = [
        lambda **how: comm.all_to_all_single(x, [1, 2], **how),
        lambda **how: comm.all_gatherv(x, **how),
        lambda **how: comm.all_gatherv([x, x], **how),
    ]
    for call in calls:
        for algorithm in ("two_shot", "torch"):
            if member.rank == 0:
                with pytest.raises(CapabilityError):
                    call(algorithm=algorithm)
        call()
    comm.close()


def test_an_unknown_algorithm_of_a_call_in_two_steps_leaves_nobody_waiting(on_ranks):
    on_ranks(2, _refused_before_the_ranks_agree)
