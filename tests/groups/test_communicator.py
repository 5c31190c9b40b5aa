import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tcomm
from tcomm import reference
from tcomm.errors import CapabilityError, ConfigError
from tests.test_reference import DTYPES, difference, every_ranks_input


def _smoke(member):
    comm = member.communicator()
    x = torch.arange(10.0) + member.rank
    y = comm.all_reduce(x)
    z = comm.all_reduce(x, algorithm="triton")
    comm.close()
    assert torch.equal(y, z)
    return y.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_adds_up(on_ranks, world_size):
    expected = [world_size * i + sum(range(world_size)) for i in range(10)]
    assert on_ranks(world_size, _smoke) == [expected] * world_size


def wrong_result(member, comm, seed, shape, dtype, op="sum", **kwargs):
    """All-reduce random data; what differs from the reference, or empty."""
    inputs = every_ranks_input(seed, member.world_size, shape, dtype, special=True)
    x = inputs[member.rank].clone()
    found = difference(comm.all_reduce(x, op, **kwargs), reference.all_reduce(inputs, op)[0], op)
    return found or difference(x, inputs[member.rank])


def _every_dtype_and_size(member):
    comm, found = member.communicator(), []
    shapes = [(), (0,), (1,), (7,), (3, 5, 2), (4097,), (300_001,)]
    for seed, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        op = ["sum", "max", "min"][seed % 3]
        found.append(wrong_result(member, comm, seed, shape, dtype, op))
    comm.close()
    assert not any(found), found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_dtype_and_size_has_the_bits_of_the_reference(on_ranks, world_size):
    on_ranks(world_size, _every_dtype_and_size)


def _any_stride(member):
    comm = member.communicator()
    base = every_ranks_input(3, member.world_size, (6, 8, 10), torch.float32)
    views = {
        "transposed": lambda t: t.transpose(0, 2),
        "every other": lambda t: t[::2, 1::3, 3],
        "expanded": lambda t: t[:1].expand(4, 8, 10),
        "one column": lambda t: t[..., 4],
        "offset": lambda t: t.view(-1)[5:300],
    }
    for (name, view), algorithm in itertools.product(views.items(), ["", "triton:two_shot"]):
        expected = reference.all_reduce([view(t).contiguous() for t in base])[0]
        x = view(base[member.rank])
        result = comm.all_reduce(x, algorithm=algorithm)
        assert result.is_contiguous()
        assert difference(result, expected) == "", name
        holey = torch.full((*x.shape, 3), -1.0)
        assert (
            comm.all_reduce(x, out=holey[..., 1], algorithm=algorithm).data_ptr() == holey[..., 1].data_ptr()
        )
        assert difference(holey[..., 1], expected) == "", name
        assert holey[..., ::2].eq(-1).all(), name
    square = base[member.rank][:, :6, 0].t()
    expected = reference.all_reduce([t[:, :6, 0].t() for t in base])[0]
    assert difference(comm.all_reduce(square, out=square), expected) == ""
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_inputs_and_outputs_of_any_stride(on_ranks, world_size):
    on_ranks(world_size, _any_stride)


def _lazily_negated(member):
    comm, results = member.communicator(), []
    for algorithm in ("", "cpu:one_shot_push", "cpu:two_shot", "triton:one_shot_pull"):
        x, out = torch._neg_view(torch.tensor([1.0, 2.0])), torch._neg_view(torch.zeros(2))
        results.append(comm.all_reduce(x, algorithm=algorithm).tolist())
        results.append(comm.all_reduce(x, algorithm=algorithm, out=out).tolist())
    comm.close()
    return results


def test_lazily_negated_tensors_count_with_their_sign(on_ranks):
    assert on_ranks(2, _lazily_negated) == [[[-2.0, -4.0]] * 8] * 2


def _ops(member):
    comm = member.communicator()
    x = torch.tensor([1.0, 5.0]) * (member.rank + 1)
    given = [dist.ReduceOp.SUM, "avg", dist.ReduceOp.AVG, dist.ReduceOp.MAX, "MIN"]
    results = [comm.all_reduce(x, op).tolist() for op in given]
    comm.close()
    return results


def test_operations_may_be_torchs(on_ranks):
    assert on_ranks(2, _ops) == [[[3, 15], [1.5, 7.5], [1.5, 7.5], [2, 10], [1, 5]]] * 2


def _last_algorithm(comm):
    """What this rank put down for its peers to read at its last call."""
    channel = comm._arena.channel
    return channel.pages[comm.rank].description(channel.words[24] & 1).algorithm


def _explained(member):
    comm, used, told = member.communicator(), [], []
    for numel, algorithm in [
        (10, ""),
        (16 * 1024, ""),
        (16 * 1024 + 1, ""),
        (400_000, ""),
        (10, "cpu"),
        (10, "two_shot"),
        (10, "triton"),
        (16 * 1024 + 1, "triton"),
        (10, "triton:one_shot_ll"),
    ]:
        comm.all_reduce(torch.ones(numel), algorithm=algorithm)
        used.append(_last_algorithm(comm))
        told.append(comm.explain("all_reduce", nbytes=4 * numel, algorithm=algorithm).algorithm)
    comm.close()
    return used, told


