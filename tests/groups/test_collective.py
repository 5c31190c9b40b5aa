"""What all verbs share: order, kept plans, pieces, refusals that cost nothing, modes of torch."""

import os
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm import reference
from tcomm.errors import ConfigError, PeerLostError
from tcomm.memory.control import Word
from tcomm.tuning.table import load_table
from tests.groups.verbs import (
    PULL_AND_PUSH,
    group_for,
    inputs_to_move,
    inputs_to_reduce,
    join,
    mistake,
    unequal_bits,
    wrong_result,
)

REDUCING = ("all_reduce", "reduce", "reduce_scatter_single", "reduce_scatterv")


def any_call(seed, world, numel=0):
    """A call of one of the verbs on random data: (verb, all inputs, arguments, options)."""
    dice = random.Random(seed)
    verb = dice.choice([*REDUCING, "all_gather_single", "all_gatherv", "gather", "broadcast", "scatter",
                        "all_to_all_single"])  # fmt: skip
    rows, row = dice.randint(0, 4), (dice.randint(0, 5) if not numel else numel // world)
    root, dim = dice.randrange(world), dice.choice([0, 1, -1, -2])
    sizes = [dice.randint(0, 3) for _ in range(world)]
    shapes = {
        "all_gatherv": [(n, row) if dim % 2 == 0 else (row, n) for n in sizes],
        "reduce_scatterv": [(sum(sizes), row) if dim % 2 == 0 else (row, sum(sizes))] * world,
    }.get(verb, [(world * rows, world * row)] * world)
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    if verb in REDUCING:
        inputs = inputs_to_reduce(seed, world, shapes[0], dice.choice(dtypes))
    else:
        inputs = inputs_to_move(seed, shapes, dice.choice([*dtypes, torch.bool, torch.complex128]))
    op = dice.choice(["sum", "max", "min"]) if verb in REDUCING else ""
    args = {
        "all_reduce": (op,),
        "reduce": (root, op),
        "reduce_scatter_single": (op,),
        "reduce_scatterv": (sizes, op),
        "all_gatherv": (sizes,) if dice.random() < 0.5 else (),
        "gather": (root,),
        "broadcast": (root,),
        "scatter": (root,),
    }.get(verb, ())
    has_dim = verb not in ("all_reduce", "reduce", "broadcast", "all_to_all_single")
    return verb, inputs, args, {"op": op} | ({"dim": dim} if has_dim else {})


def _alternating(member, seeds, numel, algorithms):
    comm, world, found = member.communicator(), member.world_size, []
    delays = random.Random(member.rank)
    for seed in seeds:
        verb, inputs, args, options = any_call(seed, world, numel)
        if delays.random() < 0.1:
            time.sleep(0.002)
        algorithm = "" if verb == "all_reduce" else algorithms[seed % len(algorithms)]
        found.append(mistake(comm, verb, inputs, *args, algorithm=algorithm, **options))
        if seed % 7 == 0:
            comm.barrier()
    comm.close()
    return join(found)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_verbs_shapes_and_dtypes_alternate_at_random(on_ranks, world_size):
    algorithms = ("", *PULL_AND_PUSH[:2])
    assert on_ranks(world_size, _alternating, range(120), 0, algorithms) == [[]] * world_size


def test_engines_alternate_at_random(on_ranks):
    assert on_ranks(2, _alternating, range(200, 216), 0, PULL_AND_PUSH) == [[]] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_larger_than_the_staging_go_in_pieces(on_ranks, world_size):
    on_ranks(world_size, _with_little_staging, range(24), 8_000)


def _with_little_staging(member, seeds, numel):
    os.environ["TCOMM_STAGING_BYTES"] = "65536"
    assert _alternating(member, seeds, numel, PULL_AND_PUSH[:2]) == []


def _ragged_with_little_staging(member, algorithm):
    """Parts of which one alone is larger than the staging, and one's own, and lists and blocks of such."""
    os.environ["TCOMM_STAGING_BYTES"] = "65536"
    comm, rank, world, found = member.communicator(), member.rank, member.world_size, []
    counts = [[9_000 if s == d else 500 * (s + 2 * d) for d in range(world)] for s in range(world)]
    rows = inputs_to_move(1, [(sum(line),) for line in counts], torch.complex64)
    want = reference.all_to_all(rows, counts)[rank]
    lengths = [7_001, *[0] * (world - 2), 30_000]
    parts = inputs_to_move(2, [(2, n) for n in lengths], torch.bfloat16)
    flags = inputs_to_move(3, [(n,) for n in lengths], torch.bool)
    inputs = inputs_to_reduce(4, world, (2, sum(lengths)), torch.float32)
    for name in (algorithm, ""):
        got = comm.all_to_all_single(rows[rank], counts[rank], algorithm=name)
        found.append(unequal_bits(got, want))
        got = comm.all_gatherv(parts[rank], dim=1, algorithm=name)
        found.append(unequal_bits(got, torch.cat(parts, 1)))
        got = comm.all_gatherv([parts[rank].t().contiguous(), flags[rank]], lengths, algorithm=name)
        found += map(unequal_bits, got, (torch.cat(parts, 1).t(), torch.cat(flags)))
        got = comm.reduce_scatterv(inputs[rank], lengths, dim=1, algorithm=name)
        found.append(wrong_result(got, reference.reduce_scatter(inputs, "sum", 1, lengths)[rank], "sum"))
    with comm.coalescing() as batch:
        got = [batch.all_reduce(inputs[rank]), batch.all_reduce(inputs[rank][0])]
    whole = reference.all_reduce(inputs)[0]
    found += [wrong_result(x, y, "sum") for x, y in zip(got, (whole, whole[0]), strict=True)]
    comm.close()
    return join(found)


@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(2, "cpu:pull"), (3, "cpu:push"), (2, "triton:pull"), (2, "triton:push")]
)
def test_ragged_messages_lists_and_blocks_go_in_pieces_too(on_ranks, world_size, algorithm):
    assert on_ranks(world_size, _ragged_with_little_staging, algorithm) == [[]] * world_size


