import time
import types

import pytest
import torch

from tcomm.groups.parallel.coordinator import GroupCoordinator
from tests.groups.parallel.engine import coordinator, numbers, refusal


def _reducing(member):
    rank = member.rank
    with coordinator(member) as group:
        x = numbers(4, 6, 2, 8, offset=100.0 * rank)
        before = x.clone()
        total = group.all_reduce(x)
        want = numbers(4, 6, 2, 8) * 2 + 100.0
        assert torch.equal(total, want)
        assert torch.equal(x, before), "the input stays"
        for dim in range(-4, 4):
            chunk = group.reduce_scatter(x, dim)
            assert torch.equal(chunk, want.chunk(2, dim)[rank]), dim
            sizes = [want.shape[dim] - 1, 1]
            part = group.reduce_scatterv(x, dim, sizes)
            assert torch.equal(part, want.split(sizes, dim)[rank]), dim
        output = torch.empty(2, 6, 2, 8)
        assert group.reduce_scatterv_into_output(x, output, 0, [2, 2]) is output
        assert torch.equal(output, want.chunk(2, 0)[rank])
        assert torch.equal(x, before)
        assert torch.equal(group.all_reduce(x.transpose(0, 3)), want.transpose(0, 3)), "any stride"
        small = torch.ones(3)
        assert group.cpu_all_reduce_(small) is small
        assert small.tolist() == [2.0, 2.0, 2.0]


def test_reducing_along_every_dim_leaves_the_input(on_ranks):
    on_ranks(2, _reducing)


def _moving(member):
    rank = member.rank
    with coordinator(member) as group:
        x = numbers(2, 3, 4, offset=100.0 * rank)
        for dim in range(-3, 3):
            want = torch.cat([numbers(2, 3, 4), numbers(2, 3, 4, offset=100.0)], dim)
            assert torch.equal(group.all_gather(x, dim), want)
            gathered = group.gather(x, 1, dim)
            assert gathered is None if rank == 0 else torch.equal(gathered, want)
        assert group.all_gather(torch.empty(0, 3)).shape == (0, 6)
        rows = [3, 0]
        mine = numbers(rows[rank], 2), torch.ones(rows[rank], 1, dtype=torch.int32)
        first, second = group.all_gatherv(list(mine), sizes=rows)
        assert torch.equal(first, numbers(3, 2))
        assert second.tolist() == [[1]] * 3
        y = numbers(2, 2, offset=rank).t()
        assert group.broadcast(y, 1) is y
        assert torch.equal(y, numbers(2, 2, offset=1.0).t()), "by meaning, whatever the stride"
        if rank == 0:
            group.send(x[:, 1])
            assert torch.equal(
                group.recv(torch.Size([2, 4]), torch.float32), numbers(2, 3, 4, offset=100.0)[:, 1]
            )
        else:
            got = group.recv(torch.Size([2, 4]), torch.float32, 0)
            assert torch.equal(got, numbers(2, 3, 4)[:, 1])
            group.send(x[:, 1], 0)
        if rank == 1:
            time.sleep(0.1)
            member.store.set("here", b"")
        group.barrier()
        assert member.store.check(["here"]), "rank 1 has come"


def test_moving_along_every_dim(on_ranks):
    on_ranks(2, _moving)