@pytest.mark.parametrize("world_size", [2, 3])
def test_explain_names_what_is_really_used(on_ranks, world_size):
    for used, told in on_ranks(world_size, _explained):
        assert used == told
        assert {name.partition(":")[0] for name in used[:4]} == {"cpu"}
        assert used[5] == "cpu:two_shot"
        assert used[8] == "triton:one_shot_ll"


def _bad_arguments(x):
    """(arguments, the exact message); all of them wrong for `x`, float32 [4]."""
    base = torch.zeros(10)
    needed = "needed float32 [4] on cpu"
    one_of = "give one of sum, avg, max, min, product, band, bor, bxor or a torch.distributed.ReduceOp"
    overlap = "out= of all_reduce overlaps the input without being the input; give other memory"
    profiles = "default, ml_inference, batch_job, streaming"
    return [
        (([1.0],), {}, "all_reduce takes a torch.Tensor, not list"),
        (
            (torch.ones(4).to_sparse(),),
            {},
            "all_reduce takes a dense tensor, not one of layout torch.sparse_coo; call .to_dense() first",
        ),
        (
            (torch.ones(4, requires_grad=True),),
            {},
            "all_reduce would lose the gradient of its input; call it under torch.no_grad() or on x.detach()",
        ),
        ((x, "mean"), {}, f"reduce operation 'mean' is unknown; {one_of}"),
        ((x,), {"out": torch.zeros(5)}, f"out= of all_reduce is float32 [5] on cpu; {needed}"),
        (
            (x,),
            {"out": torch.zeros(4, dtype=torch.float16)},
            f"out= of all_reduce is float16 [4] on cpu; {needed}",
        ),
        ((x,), {"out": [0.0] * 4}, "all_reduce takes a torch.Tensor, not list"),
        ((base[:4],), {"out": base[2:6]}, overlap),
        ((base[:8:2],), {"out": base[2::2]}, overlap),
        ((x,), {"timeout": "abc"}, f"timeout 'abc' is neither seconds nor one of {profiles}"),
        ((x,), {"timeout": 0}, "timeout 0 is not a positive number of seconds"),
        ((x,), {"timeout": -1}, "timeout -1 is not a positive number of seconds"),
        ((x,), {"timeout": float("nan")}, "timeout nan is not a positive number of seconds"),
    ]


def _refuses_and_goes_on(member):
    comm = member.communicator()
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]) * (member.rank + 1)
    for _ in ("before any plan exists", "with the plan of this kind of call"):
        if member.rank == 0:
            for args, kwargs, message in _bad_arguments(x):
                with pytest.raises(ConfigError) as caught:
                    comm.all_reduce(*args, **kwargs)
                assert str(caught.value) == message
        assert comm.all_reduce(x).tolist() == [3, 6, 9, 12]
    comm.close()


def test_a_bad_argument_on_one_rank_sends_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)


def _output_with_gradient(member):
    """A peer must not take the data of the refused call for that of the next one."""
    comm = member.communicator()
    comm.all_reduce(torch.ones(4))
    if member.rank == 0:
        with pytest.raises(ConfigError) as caught:
            comm.all_reduce(torch.full((4,), 99.0), out=torch.zeros(4, requires_grad=True))
        assert "all_reduce would lose the gradient" in str(caught.value)
    results = [comm.all_reduce(torch.full((4,), 1.0 + turn)).tolist() for turn in range(3)]
    comm.close()
    return results


def test_an_output_that_needs_a_gradient_is_refused_before_anything_is_sent(on_ranks):
    assert on_ranks(2, _output_with_gradient) == [[[2.0] * 4, [4.0] * 4, [6.0] * 4]] * 2


def _cannot(member):
    comm, told = member.communicator(), []
    forced = [
        (torch.ones(3, dtype=torch.float64), "sum", "triton:one_shot_ll"),
        (torch.ones(3), "sum", "nccl"),
        (torch.ones(3), "sum", "torch"),
        (torch.ones(3), "product", ""),
    ]
    for x, op, algorithm in forced:
        with pytest.raises(CapabilityError) as caught:
            comm.all_reduce(x, op, algorithm=algorithm)
        told.append(str(caught.value))
    for dtype in (torch.int32, torch.uint8):
        with pytest.raises((CapabilityError, ConfigError)):
            comm.all_reduce(torch.ones(3, dtype=dtype), "avg")
    assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    comm.close()
    return told


def test_what_an_algorithm_cannot_do_is_refused_with_the_reason(on_ranks):
    for lanes, unknown, torch_, product in on_ranks(2, _cannot):
        assert "cannot do all_reduce sum of torch.float64" in lanes
        assert "torch.float64 is not among float32, float16, bfloat16, int32" in lanes
        assert unknown == (
            "algorithm 'nccl' is not known for all_reduce; give one of cpu, triton, torch, "
            "cpu:one_shot_push, cpu:one_shot_pull, cpu:two_shot, triton:one_shot_ll, triton:one_shot_push, "
            "triton:one_shot_pull, triton:two_shot, torch:none"
        )
        assert "there is no torch.distributed process group for cpu tensors behind this group" in torch_
        assert "product is not among sum, avg, max, min" in product