def _later(member):
    """Handles of every verb, all under way at once, and calls between them that wait for their turn."""
    comm, rank, world = member.communicator(), member.rank, member.world_size
    x = torch.full((world, 2), float(rank))
    sizes = [1] * world
    calls = {
        "all_reduce": (x,),
        "reduce": (x, 1),
        "reduce_scatter_single": (x,),
        "reduce_scatterv": (x, sizes),
        "reduce_scatterv several": ([x, 2 * x], sizes),
        "all_gather_single": (x,),
        "all_gatherv": (x, [world] * world),
        "all_gatherv several": ([x, x.int()],),
        "gather": (x, 1),
        "broadcast": (x, 1),
        "scatter": (x, 1),
        "all_to_all_single": (x,),
        "all_to_all_single ragged": (x, sizes),
    }
    at_once = {name: getattr(comm, name.split()[0])(*args) for name, args in calls.items()}
    if rank == 0:
        time.sleep(0.1)
    works = {name: getattr(comm, name.split()[0])(*args, async_op=True) for name, args in calls.items()}
    assert not works["all_to_all_single ragged"].is_completed()
    between = comm.all_reduce(torch.ones(3), "max")
    assert all(work.is_completed() for work in works.values())
    assert between.tolist() == [1.0] * 3
    none = [name for name, work in works.items() if work.wait() is None]
    assert none == ([] if rank == 1 else ["reduce", "gather"])
    for name, work in works.items():
        pairs = (work.wait(), at_once[name])
        for later, now in zip(*pairs, strict=True) if name.endswith("several") else (pairs,):
            assert (later is None and now is None) or later.equal(now), name
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_verb_may_be_waited_for_later(on_ranks, world_size):
    on_ranks(world_size, _later)


