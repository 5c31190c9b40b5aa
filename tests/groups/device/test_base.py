"""Device communicators: the meaning of every method, inputs left alone, errors before peers wait."""

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import CollectiveMismatchError, ConfigError, GroupClosedError, UsageError
from tcomm.groups.device import DeviceCommunicatorBase
from tests.groups.verbs import join, unequal_bits


def _device(member, name="tp:0", **kwargs):
    if not dist.is_initialized():
        member.process_group()
    return DeviceCommunicatorBase(dist.group.WORLD, unique_name=name, timeout=20.0, **kwargs)


def _of_rank(rank, shape, dtype=torch.float64):
    """Other numbers on every rank, whose sums are exact."""
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) * (rank + 1) + rank).to(dtype)


def _odd(x):
    """x in memory that is not contiguous."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
    return wide.copy_(x)


def _raised(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    return "nothing was raised"


def _every_dim(member):
    """Every verb along every dim of a 4-D tensor, contiguous or not; inputs stay as they are."""
    device, rank, world = _device(member), member.rank, member.world_size
    found, shape = [], (4, 8, 4, 12)
    inputs = [_of_rank(r, shape) for r in range(world)]
    whole = sum(inputs)
    for x in (inputs[rank], _odd(inputs[rank])):
        before = x.clone()
        total = device.all_reduce(x)
        found += [unequal_bits(total, whole), "" if total.is_contiguous() else "not contiguous"]
        found.append("shared" if total.data_ptr() == x.data_ptr() else "")
        for dim in (*range(4), -1, -3):
            cat = torch.cat(inputs, dim)
            found.append(unequal_bits(device.all_gather(x, dim), cat))
            root = dim % world
            found.append(unequal_bits(device.gather(x, root, dim), cat if rank == root else None))
            found.append(unequal_bits(device.reduce_scatter(x, dim), total.chunk(world, dim)[rank]))
            sizes = [shape[dim] - 2] + [0] * (world - 2) + [2]
            part = total.split(sizes, dim)[rank]
            found.append(unequal_bits(device.reduce_scatterv(x, dim, sizes), part))
            out = torch.empty_like(part, memory_format=torch.contiguous_format)
            given = device.reduce_scatterv_into_output(x, out, dim, sizes)
            found.append(unequal_bits(out, part) if given is out else "another output")
        found.append(unequal_bits(x, before))
    found.append(unequal_bits(device.all_gather(inputs[rank]), torch.cat(inputs, -1)))
    found.append(unequal_bits(device.reduce_scatter(inputs[rank]), total.chunk(world, -1)[rank]))
    device.destroy()
    return join(found)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_verb_along_every_dimension(on_ranks, world_size):
    assert on_ranks(world_size, _every_dim) == [[]] * world_size


def _variable_sizes(member):
    device, rank, world = _device(member), member.rank, member.world_size
    found = []
    for sizes in ([3, 0, 5, 1][:world], [0] * world, [2] * world, None):
        rows = [2] * world if sizes is None else sizes
        kinds = ((torch.float32, (5,)), (torch.int64, ()), (torch.bfloat16, (2, 3)))
        each = [[_of_rank(r, (rows[r], *rest), dtype) for r in range(world)] for dtype, rest in kinds]
        mine = [xs[rank] for xs in each]
        got = device.all_gatherv(mine, 0, sizes)
        found += [unequal_bits(a, torch.cat(xs)) for a, xs in zip(got, each, strict=True)]
        found.append(unequal_bits(device.all_gatherv(mine[0], sizes=sizes), torch.cat(each[0])))
        along_1 = torch.cat([x.t() for x in each[0]], 1)
        found.append(unequal_bits(device.all_gatherv(mine[0].t(), 1, sizes), along_1))
        if sizes:
            x = [_of_rank(r, (sum(sizes), 3)) for r in range(world)]
            want = sum(x).split(sizes)[rank]
            found.append(unequal_bits(device.reduce_scatterv(x[rank], 0, sizes), want))
    x = [_of_rank(r, (2 * world, 3)) for r in range(world)]
    found.append(unequal_bits(device.reduce_scatterv(x[rank], 0), sum(x).chunk(world)[rank]))
    # Without sizes, each tensor of a list has a number of rows of its own.
    one, two = device.all_gatherv([torch.full((1,), rank), torch.full((2,), rank)])
    found.append(unequal_bits(one, torch.arange(world)))
    found.append(unequal_bits(two, torch.arange(world).repeat_interleave(2)))
    device.destroy()
    return join(found)


@pytest.mark.parametrize("world_size", [2, 4])
def test_variable_sizes_on_the_cpu(on_ranks, world_size):
    assert on_ranks(world_size, _variable_sizes) == [[]] * world_size


def _mistakes(member):
    """One rank alone calls wrongly, and the group is in step afterwards."""
    device, rank = _device(member), member.rank
    x, told = torch.ones(4, 6), {}
    if rank == 0:
        told["dim"] = [
            _raised(UsageError, call, x, dim=2)
            for call in (device.all_gather, device.reduce_scatter, device.gather, device.all_gatherv)
        ]
        told["0-d"] = _raised(AssertionError, device.all_gather, torch.tensor(1.0))
        told["division"] = _raised(AssertionError, device.reduce_scatter, torch.ones(3, 5), 0)
        told["rows"] = _raised(AssertionError, device.all_gatherv, x, 0, [3, 4])
        told["uniform"] = _raised(AssertionError, device.all_gatherv, x, 0, [3, 3])
        told["entries"] = _raised(AssertionError, device.all_gatherv, x, 0, [4])
        told["sum"] = _raised(AssertionError, device.reduce_scatterv, x, 0, [3, 4])
        told["dst"] = [_raised(ConfigError, device.gather, x, bad) for bad in (2, -1)]
        told["src"] = [_raised(AssertionError, device.broadcast, x, bad) for bad in (2, -1)]
        told["peers"] = [_raised(ConfigError, device.send, x, bad) for bad in (0, 7, -1)]
        told["recv"] = _raised(ConfigError, device.recv, (1,), torch.float32, 9)
        told["list"] = _raised(ConfigError, device.all_gather, [x])
        told["none"] = _raised(ConfigError, device.all_gatherv, [])
        told["output"] = _raised(ConfigError, device.reduce_scatterv_into_output, x, None, 0)
        told["gradient"] = _raised(ConfigError, device.all_reduce, x.clone().requires_grad_())
    told["unequal"] = _raised(CollectiveMismatchError, device.all_gatherv, torch.ones(rank + 1, 2))
    total = device.all_reduce(x).sum().item()
    device.destroy()
    return told, total


def test_mistakes_are_told_before_anybody_waits(on_ranks):
    (told, total), (others, other) = on_ranks(2, _mistakes)
    assert (total, other) == (48, 48)
    assert all(
        "Invalid dim (2) for input tensor with shape torch.Size([4, 6])" in text for text in told["dim"]
    )
    assert "Invalid dim (-1) for input tensor with shape torch.Size([])" in told["0-d"]
    assert "3 rows along dim 0 do not divide among 2 ranks" in told["division"]
    assert told["rows"].startswith("[4, 6] != 3: rank 0 gives all_gatherv")
    assert told["uniform"].startswith("[4, 6] != 3")
    assert "needed one for each of 2 ranks" in told["entries"]
    assert told["sum"].startswith("4 != 7: reduce_scatterv along dim 0")
    assert all("Invalid dst rank" in text and "ranks 0 to 1" in text for text in told["dst"])
    assert [text[:22] for text in told["src"]] == ["Invalid src rank (2) o", "Invalid src rank (-1) "]
    assert "this rank itself" in told["peers"][0]
    assert all("group 'tp:0' has ranks 0 to 1" in text for text in [*told["peers"][1:], told["recv"]])
    assert "takes a torch.Tensor, not list" in told["list"]
    assert "at least one" in told["none"]
    assert "takes a torch.Tensor, not NoneType" in told["output"]
    assert "would lose the gradient" in told["gradient"]
    # Without sizes the ranks must have alike; that they do not is seen by all.
    assert all("[1, 2]" in text and "[2, 2]" in text for text in (told["unequal"], others["unequal"]))


def _ring_and_broadcast(member):
    device, rank, world = _device(member), member.rank, member.world_size
    found = []
    # By default to the next, from the previous; the first rank sends first.
    x = _odd(_of_rank(rank, (3, 4)))
    if rank == 0:
        device.send(x)
    got = device.recv((3, 4), torch.float64)
    if rank != 0:
        device.send(x)
    found.append(unequal_bits(got, _of_rank((rank - 1) % world, (3, 4))))
    if rank == 1:
        device.send(torch.tensor(7), 0)
    elif rank == 0:
        found.append(unequal_bits(device.recv((), torch.int64, 1), torch.tensor(7)))
    for src in range(world):
        target = _odd(_of_rank(rank, (3, 4))).t()
        given = device.broadcast(target, src)
        found.append(unequal_bits(target, _of_rank(src, (3, 4)).t()) if given is target else "another tensor")
    found.append(unequal_bits(device.broadcast(torch.tensor([rank])), torch.tensor([0])))
    device.destroy()
    device.destroy()
    closed = _raised(GroupClosedError, device.all_reduce, torch.ones(1))
    return join([*found, "" if "closed" in closed else closed])


def test_send_recv_broadcast_and_the_end(on_ranks):
    assert on_ranks(4, _ring_and_broadcast) == [[]] * 4


def _without_kernels(member):
    """Torch does everything, and says so; the results are the same."""
    device, rank, world = _device(member, use_kernels=False), member.rank, member.world_size
    inputs = [_of_rank(r, (4, 6)) for r in range(world)]
    x, whole = inputs[rank], sum(inputs)
    found = [
        unequal_bits(device.all_reduce(x), whole),
        unequal_bits(device.all_gather(x, 1), torch.cat(inputs, 1)),
        unequal_bits(device.all_gatherv(x, 0, [4, 4]), torch.cat(inputs)),
        unequal_bits(
            device.all_gatherv([x[: rank + 1]], 0, [1, 2])[0], torch.cat([inputs[0][:1], inputs[1][:2]])
        ),
        unequal_bits(device.reduce_scatter(x, 0), whole.chunk(2)[rank]),
        unequal_bits(device.reduce_scatterv(x, 0, [1, 3]), whole.split([1, 3])[rank]),
        unequal_bits(device.gather(x, 1, 0), torch.cat(inputs) if rank else None),
        unequal_bits(device.broadcast(x.clone(), 1), inputs[1]),
    ]
    if rank == 0:
        device.send(x)
    else:
        found.append(unequal_bits(device.recv((4, 6), torch.float64), inputs[0]))
    names = [device.explain(verb).algorithm for verb in ("all_reduce", "all_gather_single", "send")]
    asked = device.explain("all_reduce", nbytes=64, dtype=torch.int64, op="max")
    told = str(asked)
    device.destroy()
    other = _device(member)
    own = other.explain("all_reduce").algorithm
    other.destroy()
    return join(found), names, told, own


def test_without_kernels_torch_does_everything(on_ranks):
    for found, names, told, own in on_ranks(2, _without_kernels):
        assert found == []
        assert names == ["torch:gloo"] * 3
        assert "all_reduce max int64, 64 bytes on 2 ranks (cpu): torch:gloo" in told
        assert "not cpu:two_shot: 'torch' was asked for" in told
        assert own.startswith("cpu:")


def _attributes(member):
    member.process_group()
    ranks = [3, 1]
    group = dist.new_group(ranks)
    if member.rank not in ranks:
        return None
    device = DeviceCommunicatorBase(group, unique_name="pp:1")
    said = device.rank, device.rank_in_group, device.world_size, device.ranks, device.global_rank
    device.destroy()
    return *said, device.global_world_size, device.unique_name, device.cpu_group is group, device.device_group


def test_ranks_of_the_group_and_of_the_world(on_ranks):
    got = on_ranks(4, _attributes)
    assert got[1] == (0, 0, 2, [1, 3], 1, 4, "pp:1", True, None)
    assert got[3] == (1, 1, 2, [1, 3], 3, 4, "pp:1", True, None)


@pytest.fixture
def alone():
    device = DeviceCommunicatorBase(None, unique_name="ep:0")
    yield device
    device.destroy()


def test_a_world_of_one_has_every_method(alone):
    x = _odd(_of_rank(0, (2, 6)))
    for got in (
        alone.all_reduce(x),
        alone.all_gather(x),
        alone.all_gatherv(x),
        alone.all_gatherv([x], 0, [2])[0],
        alone.reduce_scatter(x),
        alone.reduce_scatterv(x, 0, [2]),
        alone.gather(x),
        alone.reduce_scatterv_into_output(x, torch.empty(2, 6, dtype=x.dtype)),
    ):
        assert unequal_bits(got, x) == ""
        assert got.data_ptr() != x.data_ptr()
    assert alone.broadcast(x) is x
    with pytest.raises(UsageError, match=r"2 != 3: "):
        alone.reduce_scatterv(x, 0, [3])


def test_a_world_of_one_sends_to_itself(alone):
    x = torch.ones(2)
    alone.send(x)
    x.zero_()
    alone.send(torch.tensor([3, 4]), 0)
    with pytest.raises(CollectiveMismatchError, match="next message is float32"):
        alone.recv((2,), torch.int64)
    assert alone.recv((2,), torch.float32).tolist() == [1, 1]
    assert alone.recv([2], torch.int64, 0).tolist() == [3, 4]
    with pytest.raises(ConfigError, match="has sent nothing"):
        alone.recv((2,), torch.int64)
    with pytest.raises(ConfigError, match=r"Invalid dst rank \(1\) of send"):
        alone.send(x, 1)
    with pytest.raises(ConfigError, match=r"Invalid src rank \(1\) of recv"):
        alone.recv((2,), torch.int64, 1)


def test_destroying_forgets_what_was_not_received(alone):
    alone.send(torch.ones(2))
    alone.destroy()
    with pytest.raises(ConfigError, match="has sent nothing"):
        alone.recv((2,), torch.float32)


def test_what_exchanges_tokens_ends_with_the_communicator(alone):
    class Manager:
        ended = 0

        def destroy(self):
            self.ended += 1

    alone.all2all_manager = manager = Manager()
    alone.destroy()
    alone.destroy()
    assert (manager.ended, alone.all2all_manager) == (1, None)


def test_names_of_groups_are_compared_whole():
    for name, is_ep in [("ep:0", True), ("ep", True), ("prep:0", False), ("deep:1", False), ("", False)]:
        device = DeviceCommunicatorBase(None, unique_name=name, use_all2all=True)
        assert (device.is_ep_communicator, device.use_all2all) == (is_ep, is_ep), name
        device.destroy()


def test_what_is_not_asked_for(alone):
    assert (alone.use_all2all, alone.all2all_backend, alone.all2all_manager) == (False, None, None)
    assert alone.device == torch.device("cpu")


class FusedMoE(torch.nn.Module):
    prepared = 0

    def maybe_init_modular_kernel(self):
        self.prepared += 1


class SharedFusedMoE(FusedMoE):
    pass


class NearlyFusedMoE(FusedMoE):
    pass


def test_expert_layers_prepare_in_an_expert_group_alone(alone):
    layers = [FusedMoE(), SharedFusedMoE(), NearlyFusedMoE()]
    model = torch.nn.Sequential(layers[0], torch.nn.Sequential(*layers[1:]))
    alone.prepare_communication_buffer_for_model(model)
    assert [layer.prepared for layer in layers] == [1, 1, 0]
    other = DeviceCommunicatorBase(None, unique_name="tp:0")
    other.prepare_communication_buffer_for_model(model)
    other.destroy()
    assert [layer.prepared for layer in layers] == [1, 1, 0]