def _mistakes(member):
    with coordinator(member) as group:
        x = torch.ones(2, 3)
        for verb in (group.all_gather, group.reduce_scatter):
            kind, text = refusal(verb, x, 2)
            assert kind == "UsageError"
            assert text.startswith("Invalid dim (2) for input tensor with shape torch.Size([2, 3])")
        assert refusal(group.gather, x, 0, -3)[0] == "UsageError"
        assert refusal(group.all_gather, torch.tensor(1.0))[0] == "UsageError", (
            "no dim of a 0-d tensor is valid"
        )
        for src in (-1, 2, True):
            kind, text = refusal(group.broadcast, x, src)
            assert kind == "UsageError"
            assert text.startswith(f"Invalid src rank ({src})")
        assert refusal(group.gather, x, 5)[1].startswith("Invalid dst rank (5)")
        assert refusal(group.send, x, 9)[1].startswith("Invalid dst rank (9)")
        assert refusal(group.reduce_scatter, torch.ones(3, 3), 0)[0] == "UsageError"
        kind, text = refusal(group.all_gatherv, x, 0, [1, 1])
        assert kind == "UsageError"
        assert "[2, 3] != 1" in text
        _check_refusals(group, x)
        assert refusal(group.reduce_scatterv, x, 0, [True, True])[0] == "UsageError"
        assert refusal(group.reduce_scatterv_into_output, x, torch.ones(9), 0)[0] == "ConfigError"
        # Nothing of this has put the ranks out of step.
        assert group.all_reduce(x).sum().item() == 12.0


def test_mistakes_are_told_before_anything_is_sent(on_ranks):
    on_ranks(2, _mistakes)


def _check_refusals(group, x):
    """What is refused in a group of any size, with errors that are ours and before anything is sent."""
    along = group.all_gather, group.all_gatherv, group.reduce_scatter, group.reduce_scatterv
    for wrong in (None, 1.0, "x", [1], x.to_sparse()):
        for call in (
            *along,
            group.all_reduce,
            group.gather,
            group.broadcast,
            group.send,
            group.cpu_all_reduce_,
        ):
            assert refusal(call, wrong)[0] == "ConfigError", (call.__name__, wrong)
    for dim in (None, "x", [0], True, 1.5, 7):
        for call in (*along, lambda x, dim: group.gather(x, 0, dim)):
            assert refusal(call, x, dim)[0] == "UsageError", dim
            assert refusal(call, x, dim)[1].startswith(f"Invalid dim ({dim})"), dim
    assert refusal(group.gather, x, None)[1].startswith("Invalid dst rank (None)")
    assert refusal(group.broadcast, x, "x")[1].startswith("Invalid src rank (x)")
    for sizes in ([99] * group.world_size, 5, "ab", [None] * group.world_size, [1, 2, 3]):
        for call in (group.all_gatherv, group.reduce_scatterv):
            assert refusal(call, x, 0, sizes)[0] == "UsageError", sizes
        assert refusal(group.reduce_scatterv_into_output, x, x.clone(), 0, sizes)[0] == "UsageError"
    assert refusal(group.reduce_scatterv_into_output, x, None, 0)[0] == "ConfigError"
    for size, dtype in ((None, x.dtype), ((1.5,), x.dtype), ((-1,), x.dtype), (3, x.dtype), ((1,), None)):
        assert refusal(group.recv, size, dtype)[0] == "ConfigError", (size, dtype)
    assert refusal(group.recv, (1,), x.dtype, 9)[1].startswith("Invalid src rank (9)")