def _epochs(member):
    comm, world = member.communicator(), member.world_size
    x, sizes, counts = torch.ones(world, 4), [1] * world, []
    words = comm._arena.channel.words
    calls = [
        lambda: comm.reduce(x, 0),
        lambda: comm.reduce_scatter_single(x, dim=0),
        lambda: comm.all_gather_single(x, dim=1),
        lambda: comm.all_gatherv([x, x.int()], [world] * world),
        lambda: comm.reduce_scatterv([x, x], sizes),
        lambda: comm.scatter(x, 0),
        comm.barrier,
        lambda: comm.all_to_all_single(x, sizes),
        lambda: comm.all_gatherv(x),
    ]
    for call in calls:
        call()
        before = words[Word.EPOCH]
        call()
        counts.append(words[Word.EPOCH] - before)
    comm.close()
    return counts


def test_a_call_is_one_epoch_and_one_more_where_the_ranks_tell_their_rows(on_ranks):
    assert on_ranks(2, _epochs) == [[1] * 7 + [2] * 2] * 2


def _written_otherwise(member):
    """The same call, written otherwise on each rank and at each turn: it is one call, and one plan each."""
    comm, rank = member.communicator(), member.rank
    x = torch.arange(4.0).view(2, 2) + rank
    total = torch.arange(4.0).view(2, 2) * 2 + 1
    roots = [1, True, np.int64(1).item()]
    for turn in range(6):
        op = ["sum", dist.ReduceOp.SUM, "SUM", dist.ReduceOp(dist.ReduceOp.SUM)][(turn + rank) % 4]
        dim = [1, -1, np.int64(1), True][(turn + rank) % 4]
        root = roots[(turn + rank) % 3]
        sizes = [[1, 1], (1, 1), [True, 1], torch.tensor([1, 1])][(turn + rank) % 4]
        assert comm.all_reduce(x, op).equal(total)
        assert comm.reduce_scatter_single(x, op, dim=dim).equal(total[:, rank : rank + 1])
        assert comm.reduce_scatterv(x, sizes, op, dim=np.array(int(dim))).equal(total[:, rank : rank + 1])
        assert comm.broadcast(x, root).equal(torch.arange(4.0).view(2, 2) + 1)
        assert comm.all_gather_single(x, dim=dim).shape == (2, 4)
        assert comm.all_gather_single(x, dim=0).shape == (4, 2)
        assert comm.all_to_all_single(x, sizes).shape == (2, 2)
    comm.close()


def test_arguments_that_mean_the_same_are_the_same_call(on_ranks):
    on_ranks(2, _written_otherwise)


def _kinds_are_kept_apart(member):
    """Plans of calls that look alike: shape, dtype, root, dim and sizes all tell them apart."""
    comm, rank = member.communicator(), member.rank
    x = torch.arange(16.0).view(4, 4) * (rank + 1)
    for _ in range(2):
        assert comm.reduce_scatter_single(x, dim=0).shape == (2, 4)
        assert comm.reduce_scatter_single(x, dim=1).shape == (4, 2)
        assert comm.reduce_scatterv(x, [3, 1], dim=1).shape == (4, 3 if rank == 0 else 1)
        assert comm.reduce_scatterv(x, [1, 3], dim=1).shape == (4, 1 if rank == 0 else 3)
        assert comm.broadcast(x, 0).equal(torch.arange(16.0).view(4, 4))
        assert comm.broadcast(x, 1).equal(torch.arange(16.0).view(4, 4) * 2)
        assert comm.broadcast(x.view(torch.int32), 1).dtype is torch.int32
        assert comm.broadcast(x.view(2, 8), 1).shape == (2, 8)
        assert (comm.gather(x, 0) is None) == (rank == 1)
        assert (comm.reduce(x, 1) is None) == (rank == 0)
    comm.close()


def test_calls_that_look_alike_are_not_taken_for_one_another(on_ranks):
    on_ranks(2, _kinds_are_kept_apart)


