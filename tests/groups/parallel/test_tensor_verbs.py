import pytest
import torch

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
        group.barrier()


def test_moving_along_every_dim(on_ranks):
    on_ranks(2, _moving)


def _mistakes(member):
    with coordinator(member) as group:
        x = torch.ones(2, 3)
        for verb in (group.all_gather, group.reduce_scatter):
            assert refusal(verb, x, 2) == (
                "UsageError",
                "Invalid dim (2) for input tensor with shape torch.Size([2, 3])",
            )
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
        # Nothing of this has put the ranks out of step.
        assert group.all_reduce(x).sum().item() == 12.0


def test_mistakes_are_told_before_anything_is_sent(on_ranks):
    on_ranks(2, _mistakes)


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