def _explain_refuses(member):
    comm = member.communicator()
    for call, message in [
        (lambda: comm.explain("all_reduce", nbytes=-4), "nbytes=-4 is negative"),
        (
            lambda: comm.explain("gossip", nbytes=4),
            "'gossip' is not among all_reduce, reduce, reduce_scatter_single, reduce_scatterv, "
            "all_gather_single, all_gatherv, gather, broadcast, scatter, all_to_all_single, barrier, send, "
            "recv",
        ),
        (lambda: comm.prepare(0), "max_nbytes=0 is not a positive number of bytes"),
        (lambda: comm.prepare(-1), "max_nbytes=-1 is not a positive number of bytes"),
    ]:
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == message


def test_explain_and_prepare_refuse_nonsense(on_ranks):
    on_ranks(1, _explain_refuses)


def _prepared(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(10))
    old, channel = comm._arena.staging, comm._arena.channel
    address = old.buffer.local.data_ptr()
    x = torch.ones(3_000_000) * (member.rank + 1)
    for algorithm in ("one_shot_push", "one_shot_pull"):
        assert comm.all_reduce(x, algorithm=f"cpu:{algorithm}").eq(3).all()
    old.buffer.local[-1] = 77
    comm.prepare(x.numel() * 4)
    assert comm._arena.staging is not old
    before = channel.words[24]
    assert comm.all_reduce(x, algorithm="cpu:one_shot_push").eq(3).all()
    assert channel.words[24] == before + 1
    assert (old.buffer.local.data_ptr(), int(old.buffer.local[-1])) == (address, 77)
    comm.close()


def test_prepared_staging_takes_the_message_in_one_piece_and_old_staging_stays(on_ranks):
    on_ranks(2, _prepared)


def _prepare_first(member):
    comm = member.communicator()
    comm.prepare(1000)
    comm.prepare(1)
    total = comm.all_reduce(torch.ones(5)).tolist()
    comm.close()
    return total


def test_prepare_may_come_first_and_twice(on_ranks):
    assert on_ranks(3, _prepare_first) == [[3.0] * 5] * 3


def _mesh(member):
    member.process_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ConfigError) as caught:
        tcomm.Communicator(mesh)
    with tcomm.Communicator(mesh["tp"]) as row, tcomm.Communicator(mesh["dp"]) as column:
        x = torch.tensor([10.0**member.rank])
        sums = int(row.all_reduce(x)), int(column.all_reduce(x))
        places = row.rank, row.global_ranks, column.rank, column.global_ranks
    return str(caught.value), sums, places


def test_a_group_from_one_dimension_of_a_mesh(on_ranks):
    seen = on_ranks(4, _mesh)
    assert {told for told, _, _ in seen} == {
        "a mesh of 2 dimensions ('dp', 'tp') is not one group; take one of them, as in mesh[\"tp\"]"
    }
    assert [sums for _, sums, _ in seen] == [(11, 101), (11, 1010), (1100, 101), (1100, 1010)]
    assert seen[2][2] == (0, (2, 3), 1, (0, 2))


def _on_gloo(member):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("tcomm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    member.process_group()
    comm = tcomm.Communicator()
    results = [comm.all_reduce(torch.arange(4).to(dtype)).tolist() for dtype in 3 * (torch.int8, torch.uint8)]
    results.append(comm.all_reduce(torch.arange(1, 5), "product").tolist())
    x = torch.arange(4, dtype=torch.uint8)
    results.append(comm.all_reduce(x.view(2, 2).t(), "max").tolist())
    comm.close()
    return results, [m for m in messages if "goes to" in m]


def test_what_no_algorithm_does_goes_to_gloo_and_is_logged_once_for_each_reason(on_ranks):
    for results, logged in on_ranks(2, _on_gloo):
        assert results[:6] == [[0, 2, 4, 6]] * 6
        assert results[6:] == [[1, 4, 9, 16], [[0, 2], [1, 3]]]
        assert len(logged) == len(set(logged)) == 3
        assert logged[0].startswith("group 'default_pg': all_reduce goes to torch:gloo: ")
        assert "torch.int8 is not among float32, float16, bfloat16, float64, int32, int64" in logged[0]


def _integer_average(member):
    member.process_group()
    comm = tcomm.Communicator()
    for dtype in (torch.int32, torch.int8):
        with pytest.raises((ConfigError, CapabilityError)) as caught:
            comm.all_reduce(torch.ones(4, dtype=dtype), "avg")
        assert f"the average of {dtype} is not a {dtype}" in str(caught.value)
    total = comm.all_reduce(torch.ones(4)).tolist()
    comm.close()
    return total


def test_an_average_of_integers_is_refused_with_a_process_group_too(on_ranks):
    assert on_ranks(2, _integer_average) == [[2.0] * 4] * 2