def _wrong(comm):
    x = torch.ones(4, 2)
    with torch.inference_mode():
        frozen = torch.ones(4, 2)
    freed = torch.ones(4, 2)
    freed.untyped_storage().resize_(0)
    needed = "needed float32 [8, 2] on cpu"
    frozen_told = "was made in inference mode and cannot be written outside of it"
    gradient = "would lose the gradient of its input; call it under torch.no_grad() or on x.detach()"
    ranks = "is not a rank of this group; ranks are 0 to 1"
    return [
        (lambda: comm.broadcast(frozen, 0, out=frozen), f"out= of broadcast {frozen_told}"),
        (lambda: comm.reduce(x.requires_grad_(), 0), f"reduce {gradient}"),
        (lambda: comm.scatter(x.detach().requires_grad_(), 0), f"scatter {gradient}"),
        (lambda: comm.all_gather_single(x.detach(), dim=0, out=x.detach()), f"out= of all_gather_single is "
         f"float32 [4, 2] on cpu; {needed}"),
        (lambda: comm.broadcast(x.detach(), 0, out=x.detach().to_sparse()),
         "broadcast takes a dense tensor, not one of layout torch.sparse_coo; call .to_dense() first"),
        (lambda: comm.broadcast(freed, 0),
         "broadcast takes a tensor with memory; that of this one was freed, or never there"),
        (lambda: comm.all_gather_single(x.detach(), out=freed),
         "all_gather_single takes a tensor with memory; that of this one was freed, or never there"),
        (lambda: comm.broadcast(x.detach(), 0, out=[1]), "broadcast takes a torch.Tensor, not list"),
        (lambda: comm.broadcast(x.detach(), 2), f"root=2 of broadcast {ranks}"),
        (lambda: comm.gather(x.detach(), "0"), f"root='0' of gather {ranks}"),
        (lambda: comm.scatter(x.detach(), -1), f"root=-1 of scatter {ranks}"),
        (lambda: comm.scatter(x.detach()[:3], 1), "scatter of [3, 2]: 3 along dim 0 does not divide by 2 "
         "ranks; nothing is padded, so pad it or give sizes to the variable form"),
        (lambda: comm.gather(x.detach(), 0, dim=-3),
         "dim=-3 of gather: a tensor of shape [4, 2] has dimensions -2 to 1"),
        (lambda: comm.all_gather_single(x.detach(), dim=None), "dim=None of all_gather_single is no integer"),
        (lambda: comm.reduce(torch.ones(2).int(), 0, "avg"),
         "the average of torch.int32 is not a torch.int32"),
        (lambda: comm.all_to_all_single(x.detach()[:3]),
         "3 rows do not divide among 2 ranks; give send_splits="),
        (lambda: comm.all_to_all_single(x.detach(), [2, 2], [1, 1], out=x.detach()),
         "out= of all_to_all_single is float32 [4, 2] on cpu; needed float32 [2, 2] on cpu"),
        (lambda: comm.reduce_scatter_single(x.detach(), "sum", timeout=-1),
         "timeout -1 is not a positive number of seconds"),
    ]  # fmt: skip


def _refuses_and_goes_on(member):
    comm = member.communicator()
    words = comm._arena.channel.words
    for _ in ("before any plan exists", "with plans of these kinds of calls"):
        if member.rank == 0:
            before = words[Word.EPOCH]
            for call, told in _wrong(comm):
                with pytest.raises(ConfigError) as caught:
                    call()
                assert str(caught.value) == told
            assert words[Word.EPOCH] == before
        x = torch.ones(4, 2)
        assert comm.broadcast(x, 0).equal(x)
        assert comm.reduce(x, 0) is None or member.rank == 0
        assert comm.scatter(x, 0).shape == (2, 2)
        assert comm.all_gather_single(x).shape == (8, 2)
        assert comm.reduce_scatter_single(x).eq(2).all()
    comm.close()


def test_a_wrong_argument_on_one_rank_sends_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)


def _in_inference_mode(member):
    comm, world = member.communicator(), member.world_size
    for numel in (world, 20_000 * world):
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                x = torch.full((numel, 2), float(member.rank))
                calls = [
                    comm.broadcast(x, 1, out=x),
                    comm.reduce_scatter_single(x, dim=1),
                    comm.all_gather_single(x, dim=1),
                    comm.all_to_all_single(x, out=x),
                    comm.all_gatherv([x, x])[1],
                    comm.scatter(x, 0, async_op=True).wait(),
                ]
                assert all(result.eq(result.max()).all() for result in calls)
    comm.close()