def _alone(member):
    with coordinator(member) as group:
        assert group.device_communicator is None
        x = numbers(2, 3)
        assert group.all_reduce(x) is x
        assert group.all_gather(x) is x
        assert group.reduce_scatter(x, 0) is x
        assert group.all_gatherv(x, sizes=[2]) is x
        assert group.reduce_scatterv(x, 0, [2]) is x
        assert group.gather(x) is x
        assert group.broadcast(x) is x
        assert group.cpu_all_reduce_(x) is x
        group.barrier()
        out = torch.empty(2, 3)
        assert group.reduce_scatterv_into_output(x, out, 0) is out
        assert torch.equal(out, x)
        group.send(x)
        group.send(x + 1)
        x.zero_()
        assert torch.equal(group.recv(torch.Size([2, 3]), torch.float32), numbers(2, 3))
        assert torch.equal(group.recv(torch.Size([2, 3]), torch.float32), numbers(2, 3) + 1)
        assert refusal(group.recv, torch.Size([1]), torch.float32)[0] == "ConfigError"
        x = torch.ones(1, 4)
        _check_refusals(group, x)
        for out in (torch.zeros(3, 4), torch.zeros(1, 4, dtype=torch.int32)):
            kind, text = refusal(group.reduce_scatterv_into_output, x, out, 0)
            assert kind == "ConfigError", "nothing is broadcast or converted"
            assert "needed float32 [1, 4]" in text
            assert not out.any()
        assert torch.compile(lambda x: group.all_gather(group.all_reduce(x), 1), backend="eager")(x) is x
        hidden, logits, extra = torch.ones(2, 4), torch.zeros(2, 3), torch.ones(2)
        assert group.dispatch(hidden, logits) == (hidden, logits)
        assert group.dispatch(hidden, logits, False, [extra])[2] == [extra]
        assert group.dispatch(hidden, logits, extra, extra_tensors=[])[2:] == (extra, [])
        assert group.dispatch_router_logits(hidden, logits) == (hidden, logits)
        assert group.combine(hidden) is hidden
        assert group.allocate_combine_input([2, 4], torch.float32, torch.device("cpu")) is None
        into = torch.zeros(2, 4)
        assert group.combine_into_output(hidden, into) is into
        assert into.sum().item() == 8.0


def test_a_group_of_one_gives_back_what_it_got(on_ranks):
    on_ranks(1, _alone)


def test_what_combines_without_a_copy_is_the_device_communicators():
    group = GroupCoordinator.__new__(GroupCoordinator)
    memory = torch.empty(2, 4)
    group.device_communicator = types.SimpleNamespace(allocate_combine_input=lambda *args: (args, memory))
    asked = [2, 4], torch.float32, torch.device("cpu"), True
    assert group.allocate_combine_input(*asked) == (asked, memory)


def _destroyed(member, rows):
    with coordinator(member, rows=rows) as group:
        group.destroy()
        x = torch.ones(2, 2)
        calls = {
            "one tensor": [(call, x) for call in (group.all_reduce, group.all_gather, group.all_gatherv)],
            "more": [(call, x) for call in (group.reduce_scatter, group.reduce_scatterv, group.gather)],
            "in place": [(call, x) for call in (group.broadcast, group.cpu_all_reduce_)],
            "to another": [(group.send, x), (group.recv, (1,), x.dtype), (group.barrier,)],
            "experts": [(group.dispatch, x, x), (group.dispatch_router_logits, x, x), (group.combine, x)],
            "output": [(group.reduce_scatterv_into_output, x, x), (group.combine_into_output, x, x)],
        }
        said = {refusal(call, *args) for row in calls.values() for call, *args in row}
        return said, group.unique_name


@pytest.mark.parametrize("rows", [[[0, 1]], [[0], [1]]])
def test_a_destroyed_group_says_so(on_ranks, rows):
    for said, name in on_ranks(2, _destroyed, rows):
        assert said == {("ConfigError", f"Group {name} is destroyed.")}


def _without_device(member):
    with coordinator(member, with_device=False) as group:
        x = torch.ones(2)
        for call in (group.all_reduce, group.all_gather, group.reduce_scatter, group.send):
            kind, text = refusal(call, x)
            assert kind == "ConfigError"
            assert text.startswith("No device communicator found")
        y = torch.full((2,), float(member.rank))
        assert group.broadcast(y, 1).tolist() == [1.0, 1.0]
        assert group.combine(x) is x


def test_without_a_device_communicator(on_ranks):
    on_ranks(2, _without_device)


@pytest.mark.parametrize("use_kernels", [True, False])
def test_kernels_can_be_turned_off(on_ranks, use_kernels):
    for engine in on_ranks(2, _engine_of, use_kernels):
        assert (engine == "torch") is not use_kernels


def _engine_of(member, use_kernels):
    with coordinator(member, use_kernels=use_kernels) as group:
        assert group.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
        return group.device_communicator.explain("all_reduce", nbytes=16).engine