def test_modes_of_torch_may_change_between_calls_of_one_kind(on_ranks):
    on_ranks(2, _in_inference_mode)


def _saved_for_a_gradient(member):
    comm = member.communicator()
    calls = [
        lambda y: comm.all_reduce(y, out=y, algorithm="cpu:one_shot_push"),
        lambda y: comm.all_reduce(y, out=y, algorithm="cpu:two_shot"),
        lambda y: comm.all_reduce(y.t(), out=y.t(), algorithm="cpu:one_shot_pull"),
        lambda y: comm.reduce_scatter_single(torch.ones(4 * comm.world_size, 4), out=y),
        lambda y: comm.all_reduce(y, out=y, async_op=True).wait(),
    ]
    for call in calls:
        saved = torch.ones(4, 4, requires_grad=True).exp()
        with torch.no_grad():
            comm.all_reduce(saved)
            comm.reduce(saved, 0, out=torch.empty(4, 4) if comm.rank == 0 else None)
        saved.sum().backward(retain_graph=True)
        with torch.no_grad():
            call(saved)
        loss = saved.sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_autograd_is_told_of_sums_in_what_it_has_saved(on_ranks, world_size):
    on_ranks(world_size, _saved_for_a_gradient)


def _saved_indices(member):
    comm = member.communicator()
    for call in (
        lambda y: comm.all_reduce(torch.ones(4, dtype=torch.int64), out=y, algorithm="cpu:one_shot_push"),
        lambda y: comm.all_reduce(torch.ones(4, dtype=torch.int64), out=y, algorithm="cpu:two_shot"),
        lambda y: comm.reduce_scatter_single(torch.ones(4 * comm.world_size, dtype=torch.int64), out=y),
    ):
        weight, indices = torch.ones(9, requires_grad=True), torch.zeros(4, dtype=torch.int64)
        loss = (weight[indices] ** 2).sum()
        call(indices)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_autograd_is_told_of_sums_in_indices_too(on_ranks, world_size):
    on_ranks(world_size, _saved_indices)


def _interrupted_while_preparing(member):
    """A rank that breaks off before its first collective tells the others."""
    comm = member.communicator(timeout=10.0)
    if member.rank == 1:
        comm._planner.plan = _raise_keyboard_interrupt
        with pytest.raises(KeyboardInterrupt):
            comm.all_gather_single(torch.ones(4))
        member.meet("told")
        return "interrupted"
    started = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        comm.all_gather_single(torch.ones(4))
    assert time.monotonic() - started < 5.0
    member.meet("told")
    return str(caught.value)


def _raise_keyboard_interrupt(*_):
    raise KeyboardInterrupt


def test_a_rank_interrupted_before_its_plan_is_made_is_named(on_ranks):
    assert "rank 1 was interrupted in the middle of it" in on_ranks(2, _interrupted_while_preparing)[0]


def _one_algorithm_for_all(member, algorithm):
    os.environ["TCOMM_ALGORITHM"] = algorithm
    comm = group_for(member, "")
    x = torch.ones(2)
    seen = [comm.explain(verb).algorithm for verb in ("all_reduce", "broadcast", "barrier")]
    comm.barrier()
    assert comm.all_reduce(x).equal(2 * x)
    assert comm.broadcast(x, 0).equal(x)
    comm.close()
    return seen


def _by_table(family, engine):
    return load_table().pick(family, engine, 2, 0).algorithm


@pytest.mark.parametrize(
    ("algorithm", "used"),
    [
        ("cpu:two_shot", ["cpu:two_shot", _by_table("broadcast", "cpu"), "cpu:arrival"]),
        ("push", [_by_table("all_reduce", "cpu"), "cpu:push", "cpu:arrival"]),
        ("triton", [_by_table("all_reduce", "triton"), _by_table("broadcast", "triton"), "triton:arrival"]),
    ],
)
def test_the_variable_names_an_algorithm_for_the_verbs_that_have_it(on_ranks, algorithm, used):
    assert on_ranks(2, _one_algorithm_for_all, algorithm) == [used] * 2
